"""What goes wrong while a run trains: gradients that are not finite, overflow in fp16, processes that stop or die."""

import errno
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import training
import training.launch
import training.progress
import training.trainer
from tests.training.processes import PATIENCE, python
from tests.training.test_trainer import LONG_COMMAND, assert_bit_equal, config_for, last_weights, metrics, stop_after
from training.checkpoint import list_checkpoints, load_checkpoint, load_latest, newest_whole, save_checkpoint
from training.config import load_config
from training.ema import power_of, reconstruct
from training.errors import DataError
from training.feed import LatentFeed
from training.interrupts import Interrupts
from training.lock import LOCK
from training.parallel import ALONE, ProcessLost
from training.precision import LARGEST_SCALE, LossScaler
from training.run import OWN, RunFolder
from training.sharded_checkpoint import save_sharded
from training.trainer import Diverged, Trainer
from training.writing import Writer

# --- nobody reads what is printed any more ------------------------------------------------------------------------


def test_a_reader_who_leaves_costs_no_checkpoint(tmp_path, monkeypatch):
    """As in `mmdit train ... | tee log`, of which a Ctrl-C ends both."""
    reader, writer = os.pipe()
    monkeypatch.setattr(training.progress, "LINE_EVERY", 0)
    stop_after(4, monkeypatch, signal.SIGINT)
    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == 3:
            os.close(reader)
        return real(self, model, batch)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    with suppress(BrokenPipeError), open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        training.train(config_for(tmp_path / "run", "training.num_steps=10", "training.checkpoint_every=0"))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004"]
    assert "stopped at step 4, all saved" in (tmp_path / "run" / "log.txt").read_text()


# --- a batch without a finite gradient ----------------------------------------------------------------------------


def spoil(monkeypatch, *steps: int) -> None:
    """Put a NaN (in even steps an infinity) into one number of the batches of these steps."""
    real = LatentFeed.batches

    def batches(self, batch_size, seed, start_step=0, *share):
        for k, batch in enumerate(real(self, batch_size, seed, start_step, *share), start=start_step + 1):
            if k in steps:
                batch.latents[-1, 0, 0, 0] = float("nan") if k % 2 else float("inf")
            yield batch

    monkeypatch.setattr(LatentFeed, "batches", batches)


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(tmp_path, monkeypatch):
    """Weights, average and optimiser are those before it; a resume takes note of it too."""
    spoil(monkeypatch, 3, 4)
    how = ("training.num_steps=6", "training.keep_checkpoints=9", "training.checkpoint_every=1", "optimizer.name=muon")
    out = training.train(config_for(tmp_path / "run", *how))
    folders = sorted((out / "checkpoints").iterdir())
    weights = [training.checkpoint.load_checkpoint(folder)[1] for folder in folders]
    for step, before, after in zip(range(2, 7), weights, weights[1:], strict=False):
        equal = [torch.equal(x, after[group][name]) for group in before for name, x in before[group].items()]
        assert all(equal) == (step in (3, 4))
    log = (out / "log.txt").read_text()
    assert re.findall(r"step (\d) is left out: .*\((\d) so far\)", log) == [("3", "1"), ("4", "2")]
    assert load_latest(out, print)[0]["skipped"] == 2
    assert [step for step, _ in metrics(out, "loss")] == [1, 2, 5, 6]
    assert metrics(out, "skipped_steps") == [(3, 1), (4, 2), (5, 2), (6, 2)]
    assert [step for step, _ in metrics(out, "grad_norm")] == [1, 2, 5, 6]
    by_time = {row["step"] for row in RunFolder(out).metrics() if any(name.startswith("loss_t") for name in row)}
    assert by_time == {1, 2, 5, 6}
    part = training.train(config_for(tmp_path / "part", *how, "training.num_steps=3"))
    assert_bit_equal(training.resume(part, ["training.num_steps=6"]), out)


