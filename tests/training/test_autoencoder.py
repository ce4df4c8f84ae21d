"""Training an autoencoder: it learns, what it writes is what was measured, options act, bad input is refused."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.autoencoder import open_autoencoder
from training import autoencoder as module
from training.autoencoder import (
    AutoencoderTrainConfig,
    channel_statistics,
    held_out_psnr,
    psnr,
    read_images,
    train_autoencoder,
)
from training.run import RunFolder

SMALL = {"widths": (16, 32), "depth": 1, "channels": 4, "batch_size": 4, "held_out": 0.2, "device": "cpu"}


def config(out, **settings):
    return AutoencoderTrainConfig(
        **{"data": "shapes:60", "image_size": 32, "num_steps": 2, "out": str(out), **SMALL, **settings}
    )


def quiet(line):
    pass


def psnr_of(folder):
    return json.loads((folder / "training.json").read_text())["result"]["held_out_psnr"]


def test_psnr_is_that_of_data_range_one():
    x = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(x, x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)), torch.tensor([20.0, 40.0]))


def test_training_improves_on_the_principal_components(tmp_path):
    lines = []
    out = train_autoencoder(
        config(tmp_path / "ae", data="shapes:200", num_steps=60, warmup_steps=5, lr=3e-3, batch_size=8), lines.append
    )
    start = float(next(line for line in lines if "principal components" in line).split("PSNR ")[1].split()[0])
    assert psnr_of(out) > start + 0.2
    assert lines[-1] == f"Try: mmdit train latent --data shapes:200 autoencoder={out}"


def test_how_far_training_is_can_be_seen(tmp_path, capsys):
    """The metrics are written as those of `mmdit train` are."""
    out = train_autoencoder(config(tmp_path / "ae", num_steps=5, warmup_steps=2, log_every=2, evaluate_every=4))
    number = r"[\d.e-]+"
    said, rows = capsys.readouterr().out, RunFolder(out).metrics()
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert [row["step"] for row in rows if "held_out_psnr" in row] == [4, 5]
    assert set(rows[0]) == {"step", "loss", "psnr_through_noise", "grad_norm", "lr", "images_per_second"}
    assert rows[0]["lr"] == pytest.approx(1e-3 * 0.5 * (1 + np.cos(np.pi / 5)))
    assert re.search(f"training 5/5  loss {number}  psnr_through_noise {number}  grad_norm {number}  images/s", said)
    assert any(path.name.startswith("events") for path in (out / "tensorboard").iterdir())
    assert "warning" not in said


def test_the_loss_of_a_line_is_the_mean_since_the_last(tmp_path):
    def losses(name, log_every):
        out = train_autoencoder(config(tmp_path / name, num_steps=6, log_every=log_every), quiet)
        return [row["loss"] for row in RunFolder(out).metrics() if "loss" in row]

    each = losses("each", 1)
    assert losses("some", 4) == pytest.approx([np.mean(each[:4]), np.mean(each[4:])])


def test_images_of_a_cameras_size_are_warned_of_unless_it_is_asked_for(tmp_path):
    for i in range(8):
        Image.new("RGB", (1632, 1224)).save(tmp_path / f"{i}.png")
    warned = (
        "warning: images keep their commonest size, 1224 x 1632, 0.0 GiB of memory: image_size=256 scales them down"
    )
    for size, lines in ((None, [warned]), (64, [])):
        said = []
        read_images(config(tmp_path / "ae", data=str(tmp_path), image_size=size, held_out=0.5), said.append)
        assert said == lines


def test_a_run_that_is_all_warm_up_says_so(tmp_path):
    lines = []
    train_autoencoder(config(tmp_path / "ae", num_steps=2, warmup_steps=2), lines.append)
    assert lines[0] == "warning: the learning rate warms up for the whole run: warmup_steps = 2, num_steps = 2"


def test_the_folder_holds_what_was_measured(tmp_path):
    settings = config(tmp_path / "ae", num_steps=5, evaluate_every=2)
    out = train_autoencoder(settings, quiet)
    model, (train, held_out) = open_autoencoder(out), read_images(settings, quiet)
    assert psnr_of(out) == pytest.approx(held_out_psnr(model, held_out), abs=1e-3)
    mean, std = channel_statistics(model, train)
    assert mean.mean().item() == pytest.approx(0, abs=0.01)
    assert (std.square() + mean.square()).mean().item() == pytest.approx(1, abs=0.01)
    scores = [row["held_out_psnr"] for row in RunFolder(out).metrics() if "held_out_psnr" in row]
    assert len(scores) == 3 and scores[-1] == psnr_of(out)
    assert json.loads((out / "training.json").read_text())["config"]["widths"] == [16, 32]
    grid = np.asarray(Image.open(out / "reconstructions.png"))  # small pictures are enlarged, here from 32 to 128
    assert grid.shape[1] == 8 * 134 + 6
    assert (grid[7:133, 7:133] == held_out[0].repeat(4, 0).repeat(4, 1)[1:-1, 1:-1]).all()
    back = model.decode(model.encode(torch.from_numpy(held_out[:1]).permute(0, 3, 1, 2) / 127.5 - 1))[0]
    row, expected = (grid.shape[0] - 6) // 2, ((back[:, 16, 16] + 1) * 127.5).clamp(0, 255).detach().numpy()
    assert np.abs(grid[6 + row + 66, 6 + 66] - expected).max() <= 1


def test_a_run_is_a_function_of_its_seed(tmp_path):
    def weights(name, seed):
        return (train_autoencoder(config(tmp_path / name, seed=seed), quiet) / "model.safetensors").read_bytes()

    first = weights("a", 3)
    assert first == weights("b", 3)
    assert first != weights("c", 4)


def test_the_callers_random_numbers_stay_as_they_are(tmp_path):
    before = torch.get_rng_state()
    train_autoencoder(config(tmp_path / "ae"), quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_on_the_latents_makes_the_decoder_robust(tmp_path):
    def psnr_under_noise(noise):
        settings = config(tmp_path / str(noise), num_steps=50, warmup_steps=5, lr=3e-3, latent_noise=noise)
        model = open_autoencoder(train_autoencoder(settings, quiet))
        _, held_out = read_images(settings, quiet)
        x = module._to_float(held_out)
        z = model.encode(x)
        z = z + 0.7 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        return psnr(model.decode(z), x).mean().item()

    assert psnr_under_noise(1.0) > psnr_under_noise(0.0) + 0.1


def test_a_run_that_diverges_says_so_and_saves_nothing_of_it(tmp_path):
    """What was saved while it had not stays."""
    with pytest.raises(ValueError, match="diverged before step 8: lower lr, which is 1e\\+30"):
        train_autoencoder(config(tmp_path / "ae", lr=1e30, num_steps=8, warmup_steps=0), quiet)
    assert not (tmp_path / "ae" / "config.json").exists()


@pytest.mark.parametrize("colours", [(255,), (0, 255)], ids=["all white", "black or white"])
def test_pictures_of_one_colour_give_finite_latents(tmp_path, colours):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        Image.new("L", (16, 16), colours[i % len(colours)]).save(data / f"{i}.png")
    out = train_autoencoder(config(tmp_path / "ae", data=str(data), image_size=None, held_out=0.4), quiet)
    model, x = open_autoencoder(out), torch.rand(1, 3, 16, 16) * 2 - 1
    assert psnr_of(out) > 50
    assert model.encode(x).isfinite().all() and model.decode(model.encode(x)).isfinite().all()
    assert max(json.loads((out / "training.json").read_text())["result"]["latent_std"]) < 3


def test_windows_are_cut_from_large_images_and_odd_sides_fit(tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (50, 83, 3), dtype=np.uint8)).save(data / f"{i}.png")
    (data / "broken.png").write_bytes(b"no picture")
    lines = []
    settings = config(tmp_path / "ae", data=str(data), image_size=None, crop_size=24)
    train, held_out = read_images(settings, lines.append)
    assert len(train) + len(held_out) == 30
    assert any(line.startswith("skipped 1 ") and line.endswith("images: broken") for line in lines)
    alone = []
    assert np.array_equal(module.read_held_out(settings, 8, alone.append), held_out)
    assert alone == [line for line in lines if "held-out" in line]
    assert train.shape[1] % 8 == 0 and train.shape[2] % 8 == 0 and train.shape[2] > train.shape[1]
    assert module._draw(train, settings, 0).shape == (4, 3, 24, 24)
    assert not torch.equal(module._draw(train, settings, 0), module._draw(train, settings, 1))
    assert np.isfinite(psnr_of(train_autoencoder(settings, lines.append)))


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_saves_what_there_is_after_the_step_in_progress(tmp_path, monkeypatch, sig):
    step, original = [], module._loss

    def interrupted(*arguments):
        step.append(1)
        if len(step) == 3:
            os.kill(os.getpid(), sig)
        return original(*arguments)

    monkeypatch.setattr(module, "_loss", interrupted)
    out = train_autoencoder(config(tmp_path / "ae", num_steps=100), quiet)
    assert json.loads((out / "training.json").read_text())["result"]["steps"] == 3
    assert open_autoencoder(out).channels == 4


def written(out, **settings):
    """What a short run leaves: weights, and every measured number but times."""
    train_autoencoder(config(out, **{"warmup_steps": 0, "batch_size": 2, **settings}), quiet)
    result = json.loads((out / "training.json").read_text())["result"] | {"seconds": None}
    metrics = [row | {"images_per_second": None} for row in RunFolder(out).metrics()]
    return (out / "model.safetensors").read_bytes(), metrics, result


@pytest.fixture(scope="module")
def by_default(tmp_path_factory):
    out = tmp_path_factory.mktemp("default") / "ae"
    first = written(out)
    assert first == written(out.with_name("again"))
    return first


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "shapes:50"},
        {"image_size": (24, 32)},
        {"channels": 5},
        {"widths": (16, 40)},
        {"depth": 0},
        {"balance": 0.0},
        {"latent_noise": 0.5},
        {"crop_size": 16},
        {"held_out": 0.5},
        {"num_held_out": 2},
        {"num_steps": 3},
        {"batch_size": 5},
        {"lr": 0.1},
        {"warmup_steps": 2},
        {"weight_decay": 10.0},
        {"grad_clip": 1e-9},
        {"seed": 1},
        {"log_every": 1},
        {"evaluate_every": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_option_changes_what_is_written(tmp_path, settings, by_default):
    assert written(tmp_path / "ae", **settings) != by_default


def test_every_option_is_tried_above():
    tried = {name for mark in test_every_option_changes_what_is_written.pytestmark for s in mark.args[1] for name in s}
    assert tried | {"out", "device"} == set(AutoencoderTrainConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 0},
        {"lr": 0.0},
        {"held_out": 1.0},
        {"crop_size": 20},
        {"balance": 1.5},
        {"widths": (9, 16)},
        {"device": "tpu"},
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        config(tmp_path, **settings)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device"):
        train_autoencoder(config(tmp_path / "ae", device="cuda"), quiet)
    assert not (tmp_path / "ae").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        train_autoencoder(config(tmp_path), quiet)


def test_data_without_a_held_out_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no held-out image .*give more images, or raise held_out"):
        read_images(config(tmp_path, data="shapes:3", held_out=0.0001), quiet)
