"""`mmdit evaluate` of a run's other weights, drawn in another way, on a device of one's choice."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmdit
import training
from mmdit_cli.main import app

TINY = [
    *("training.num_steps=4", "training.batch_size=4", "data.num_samples=100", "data.held_out=0.1"),
    *("model.depth=1", "model.num_heads=1", "model.head_dim=16", "text.width=16", "text.depth=1"),
    *("evaluation.prompts_per_question=0", "sampling.num_steps=2", "training.checkpoint_every=2"),
    *("optimizer.warmup_steps=0", "optimizer.lr=0.01", "training.ema=power", "training.ema_snapshot_every=2"),
]


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return training.train(training.load_config("pixels-tiny", [*TINY, f'training.out="{out}"']))


def test_a_checkpoint_and_another_average_are_scored_and_the_runs_own_scores_stay(trained, tmp_path):
    own, files = (trained / "scores.json").read_bytes(), ("scores.json", "samples.png", "loss.png")
    before = [(trained / name).stat().st_mtime_ns for name in files]
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation_loss"] for line in metrics if "validation_loss" in line][-1]

    run("ema", trained, "--sigma-rel", 0.2, "--out", tmp_path / "wider")
    run("evaluate", trained, "--weights", tmp_path / "wider", "--guidance", 2, "--out", tmp_path / "new" / "wider.json")
    wider = json.loads((tmp_path / "new" / "wider.json").read_text())
    assert wider["sampling"] == json.loads(own)["sampling"] | {"guidance": 2.0}
    assert wider["validation_loss"] != pytest.approx(last, rel=1e-4)

    def loss(shown):
        return float(next(line.split()[1] for line in shown.splitlines() if line.startswith("validation_loss ")))

    assert loss(run("evaluate", trained, "--checkpoint", 4)) == pytest.approx(last, abs=1e-4)
    assert loss(run("evaluate", trained, "--checkpoint", 2)) != pytest.approx(last, abs=1e-4)
    assert [(trained / name).stat().st_mtime_ns for name in files] == before


def test_the_way_of_drawing_is_that_of_the_command(trained, tmp_path):
    run("evaluate", trained, "--solver", "heun", "--steps", 3, "--out", tmp_path / "heun.json")
    drawn = json.loads((tmp_path / "heun.json").read_text())
    assert (drawn["sampling"]["solver"], drawn["sampling"]["num_steps"]) == ("heun", 3)
    assert drawn["network_evaluations"] == 2 * 2 * 3  # heun's two a step, each with guidance


def test_the_device_is_that_of_the_command(trained, tmp_path, monkeypatch):
    devices = []

    def load(path, device, **_):
        devices.append(device)
        raise ValueError("seen enough")

    monkeypatch.setattr(mmdit.TextToImage, "load", load)
    for words in ([], ["--out", tmp_path / "scores.json"], ["--checkpoint", 2], ["--weights", trained]):
        for device in ([], ["--device", "cpu"]):
            CliRunner().invoke(app, ["evaluate", str(trained), *map(str, words), *device])
    assert devices == [None, torch.device("cpu")] * 4


@pytest.mark.parametrize("words", [["--images", "pictures", "--metrics", "clip-score", "--clip", "clip"], ["run"]])
def test_a_device_that_is_not_there_is_named(trained, tmp_path, monkeypatch, words):
    """Of pictures, before networks are read."""
    monkeypatch.setattr("training.devices.available", lambda name: name == "cpu")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "run").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.quality.check_metrics", lambda config: None)
    result = CliRunner().invoke(app, ["evaluate", *words, "--device", "mps"])
    assert result.exit_code == 2 and "this torch sees no MPS device" in result.stderr
