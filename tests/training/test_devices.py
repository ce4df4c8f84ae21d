"""Devices and precisions by name."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from mmdit import MMDiT, MMDiTConfig
from tests.mmdit.tiny_mmdit import in_one_call
from tests.training.runs import config_for
from training.config import load_config
from training.devices import compiled, multiplies_bf16, pick_device, pick_precision, repeatable
from training.run import RunFolder
from training.seeds import generator_for
from training.trainer import Trainer


def test_devices(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device("auto") == torch.device(expected)
        assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        monkeypatch.setattr(torch, "get_device_module", lambda name: SimpleNamespace(is_available=lambda: False))
        with pytest.raises(ValueError, match=f"no {name.upper()} device: use cpu or auto"):
            pick_device(name)


def test_the_gpu_of_a_mac_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    mps = torch.device("mps")
    assert pick_device("mps") == mps and pick_device("auto").type == "cpu"
    assert pick_precision("auto", mps) == torch.float32 and pick_precision("bf16", mps) == torch.bfloat16


@pytest.mark.parametrize("has", [None, "_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_precisions(monkeypatch, has):
    """Asked for, it is that; left to us, bf16 where the hardware has it."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has)
    cpu, native = torch.device("cpu"), has is not None
    assert multiplies_bf16(cpu) == native
    assert pick_precision("fp32", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("auto", cpu) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("settings", [(), ("data.buckets=true",), ("training.packing=true",)])
def test_how_long_compiling_takes_is_said_before(settings, monkeypatch):
    """Once for batches of one shape, and again for further shapes."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    said, model = [], MagicMock()
    config = load_config("pixels-tiny", ["training.compile=on", *settings])
    assert compiled(model, config, torch.device("cpu"), said.append) is model
    [line] = said
    assert ("in the first steps, which may take some minutes" if settings else "in the first step, which takes") in line


@pytest.mark.parametrize(("every", "rest"), [(1, []), (2, ["compiling"])])
def test_packed_blocks_that_are_recomputed_in_part_are_said_to_run_uncompiled(every, rest):
    own = ("training.packing=true", "training.recompute=selective", f"training.recompute_every={every}")
    config, said, model = load_config("pixels-tiny", ["training.compile=on", *own]), [], MagicMock()
    assert compiled(model, config, torch.device("cpu"), said.append) is model
    first, *others = said
    assert "run uncompiled with training.packing" in first and [line.split()[0] for line in others] == rest


def test_where_one_kernel_attends_to_packed_samples_they_are_compiled(monkeypatch):
    """In half precision on CUDA, with torch's own kernel."""
    monkeypatch.setattr("mmdit.attention._has_varlen", lambda: True)
    own = ("training.compile=on", "training.packing=true", "training.recompute=selective")
    for change in ("training.precision=bf16", "training.precision=fp32", "training.attention=flex"):
        config, said, model = load_config("pixels-tiny", [*own, "training.precision=bf16", change]), [], MagicMock()
        model.transformer.config.head_dim = 64
        compiled(model, config, torch.device("cuda"), said.append)
        assert ("uncompiled" in said[0]) == (change != "training.precision=bf16")


@pytest.mark.parametrize(
    ("how", "one_call", "expected_graphs"), [("full", False, 6), ("selective", False, 3), ("selective", True, 2)]
)
def test_packed_blocks_that_are_recomputed_are_compiled_where_they_can_be(
    how, one_call, expected_graphs, tmp_path, monkeypatch
):
    """If torch compiles those of "selective" one day, the warning can go."""
    own = ("training.packing=true", f"training.recompute={how}", "training.recompute_every=2", "model.depth=2")
    config = config_for(tmp_path / "run", *own, "training.compile=on")
    trainer = Trainer(config, RunFolder.create(tmp_path / "run", config))
    batch = next(trainer.feed.batches(8, 0))

    def gradients():
        trainer.model.zero_grad()
        trainer.learner(batch, generator_for(0)).total.backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    expected = gradients()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    if one_call:
        in_one_call(monkeypatch)
        monkeypatch.setattr("training.devices.in_one_call", lambda *_: True)
    compiled(trainer.model, config, trainer.device, lambda line: None)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(gradients(), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == expected_graphs  # of each block what is before, within (nothing) and after its attention; or all


def test_blocks_and_batches_of_many_forms_stay_compiled(monkeypatch):
    """Blocks share one function, and what is beyond torch's limit of graphs for it would run uncompiled."""
    shape = MMDiTConfig(
        in_channels=4, depth=3, num_heads=2, head_dim=16, context_dim=8, pooled_dim=8, dual_attention_layers=(0,)
    )
    model = SimpleNamespace(transformer=MMDiT(shape))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    config = load_config("pixels-tiny", ["training.compile=on", "training.packing=true"])
    compiled(model, config, torch.device("cpu"), lambda line: None)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for sizes in ([8, 8], [8, 12, 16], [16, 16, 16], [12, 8, 8, 16], [24]):
            n, real = len(sizes), torch.arange(6) < torch.arange(1, 1 + len(sizes))[:, None]
            latents = [torch.randn(4, side, 8) for side in sizes]
            model.transformer(latents, torch.rand(n), torch.randn(n, 6, 8), torch.randn(n, 8), real)


def test_compiled_gradients_of_an_embedding_repeat_bit_for_bit():
    """Compiled, threads add to one table; each row here is added to by many tokens of both threads."""
    table = torch.randn(16, 256)
    ids = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 32, 256)
    step = torch.compile(lambda table: (torch.nn.functional.embedding(ids, table) * weight).sum())

    def gradient():
        given = table.clone().requires_grad_()
        step(given).backward()
        return given.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with repeatable(torch.device("cpu")):
            first = gradient()
            assert all(torch.equal(gradient(), first) for _ in range(20))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
