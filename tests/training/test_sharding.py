"""What is computed again, and what a sharded model holds; the processes: test_parallel.py, test_distributed.py."""

import gc
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Shard, distribute_tensor

import training
from tests.training.runs import TRANSFUSION, config_for, metrics
from training.checkpoint import list_checkpoints, read_checkpoint
from training.config import ConfigError, load_config
from training.parallel import (
    ALONE,
    Ranks,
)
from training.precision import autocast
from training.run import RunFolder
from training.seeds import generator_for
from training.sharded_checkpoint import read_sharded, save_sharded
from training.sharding import (
    check_parallel,
    gradient_sync,
    kept_ops,
    local,
    mesh_of,
    replicated,
    strategy,
    unsharded,
)
from training.trainer import Trainer


def step(out, *overrides) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept for the backward pass of a step, and its gradients."""
    config = config_for(out, "training.batch_size=4", *overrides)
    trainer = Trainer(config, RunFolder.create(out, config))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batch, _ = trainer.learner.objective.prepared(trainer.model, next(trainer.feed.batches(4, 0)), generator_for(0))
    gc.collect()  # else what an earlier step has left is freed within the profile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as memory:
        loss = trainer.learner(batch, generator_for(1)).total
    loss.backward()
    kept = sum(event.self_cpu_memory_usage for event in memory.key_averages())
    return kept, [p.grad for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("model", [(), ("training.packing=true",), TRANSFUSION], ids=["image", "packed", "mixed"])
def test_recomputing_keeps_less_and_changes_nothing(model, tmp_path):
    how = {
        "none": (),
        "selective": ("training.recompute=selective",),
        "half": ("training.recompute=full", "training.recompute_every=2"),
        "full": ("training.recompute=full",),
    }
    step(tmp_path / "first", *model)  # what is made once and kept
    found = {name: step(tmp_path / name, "model.depth=4", *model, *own) for name, own in how.items()}
    bytes_of = {name: kept for name, (kept, _) in found.items()}
    assert bytes_of["full"] < bytes_of["half"] < bytes_of["none"]
    assert bytes_of["full"] < bytes_of["selective"] < bytes_of["none"]
    for _, gradients in found.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, found["none"][1], strict=True))


def test_the_attention_of_samples_in_one_row_is_kept_too():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert varlen._varlen_attn._opoverload in kept_ops() > {torch.ops.aten.mm.default}


def test_what_the_processes_hold_is_what_the_config_says():
    two = Ranks(1, 2)
    ways = {name: load_config("demo", [f"parallel.strategy={name}"]).parallel for name in ("auto", "ddp", "fsdp")}
    assert [strategy(way, two) for way in ways.values()] == ["ddp", "ddp", "fsdp"]
    assert {strategy(way, ALONE) for way in ways.values()} == {"none"}


def test_one_process_alone_says_that_there_is_nothing_to_share(tmp_path):
    for way, told in (("fsdp", 1), ("auto", 0), ("none", 0)):
        config = config_for(tmp_path / way, f"parallel.strategy={way}")
        Trainer(config, RunFolder.create(config.run_folder, config))
        line = f"parallel.strategy is {way}: it takes effect under torchrun"
        assert (tmp_path / way / "log.txt").read_text().count(line) == told


def test_one_process_may_keep_its_weights_in_the_cpus_memory(tmp_path, monkeypatch):
    """Without torchrun; also when it goes on. On a CPU, where it is refused, it is what it is without."""
    monkeypatch.setattr("training.trainer.check_parallel", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.CPUOffloadPolicy", partial(CPUOffloadPolicy, pin_memory=False))
    there = ["parallel.strategy=fsdp", "parallel.cpu_offload=true"]
    runs = []
    for name, how in (("there", there), ("plain", [])):
        runs.append(training.train(config_for(tmp_path / name, *how, "training.num_steps=2")))
        training.resume(runs[-1], ["training.num_steps=4"])
    assert "weights in the CPU's memory" in (runs[0] / "log.txt").read_text()
    assert list(list_checkpoints(runs[0])[-1].glob("shard-00001-model-*"))
    assert metrics(runs[0], "loss") == [(step, pytest.approx(loss)) for step, loss in metrics(runs[1], "loss")]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["parallel.strategy=fsdp", "parallel.cpu_offload=true"], 'cpu_offload .* here is "fsdp" on cpu'),
        (["parallel.strategy=fsdp", "optimizer.name=adamw-8bit"], "state cannot be sharded: take"),
        (["parallel.strategy=hsdp", "parallel.shard_size=3"], "shard_size is 3, expected a divisor of the 4 processes"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_parallel(load_config("demo", changes), Ranks(0, 4, 4), torch.device("cpu"))


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    config = config_for(tmp_path / "run", "training.batch_size=10", "training.grad_accumulation=2")
    with pytest.raises(ValueError, match="batch_size is 10, .*grad_accumulation = 2 times 4 processes: 8 or 16"):
        Trainer(config, RunFolder.create(config.run_folder, config), ranks=Ranks(0, 4, 4))


# --- a process alone, which holds all the parts: what FSDP and DDP do is then seen without another one --------------


def test_in_parts_a_run_is_what_it_is_in_one_piece(tmp_path, group):
    """Also when it goes on from a checkpoint in parts."""
    how = ["training.grad_accumulation=2", "training.batch_size=8", "training.checkpoint_every=1"]
    parts = [*how, "parallel.strategy=fsdp", "training.num_steps=1"]
    run = training.train(config_for(tmp_path / "parts", *parts))
    training.resume(run, ["training.num_steps=2"])
    whole = training.train(config_for(tmp_path / "whole", *how, "parallel.strategy=none", "training.num_steps=2"))
    folders = [list_checkpoints(path)[-1] for path in (run, whole)]
    assert [path.name[:11] for path in folders[0].glob("*.safetensors")] == ["shard-00001"]
    (_, found), (_, expected) = map(read_checkpoint, folders)
    assert {group: x.keys() for group, x in found.items()} == {group: x.keys() for group, x in expected.items()}
    for group, tensors in expected.items():
        for name, x in tensors.items():
            torch.testing.assert_close(found[group][name], x, rtol=1e-4, atol=1e-5, msg=f"{group} {name}")
    assert metrics(run, "loss") == [(step, pytest.approx(loss)) for step, loss in metrics(whole, "loss")]


def test_a_checkpoint_in_parts_is_read_into_parts(tmp_path, group):
    """The optimiser's state of a weight too, in its own type; a weight of another shape is refused."""
    mesh = init_device_mesh("cpu", (1,))
    numbers = {"w": torch.randn(4, 2).bfloat16(), "w/exp_avg": torch.randn(4, 2)}
    w, average = (distribute_tensor(x, mesh, [Shard(0)]) for x in numbers.values())
    weights = {"model": {"w": w}, "optimizer": {"w/exp_avg": average, "w/step": torch.tensor(3.0)}}
    folder = save_sharded(tmp_path, {"step": 1, "seed": 0}, weights, 1, ALONE)()
    into = torch.zeros_like(w)
    found = read_sharded(folder, {"model": {"w": into}})
    state = found["optimizer"]
    assert found["model"]["w"] is into and hasattr(state["w/exp_avg"], "device_mesh") and state["w/step"] == 3
    for name, x in {"w": into, "w/exp_avg": state["w/exp_avg"]}.items():
        assert x.dtype == numbers[name].dtype and torch.equal(local(x), numbers[name])
    with pytest.raises(ValueError, match=r"step-00000001 has model/w of \(4, 2\), the model \(2, 2\)"):
        read_sharded(folder, {"model": {"w": torch.zeros(2, 2)}})


