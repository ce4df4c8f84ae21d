"""Speed on one CUDA GPU beside diffusers: forward, training step, attention, sampling.

    python -m benchmarks.gpu --out benchmarks/results/gpu.md        (or: make bench-gpu)

Both models have the shape of SD3.5 without dual attention at depth d = heads, the same weights, 333 text tokens (77 of
CLIP, 256 of T5), bf16 by autocast over fp32 weights, blocks compiled one by one. A training step is forward,
backward, fused AdamW and the moving average. FLOPs are counted by torch's own counter over matrix products and
attention, so MFU leaves out everything else; its peak is the datasheet's for dense bf16. Times are medians of
seven runs, of five by turns in sampling.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.beside_diffusers import call_ours, call_theirs, inputs, ours, theirs
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from samplers import Field, RectifiedFlow, cfg_batched, sample, shift_time, uniform
from training.ema import update_ema

TEXT = 333
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, NVIDIA's datasheets of the SXM modules
# depth, latent side in tokens, pictures a step
SHAPES = ((14, 16, 64), (24, 16, 24), (24, 32, 12))


def config(depth: int) -> MMDiTConfig:
    return MMDiTConfig(depth=depth, num_heads=depth, qk_norm="rms_norm", sample_size=64, pos_embed_max_size=64)


seconds = partial(timing.seconds, cuda=True)


def bf16() -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16)


def training_step(model: nn.Module, call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Callable[[], None]:
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.randn_like(given[0])

    def step() -> None:
        with bf16():
            v = call(model, *given)
        F.mse_loss(v.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, 0.999, 10_000)

    return step


def compiled(model: nn.Module, blocks: str) -> nn.Module:
    for block in getattr(model, blocks):
        block.compile()
    return model


def models(depth: int) -> list[tuple[str, Callable[[], nn.Module], Callable[..., Tensor]]]:
    """Name, maker and call of the two; made one at a time where both with their optimisers do not fit."""
    torch.manual_seed(0)
    state = {name: value.cpu() for name, value in ours(config(depth), "cuda").state_dict().items()}

    def first() -> nn.Module:
        model = ours(config(depth), "cuda")
        model.load_state_dict(state)
        return model

    return [
        ("ours", lambda: compiled(first(), "blocks"), call_ours),
        ("diffusers", lambda: compiled(theirs(first()), "transformer_blocks"), call_theirs),  # type: ignore[arg-type]
    ]


def flops(depth: int, side: int) -> int:
    """FLOPs of one picture's forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = MMDiT(config(depth))
        x, t, context, pooled = (part.to("meta") for part in inputs(model.config, side, 1, TEXT))
        model(x, t, context, pooled).sum().backward()
    return counter.get_total_flops()


