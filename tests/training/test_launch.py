"""Runs of several processes under torchrun that stop, die and start again; and where a restart begins anew."""

import os
import re
import shutil
import signal

import pytest

import training
import training.launch
from tests.training.processes import LONG_COMMAND, PATIENCE, children, linux, python, wait_for_steps
from tests.training.runs import config_for, metrics
from training.checkpoint import list_checkpoints, load_latest
from training.config import load_config
from training.interrupts import Interrupts
from training.lock import LOCK
from training.parallel import ProcessLost
from training.run import OWN, RunFolder

# --- several processes --------------------------------------------------------------------------------------------


def torchrun(*words: object, max_restarts: int = 0):
    """`torchrun WORDS` on two processes, as `python` starts it."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", max_restarts]
    return python("-m", *launch, *words)


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


# --- where a restart begins ---------------------------------------------------------------------------------------


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


def test_a_run_folder_holds_only_known_files(tmp_path):
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
