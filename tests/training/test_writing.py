"""Checkpoints in parts, or written by a thread beside the training: on full disks, with damaged files, when killed."""

import errno
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import training
from tests.training.processes import PATIENCE, python
from tests.training.runs import assert_bit_equal, config_for, spoil
from training.checkpoint import list_checkpoints, load_checkpoint, load_latest, newest_whole, save_checkpoint
from training.parallel import ALONE
from training.run import RunFolder
from training.sharded_checkpoint import save_sharded, stored
from training.trainer import Diverged, Trainer
from training.writing import Writer


def in_parts(run: Path, step: int, beside: bool = False):
    """Begin a checkpoint in parts, of one process; what is returned ends it."""
    weights = {"model": {"w": torch.full((64, 8), float(step))}, "optimizer": {"w/step": torch.tensor(float(step))}}
    return save_sharded(run, {"step": step, "seed": 7}, weights, 3, ALONE, beside)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "flipped": flip,
    "missing": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "in parts"])
def test_a_run_stopped_before_its_first_update_goes_on(tmp_path, monkeypatch, sharded):
    """All steps so far were left out, as the first ones in fp16 may be: the optimiser has no state yet."""
    spoil(monkeypatch, 1)
    run = training.train(config_for(tmp_path / "run", "training.num_steps=1"))
    if sharded:
        state, weights = load_latest(run, print)
        told = {name: value for name, value in state.items() if name not in ("files", "sha256")}
        save_sharded(run, told, weights, 1, ALONE)()
    whole = training.train(config_for(tmp_path / "whole", "training.num_steps=2"))
    assert_bit_equal(training.resume(run, ["training.num_steps=2"]), whole)