def test_a_step_that_is_left_out_is_no_time_to_an_average_by_powers(tmp_path, monkeypatch):
    """It weighs updates of the weights alone, written out; so do its snapshots, and a resumed run."""
    spoil(monkeypatch, 3, 4)
    how = ["training.num_steps=6", "training.keep_checkpoints=9", "training.checkpoint_every=1", "training.ema=power"]
    how += ["training.ema_sigma_rel=[0.1, 0.25]", "training.ema_snapshot_every=1", "training.ema_snapshot_dtype=fp32"]
    out = training.train(config_for(tmp_path / "run", *how))
    weights = [load_checkpoint(out / "checkpoints" / f"step-{step:08d}")[1] for step in (1, 2, 5, 6)]
    name = "transformer.patch_in.weight"
    for width, average in ((0.1, weights[-1]["ema"]), (0.25, weights[-1]["ema_second"])):
        shares = torch.tensor([k / 4 for k in range(5)], dtype=torch.float64).pow(power_of(width) + 1).diff()
        exact = sum(x * one["model"][name].double() for x, one in zip(shares, weights, strict=True))
        assert (average[name] - exact).abs().max() < 1e-7
        assert (reconstruct(out, width)[name] - exact).abs().max() < 1e-6
    part = training.train(config_for(tmp_path / "part", *how, "training.num_steps=3"))
    assert_bit_equal(training.resume(part, ["training.num_steps=6"]), out)


def test_too_many_in_a_row_stop_the_run_with_a_clear_line(tmp_path, monkeypatch):
    spoil(monkeypatch, 2, 4, 5, 6)
    how = ("training.num_steps=9", "training.checkpoint_every=1", "training.max_bad_steps=3")
    with pytest.raises(Diverged, match=r"stopped at step 6: .* in 3 steps in a row .*lower optimizer.lr") as caught:
        training.train(config_for(tmp_path / "run", *how))
    assert "\n" not in str(caught.value)
    state, weights = load_latest(tmp_path / "run", print)
    assert state["step"] == 5 and state["bad"] == 2
    assert all(x.isfinite().all() for x in weights["model"].values())
    with pytest.raises(Diverged, match="stopped at step 6: .* in 3 steps in a row"):  # counted on where it goes on
        training.resume(tmp_path / "run")


def test_without_a_look_the_weights_are_lost(tmp_path, monkeypatch):
    """What max_bad_steps = 0 means, and that the NaN of these tests reaches the weights."""
    spoil(monkeypatch, 2)
    monkeypatch.setattr(training.trainer, "evaluate_run", lambda path, progress: {})
    out = training.train(config_for(tmp_path / "run", "training.num_steps=2", "training.max_bad_steps=0"))
    assert not all(x.isfinite().all() for x in last_weights(out).values())


# --- fp16 ---------------------------------------------------------------------------------------------------------