def test_a_checkpoint_in_parts_is_read_without_a_group_and_a_word(tmp_path, recwarn):
    weights = {"model": {"w": torch.randn(4, 2)}}
    folder = save_sharded(tmp_path, {"step": 1, "seed": 0}, weights, 1, ALONE)()
    recwarn.clear()
    assert torch.equal(read_sharded(folder)["model"]["w"], weights["model"]["w"])
    assert [w for w in recwarn if w.category is not ResourceWarning] == []  # which is of what other tests left


def test_the_first_process_alone_looks_into_all_parts_and_once(tmp_path, monkeypatch):
    """As many processes as parts would open each of them, or twice as often where torch's `load` looks again."""
    reader, weights = HuggingFaceStorageReader, {"model": {"w": torch.randn(4, 2)}}
    folder = save_sharded(tmp_path, {"step": 1, "seed": 0}, weights, 1, ALONE)()
    looks, look = [], reader.read_metadata
    monkeypatch.setattr(reader, "read_metadata", lambda self: looks.append(look(self)) or looks[-1])
    read_sharded(folder)
    second = Ranks(1, 2)
    monkeypatch.setattr(second, "from_first", lambda make: looks[0])
    assert torch.equal(read_sharded(folder, ranks=second)["model"]["w"], weights["model"]["w"])
    assert len(looks) == 1


