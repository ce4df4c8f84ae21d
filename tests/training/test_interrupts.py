"""Signals during training, before and after it: what is saved, and how a command ends."""

import os
import shutil
import signal
import time

import pytest

import training
import training.setup
import training.trainer
import training.writing
from tests.training.processes import LONG_COMMAND, PATIENCE, end, python
from tests.training.runs import LONG, config_for, contents
from training.checkpoint import list_checkpoints, load_latest
from training.interrupts import STOPS, Interrupted, Interrupts
from training.run import RunFolder


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tmp_path, monkeypatch):
    real = training.writing.save_checkpoint

    def save(*all):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return real(*all)

    monkeypatch.setattr(training.writing, "save_checkpoint", save)
    out = training.train(config_for(tmp_path / "run", *LONG, "training.async_checkpoint=true"))
    assert [path.name for path in list_checkpoints(out)] == ["step-00000010"]
    assert "stopped at step 10, all saved" in (out / "log.txt").read_text()


def signal_in(module, name: str, monkeypatch, sig: int) -> None:
    """Send ourselves a signal when that is called, and wait for what comes of it."""

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), sig)
        time.sleep(5)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr(module, name, interrupted)


@pytest.fixture(autouse=True, scope="module")
def as_in_a_terminal():
    """Also where the tests themselves run under nohup, whose SIGHUP is ignored, here and in processes started here."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = pytest.mark.parametrize("sig", STOPS, ids=lambda sig: sig.name)


@SIGNALS
def test_a_signal_during_set_up_leaves_the_name_free(tmp_path, monkeypatch, capsys, sig):
    before = signal.getsignal(sig)
    signal_in(training.setup, "LatentFeed", monkeypatch, sig)
    out = tmp_path / "run"
    assert training.train(config_for(out)) == out
    assert not out.exists()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"stopped before the first step: nothing had been trained yet, {out} is removed"
    assert signal.getsignal(sig) is before


@SIGNALS
def test_a_signal_during_the_set_up_of_a_resumed_run_changes_nothing(run, tmp_path, monkeypatch, sig):
    out = shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(out)
    folder.write_metrics(7, loss=1.0)  # of a step that no checkpoint holds
    folder.close()
    before = contents(out)
    signal_in(training.setup, "LatentFeed", monkeypatch, sig)
    training.resume(out, ["training.num_steps=8", "sampling.guidance=1.5"])
    assert contents(out) == before
    assert "nothing is lost; go on with: mmdit train --resume" in (out / "log.txt").read_text()


@SIGNALS
def test_a_signal_during_the_scores_leaves_a_whole_run(tmp_path, monkeypatch, sig):
    signal_in(training.trainer, "evaluate_run", monkeypatch, sig)
    out = training.train(config_for(tmp_path / "run"))
    assert "all is trained and saved, score it with: mmdit evaluate" in (out / "log.txt").read_text()
    assert list_checkpoints(out)[-1].name == "step-00000006"
    assert training.evaluate_run(out)["validation_loss"] > 0


def test_a_signal_just_before_the_scores_is_heeded_too(tmp_path, monkeypatch):
    """After the last look for one, while it still only leaves a mark."""
    real = training.writing.Writer.wait

    def wait(self):
        real(self)
        if list_checkpoints(self.run)[-1:] == [self.run / "checkpoints" / "step-00000006"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.writing.Writer, "wait", wait)
    out = training.train(config_for(tmp_path / "run"))
    assert "all is trained and saved, score it with: mmdit evaluate" in (out / "log.txt").read_text()
    assert not (out / "scores.json").exists()


def test_a_first_signal_waits_for_the_step_and_a_second_acts_at_once():
    """Also where it is another signal; and where no step is in progress, the first."""

    class Handled(BaseException):
        pass

    def handler(sig, frame):
        raise Handled

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with Interrupts() as interrupts, interrupts.deferred():
            assert not interrupts.caught
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.caught
            with pytest.raises(Handled):
                os.kill(os.getpid(), signal.SIGTERM)
        with Interrupts():
            for error in (Interrupted, Handled):
                with pytest.raises(error):
                    os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_does_not_take_the_place_of_the_error_that_ends_training():
    """As where a process dies: torchrun ends the others while they say so."""

    def lost():
        with Interrupts() as interrupts:
            try:
                with interrupts.deferred():
                    raise ValueError("lost")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                assert interrupts.caught

    with pytest.raises(ValueError, match="lost"):
        lost()


def test_a_terminal_that_closes_may_say_so_twice_and_nohup_stands():
    before = signal.getsignal(signal.SIGHUP)
    with Interrupts() as interrupts, interrupts.deferred():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.caught
    assert signal.getsignal(signal.SIGHUP) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts, interrupts.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.caught
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_command_saves_and_exits_0(tmp_path, sig):
    """With worker processes, which end with it."""
    out = tmp_path / "run"
    with python(*LONG_COMMAND, "--out", out, "data.cache_latents=false", "data.num_workers=2") as process:
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until and len(RunFolder(out).metrics()) < 3:
            time.sleep(0.05)
        output = end(process, sig)
    state, _ = load_latest(out, print)
    assert state["step"] >= 3 and f"stopped at step {state['step']}, all saved" in output
    assert RunFolder(out).metrics()[-1]["step"] == state["step"]


def test_sigterm_to_the_command_while_it_encodes_exits_0(tmp_path):
    out = tmp_path / "run"
    with python(*LONG_COMMAND, "--out", out, "data.num_samples=20000") as process:
        assert any(line.startswith("encoding ") for line in process.stdout)
        output = end(process)
    assert output == f"stopped before the first step: nothing had been trained yet, {out} is removed\n"
    assert not out.exists()
