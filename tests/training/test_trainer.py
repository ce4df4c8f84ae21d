"""The trainer, from config to scored run folder: the demo's own path in a few steps; stops, resumes; every setting."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit
import training
import training.evaluate
import training.setup
import training.trainer
import training.writing
from mmdit.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from mmdit.weights_io import read_weights
from tests.training.processes import PATIENCE, python
from training.checkpoint import list_checkpoints, load_latest
from training.config import load_config
from training.data import place_of
from training.devices import compiled
from training.interrupts import STOPS, Interrupted, Interrupts
from training.objectives import Loss
from training.progress import Progress
from training.resuming import check_state
from training.run import RunFolder
from training.settings import field_docs
from training.trainer import Trainer


def config_for(out: Path, *overrides: str) -> training.TrainConfig:
    """The tiny preset, without what takes most of its time."""
    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    return load_config("pixels-tiny", [*quiet, "training.precision=fp32", f"training.out={out}", *overrides])


def metrics(run: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in RunFolder(run).metrics() if name in row]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, average, optimiser."""
    folder = list_checkpoints(run)[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in read_weights(file).items()}


def assert_bit_equal(run: Path, other: Path) -> None:
    a, b = last_weights(run), last_weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- the whole path -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The tiny preset as it is, trained once."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert training.train(load_config("pixels-tiny", [f"training.out={out}"])) == out
    return out