def opened(tmp_path, *changes) -> Trainer:
    """The trainer of a run in parts and bf16, with gradients everywhere."""
    how = ("training.precision=bf16", "training.batch_size=4", "training.grad_accumulation=2")
    config = config_for(tmp_path / "run", *how, *changes)
    trainer = Trainer(config, RunFolder.create(tmp_path / "run", config))
    with torch.no_grad():
        for p in trainer.model.parameters():
            local(p).add_(0.05 * torch.randn(local(p).shape, generator=torch.Generator().manual_seed(p.numel())))
    return trainer


def in_parts(module) -> set[bool]:
    return {hasattr(p, "device_mesh") for p in module.parameters()}


@pytest.mark.parametrize(("way", "reshard"), [("fsdp", True), ("hsdp", False)])
def test_blocks_work_in_bf16_and_gradients_are_summed_in_fp32(tmp_path, group, way, reshard):
    trainer = opened(tmp_path, f"parallel.strategy={way}", f"parallel.reshard={str(reshard).lower()}")
    trunk, types = trainer.model.transformer, {}
    for name in ("patch_in", "patch_out", "blocks.0.img.modulation", "blocks.1.txt.attn.qkv"):
        trunk.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: types.update({name: (module.weight.dtype, given[0].dtype)})
        )
    for last, part in enumerate(trainer._prepared(next(trainer.feed.batches(4, 0)))):
        with gradient_sync(trainer.learner, bool(last)):
            with autocast(trainer.device, trainer.precision):
                loss = trainer.learner(*part).total
            assert in_parts(trunk.blocks[0]) == {reshard}
            loss.backward()
        assert {p.grad is None for p in trunk.blocks.parameters()} == {not last}  # exchanged once, at the end
    half, full = torch.bfloat16, torch.float32
    assert types == {"patch_in": (full, full), "patch_out": (full, half), "blocks.0.img.modulation": (half, full),
                     "blocks.1.txt.attn.qkv": (half, half)}  # fmt: skip
    sums = local(trunk.blocks[0].img.modulation.weight.grad)
    assert in_parts(trainer.model) == {True} and sums.dtype == full
    assert (sums.bfloat16() != sums).any()  # of two parts, each in bf16


def test_the_average_is_whole_while_it_is_called(tmp_path, group):
    """In fp32, and not after; what is called of it may be the text encoder or the trunk alone."""
    trainer = opened(tmp_path, "parallel.strategy=fsdp")
    average, types = trainer.ema, set()
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    for layer in (average.transformer.blocks[0].img.attn.qkv, average.conditioner.layers[0].qkv):
        layer.register_forward_pre_hook(lambda module, _: types.add(module.weight.dtype))
    assert in_parts(average) == {True}
    with pytest.raises(KeyboardInterrupt), unsharded(average):
        assert in_parts(average.conditioner) == in_parts(average.transformer.patch_in) == {False}
        trainer.pipe(["a red circle"], num_steps=1)
        raise KeyboardInterrupt
    assert in_parts(average) == {True} and types == {torch.float32}


def test_hsdp_holds_parts_on_a_machine_and_copies_from_one_to_the_next(monkeypatch):
    meshes, parts = [], []
    monkeypatch.setattr(DeviceMesh, "from_group", lambda groups, *how, **names: meshes.append((groups, *how[1:])))
    monkeypatch.setattr(Ranks, "group_among", lambda ranks, among: parts.append(among) or len(among))
    for changes in (["hsdp"], ["hsdp", "parallel.shard_size=2"], ["fsdp"]):
        config = load_config("demo", [f"parallel.strategy={changes[0]}", *changes[1:]])
        check_parallel(config, Ranks(0, 12, 4), torch.device("cpu"))
        mesh_of(config.parallel, Ranks(0, 12, 4), torch.device("cpu"))
    assert [mesh[0] for mesh in meshes] == [[4, 3], [2, 6], None]
    assert parts[0] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]] and parts[1][1] == [4, 5, 6, 7]
    assert [parts[1], parts[3]] == [mesh[1].tolist() for mesh in meshes[:2]]
    with pytest.raises(ConfigError, match="shard_size is 4, expected a divisor of the 6 processes"):
        check_parallel(load_config("demo", ["parallel.strategy=hsdp"]), Ranks(0, 6, 4), torch.device("cpu"))


def test_copies_exchange_the_gradient_of_the_last_part_alone(group):
    learner = replicated(torch.nn.Linear(2, 2), torch.device("cpu"))
    for last in (False, True):
        with gradient_sync(learner, last):
            assert learner.require_backward_grad_sync == last
    plain = torch.nn.Linear(2, 2)
    with gradient_sync(plain, False):
        assert plain(torch.ones(1, 2)).shape == (1, 2)
