"""Runs that were stopped or killed go on to the same bits; and what a resumed run refuses or says."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmdit
import training
import training.writing
from mmdit import memory
from mmdit.weights_io import read_weights
from tests.training.pictures import shards_of
from tests.training.runs import LONG, assert_bit_equal, config_for, contents, make_pictures, metrics, stop_after
from training.checkpoint import list_checkpoints, load_latest
from training.config import load_config
from training.interrupts import Interrupts
from training.resuming import check_state
from training.run import RunFolder
from training.trainer import Trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """57 samples in batches of 8: the second epoch begins in step 8."""
    return training.train(config_for(tmp_path_factory.mktemp("runs") / "whole", *LONG))


@pytest.mark.parametrize("cached", ["true", "false"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(uninterrupted, tmp_path, monkeypatch, cached, workers):
    """Also from mid-epoch and between two lines of metrics; and neither the cache nor the workers change anything."""
    changes = (f"data.cache_latents={cached}", f"data.num_workers={workers}")
    with monkeypatch.context() as patch:
        stop_after(4, patch, signal.SIGINT if workers else signal.SIGTERM)
        out = training.train(config_for(tmp_path / "run", *LONG, *changes))
    assert [path.name for path in list_checkpoints(out)] == ["step-00000004"]
    assert "stopped at step 4, all saved; go on with: mmdit train --resume" in (out / "log.txt").read_text()
    assert not (out / "scores.json").exists()
    assert training.resume(out) == out
    assert metrics(out, "loss") == metrics(uninterrupted, "loss")
    assert metrics(out, "grad_norm") == metrics(uninterrupted, "grad_norm")
    assert [step for step, _ in metrics(out, "loss")] == [3, 6, 9, 10]
    assert_bit_equal(out, uninterrupted)
    scores, others = (json.loads((path / "scores.json").read_text()) for path in (out, uninterrupted))
    assert scores["validation_loss"] == others["validation_loss"]


def test_a_killed_run_goes_on_from_its_last_checkpoint(uninterrupted, tmp_path, monkeypatch):
    """Killed in step 6, with a checkpoint of step 2 to 4: what was written after it is forgotten and done again."""

    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == 6:
            raise Killed
        return real(self, model, batch)

    config = config_for(tmp_path / "run", *LONG, "training.checkpoint_every=2", "training.keep_checkpoints=3")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_train_step", train_step)
        training.train(config)
    out = tmp_path / "run"
    data = out / "checkpoints" / "step-00000006" / "ema.safetensors"
    data.write_bytes(data.read_bytes()[:-5])  # and the newest one is bad
    training.resume(out)
    log = (out / "log.txt").read_text()
    assert "passed over" in log and "step-00000006/ema.safetensors has changed" in log and "resumed at step 4" in log
    assert metrics(out, "loss") == metrics(uninterrupted, "loss")
    assert_bit_equal(out, uninterrupted)


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    for folder in list_checkpoints(out):
        (folder / "state.json").unlink()
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        training.resume(out)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_resuming_with_more_steps_keeps_the_new_settings(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    changes = ["training.num_steps=8", "sampling.guidance=1.5", "evaluation.prompts_per_question=0"]
    training.resume(out, changes)
    assert [step for step, _ in metrics(out, "loss")] == list(range(1, 9))
    assert RunFolder.open(out).config() == load_config(run, changes)
    assert mmdit.TextToImage.load(out, "cpu").sampling["guidance"] == 1.5
    assert json.loads((out / "scores.json").read_text())["sampling"]["guidance"] == 1.5
    # The same asked for with a config and its folder, as `mmdit train CONFIG --resume RUN` does: nothing is left to do.
    config = load_config(out, [f"training.out={out}"])
    assert training.train(config, resume=True) == out
    assert [step for step, _ in metrics(out, "loss")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("size", "said"), [(6, "12 samples come once more"), (12, "24 samples are passed over"), (8, None)]
)
def test_resuming_with_another_size_of_batches_says_what_becomes_of_samples(run, size, said):
    """As batch number k is that of a run of this size; nothing is drawn twice where it is the same."""
    config = load_config(run, ["training.num_steps=7", f"training.batch_size={size}"])
    (told := RunFolder(run)).log = (lines := []).append
    state, _ = load_latest(run, print)
    check_state(told, config, state, data=state)
    assert ([line.rpartition("so that ")[2] for line in lines] or [None]) == [said]


class Killed(BaseException):
    """What stands for SIGKILL: nothing catches it."""


def test_a_kill_between_the_last_checkpoint_and_its_pipeline_leaves_no_old_weights(
    uninterrupted, tmp_path, monkeypatch
):
    """The run is scored when it goes on, and sampled ever after, with the average of its last step."""
    real, out = mmdit.TextToImage.save_weights, tmp_path / "run"

    def save_weights(self, folder):
        if list_checkpoints(out)[-1].name == "step-00000010":
            raise Killed
        real(self, folder)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mmdit.TextToImage, "save_weights", save_weights)
        training.train(config_for(out, *LONG, "training.checkpoint_every=5"))
    assert training.resume(out) == out
    for part in ("transformer", "text"):
        ours, theirs = (read_weights(run / "pipeline" / part / "model.safetensors") for run in (out, uninterrupted))
        assert [name for name, x in theirs.items() if not torch.equal(ours[name], x)] == []
    scores, others = (json.loads((path / "scores.json").read_text()) for path in (out, uninterrupted))
    assert scores["validation_loss"] == others["validation_loss"]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_that_is_saved_is_not_saved_again(resumed, tmp_path, monkeypatch):
    """Stopped in a step whose checkpoint is written anyway, or after none: a kill could take the only one there is."""
    config = config_for(tmp_path / "run", *LONG, "training.checkpoint_every=4", "training.keep_checkpoints=1")
    saved, real = [], training.writing.save_checkpoint

    def save(run, state, *rest):
        saved.append(state["step"])
        return real(run, state, *rest)

    monkeypatch.setattr(training.writing, "save_checkpoint", save)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        out = training.train(config)
    if resumed:
        monkeypatch.setattr(Interrupts, "caught", property(lambda self: True))
        assert training.resume(out) == out
    assert saved == [4]
    assert "stopped at step 4, all saved" in (out / "log.txt").read_text().splitlines()[-1]


def test_a_resumed_run_refuses_what_would_do_nothing(run, tmp_path):
    before = contents(run)
    with pytest.raises(ValueError, match=r"is at step 6, past training.num_steps = 5: .*train afresh"):
        training.resume(run, ["training.num_steps=5"])
    with pytest.raises(ValueError, match=f"was trained with another init: none, not {tmp_path}"):
        training.resume(run, [f"init={tmp_path}"])
    with pytest.raises(ValueError, match="training.out .* is the folder of a new run.* move it"):
        training.resume(run, [f"training.out={tmp_path}"])
    assert contents(run) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("model.depth=3", "model.depth: 2, not 3;"),
        ("model.qk_norm=none", "model"),
        ("text.width=64", "text.width: 32, not 64"),
        ("autoencoder=shapes", "autoencoder"),
        ("seed=1", "seed"),
        ("data.num_samples=32", "data.num_samples"),
        ("data.image_size=16", "data.image_size"),
        ("data.held_out=0.3", "data.held_out"),
        ("data.source=shapes:32", "data.source"),
        ("data.buckets=true", "data.buckets: false, not true;"),
        ("data.captions=text=1", "data.captions"),
        ("optimizer.name=muon", "optimizer.name"),
        ("optimizer.base_width=16", "optimizer.base_width"),
        ("training.ema=power", "training.ema"),
    ],
)
def test_resuming_another_model_or_other_samples_is_refused(run, change, part):
    before = (run / "config.toml").read_text()
    with pytest.raises(ValueError, match=f"was trained with another {part}.*train afresh"):
        training.resume(run, [change])
    with pytest.raises(ValueError, match=f"was trained with another {part}"):
        training.train(load_config(run, [change, f"training.out={run}"]), resume=True)
    assert (run / "config.toml").read_text() == before


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ("init=weights; lora.rank=2", "lora.rank=4"),
        ("training.ema=power", "training.ema_sigma_rel=[0.05, 0.2]"),
        ("data.source=hf-stream:x; data.cache_latents=false", "data.shuffle_buffer=7"),
        ("data.buckets=true", "data.bucket_ratio=3"),
        ("data.buckets=true", "training.batch_size=16"),
        ("data.buckets=true", "training.packing=true"),
        ("optimizer.name=schedule-free; training.ema_decay=0", "optimizer.betas=[0.8, 0.99]"),
    ],
)
def test_a_resumed_run_refuses_changes_that_matter_only_beside_another_setting(how, change, tmp_path):
    RunFolder.create(tmp_path / "run", config_for(tmp_path / "run", *how.split("; ")))
    with pytest.raises(ValueError, match=f"was trained with another {change.partition('=')[0]}"):
        training.resume(tmp_path / "run", [change])


def test_a_config_that_was_edited_to_another_seed_does_not_go_on(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("seed = 0", "seed = 5", 1))
    with pytest.raises(ValueError, match="the checkpoint was made with seed 0, the config says 5"):
        training.resume(out, ["training.num_steps=8"])


def test_data_may_move_and_is_read_as_one_likes_but_stays_the_same(tmp_path, monkeypatch, capsys):
    """Read from another place, by workers, without a cache: the same bits. Other samples are refused, more are told."""
    data, other = make_pictures(tmp_path / "data", 24), make_pictures(tmp_path / "other", 23)
    changes = [f"data.source={data}", "training.num_steps=4", "training.checkpoint_every=0"]
    whole = training.train(config_for(tmp_path / "whole", *changes))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        out = training.train(config_for(tmp_path / "run", *changes))
    moved = data.rename(tmp_path / "moved")
    before = contents(out)
    with pytest.raises(ValueError, match=f"was trained with another data.source: {data}, not {other}; a resumed run"):
        training.resume(out, [f"data.source={other}"])
    assert contents(out) == before
    training.resume(out, [f"data.source={moved}", "data.num_workers=1", "data.cache_latents=false"])
    assert_bit_equal(out, whole)
    assert RunFolder.open(out).config().data.source == str(moved)
    with pytest.raises(ValueError, match=f"no folder or file {data};"):
        training.evaluate_run(whole)
    assert training.evaluate_run(whole, data=str(moved))["validation_loss"] == metrics(whole, "validation_loss")[-1][1]
    assert "has changed since" not in capsys.readouterr().out
    shutil.copy(moved / "000.png", moved / "more.png")
    shutil.copy(moved / "000.txt", moved / "more.txt")
    training.resume(out, ["training.num_steps=5"])
    assert f"warning: {moved} has changed since it was trained on" in capsys.readouterr().out
    assert metrics(out, "loss")[-1][0] == 5


def test_folders_that_are_taken_or_are_no_runs_are_named(run, tmp_path):
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="exists: continue it with"):
        training.train(config_for(run))
    assert (run / "metrics.jsonl").read_text() == before
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        training.resume(tmp_path)


@pytest.mark.parametrize("change", ["repaired", "read as it comes"])
def test_samples_that_come_or_go_between_two_parts_of_a_run_are_said(change, tmp_path, monkeypatch):
    """The keys are the same, and the order that is made of those that can be read is another."""
    folder = make_pictures(tmp_path / "pictures", 24)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[:300])
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        out = training.train(config_for(tmp_path / "run", f"data.source={folder}", "data.held_out=0"))
    stop_after(4, monkeypatch)
    training.resume(out)
    assert "the order of samples is another now" not in (out / "log.txt").read_text()
    if change == "repaired":
        (folder / "003.png").write_bytes(whole)
    training.resume(out, ["data.cache_latents=false"] if change != "repaired" else [])
    line = "warning: of 24 samples, not of 23 as before, batches are made: the order of samples is another now"
    assert line in (out / "log.txt").read_text()


def test_a_run_that_was_moved_is_named_where_it_is(tmp_path, monkeypatch):
    """Where another process is lost, what is said names the folder to go on in."""
    RunFolder.create(tmp_path / "run", config_for(tmp_path / "run"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    asked, real = [], training.launch.ranks_of
    monkeypatch.setattr(training.launch, "ranks_of", lambda config: asked.append(config.run_folder) or real(config))
    with pytest.raises(ValueError, match="moved/pipeline/text/tokenizer.json"):
        training.resume(moved)
    assert asked == [moved]


def test_data_that_grows_leaves_one_index(tmp_path):
    folder = shards_of(tmp_path / "shards", (12,))
    changes = f"data.source={folder}", "data.num_samples=none", "data.cache_latents=false", "data.held_out=0"
    out = training.train(config_for(tmp_path / "run", *changes, "training.num_steps=1"))
    for step in (2, 3):
        shutil.copy(folder / "000.tar", folder / f"{step:03d}.tar")
        training.resume(out, [f"training.num_steps={step}"])
        names = {path.name.split(".")[1] for path in (out / "index").iterdir()}
        assert len(names) == 1 and len(list((out / "index").iterdir())) == 3
    assert "data: 36 samples" in (out / "log.txt").read_text()


def test_a_run_and_its_sequel_work_alike_and_leave_the_process_as_it_was(tmp_path, monkeypatch):
    """Both keep freed memory for the next step, and give back the caller's random numbers."""
    held, real = [], Trainer._train_step
    monkeypatch.setattr(memory, "_glibc", lambda: SimpleNamespace(mallopt=lambda *_: 1, malloc_trim=lambda _: 1))
    monkeypatch.setattr(Trainer, "_train_step", lambda *args: held.append(memory._depth) or real(*args))
    before = torch.get_rng_state()
    out = training.train(config_for(tmp_path / "run", "training.num_steps=1"))
    assert torch.equal(torch.get_rng_state(), before) and memory._depth == 0
    training.resume(out, ["training.num_steps=2"])
    assert torch.equal(torch.get_rng_state(), before) and memory._depth == 0
    assert held == [1, 1]


def test_the_log_says_which_settings_are_other_from_which_step_on(tmp_path):
    config = config_for(tmp_path / "run", "training.num_steps=2")
    run = training.train(config)

    def said():
        lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
        return [line.split(" ", 2)[2] for line in lines if "from here on" in line or "resumed at" in line]

    training.resume(run, ["optimizer.schedule=cosine", "optimizer.betas=[0.8,0.9]", "training.num_steps=3"])
    first, old = said(), config.optimizer
    assert first == [
        "resumed at step 2",
        f"optimizer.betas = [0.8,0.9] from here on, was [{old.betas[0]},{old.betas[1]}]",
        f"optimizer.schedule = cosine from here on, was {old.schedule}",
        "training.num_steps = 3 from here on, was 2",
    ]
    training.resume(run)
    assert said() == [*first, "resumed at step 3"], "and nothing where none is"
