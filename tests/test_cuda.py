"""What a CUDA device adds: the same numbers as on the CPU, no waiting inside the samplers' loop, graphs, compiling."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mmdit import MMDiT, MMDiTConfig, TextToImage
from mmdit.lora import add_lora, lora_pairs, plain_state
from samplers import SOLVERS, Brownian, Field, RectifiedFlow, SDESolver, sample, time_grid
from samplers.solvers import make_solver
from tests.samplers.common import normal
from tests.training.runs import TRANSFUSION
from training import preset, resume, train
from training.config import apply_overrides
from training.run import RunFolder

pytestmark = pytest.mark.gpu

FLOW = RectifiedFlow()
FIXED = [solver for solver in SOLVERS.values() if solver.name != "dopri5"]  # which looks at its error, and so waits


def field(device="cuda"):
    weight = normal(8, 8).float().to(device) / 8
    return Field(lambda x_t, t: torch.tanh(x_t @ weight) * (1 + t[:, None]), FLOW)


def diffusion(solver):
    return "kl" if isinstance(solver, SDESolver) else None


def walk(solver, num_steps=5):
    """All steps of a solver as a function of x and noise: `integrate` without its look at the end."""
    ts, on = time_grid("uniform", num_steps, schedule=FLOW).tolist(), field()
    ready = make_solver(solver, FLOW, diffusion(solver)).bind(on, ts)

    def run(x, noise=None):
        state = None
        for t, t_next in pairwise(ts):
            x, _, state = ready.step(on, x, t, t_next, state, noise)
        return x

    return run


@pytest.mark.parametrize("solver", FIXED, ids=lambda solver: solver.name)
def test_no_step_waits_for_the_device(solver):
    run, x = walk(solver), torch.randn(4, 8, device="cuda")
    noise = Brownian(x) if solver.stochastic or diffusion(solver) else None
    run(x, noise)  # once, so that everything is loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "solver", [s for s in FIXED if not s.stochastic and not diffusion(s)], ids=lambda solver: solver.name
)
def test_a_cuda_graph_of_the_loop_replays_it(solver):
    run, x = walk(solver), torch.randn(4, 8, device="cuda")
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(torch.randn(4, 8, device="cuda"))
    graph.replay()
    torch.testing.assert_close(out, run(x))


@pytest.mark.parametrize("solver", FIXED, ids=lambda solver: solver.name)
def test_solvers_end_where_they_do_on_the_cpu(solver):
    def end(device):
        x = normal(4, 8).float().to(device)
        return sample(field(device), x, solver, 6, diffusion=diffusion(solver), generator=[1, 2, 3, 4]).x.cpu()

    torch.testing.assert_close(end("cuda"), end("cpu"), rtol=1e-4, atol=1e-5)


def tiny(tmp_path, name, *changes):
    out = [f"training.out={tmp_path / name}", "training.precision=fp32"]
    return apply_overrides(preset("pixels-tiny"), [*out, *changes])


def losses(run):
    return [line["loss"] for line in RunFolder.open(run).metrics() if "loss" in line]


def test_a_run_learns_as_it_does_on_the_cpu(tmp_path):
    runs = [train(tiny(tmp_path, device, f"training.device={device}")) for device in ("cpu", "cuda")]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3)
    pictures = [TextToImage.load(runs[0], device)("a red circle", seed=3)[0] for device in ("cpu", "cuda")]
    assert np.abs(np.subtract(*(np.asarray(p, dtype=float) for p in pictures))).max() <= 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_and_compiling_run_and_resume(tmp_path, optimizer):
    changes = (f"optimizer.name={optimizer}", "training.device=cuda", "training.compile=on", "training.precision=bf16")
    run = train(tiny(tmp_path, "run", *changes))
    plain = train(tiny(tmp_path, "plain", f"optimizer.name={optimizer}", "training.device=cuda"))
    assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    again = resume(run, ["training.num_steps=9"])
    assert len(losses(again)) == 9


@pytest.mark.parametrize("how", ["training.precision=bf16", "optimizer.name=muon", "training.compile=on"])
def test_weights_in_the_cpus_memory_learn_the_same(tmp_path, how):
    """Also when the run goes on."""
    there = ("parallel.strategy=fsdp", "parallel.cpu_offload=true")
    run = train(tiny(tmp_path, "run", how, *there, "training.device=cuda"))
    plain = train(tiny(tmp_path, "plain", how, "training.device=cuda"))
    assert losses(resume(run, ["training.num_steps=9"])) == pytest.approx(
        losses(resume(plain, ["training.num_steps=9"])), rel=0.01
    )


@pytest.mark.parametrize("how", ["training.attention=sdpa", "training.attention=flex", "training.recompute=full"])
def test_text_and_images_are_learnt_compiled_and_in_bf16(tmp_path, how):
    """As in float32 on the CPU; and the model writes and draws with its cache."""
    fast = (how, "training.device=cuda", "training.compile=on", "training.precision=bf16")
    run = train(tiny(tmp_path, "run", *TRANSFUSION, *fast))
    plain = train(tiny(tmp_path, "plain", *TRANSFUSION, "training.device=cpu"))
    assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    [written] = TextToImage.load(run, "cuda").generate([["a red circle"]], max_tokens=4, max_images=1)
    assert written.parts


def test_the_model_is_the_same_on_both_devices_and_in_bf16():
    shape = MMDiTConfig(depth=2, num_heads=4, head_dim=32, sample_size=16, pos_embed_max_size=16, qk_norm="rms_norm")
    for config in (shape, replace(shape, positions="rope"), replace(shape, dual_attention_layers=(0,))):
        torch.manual_seed(0)
        model = MMDiT(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        inputs = (
            torch.randn(2, config.in_channels, 16, 12),
            torch.tensor([0.2, 0.9]),
            torch.randn(2, 9, config.context_dim),
            torch.randn(2, config.pooled_dim),
            torch.arange(9) < torch.tensor([[4], [9]]),
        )
        expected = model(*inputs)
        model, inputs = model.cuda(), tuple(x.cuda() for x in inputs)
        torch.testing.assert_close(model(*inputs).cpu(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.compile(model)(*inputs).cpu(), expected, rtol=1e-3, atol=1e-4)
        with torch.autocast("cuda", torch.bfloat16):
            error = (model(*inputs).float().cpu() - expected).norm() / expected.norm()
        assert error < 0.02


def test_adapters_are_merged_in_the_cpus_memory_to_be_written():
    model = MMDiT(MMDiTConfig(depth=1, num_heads=2, head_dim=16, context_dim=32, pooled_dim=32)).cuda()
    add_lora(model, 2)
    state = plain_state(model)
    assert {name for name, x in state.items() if not x.is_cuda} == {f"{name}.weight" for name in lora_pairs(model)}
