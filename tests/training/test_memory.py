"""What a run holds at most, stage by stage, in bytes per parameter: 4 for each of weights, gradients, two moments and
each average. Counted on storages that torch's operators make, so mapped files do not count.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmdit
import training
from mmdit.embeddings import position_table
from tests.training.processes import together
from tests.training.runs import config_for
from training.checkpoint import list_checkpoints, read_checkpoint
from training.run import RunFolder
from training.sharding import local, skeleton
from training.trainer import Trainer

WIDE = ("model.num_heads=8", "model.head_dim=32", "training.num_steps=2", "training.batch_size=2")
WIDE += ("training.checkpoint_every=0", "data.num_samples=16", "data.held_out=0.2")
SLACK = 0.7  # for activations, latents and one tensor in flight


def storages_of(tree) -> list:
    return [local(x).untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and not x.is_meta]


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most of them since `most` was set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages_of((args, kwargs))}
        for storage in storages_of(out):
            self._count(storage, given)  # views are no new memory, of mapped files neither
        return out

    def _count(self, storage, given: set[int]) -> None:
        if id(storage) not in self.known | given:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def most_per_parameter(model_of):
    """A function that is, after the block, the most bytes held in it, per parameter of `model_of()`."""
    held = Held()
    with held:
        yield lambda: held.most / sum(p.numel() for p in model_of().parameters())


def opened(config, resumed=False) -> Trainer:
    return Trainer(
        config, RunFolder.open(config.run_folder) if resumed else RunFolder.create(config.run_folder, config), resumed
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps."""
    return training.train(config_for(tmp_path_factory.mktemp("memory") / "run", *WIDE))


@pytest.mark.parametrize(
    ("how", "needed"),
    [((), 8), (("training.ema=power",), 12), (("init",), 8), (("init", "lora.rank=2"), 4)],
    ids=["fresh", "two averages", "init", "adapters"],
)
def test_a_run_begins_with_its_weights_and_averages_alone(base, tmp_path, how, needed):
    config = config_for(tmp_path / "run", *WIDE, *(f"init={base}" if word == "init" else word for word in how))
    with most_per_parameter(lambda: trainer.model) as most:
        trainer = opened(config)
    assert needed < most() < needed + SLACK


@pytest.mark.parametrize(("resumed", "needed"), [(False, 4), (True, 0)], ids=["init", "resumed"])
def test_weights_that_come_from_a_file_are_not_made_before(base, tmp_path, monkeypatch, resumed, needed):
    """A trunk that starts from weights is made once, and that of a resumed run without memory."""

    class Built(Exception):
        pass

    def parallelize(model, *rest):
        built.append(model)
        raise Built

    built: list = []
    monkeypatch.setattr("training.trainer.parallelize", parallelize)
    config = RunFolder.open(base).config() if resumed else config_for(tmp_path / "run", *WIDE, f"init={base}")
    with most_per_parameter(lambda: built[0]) as most, pytest.raises(Built):
        opened(config, resumed)
    assert needed <= most() < needed + SLACK


def test_a_resumed_run_has_nothing_twice(base):
    with most_per_parameter(lambda: trainer.model) as most:
        trainer = opened(RunFolder.open(base).config(), resumed=True)
    assert 16 < most() < 16 + SLACK


@pytest.mark.parametrize(("background", "needed"), [(False, 16), (True, 32)])
def test_a_checkpoint_takes_no_memory_or_one_copy_of_all(base, background, needed):
    config = training.load_config(base / "config.toml", [f"training.async_checkpoint={str(background).lower()}"])
    with most_per_parameter(lambda: trainer.model) as most:
        trainer = opened(config, resumed=True)
        trainer._checkpoint()
        trainer.writer.wait()
    assert needed < most() < needed + SLACK