def test_a_scale_falls_with_an_overflow_and_grows_after_good_steps():
    scaler = LossScaler(8.0, grow_every=3)
    assert scaler.update(False) and scaler.scale == 4
    assert [scaler.update(True) or scaler.scale for _ in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert scaler.update(False) and (scaler.scale, scaler.good) == (8, 0)
    largest = LossScaler(LARGEST_SCALE, grow_every=1)
    assert not largest.update(True) and largest.scale == LARGEST_SCALE
    scaler.scale = 1.0
    assert not scaler.update(False) and scaler.scale == 1  # nothing is left to blame on the scale
    assert LossScaler.for_precision(torch.float16).enabled and not LossScaler.for_precision(torch.bfloat16).enabled


def test_an_overflow_in_fp16_leaves_the_step_out_and_halves_the_scale(tmp_path, monkeypatch):
    """From a scale far too large down to one that fits, with no step lost to training; and on after a resume."""
    monkeypatch.setattr("training.precision.LARGEST_SCALE", 2.0**40)
    monkeypatch.setattr(LossScaler, "for_precision", lambda precision: LossScaler(2.0**33, grow_every=3))
    how = ("training.precision=fp16", "training.num_steps=24", "training.max_bad_steps=2")
    out = training.train(config_for(tmp_path / "run", *how, "training.checkpoint_every=0"))
    scales = [scale for _, scale in metrics(out, "loss_scale")]
    fell = [k for k, (a, b) in enumerate(zip(scales, scales[1:], strict=False)) if b < a]
    assert scales[0] == 2.0**32 and len(fell) >= 4
    assert any(b == 2 * a for a, b in zip(scales, scales[1:], strict=False))
    assert not metrics(out, "skipped_steps")  # that was the scale's doing
    state, weights = load_latest(out, print)
    assert state["loss_scale"][0] == scales[-1]
    assert {x.dtype for group in weights.values() for x in group.values()} == {torch.float32}
    part = training.train(config_for(tmp_path / "part", *how, "training.checkpoint_every=0", "training.num_steps=11"))
    assert_bit_equal(training.resume(part, ["training.num_steps=24"]), out)


def test_fp16_learns_as_fp32_does(tmp_path):
    runs = [training.train(config_for(tmp_path / name, f"training.precision={name}")) for name in ("fp16", "fp32")]
    half, full = (dict(metrics(run, "loss")) for run in runs)
    assert half != full and half == pytest.approx(full, rel=2e-3)


# --- checkpoints in parts ------------------------------------------------------------------------------------------


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
            writer.write({"step": 6}, {"model": {"w": torch.ones(3)}}, lambda: pytest.fail("it is not written"))
            writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    assert load_latest(tmp_path, pytest.fail)[0]["step"] == 3
    writer.write({"step": 6}, {"model": {"w": torch.ones(3)}}, lambda: None)
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


def test_a_checkpoint_beside_is_of_its_own_step_and_written_alone(tmp_path, monkeypatch):
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


def test_a_last_checkpoint_beside_that_fails_ends_the_run_with_its_error(tmp_path, monkeypatch):
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


def test_a_grid_of_samples_that_finds_the_disk_full_says_where(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*run/samples.png"):
        training.train(config_for(tmp_path / "run"))
    with pytest.raises(OSError, match=r"No space left on device: .*run/samples/step-00000007.png"):
        training.resume(tmp_path / "run", ["training.num_steps=8", "training.sample_every=7"])


def test_a_checkpoint_that_could_not_be_written_is_told_where_another_error_ends_the_run(tmp_path, monkeypatch, capsys):
    """Or one would look for it: the writer beside the training says so at the next checkpoint, which does not come."""
    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == 2:
            raise ValueError("something else")
        return real(self, model, batch)

    def save(*all):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    monkeypatch.setattr("training.writing.save_checkpoint", save)
    with pytest.raises(ValueError, match="something else"):
        training.train(config_for(tmp_path / "run", "training.checkpoint_every=2", "training.async_checkpoint=true"))
    assert "warning: the last checkpoint was not written: " in capsys.readouterr().out


@pytest.mark.parametrize("what", ["checkpoint_every=1", "log_every=1"])
def test_a_run_that_fails_stays_where_anything_was_written(what, tmp_path, monkeypatch):
    """A checkpoint before the first line of metrics, or metrics alone; one that has neither leaves the name free."""
    spoil(monkeypatch, 2)
    how = ("training.checkpoint_every=0", "training.log_every=99", "training.max_bad_steps=1")
    with pytest.raises(Diverged):
        training.train(config_for(tmp_path / "neither", *how))
    with pytest.raises(Diverged):
        training.train(config_for(tmp_path / "run", *how, f"training.{what}"))
    assert not (tmp_path / "neither").exists()
    assert (len(list_checkpoints(tmp_path / "run")), len(metrics(tmp_path / "run", "loss"))) in ((1, 0), (0, 1))


# --- to begin again ---


def test_a_restart_begins_anew_only_where_nothing_is_lost(tmp_path):
    """A run that was killed before its first checkpoint goes, a finished one whose checkpoints were removed stays."""
    config = config_for(tmp_path / "run", "training.num_steps=1")
    run = training.train(config)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(FileExistsError, match="run exists"):
        training.train(config, restart=True)
    assert (run / "pipeline" / "pipeline.json").is_file()
    (run / "scores.json").unlink()
    assert metrics(training.train(config, restart=True), "loss")


# --- several processes --------------------------------------------------------------------------------------------


def torchrun(*words: object, max_restarts: int = 0):
    """`torchrun WORDS` on two processes, as `python` starts it."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", max_restarts]
    return python("-m", *launch, *words)


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, found) if b"mmdit_cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until and len(RunFolder(out).metrics()) < steps:
        time.sleep(0.05)


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")


@pytest.mark.slow
@linux
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path, strategy):
    """It saves, and all exit with status 0; one process goes on from there."""
    out = tmp_path / "run"
    with torchrun(*LONG_COMMAND, "--out", out, f"parallel.strategy={strategy}") as process:
        wait_for_steps(process, out, 3)
        os.kill(children(process)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    state, _ = load_latest(out, print)
    assert state["step"] >= 3 and output.count(f"stopped at step {state['step']}, all saved") == 1
    assert RunFolder(out).metrics()[-1]["step"] == state["step"]
    training.resume(out, [f"training.num_steps={state['step'] + 1}", "evaluation.prompts_per_question=0"])
    assert metrics(out, "loss")[-1][0] == state["step"] + 1


@pytest.mark.slow
@linux
def test_a_process_that_dies_ends_the_others_with_a_clear_line(tmp_path):
    """And torchrun's restart goes on from the newest checkpoint."""
    out = tmp_path / "run"
    steps = ("training.checkpoint_every=5", "training.num_steps=40", "evaluation.prompts_per_question=0")
    with torchrun(*LONG_COMMAND, "--out", out, *steps, "training.num_steps=100000") as process:
        wait_for_steps(process, out, 12)
        os.kill(children(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode not in (0, None)
    [line] = [line for line in output.splitlines() if line.startswith("mmdit: error")]
    assert "process 0 stops: another one of the 2 ended" in line and f"mmdit train --resume {out}" in line
    state, _ = load_latest(out, print)
    assert state["step"] >= 10 and state["step"] % 5 == 0
    last = state["step"] + 2
    with torchrun(*LONG_COMMAND, "--restart", "--out", out, f"training.num_steps={last}", *steps[2:]) as process:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    assert f"resumed at step {state['step']}" in output and metrics(out, "loss")[-1][0] == last


@pytest.mark.slow
@linux
def test_torchrun_starts_all_again_from_the_newest_checkpoint(tmp_path):
    """Its second attempt finds its own processes, not the addresses of the first one's."""
    out = tmp_path / "run"
    steps = ("training.checkpoint_every=5", "evaluation.prompts_per_question=0", "training.num_steps=150")
    with torchrun(*LONG_COMMAND, "--out", out, *steps, max_restarts=1) as process:
        wait_for_steps(process, out, 12)
        os.kill(children(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    assert "resumed at step" in output and metrics(out, "loss")[-1][0] == 150


@pytest.mark.slow
@linux
def test_processes_that_outlive_torchrun_save_and_end(tmp_path):
    """A new run in their folder waits for them (here for one that is asleep), and goes on from what they saved."""
    out = tmp_path / "run"
    quick = ("training.checkpoint_every=0", "evaluation.prompts_per_question=0")
    with torchrun(*LONG_COMMAND, "--out", out, *quick) as process:
        wait_for_steps(process, out, 3)
        ranks = children(process)
        os.kill(ranks[1], signal.SIGSTOP)
        process.kill()
        process.wait()
        with torchrun(*LONG_COMMAND, "--out", out, *quick, "training.num_steps=5", "--restart") as again:
            said = ""
            while "waiting for it to end" not in said:
                assert (line := again.stdout.readline()), said
                said += line
            assert not list_checkpoints(out)
            os.kill(ranks[1], signal.SIGCONT)
            said += again.communicate(timeout=PATIENCE)[0]
            assert again.returncode == 0, said
        output, _ = process.communicate(timeout=PATIENCE)
    [told] = re.findall(r"stopped at step (\d+), all saved", output)
    assert output.count("stops: the torchrun that had started it has ended") == 2
    assert f"resumed at step {told}" in said and not (out / LOCK).exists()


def test_a_process_without_its_torchrun_saves_and_ends(tmp_path, monkeypatch):
    """Another's parent may come and go: a shell that is closed stops nobody."""
    parents = iter([7, 7, 7])
    monkeypatch.setattr("training.interrupts.os.getppid", lambda: next(parents, 1))
    with Interrupts() as interrupts:
        assert not interrupts.caught
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ProcessLost, match="the torchrun that had started it has ended"):
        training.train(config_for(tmp_path / "run", "training.num_steps=9", "training.checkpoint_every=0"))
    assert load_latest(tmp_path / "run", print)[0]["step"] == 2
    assert "stopped at step 2, all saved" in (tmp_path / "run" / "log.txt").read_text()


def test_restart_begins_where_nothing_was_saved(tmp_path, monkeypatch):
    out = tmp_path / "run"
    config = config_for(out, "training.num_steps=1")
    RunFolder.create(out, config).log("died at once")
    with pytest.raises(FileExistsError):
        training.train(config)
    training.train(config, restart=True)
    assert metrics(out, "loss")[-1][0] == 1 and "died at once" not in (out / "log.txt").read_text()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun tells its second attempt
    training.train(load_config(out, [f"training.out={out}", "training.num_steps=2"]))
    assert [step for step, _ in metrics(out, "loss")] == [1, 2]


def test_restart_begins_where_a_kill_left_half_a_beginning(tmp_path):
    """In the first file that was written, or while a folder without checkpoint was being removed."""
    config = config_for(tmp_path / "run", "training.num_steps=1", "evaluation.prompts_per_question=0")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.77.part").write_text("[data")
    training.train(config, restart=True)
    assert metrics(tmp_path / "run", "loss")[-1][0] == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        training.train(config_for(other), restart=True)
    assert (other / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("whose", ["config", "notes"])
def test_a_restart_removes_nothing_that_a_person_made(whose, tmp_path):
    """A folder with a config.toml that no run wrote, and one of a run with notes beside."""
    config = config_for(tmp_path / "run")
    RunFolder.create(tmp_path / "run", config).log("died at once")
    if whose == "config":
        (tmp_path / "run" / "config.toml").write_text('preset = "demo"\n')
    else:
        (tmp_path / "run" / "thesis.txt").write_text("mine")
    before = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match="run exists"):
        training.train(config, restart=True)
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_writes_what_is_known_of_it(tmp_path):
    """Or a restart would not tell its folder from a person's."""
    how = ("training.ema=power", "training.ema_snapshot_every=1", "training.profile=1:1", "training.sample_every=1")
    run = training.train(config_for(tmp_path / "run", "training.num_steps=1", *how))
    assert {path.name for path in run.iterdir()} == OWN - {"wandb", "index"}


def test_a_run_without_checkpoint_is_removed_config_last(tmp_path, monkeypatch):
    """So that what a kill leaves of it can still be told from a user's folder."""
    run = RunFolder.create(tmp_path / "run", config_for(tmp_path / "run"))
    run.log("died at once")
    (run.path / "pipeline").mkdir()
    monkeypatch.setattr(training.launch.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.launch._can_continue(run.path)
    monkeypatch.undo()
    assert (run.path / "config.toml").exists() and not training.launch._can_continue(run.path)
    assert not run.path.exists()


def test_a_worker_that_dies_in_the_middle_of_a_step_is_named(tmp_path, monkeypatch):
    """torch says so from a signal's handler, wherever the program is."""

    def dies(self, learner, batch):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(Trainer, "_train_step", dies)
    with pytest.raises(DataError, match=r"a data worker died, .*num_workers = 0 \(DataLoader worker \(pid 7\)"):
        training.train(config_for(tmp_path / "run"))
