"""The trainer, from config to scored run folder: the demo's own path in a few steps, and a step of it."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit
import training
from mmdit.weights_io import read_weights
from tests.training.runs import assert_bit_equal, config_for, make_autoencoder, metrics, stop_after
from training.checkpoint import list_checkpoints
from training.config import load_config
from training.devices import compiled
from training.objectives import Loss
from training.progress import Progress
from training.run import RunFolder
from training.trainer import Trainer


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
    printed, kept = capsys.readouterr().out, (run / "log.txt").read_text()
    said = [line for line in printed.splitlines() if "validation loss" in line]
    assert len(said) == 2 and said[0] == "step 3: validation loss 1.0000" and said[1].startswith("validation loss ")
    assert [line.split(" ", 2)[2] for line in kept.splitlines() if "validation loss" in line] == said


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


def test_packing_changes_nothing_but_the_work(tmp_path):
    """Losses and held-out losses of a run whose captions have no padding, to rounding."""
    runs = [training.train(config_for(tmp_path / how, f"training.packing={how}")) for how in ("false", "true")]
    for name in ("loss", "validation_loss"):
        plain, packed = (torch.tensor(metrics(run, name)) for run in runs)
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=0)


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