def test_the_skeleton_of_a_model_takes_no_memory(base):
    model = mmdit.TextToImage.load(base, "cpu").model
    with most_per_parameter(lambda: model) as most:
        empty = skeleton(model)
    assert most() < 0.1 and all(x.is_meta for x in empty.state_dict().values())
    assert empty.load_state_dict(model.state_dict(), assign=True).missing_keys == []


def test_a_table_of_positions_takes_no_more_than_itself():
    with Held() as held:
        table = position_table(256, 32, 16)
    assert held.most < 1.2 * table.nbytes


def test_what_is_not_trained_has_no_second_copy_in_memory_or_on_disk(base, tmp_path):
    config = config_for(tmp_path / "run", *WIDE, f"init={base}", "lora.rank=2")
    trainer = opened(config)
    pairs = zip(trainer.model.parameters(), trainer.ema.parameters(), strict=True)
    assert all((p.data_ptr() == e.data_ptr()) != p.requires_grad for p, e in pairs)
    trainer._checkpoint()
    sizes = {path.stem: path.stat().st_size for path in list_checkpoints(config.run_folder)[-1].glob("*.safetensors")}
    assert sizes["ema"] < 0.2 * sizes["model"]


PARTS = """
import sys, torch
from tests.training.test_memory import most_per_parameter
from training.config import load_config
from training.parallel import ranks_of
from training.run import RunFolder
from training.trainer import Trainer

config = load_config("pixels-tiny", sys.argv[1:])
with ranks_of(config) as ranks:
    run = RunFolder(ranks.from_first(lambda: RunFolder.create(config.run_folder, config).path), ranks.rank)
    with most_per_parameter(lambda: trainer.model) as most:
        trainer = Trainer(config, run, ranks=ranks)
    print("most", most(), flush=True)
    with most_per_parameter(lambda: trainer.model) as most:
        trainer._checkpoint()
        trainer.writer.wait()
    print("saved", most(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "copies"),
    [((), 0), (("init",), 0), (("init", "lora.rank=2"), 0), (("training.async_checkpoint=true",), 2)],
    ids=["drawn", "init", "adapters", "async"],
)
def test_a_model_in_parts_was_never_whole(how, copies, tmp_path):
    """Each of four processes has 1 for its weights and 1 for their average, and draws a tensor at a time, or reads it;
    so does the first one gather it for the pipeline, and merge adapters into it; or read it, where a thread saves.
    """
    own = ["model.depth=6", "training.batch_size=4", "parallel.strategy=fsdp", f"training.out={tmp_path / 'run'}"]
    if "init" in how:
        start = training.train(config_for(tmp_path / "start", *WIDE, own[0]))
    own += [f"init={start}" if word == "init" else word for word in how]
    said = together(4, "-c", PARTS, *WIDE, *own)
    assert all(2 < float(text.split("most ")[1].split()[0]) < 2 + SLACK for text in said), said
    assert all(copies < float(text.split("saved ")[1].split()[0]) < copies + SLACK for text in said), said


def test_a_checkpoint_in_parts_is_read_once_into_its_place(tmp_path, group, monkeypatch):
    """Its files are small, for the bytes of each are made in memory; by one process it is read without a copy too."""
    monkeypatch.setattr("training.sharded_checkpoint.PART", 2**21)
    run = training.train(config_for(tmp_path / "run", *WIDE, "parallel.strategy=fsdp"))
    sizes = [path.stat().st_size for path in list_checkpoints(run)[-1].glob("*.safetensors")]
    assert len(sizes) > sum(sizes) / 2**21 and max(sizes) < 2**21 + 2**16
    for way in ("fsdp", "none"):
        config = training.load_config(run / "config.toml", [f"parallel.strategy={way}", "training.num_steps=3"])
        with most_per_parameter(lambda: trainer.model) as most:  # noqa: B023
            trainer = opened(config, resumed=True)
        assert 16 < most() < 16 + SLACK
        found, saved = trainer._tensors(), read_checkpoint(list_checkpoints(run)[-1])[1]
        assert all(torch.equal(local(x), saved[part][name]) for part in found for name, x in found[part].items())
