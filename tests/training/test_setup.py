"""A run on data with bad images, or with none to use; a set-up that fails leaves the name of the run free."""

import json
import shlex
from dataclasses import replace

import pytest
from PIL import Image

import training
import training.setup
from tests.training.runs import TRANSFUSION, config_for, make_pictures, metrics
from training.plots import caption_grid
from training.run import RunFolder


@pytest.mark.parametrize(
    ("source", "autoencoder", "warned"), [("mine", "shapes", 1), ("mine", "none", 0), ("shapes:9", "shapes", 0)]
)
def test_a_run_warns_of_the_drawn_worlds_autoencoder_on_other_pictures(tmp_path, source, autoencoder, warned):
    folder = make_pictures(tmp_path / "mine", 3)
    changes = (f"autoencoder={autoencoder}", "data.num_samples=none", "data.image_size=64", "model.patch_size=2")
    config = config_for(tmp_path / "run", f"data.source={folder if source == 'mine' else source}", *changes)
    training.setup.open_data(config, RunFolder.create(tmp_path / "run", config), 8)
    assert (tmp_path / "run" / "log.txt").read_text().count('the autoencoder "shapes" has seen drawn') == warned


def test_pictures_of_a_cameras_size_are_warned_of_unless_it_is_asked_for(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1632, 1224)).save(folder / "a.png")
    (folder / "a.txt").write_text("a")
    warned = "pictures keep their commonest size, 1224 x 1632, 31212 image tokens"
    for size, times in (("none", 1), ("[1224, 1632]", 0), ("64", 0)):
        changes = (f"data.source={folder}", f"data.image_size={size}", "data.num_samples=none", "model.patch_size=8")
        config = config_for(tmp_path / f"run{size}", *changes)
        training.setup.open_data(config, RunFolder.create(tmp_path / f"run{size}", config), 1)
        assert (tmp_path / f"run{size}" / "log.txt").read_text().count(warned) == times


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


def test_grids_have_captions_also_where_no_sample_is_held_out(tmp_path, monkeypatch):
    """Those that are trained on: the few photographs of a fine-tuning seldom have a held-out one among them."""
    folder, drawn = make_pictures(tmp_path / "data", 5), []
    for i in range(5):
        (folder / f"{i:03d}.txt").write_text(f'it\'s the "{i}"')

    def kept(images, captions):
        drawn.append(captions)
        return caption_grid(images, captions)

    monkeypatch.setattr(training.trainer, "caption_grid", kept)
    monkeypatch.setattr(training.evaluate, "caption_grid", kept)
    changes = [f"data.source={folder}", "data.image_size=[40, 32]", "data.held_out=0", "training.sample_every=3"]
    out = training.train(config_for(tmp_path / "my run", *changes))
    assert [len(captions) for captions in drawn] == [16, 16, 32]
    assert all(captions[:6] == [f'it\'s the "{i % 5}"' for i in range(6)] for captions in drawn)
    [command] = [line for line in (out / "log.txt").read_text().splitlines() if line.startswith("Try: ")]
    words = shlex.split(command)
    assert words[1:6] == ["mmdit", "sample", str(out), 'it\'s the "0"', "--out"]


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
        (["data.held_out=0.999999"], "held out: raise data.num_samples, or lower data.held_out"),
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


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ([*TRANSFUSION, "transfusion.max_tokens=18"], "longer than the model's limit of 18"),
        (["training.attention=varlen"], "needs a CUDA device, this is cpu; here there are sdpa"),
        (["training.attention=flex"], "no backward pass on a CPU"),
    ],
)
def test_what_cannot_run_leaves_the_name_free(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        training.train(config_for(tmp_path / "run", *changes))
    assert not (tmp_path / "run").exists()
