"""What goes wrong while a run trains: gradients that are not finite, full disks, dead workers, readers that leave."""

import errno
import os
import re
import signal
from contextlib import suppress

import pytest
import torch

import training
import training.progress
import training.trainer
from tests.training.runs import assert_bit_equal, config_for, last_weights, metrics, spoil, stop_after
from training.checkpoint import list_checkpoints, load_checkpoint, load_latest
from training.ema import power_of, reconstruct
from training.errors import DataError
from training.run import RunFolder
from training.trainer import Diverged, Trainer


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


def test_max_bad_steps_0_trains_on_nan_gradients(tmp_path, monkeypatch):
    """What max_bad_steps = 0 means, and that the NaN of these tests reaches the weights."""
    spoil(monkeypatch, 2)
    monkeypatch.setattr(training.trainer, "evaluate_run", lambda path, progress: {})
    out = training.train(config_for(tmp_path / "run", "training.num_steps=2", "training.max_bad_steps=0"))
    assert not all(x.isfinite().all() for x in last_weights(out).values())


def test_a_grid_of_samples_that_finds_the_disk_full_says_where(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*run/samples.png"):
        training.train(config_for(tmp_path / "run"))
    with pytest.raises(OSError, match=r"No space left on device: .*run/samples/step-00000007.png"):
        training.resume(tmp_path / "run", ["training.num_steps=8", "training.sample_every=7"])


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


def test_a_worker_that_dies_in_the_middle_of_a_step_is_named(tmp_path, monkeypatch):
    """torch says so from a signal's handler, wherever the program is."""

    def dies(self, learner, batch):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(Trainer, "_train_step", dies)
    with pytest.raises(DataError, match=r"a data worker died, .*num_workers = 0 \(DataLoader worker \(pid 7\)"):
        training.train(config_for(tmp_path / "run"))