def test_a_preset_is_trained_by_its_name_or_a_file(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text((run / "config.toml").read_text().replace(str(run), "mine"))
    for config, folder in (("pixels-tiny", "runs/pixels-tiny"), (tmp_path / "my.toml", "mine")):
        assert training.train(config) == Path(folder)
        assert_bit_equal(run, tmp_path / folder)
    with pytest.raises(ValueError, match='did you mean the preset "demo"'):
        training.train("dmeo")


def test_the_run_folder_holds_all_that_is_promised(run):
    assert {path.name for path in run.iterdir()} == {
        "config.toml",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "pipeline",
        "log.txt",
        "loss.png",
        "scores.json",
        "samples.png",
    }
    assert [path.name for path in list_checkpoints(run)] == ["step-00000003", "step-00000006"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    for picture in (run / "loss.png", run / "samples.png", run / "samples" / "step-00000003.png"):
        assert np.asarray(Image.open(picture).convert("L")).std() > 5
    assert RunFolder.open(run).config() == load_config("pixels-tiny", [f"training.out={run}"])
    assert list((run / "tensorboard").iterdir())


def test_metrics_have_every_step(run):
    losses = metrics(run, "loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert all(0.5 < loss < 5 for _, loss in losses)
    assert [rate for _, rate in metrics(run, "lr")] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert [step for step, _ in metrics(run, "validation_loss")] == [3, 6]
    assert all(norm > 0 for _, norm in metrics(run, "grad_norm"))
    speeds = metrics(run, "images_per_second")
    assert [step for step, _ in speeds] == [2, 3, 4, 5, 6] and all(speed > 0 for _, speed in speeds)  # 1: not known


def test_a_line_of_metrics_is_of_the_steps_since_the_last(run, tmp_path):
    """The mean of their losses; and of the last of them the gradient, in all and by parts."""
    out = training.train(config_for(tmp_path / "run", "training.log_every=4"))
    losses = [loss for _, loss in metrics(run, "loss")]
    assert metrics(out, "loss") == [(4, pytest.approx(np.mean(losses[:4]))), (6, pytest.approx(np.mean(losses[4:])))]
    for row in (row for row in RunFolder(out).metrics() if "loss" in row):
        parts = [row[f"grad_norm_{part}"] for part in ("blocks", "text", "in", "out")]
        assert row["grad_norm"] == pytest.approx(np.linalg.norm(parts))
        assert row["grad_norm"] == dict(metrics(run, "grad_norm"))[row["step"]]


def test_validation_is_left_out_of_the_rate_and_said_once(tmp_path, monkeypatch, capsys):
    pausing, seen = [], []

    class Watched(Progress):
        @contextmanager
        def paused(self):
            with super().paused():
                pausing.append(True)
                yield
                pausing.clear()

    monkeypatch.setattr("training.trainer.Progress", Watched)
    monkeypatch.setattr(
        "training.trainer.validation_loss", lambda *_: seen.append(bool(pausing)) or {"validation_loss": 1.0}
    )
    run = training.train(config_for(tmp_path / "run", "training.validate_every=3"))
    assert seen == [True, True] and len(metrics(run, "validation_loss")) == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line]
    assert len(said) == 2 and said[0] == "step 3: validation loss 1.0000" and said[1].startswith("validation loss ")


def test_what_happens_before_the_first_step_is_said(run):
    log = [line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines()]
    done = [line.startswith("latents of ") for line in log].index(True)
    count = int(log[done].split()[2])
    assert log[done - 1] == f"encoding {count} images, once: their latents stay in memory"


def test_scores_are_written_and_found_again(run, capsys):
    scores = json.loads((run / "scores.json").read_text())
    assert set(scores["shapes_eval"]) == set(training.ShapesEval(32, 1, 0).score([np.zeros((32, 32, 3), np.uint8)] * 6))
    assert scores["validation_loss"] == metrics(run, "validation_loss")[-1][1]
    assert scores["sampling"] == {"solver": "ab2", "num_steps": 2, "guidance": 2.0, "interval": [0.0, 1.0]}
    assert scores["network_evaluations"] == 4
    again = training.evaluate_run(run, progress=True)
    assert capsys.readouterr().err.startswith("drawing pictures 6/6")
    assert {**again, "seconds_per_image": 0} == {**scores, "seconds_per_image": 0}
    assert training.evaluate_run(run, num_steps=1, solver="heun")["sampling"]["solver"] == "heun"
    assert json.loads((run / "scores.json").read_text())["sampling"]["num_steps"] == 1


def test_a_run_that_was_trained_on_cuda_is_scored_where_there_is_none(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = shutil.copytree(run, tmp_path / "run")
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace('device = "auto"', 'device = "cuda"'))
    scores = training.evaluate_run(out, {"prompts_per_question": 0})
    assert scores["validation_loss"] == json.loads((run / "scores.json").read_text())["validation_loss"]


def test_the_model_of_a_run_draws(run):
    pipe = mmdit.TextToImage.load(run, "cpu")
    pictures = pipe(["a red circle", "two blue stars"], seed=1)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    trunk = mmdit.load(run).state_dict()
    ema = read_weights(run / "checkpoints" / "step-00000006" / "ema.safetensors")
    assert all(torch.equal(value, ema[f"transformer.{name}"]) for name, value in trunk.items())
    text = pipe.model.conditioner.state_dict()
    assert all(torch.equal(value, ema[f"conditioner.{name}"]) for name, value in text.items())


def test_the_command_line_samples_and_evaluates_a_run(run, tmp_path):
    from typer.testing import CliRunner

    from mmdit_cli.main import app

    def call(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.output

    call("sample", run, "a red circle", "a star", "--steps", 2, "--size", "16x32", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x-1.png").size == (32, 16)
    call("sample", run, "a red circle", "--checkpoint", 3, "--out", tmp_path / "y.png")
    assert "validation_loss" in call("evaluate", run)


def test_a_model_that_can_learn_does(tmp_path):
    """On two pictures, small patches: far below the loss of knowing nothing, which is the first."""
    words = "data.num_samples=2 data.held_out=0 model.patch_size=4 training.num_steps=80 optimizer.lr=0.01"
    out = training.train(config_for(tmp_path / "run", *words.split(), "training.checkpoint_every=0"))
    losses = [loss for _, loss in metrics(out, "loss")]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def make_autoencoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = PatchAutoencoderConfig(channels=4, widths=(8, 8), depth=1, scaling_factor=0.75, shift_factor=0.125)
    PatchAutoencoder(config).save(folder)
    return folder


def test_latents_of_an_autoencoder(tmp_path, monkeypatch):
    """Non-square on purpose: 32 x 48 pixels are 4 x 6 latent pixels are 2 x 3 tokens. The run keeps its own copy."""
    folder = make_autoencoder(tmp_path / "autoencoder")
    changes = [f"autoencoder={folder}", "model.patch_size=2", "data.image_size=[32, 48]", "training.num_steps=4"]
    whole = training.train(config_for(tmp_path / "whole", *changes))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        out = training.train(config_for(tmp_path / "run", *changes))
    shutil.rmtree(folder)
    assert_bit_equal(training.resume(out), whole)
    pipe = mmdit.TextToImage.load(out, "cpu")
    assert (pipe.autoencoder.channels, pipe.autoencoder.factor, pipe.autoencoder.scaling_factor) == (4, 8, 0.75)
    assert pipe("a star")[0].size == (48, 32)
    assert "6 image tokens" in (out / "log.txt").read_text()


def test_latents_of_the_shipped_autoencoder(tmp_path):
    changes = ["autoencoder=shapes", "model.patch_size=2", "data.image_size=64", "training.num_steps=2"]
    out = training.train(config_for(tmp_path / "run", *changes, "data.num_samples=32", "training.sample_every=2"))
    assert mmdit.TextToImage.load(out, "cpu")("a red circle")[0].size == (64, 64)
    assert all(0.5 < loss < 4 for _, loss in metrics(out, "loss"))  # latents of about unit variance, less eps


# --- stops and resumes --------------------------------------------------------------------------------------------

LONG = ("training.num_steps=10", "training.checkpoint_every=0", "training.log_every=3", "training.precision=auto")


def stop_after(step: int, monkeypatch, sig: int = signal.SIGTERM) -> None:
    """Send ourselves a signal in the middle of that step."""
    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == step - 1:
            os.kill(os.getpid(), sig)
        return real(self, model, batch)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


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
def test_what_hangs_on_another_setting_is_kept_beside_it(how, change, tmp_path):
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


def contents(run: Path) -> dict[str, str]:
    """Digests of all that a run holds but its log."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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


def end(process: subprocess.Popen, sig: int = signal.SIGTERM) -> str:
    """The signal to the whole group, which ends with status 0; returns what is printed from here on."""
    os.killpg(process.pid, sig)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return output


LONG_COMMAND = ("-m", "mmdit_cli", "train", "pixels-tiny", "training.num_steps=100000", "training.checkpoint_every=0")
LONG_COMMAND += ("training.validate_every=0", "training.sample_every=0")


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


# --- data that is not as it should be -----------------------------------------------------------------------------


def make_pictures(folder: Path, n: int) -> Path:
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    return folder


@pytest.mark.parametrize(
    ("source", "autoencoder", "warned"), [("mine", "shapes", 1), ("mine", "none", 0), ("shapes:9", "shapes", 0)]
)
def test_a_run_warns_of_the_drawn_worlds_autoencoder_on_other_pictures(tmp_path, source, autoencoder, warned):
    folder = make_pictures(tmp_path / "mine", 3)
    changes = (f"autoencoder={autoencoder}", "data.num_samples=none", "data.image_size=64", "model.patch_size=2")
    config = config_for(tmp_path / "run", f"data.source={folder if source == 'mine' else source}", *changes)
    training.setup.open_data(config, RunFolder.create(tmp_path / "run", config), 8)
    assert (tmp_path / "run" / "log.txt").read_text().count('the autoencoder "shapes" has seen drawn') == warned


@pytest.mark.parametrize("cached", ["true", "false"])
def test_bad_images_are_counted_and_named_and_training_goes_on(tmp_path, cached):
    folder = make_pictures(tmp_path / "shapes-of-mine", 24)  # pictures of one's own, whatever the folder is called
    (folder / "003.png").write_bytes(b"")
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:300])
    (folder / "011.png").write_text("no image")
    (folder / "013.txt").unlink()
    changes = [f"data.source={folder}", "data.image_size=none", "data.held_out=0.2", f"data.cache_latents={cached}"]
    config = config_for(tmp_path / "run", *changes)
    config = replace(config, evaluation=replace(config.evaluation, prompts_per_question=2))  # as a preset may say
    out = training.train(config)
    log = (out / "log.txt").read_text()
    skipped = [line.split("skipped ", 1)[1] for line in log.splitlines() if "skipped (" in line]
    assert [line.split(":")[0] for line in skipped] == [f"({k} so far)" for k in range(1, 5)]
    assert sorted(line.split(": ")[1] for line in skipped) == ["003", "007", "011", "013"]
    assert all(line.split(": ", 2)[2] for line in skipped)
    assert "fitted to 40 x 32" in log
    assert metrics(out, "loss")[-1][0] == 6
    scores = json.loads((out / "scores.json").read_text())
    assert "validation_loss" in scores and "shapes_eval" not in scores
    assert (out / "samples.png").exists()


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


def test_held_out_samples_that_are_all_bad_are_no_reason_to_stop(tmp_path):
    folder = make_pictures(tmp_path / "data", 12)
    source = training.open_source(str(folder))
    _, held_out = training.split_by_key(source, 0.2)
    assert 0 < len(held_out) < 6
    for i in held_out:
        (folder / f"{i:03d}.png").write_bytes(b"")
    changes = [f"data.source={folder}", "data.image_size=[40, 32]", "data.held_out=0.2", "training.validate_every=1"]
    out = training.train(config_for(tmp_path / "run", *changes))
    assert "no validation loss" in (out / "log.txt").read_text()
    assert "validation_loss" not in json.loads((out / "scores.json").read_text())


def test_nothing_held_out_is_said(tmp_path):
    out = training.train(config_for(tmp_path / "run", "data.held_out=0", "training.num_steps=1"))
    assert "warning: no sample is held out" in (out / "log.txt").read_text()
    assert metrics(out, "validation_loss") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=nowhere"], "nowhere"),
        (["data.source={bad}", "data.image_size=none"], "no image can be read"),
        (["data.source={bad}", "data.image_size=16"], "none of the 3 samples can be used; one of them is 000: "),
        (["data.source={bad}", "data.image_size=16", "data.cache_latents=false"], "none of the 3 samples can be used"),
        (["data.held_out=0.999999"], "held out: lower data.held_out"),
        (["autoencoder=nowhere"], "autoencoder not found: nowhere"),
        (["training.device=cuda"], "no CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_set_up_that_fails_leaves_the_name_free(tmp_path, changes, message):
    bad = make_pictures(tmp_path / "bad", 3)
    for picture in bad.glob("*.png"):
        picture.write_text("no image")
    changes = [change.format(bad=bad) for change in changes]
    with pytest.raises(ValueError, match=message):
        training.train(config_for(tmp_path / "run", "data.held_out=0", *changes))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_link_is_left_free_too(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for _ in range(2):
        with pytest.raises(ValueError, match="nowhere"):
            training.train(config_for(tmp_path / "run", "data.source=nowhere"))
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_run_that_was_moved_is_named_where_it_is(tmp_path, monkeypatch):
    """Where another process is lost, what is said names the folder to go on in."""
    RunFolder.create(tmp_path / "run", config_for(tmp_path / "run"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    asked, real = [], training.launch.ranks_of
    monkeypatch.setattr(training.launch, "ranks_of", lambda config: asked.append(config.run_folder) or real(config))
    with pytest.raises(ValueError, match="moved/pipeline/text/tokenizer.json"):
        training.resume(moved)
    assert asked == [moved]


# --- one step -----------------------------------------------------------------------------------------------------


def gradients_of_a_step(tmp_path, monkeypatch, *overrides) -> dict[str, torch.Tensor]:
    """The gradients as the optimiser is given them, of an objective without draws."""
    config = config_for(tmp_path / str(len(list(tmp_path.iterdir()))), *overrides)
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    seen = {}

    def objective(model, batch, generator):
        v = model(batch.latents, torch.full((len(batch.latents),), 0.5), batch.tokens)
        loss = (v - batch.latents).square().mean()
        return Loss(loss, {})

    def step():
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    objective.prepared = lambda model, batch, generator: (batch, None)
    trainer.learner.objective = objective
    monkeypatch.setattr(trainer.optimizer, "step", step)
    with torch.no_grad():  # a fresh model gives gradients to its output alone
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    total, norm = trainer._train_step(trainer.learner, next(trainer.feed.batches(8, 0)))
    assert all(p.grad is None for p in trainer.model.parameters())
    return {"total": total, "norm": norm, **seen}


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path, monkeypatch):
    whole, parts = (
        gradients_of_a_step(tmp_path, monkeypatch, f"training.grad_accumulation={n}", "optimizer.grad_clip=0")
        for n in (1, 4)
    )
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(tmp_path, monkeypatch):
    free, clipped = (
        gradients_of_a_step(tmp_path, monkeypatch, f"optimizer.grad_clip={clip}") for clip in ("0", "0.01")
    )
    assert free["norm"] == clipped["norm"] > 0.01  # what is written down is the norm before
    names = free.keys() - {"total", "norm"}
    size = torch.stack([clipped[name].square().sum() for name in names]).sum().sqrt()
    torch.testing.assert_close(size, torch.tensor(0.01), rtol=1e-3, atol=0)
    for name in names:
        torch.testing.assert_close(clipped[name], free[name] * 0.01 / free["norm"], rtol=1e-3, atol=1e-8)


# --- every setting ------------------------------------------------------------------------------------------------


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(
        b"".join(name.encode() + t.numpy().tobytes() for name, t in sorted(tensors.items()))
    ).hexdigest()


def traces(out: Path, *overrides: str) -> dict:
    """What a short run leaves that a setting can change."""
    training.train(config_for(out, "training.num_steps=3", "optimizer.warmup_steps=1", *overrides))
    weights = last_weights(out)
    scores = json.loads((out / "scores.json").read_text())
    return {
        "shapes": {name: tuple(value.shape) for name, value in weights.items() if name.startswith("model/")},
        "weights": digest({name: value for name, value in weights.items() if name.startswith("model/")}),
        "average": digest({name: value for name, value in weights.items() if name.startswith("ema/")}),
        "loss": metrics(out, "loss"),
        "lr": metrics(out, "lr"),
        "validation": [(row["step"], len(row)) for row in RunFolder(out).metrics() if "validation_loss" in row],
        "checkpoints": [path.name for path in list_checkpoints(out)],
        "samples": sorted(path.name for path in (out / "samples").glob("*")),
        "grid": hashlib.sha256((out / "samples.png").read_bytes()).hexdigest(),
        "scores": {name: value for name, value in scores.items() if name != "seconds_per_image"},
        "log": [line.split(" ", 2)[2].replace(str(out), "") for line in (out / "log.txt").read_text().splitlines()],
    }


# Each key: settings that change it, and which traces must then differ. "=" before a name: which must not.
SETTINGS = {
    "seed": ("seed=1", "loss weights"),
    "autoencoder": ("autoencoder={autoencoder}", "shapes"),
    "data.source": ("data.source={pictures}", "loss log"),
    "data.num_samples": ("data.num_samples=60", "loss log"),
    "data.image_size": ("data.image_size=[16, 32]", "loss log"),
    "data.held_out": ("data.held_out=0.3", "loss scores"),
    "data.num_workers": ("data.num_workers=1; data.cache_latents=false", "=weights"),
    "data.cache_latents": ("data.cache_latents=false", "log =weights =loss"),
    "model.depth": ("model.depth=1", "shapes"),
    "model.num_heads": ("model.num_heads=4; model.head_dim=8", "weights"),
    "model.head_dim": ("model.head_dim=8", "shapes"),
    "model.mlp_ratio": ("model.mlp_ratio=2", "shapes"),
    "model.patch_size": ("model.patch_size=4", "shapes"),
    "model.qk_norm": ("model.qk_norm=none", "shapes"),
    "model.positions": ("model.positions=rope", "shapes"),
    "model.pos_embed_max_size": ("model.pos_embed_max_size=9", "shapes"),
    "model.dual_attention_layers": ("model.dual_attention_layers=[0]", "shapes"),
    "text.vocab_size": ("text.vocab_size=280", "shapes"),
    "text.tokenizer": ("text.tokenizer={tokenizer}; text.vocab_size=300", "loss"),
    "text.max_length": ("text.max_length=4", "loss"),
    "text.width": ("text.width=16", "shapes"),
    "text.depth": ("text.depth=0", "shapes"),
    "text.num_heads": ("text.num_heads=4", "=shapes weights"),
    "objective.time_density": ("objective.time_density=cosmap", "loss"),
    "objective.m": ("objective.m=1", "loss"),
    "objective.s": ("objective.s=0.5", "loss"),
    "objective.stratified": ("objective.stratified=false", "loss"),
    "objective.shift": ("objective.shift=3", "loss grid"),
    "objective.caption_dropout": ("objective.caption_dropout=1", "weights"),
    "optimizer.name": ("optimizer.name=muon", "weights"),
    "optimizer.momentum": ("optimizer.name=muon; optimizer.momentum=0.5", "weights"),
    "optimizer.lr": ("optimizer.lr=0.01", "lr weights"),
    "optimizer.betas": ("optimizer.betas=[0.5, 0.5]", "weights =lr"),
    "optimizer.eps": ("optimizer.eps=0.1", "weights"),
    "optimizer.weight_decay": ("optimizer.weight_decay=5", "weights"),
    "optimizer.grad_clip": ("optimizer.grad_clip=0.001", "weights"),
    "optimizer.warmup_steps": ("optimizer.warmup_steps=3", "lr weights"),
    "optimizer.schedule": ("optimizer.schedule=cosine", "lr weights"),
    "optimizer.final_lr_fraction": ("optimizer.schedule=linear; optimizer.final_lr_fraction=0.5", "lr"),
    "optimizer.decay_fraction": ("optimizer.schedule=wsd; optimizer.decay_fraction=1", "lr"),
    "optimizer.base_width": ("optimizer.base_width=16", "weights =shapes =lr"),
    "training.num_steps": ("training.num_steps=2", "loss checkpoints"),
    "training.batch_size": ("training.batch_size=4", "loss"),
    "training.grad_accumulation": ("training.grad_accumulation=2", "loss"),
    "training.ema_decay": ("training.ema_decay=0", "average =weights scores"),
    "training.ema": ("training.ema=power", "average =weights scores"),
    "training.ema_sigma_rel": ("training.ema=power; training.ema_sigma_rel=[0.2, 0.1]", "average =weights scores"),
    "training.ema_every": ("training.ema_every=2", "average =weights scores"),
    "training.packing": ("training.packing=true", "weights"),
    "training.precision": ("training.precision=bf16", "loss weights =shapes"),
    "training.recompute": ("training.recompute=full", "=loss"),
    "training.max_bad_steps": ("training.max_bad_steps=0", "=loss =weights"),
    "training.async_checkpoint": ("training.async_checkpoint=true", "=weights =average =checkpoints =scores"),
    "training.log_every": ("training.log_every=2", "loss =weights"),
    "training.validate_every": ("training.validate_every=1", "validation =weights"),
    "training.sample_every": ("training.sample_every=2", "samples =weights"),
    "training.checkpoint_every": ("training.checkpoint_every=1", "checkpoints =weights"),
    "training.keep_checkpoints": ("training.checkpoint_every=1; training.keep_checkpoints=1", "=checkpoints"),
    "sampling.prompts": ("sampling.prompts=['a star']", "grid =weights"),
    "sampling.solver": ("sampling.solver=heun", "grid scores =weights"),
    "sampling.num_steps": ("sampling.num_steps=5", "grid scores =weights"),
    "sampling.guidance": ("sampling.guidance=9", "grid scores =weights"),
    "sampling.interval": ("sampling.interval=[0.0, 0.1]", "grid scores =weights"),
    "sampling.seed": ("sampling.seed=3", "grid =weights"),
    "evaluation.validation_samples": ("evaluation.validation_samples=2", "scores =weights"),
    "evaluation.validation_times": ("evaluation.validation_times=3", "scores validation =weights"),
    "evaluation.prompts_per_question": ("evaluation.prompts_per_question=1", "scores grid =weights"),
    "evaluation.batch_size": ("evaluation.batch_size=3", "scores =weights"),
    "evaluation.seed": ("evaluation.seed=4", "scores =weights"),
}
TRANSFUSION = ("transfusion.enabled=true", "model.positions=rope", "text.vocab_size=400")
MIXED = {
    "weights": "separate",
    "time": "image",
    "attention": "causal",
    "image_weight": "1",
    "caption_first": "0",
    "image_first_cap": "1",
    "z_loss": "0.1",
    "codec": "unet",
    "size_tokens": "4",
}

ELSEWHERE = {
    "name": "the folder of a run without training.out: test_the_run_is_named_by_its_config",
    "training.out": "every test here",
    **{f"transfusion.{name}": "test_a_setting_of_transfusion_changes_what_it_should" for name in MIXED},
    **{f"transfusion.{name}": "test_text_alone_is_learnt_beside" for name in ("text", "text_fraction", "text_length")},
    "transfusion.enabled": "test_text_and_images_in_one_trunk",
    "transfusion.codec_width": "test_the_u_net_is_as_wide_as_asked",
    "transfusion.max_tokens": "test_what_cannot_run_leaves_the_name_free",
    "training.attention": "test_what_cannot_run_leaves_the_name_free",
    "init": "tests/training/test_start.py",
    **{f"lora.{name}": "tests/training/test_start.py" for name in ("rank", "alpha", "targets")},
    "transfusion.freeze_text": "tests/training/test_start.py",
    "text.encoder": "test_frozen_text.py",
    "training.recompute_every": "tests/training/test_sharding.py",
    **{f"parallel.{name}": "tests/training/test_distributed.py" for name in ("strategy", "shard_size", "reshard")},
    **{f"parallel.{name}": "tests/training/test_sharding.py" for name in ("cpu_offload", "timeout")},
    "training.ema_snapshot_every": "tests/training/test_ema.py",
    "training.ema_snapshot_dtype": "tests/training/test_ema.py",
    "data.posterior": "test_cache.py",
    **{f"data.{name}": "tests/training/test_buckets.py" for name in ("buckets", "bucket_ratio", "crop", "flip")},
    **{f"data.{name}": "tests/training/test_captions.py" for name in ("captions", "min_caption", "max_caption")},
    **{f"data.{name}": "tests/training/test_captions.py" for name in ("min_side", "max_aspect")},
    **{f"data.{name}": "tests/training/test_remote.py" for name in ("timeout", "retries")},
    "data.shuffle_buffer": "tests/training/test_rows.py",
    "training.compile": "test_compile_is_asked_for_where_it_should",
    "training.peak_tflops": "tests/training/test_telemetry.py",
    "training.profile": "tests/training/test_telemetry.py",
    "training.wandb": "tests/training/test_telemetry.py",
    **dict.fromkeys(
        [f"evaluation.{key}" for key in ["metrics", "metrics_every", "features", "clip", "reference"]]
        + [f"evaluation.{key}" for key in ["num_reference", "num_images", "cache"]],
        "tests/training/test_quality.py",
    ),
    "training.device": "test_the_device_is_the_one_asked_for",
}


def make_tokenizer(folder: Path) -> Path:
    """As transformers saves one: byte pairs with an end and padding of other names and ids than ours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend, bytes_of = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    backend.pre_tokenizer, backend.decoder = bytes_of(), decoders.ByteLevel()
    how = dict(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_of.alphabet())
    backend.train_from_iterator(["a red circle", "two blue stars"], trainers.BpeTrainer(show_progress=False, **how))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    """Pictures and an autoencoder, for the settings that name some."""
    folder = tmp_path_factory.mktemp("material")
    return {
        "pictures": make_pictures(folder / "pictures", 24),
        "autoencoder": make_autoencoder(folder / "autoencoder"),
        "tokenizer": make_tokenizer(folder / "tokenizer"),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return traces(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return training.train(config_for(tmp_path_factory.mktemp("mixed") / "run", *TRANSFUSION))


def test_text_and_images_in_one_trunk(mixed, tmp_path):
    """Trained, stopped and resumed to the same bits, scored, drawn from and asked, as any other run."""
    losses = [loss for _, loss in metrics(mixed, "loss")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    part = training.train(config_for(tmp_path / "part", *TRANSFUSION, "training.num_steps=3"))
    training.resume(part, ["training.num_steps=6"])
    assert_bit_equal(part, mixed)
    training.resume(part, ["training.num_steps=7", "evaluation.prompts_per_question=1"])
    scores = json.loads((part / "scores.json").read_text())
    assert {
        "validation_loss",
        "validation_text",
        "validation_caption",
        "shapes_eval",
        "captions_right",
    } <= scores.keys()
    assert 0 < scores["validation_text"] < 10 and 0 <= scores["captions_right"] <= 1
    pipe = mmdit.TextToImage.load(part, "cpu")
    [picture] = pipe(["a red circle"])
    assert picture.size == (32, 32)
    [written] = pipe.generate([[picture]], max_tokens=3, max_images=0)
    assert all(isinstance(text, str) for text in written.parts)
    with pytest.raises(ValueError, match="was trained with another transfusion"):
        training.resume(part, ["transfusion.weights=separate"])


@pytest.mark.parametrize("name", MIXED)
def test_a_setting_of_transfusion_changes_what_it_should(name, mixed, tmp_path):
    run = training.train(config_for(tmp_path / "run", *TRANSFUSION, f"transfusion.{name}={MIXED[name]}"))
    assert metrics(run, "loss") != metrics(mixed, "loss")


def test_the_u_net_is_as_wide_as_asked(tmp_path):
    settings = (*TRANSFUSION, "transfusion.codec=unet", "transfusion.codec_width=8", "training.num_steps=1")
    run = training.train(config_for(tmp_path / "run", *settings))
    trunk = mmdit.load(run)
    assert trunk.patch_in.conv.out_channels == 8 and trunk.config.codec_width == 8


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ([*TRANSFUSION, "transfusion.max_tokens=9"], "longer than the model's limit of 9"),
        (["training.attention=varlen"], "needs a CUDA device, this is cpu; here there are sdpa"),
        (["training.attention=flex"], "no backward pass on a CPU"),
    ],
)
def test_what_cannot_run_leaves_the_name_free(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        training.train(config_for(tmp_path / "run", *changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["model.positions=sincos"], 'a transfusion trunk needs "rope"'),
        (["model.head_dim=12"], "a multiple of 8"),
        (["model.dual_attention_layers=[0]"], "no second attention"),
        (["transfusion.image_first_cap=0"], "image_first_cap"),
        (["transfusion.text=words.txt"], "text_fraction 0: text alone needs both"),
        (["transfusion.text_fraction=0.5"], "text is none and transfusion.text_fraction 0.5"),
        (["transfusion.text=", "transfusion.text_fraction=0.5"], "transfusion.text is empty"),
        (["transfusion.text=a", "transfusion.text_fraction=0.5", "transfusion.enabled=false"], "enabled=true too"),
        (["transfusion.text=a", "transfusion.text_fraction=0.05"], "= 8 that is 0 documents of text"),
        (["transfusion.text=a", "transfusion.text_fraction=0.99"], "= 8 that is 8 documents of text"),
        (["transfusion.text=a", "transfusion.text_fraction=0.1", "training.grad_accumulation=2"], "is 0 documents"),
    ],
)
def test_settings_that_do_not_go_with_transfusion_are_refused(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        config_for(tmp_path, *TRANSFUSION, *changes)


# --- text alone, other tokenizers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Twenty documents, of which two to five are held out."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    rows = [{"text": f"number {i} comes after number {i - 1}, " * (1 + i % 3)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    return path


def with_words(words: Path, *overrides: str) -> tuple[str, ...]:
    return (*TRANSFUSION, f"transfusion.text={words}", "transfusion.text_fraction=0.25", *overrides)


@pytest.fixture(scope="module")
def beside(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("beside") / "run"
    return training.train(config_for(out, *with_words(words, "training.validate_every=3")))


def test_text_alone_is_learnt_beside(beside, words, mixed, tmp_path):
    """Read, held out in part, scored; each setting of it counts; and a batch has as many pictures less."""
    log = (beside / "log.txt").read_text()
    assert f"text: 40 documents of {words}" in log and "words.jsonl:41: no JSON" in log and " pieces to train on" in log
    losses = metrics(beside, "validation_corpus")
    assert [step for step, _ in losses] == [3, 6] and losses[1][1] < losses[0][1] < 8
    assert json.loads((beside / "scores.json").read_text())["validation_corpus"] == losses[1][1]
    others = [
        with_words(words, "transfusion.text_length=8"),
        with_words(words, "transfusion.text_fraction=0.5"),
        with_words(words, "training.grad_accumulation=2"),
    ]
    runs = [training.train(config_for(tmp_path / str(i), *other)) for i, other in enumerate(others)]
    assert len({tuple(metrics(run, "loss")) for run in (mixed, beside, *runs)}) == 5
    config = config_for(tmp_path / "batch", *others[2])
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    batch = next(trainer.feed.batches(8, 0))
    assert len(batch.latents) == len(batch.tokens.ids) == 6 and len(batch.text.ids) == 2
    assert [(len(part.latents), len(part.text.ids)) for part in batch.split(2)] == [(3, 1), (3, 1)]


def test_a_run_with_text_goes_on_to_the_same_bits(words, beside, tmp_path, monkeypatch):
    """Over the end of the text's epoch; and only with the text as it was."""
    text = Path(shutil.copy(words, tmp_path / "words.jsonl"))
    settings = with_words(text, *LONG, "transfusion.text_fraction=0.5", "transfusion.text_length=32")
    whole = training.train(config_for(tmp_path / "whole", *settings))
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        out = training.train(config_for(tmp_path / "run", *settings))
    before, good = contents(out), text.read_text()
    for content, what in ((good.replace("after", "past"), "words.jsonl has changed since"), ("", "no text found")):
        text.write_text(content)
        with pytest.raises(ValueError, match=what):
            training.resume(out)
    with pytest.raises(ValueError, match="was trained with another transfusion"):
        training.resume(out, [f"transfusion.text={words}"])
    assert contents(out) == before
    text.write_text(good)
    training.resume(out)
    assert metrics(out, "loss") == metrics(whole, "loss")
    assert_bit_equal(out, whole)


def test_the_tokenizer_learns_from_the_text_too(beside, mixed):
    text = "number 17 comes after"
    lengths = [
        len(mmdit.TextToImage.load(run, "cpu").model.conditioner.tokenizer.encode([text])[0]) for run in (beside, mixed)
    ]
    assert lengths[0] < lengths[1]


def test_text_that_cannot_be_learnt_from_leaves_the_name_free(tmp_path):
    one = tmp_path / "one.txt"
    one.write_text(next(text for text in map(str, range(99)) if place_of(text) < 0.1))  # held out
    for path, message in ((one, "no text to learn from: .* lower data.held_out"), ("nowhere", "no file or folder")):
        with pytest.raises(ValueError, match=message):
            training.train(config_for(tmp_path / "run", *with_words(path)))
        assert not (tmp_path / "run").exists()


def test_text_of_which_nothing_is_held_out_is_said(words, tmp_path):
    out = training.train(config_for(tmp_path / "run", *with_words(words, "data.held_out=0", "training.num_steps=1")))
    assert "warning: no text is held out" in (out / "log.txt").read_text()
    assert metrics(out, "validation_corpus") == []


def test_a_run_with_another_tokenizer_holds_all_of_it(material, tmp_path):
    """Trained, resumed, sampled and asked when the tokenizer's own folder is gone."""
    folder = Path(shutil.copytree(material["tokenizer"], tmp_path / "tokenizer"))
    settings = (*TRANSFUSION, f"text.tokenizer={folder}")
    whole = training.train(config_for(tmp_path / "whole", *settings))
    part = training.train(config_for(tmp_path / "run", *settings, "training.num_steps=3"))
    shutil.rmtree(folder)
    training.resume(part, ["training.num_steps=6"])
    assert_bit_equal(part, whole)
    pipe = mmdit.TextToImage.load(part, "cpu")
    config = pipe.model.transformer.config
    assert (config.pad, config.eos, config.vocab_size) == (0, 1, 400) and {config.boi, config.eoi} == {280, 281}
    [picture] = pipe(["a red circle"])
    assert all(isinstance(text, str) for text in pipe.generate([[picture]], max_tokens=3, max_images=0)[0].parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["text.tokenizer={tokenizer}", "text.vocab_size=281"], "has 282 tokens, .*: set text.vocab_size=282 or more"),
        (["text.tokenizer={pictures}"], "pictures is no tokenizer's folder: it has no tokenizer.json"),
    ],
)
def test_tokenizers_that_do_not_work_leave_the_name_free(material, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        training.train(config_for(tmp_path / "run", *TRANSFUSION, *(change.format(**material) for change in changes)))
    assert not (tmp_path / "run").exists()


def test_packing_changes_nothing_but_the_work(tmp_path):
    """Losses and held-out losses of a run whose captions have no padding, to rounding."""
    runs = [training.train(config_for(tmp_path / how, f"training.packing={how}")) for how in ("false", "true")]
    for name in ("loss", "validation_loss"):
        plain, packed = (torch.tensor(metrics(run, name)) for run in runs)
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=0)


def test_every_setting_is_tested():
    keys = {doc.key for doc in field_docs(training.TrainConfig)}
    assert keys == SETTINGS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_changes_what_it_should(key, plain, material, tmp_path, monkeypatch):
    monkeypatch.setattr(training.evaluate, "loss_plot", lambda run, path: None)
    settings, names = SETTINGS[key]
    changed = traces(tmp_path / "run", *settings.format(**material).split("; "))
    for name in names.split():
        if name.startswith("="):
            assert changed[name[1:]] == plain[name[1:]], name
        else:
            assert changed[name] != plain[name], name


def test_compile_is_asked_for_where_it_should(tmp_path, monkeypatch):
    """ "auto" takes runs that are long enough; "on" all, "off" none. What is compiled is the model itself."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model: asked.append(model) or model)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    config = config_for(tmp_path / "run")
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    for how, num_steps, times in (("off", 10**6, 0), ("on", 6, 1), ("auto", 6, 0), ("auto", 10**6, 1)):
        asked.clear()
        trainer.config = config_for(tmp_path / "run", f"training.compile={how}", f"training.num_steps={num_steps}")
        assert compiled(trainer.model, trainer.config, trainer.device, trainer.run.log) is trainer.model
        assert asked == [trainer.model] * times
    asked.clear()
    compiled(trainer.model, trainer.config, torch.device("mps"), trainer.run.log)  # for which the compiler is new
    assert not asked
    monkeypatch.setattr(shutil, "which", lambda name: None)
    asked.clear()
    compiled(trainer.model, trainer.config, trainer.device, trainer.run.log)
    if trainer.device.type == "cpu":
        assert not asked and "no C++ compiler found" in (tmp_path / "run" / "log.txt").read_text()


def test_the_device_is_the_one_asked_for(tmp_path):
    config = config_for(tmp_path / "run", "training.device=cpu")
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    assert {p.device.type for p in trainer.model.parameters()} == {"cpu"}
    assert next(trainer.feed.batches(8, 0)).latents.device.type == "cpu"


def test_the_run_is_named_by_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_for(tmp_path, "training.out=none", "name=mine", "training.num_steps=1")
    assert training.train(config) == Path("runs/mine")
    assert (tmp_path / "runs" / "mine" / "config.toml").exists()