def measure(model: nn.Module, call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[float, float]:
    """Seconds of the forward alone and of the training step."""

    def forward() -> None:
        with torch.no_grad(), bf16():
            call(model, *given)

    step = training_step(model, call, given)
    return seconds({"forward": forward})["forward"], seconds({"step": step})["step"]


def training(peak: float) -> list[str]:
    """Forward and training step of each shape."""
    lines = [
        "| parameters | image tokens | batch | | forward, ms | step, ms | pictures/s | MFU of the step | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for depth, side, batch in SHAPES:
        with torch.device("meta"):
            size = sum(p.numel() for p in MMDiT(config(depth)).parameters()) / 1e9
        work = batch * flops(depth, side)
        for name, make, call in models(depth):
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                forward, step = measure(make(), call, inputs(config(depth), side, batch, TEXT, "cuda"))
                memory = torch.cuda.max_memory_allocated() / 1e9
                cells = f"{forward * 1e3:.1f} | {step * 1e3:.1f} | {batch / step:.0f} | {work / step / peak:.1%}"
                cells += f" | {memory:.1f}"
            except torch.OutOfMemoryError:
                cells = "out of memory | | | |"
            lines.append(f"| {size:.2f} B | {side * side} | {batch} | {name} | {cells} |")
            print(lines[-1], flush=True)
    return lines


def attention() -> list[str]:
    """One joint attention, forward and backward, by each kernel; and what a mask of padded text costs."""
    lines = ["| kernel | without mask, ms | with the mask of padded text, ms |", "|---|---|---|"]
    q, k, v = (torch.randn(8, 24, 1024 + TEXT, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = (torch.arange(1024 + TEXT, device="cuda") < 1024 + 60).expand(8, 1, 1, -1)
    for part in (q, k, v):
        part.requires_grad_()

    def run(given: Tensor | None) -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=given).sum().backward()

    kinds = {
        "torch's choice": list(SDPBackend.__members__.values())[1:],
        "flash": [SDPBackend.FLASH_ATTENTION],
        "cuDNN": [SDPBackend.CUDNN_ATTENTION],
        "memory-efficient": [SDPBackend.EFFICIENT_ATTENTION],
        "formula": [SDPBackend.MATH],
    }
    for name, backends in kinds.items():
        cells = []
        for given in (None, mask):
            try:
                with sdpa_kernel(backends):
                    cells.append(f"{seconds({name: lambda: run(given)})[name] * 1e3:.2f}")  # noqa: B023
            except RuntimeError:
                cells.append("cannot")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


@torch.no_grad()
def sampling() -> list[str]:
    """28 guided Euler steps of the 2 B model at 1024 image tokens, all in bf16; the last pictures are compared."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    (_, make, _), (_, make_other, _) = models(24)
    lines = ["| pictures | ours, s | diffusers, s | difference of the latents |", "|---|---|---|---|"]
    model, other = make().bfloat16(), make_other().bfloat16()
    for batch in (1, 4):
        x, _, context, pooled = (part.bfloat16() for part in inputs(config(24), 32, batch, TEXT, "cuda"))
        both = [torch.cat([part, torch.zeros_like(part)]) for part in (context, pooled)]

        def by_us() -> Tensor:
            flow = RectifiedFlow()
            cond = Field(lambda x_t, t: model(x_t, t.bfloat16(), context, pooled), flow)  # noqa: B023
            pair = Field(lambda x_t, t: model(x_t, t.bfloat16(), *both), flow)  # noqa: B023
            return sample(cfg_batched(cond, pair, 4.0), x, "euler", grid=shift_time(uniform(28), 3.0)).x  # noqa: B023

        def by_them() -> Tensor:
            scheduler, state = FlowMatchEulerDiscreteScheduler(shift=1.0), x  # noqa: B023
            scheduler.set_timesteps(sigmas=shift_time(uniform(28), 3.0)[:-1].tolist(), device="cuda")
            for t in scheduler.timesteps:
                times = t.expand(2 * batch).bfloat16()  # noqa: B023
                v_cond, v_null = other(torch.cat([state] * 2), *both, times, return_dict=False)[0].chunk(2)  # noqa: B023
                state = scheduler.step(v_null + 4.0 * (v_cond - v_null), t, state, return_dict=False)[0]
            return state

        times = seconds({"ours": by_us, "theirs": by_them}, repeats=5, warm=1)
        difference = (by_us() - by_them()).float().norm() / by_us().float().norm()
        lines.append(f"| {batch} | {times['ours']:.3f} | {times['theirs']:.3f} | {difference:.1e} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures one")
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAKS.items() if key in name), float("nan"))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / seconds({"matmul": lambda: a @ b})["matmul"]
    about = (
        f"`python -m benchmarks.gpu`, {name}, torch {torch.__version__}. Peak {peak / 1e12:.0f} TFLOP/s (dense bf16); "
        f"a matrix product of 8192 reaches {matmul / 1e12:.0f}.\n\n{str(__doc__).split(chr(10) * 2, 2)[2]}"
    )
    print(about)
    sections = {"Attention": attention(), "Sampling": sampling(), "Training": training(peak)}
    text = "\n\n".join([f"# On one GPU\n\n{about}", *(f"## {k}\n\n" + "\n".join(v) for k, v in sections.items())])
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