@pytest.mark.parametrize("kind", ["shard-*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_or_state_is_named_and_the_one_before_taken(tmp_path, kind, damage):
    in_parts(tmp_path, 3)()
    [file] = in_parts(tmp_path, 6)().glob(kind)
    assert newest_whole(tmp_path, print).name == "step-00000006"
    DAMAGE[damage](file)
    said = []
    state, weights = load_latest(tmp_path, said.append)
    assert state["step"] == 3 and torch.equal(weights["model"]["w"], torch.full((64, 8), 3.0))
    [line] = said
    assert "passed over, falling back to the one before: step-00000006" in line and "\n" not in line


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize("where", ["a part", "the state"])
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, beside, where):
    """In parts, at once and in the thread beside; with room again, the same step is written whole."""

    def full(*words, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    in_parts(tmp_path, 3)()
    writer = Writer(tmp_path, 3, ALONE, sharded=True, background=beside)
    with monkeypatch.context() as patch:
        if where == "a part":
            patch.setattr("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", full)
        else:
            patch.setattr("training.checkpoint.write_json", full)
        with pytest.raises(OSError, match="No space left on device"):
            writer.write({"step": 6}, {"model": {"w": torch.ones(3)}}, lambda written: pytest.fail("it is not written"))
            writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    assert load_latest(tmp_path, pytest.fail)[0]["step"] == 3
    writer.write({"step": 6}, {"model": {"w": torch.ones(3)}}, lambda written: None)
    writer.wait()
    assert load_latest(tmp_path, pytest.fail)[0]["step"] == 6
    assert not list((tmp_path / "checkpoints").glob(".*.part"))


def test_a_run_that_fails_still_ends_the_checkpoint_that_it_had_begun(tmp_path, monkeypatch):
    """Its folder is free when it has stopped, not some time later."""

    def slow(*words):
        time.sleep(0.5)
        return save_checkpoint(*words)

    spoil(monkeypatch, 2)
    monkeypatch.setattr("training.writing.save_checkpoint", slow)
    how = ("training.async_checkpoint=true", "training.checkpoint_every=1", "training.max_bad_steps=1")
    with pytest.raises(Diverged):
        training.train(config_for(tmp_path / "run", *how))
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert load_latest(tmp_path / "run", pytest.fail)[0]["step"] == 1


def test_a_thread_that_reads_parts_hides_no_warnings_of_others(tmp_path, monkeypatch, recwarn):
    """What filters warnings does so in all threads: pictures may be read meanwhile."""
    read_data = HuggingFaceStorageReader.read_data

    def reading(self, *words):
        warnings.warn("of another thread", UserWarning, stacklevel=1)
        return read_data(self, *words)

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", reading)
    read = stored(in_parts(tmp_path, 3)())["model"]["w"].full_tensor()
    assert torch.equal(read, torch.full((64, 8), 3.0))
    said = [str(warning.message) for warning in recwarn]
    assert "of another thread" in said and not any("the intent is to load" in text for text in said)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import training.sharded_checkpoint as module
from training.parallel import ALONE
def save(step, beside):
    weights = {"model": {"w": torch.full((64, 8), float(step))}}
    module.save_sharded(Path(sys.argv[1]), {"step": step, "seed": 7}, weights, 3, ALONE, beside)()
save(3, False)
setattr(module, sys.argv[2], lambda *words: os.kill(os.getpid(), signal.SIGKILL))
save(6, True)
"""


@pytest.mark.parametrize("where", ["sha256", "put_in_place"])
def test_a_kill_while_a_thread_writes_parts_leaves_the_one_before(tmp_path, where):
    """What was not renamed yet counts for nothing, sealed or not, and goes with the next one."""
    with python("-c", KILLED, tmp_path, where) as killed:
        output, _ = killed.communicate(timeout=PATIENCE)
        assert killed.returncode == -signal.SIGKILL, output
    [part] = (tmp_path / "checkpoints").glob(".*.part")
    assert part.name == ".step-00000006.part" and list(part.glob("shard-*"))
    assert (part / "state.json").exists() == (where == "put_in_place")
    assert load_latest(tmp_path, pytest.fail)[0]["step"] == 3
    in_parts(tmp_path, 6)()
    assert not part.exists() and load_latest(tmp_path, pytest.fail)[0]["step"] == 6


def test_an_async_checkpoint_has_the_weights_of_its_own_step(tmp_path, monkeypatch):
    """The weights go on meanwhile: neither it nor the pipeline takes them in, and the next one waits."""
    how = ("training.checkpoint_every=1", "training.keep_checkpoints=9")
    at_once, drawn, writing = training.train(config_for(tmp_path / "at-once", *how)), {}, []

    def slow(run, state, *rest):
        writing.append(state["step"])
        time.sleep(0.2)
        assert writing == [state["step"]]
        writing.clear()
        return save_checkpoint(run, state, *rest)

    def save_weights(self, folder):
        state = self.model.state_dict()
        drawn[list_checkpoints(tmp_path / "beside")[-1].name] = {name: x.clone() for name, x in state.items()}

    monkeypatch.setattr("training.writing.save_checkpoint", slow)
    monkeypatch.setattr("mmdit.TextToImage.save_weights", save_weights)
    beside = training.train(config_for(tmp_path / "beside", *how, "training.async_checkpoint=true"))
    for one, other in zip(list_checkpoints(beside), list_checkpoints(at_once), strict=True):
        (_, ours), (_, theirs) = load_checkpoint(one), load_checkpoint(other)
        assert all(torch.equal(x, theirs[group][name]) for group in ours for name, x in ours[group].items())
        assert all(torch.equal(x, drawn[one.name][name]) for name, x in ours["ema"].items())


def test_a_last_async_checkpoint_that_fails_ends_the_run_with_its_error(tmp_path, monkeypatch):
    """No later one would tell of it, and the run would say that it is done."""

    def save(run, state, *rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr("training.writing.save_checkpoint", save)
    with pytest.raises(OSError, match="No space left on device: 'model.safetensors'"):
        training.train(config_for(tmp_path / "run", "training.checkpoint_every=0", "training.async_checkpoint=true"))


def test_a_run_that_is_interrupted_where_it_ends_still_ends_its_checkpoint_and_its_board(tmp_path, monkeypatch):
    """A second Ctrl-C while data workers end: nothing may write in the folder when the run has stopped."""

    def slow(*words):
        time.sleep(0.5)
        return save_checkpoint(*words)

    def interrupted(self):
        raise KeyboardInterrupt

    boards = []
    monkeypatch.setattr("training.writing.save_checkpoint", slow)
    monkeypatch.setattr("training.trainer.Profiler.close", interrupted)
    monkeypatch.setattr(RunFolder, "close", lambda self: boards.append(self.path))
    with pytest.raises(KeyboardInterrupt):
        training.train(config_for(tmp_path / "run", "training.async_checkpoint=true"))
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert boards == [tmp_path / "run"]


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("training.writing.save_checkpoint", "the last checkpoint was not written: "),
        ("mmdit.TextToImage.save_weights", "the last checkpoint is whole, but its pipeline was not written: "),
    ],
)
def test_what_could_not_be_written_is_told_where_another_error_ends_the_run(tmp_path, monkeypatch, capsys, fails, told):
    """Or one would look for it: the writer beside the training says so at the next checkpoint, which does not come."""
    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == 2:
            raise ValueError("something else")
        return real(self, model, batch)

    def save(*all):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    monkeypatch.setattr(fails, save)
    with pytest.raises(ValueError, match="something else"):
        training.train(config_for(tmp_path / "run", "training.checkpoint_every=2", "training.async_checkpoint=true"))
    assert f"warning: {told}" in capsys.readouterr().out
