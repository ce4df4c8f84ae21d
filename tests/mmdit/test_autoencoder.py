"""Autoencoders: round trips, the linear start, the shipped weights, the preview, errors. Diffusers' have their own."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import samplers
from mmdit.autoencoder import (
    SHIPPED,
    Autoencoder,
    PatchAutoencoder,
    PatchAutoencoderConfig,
    PixelSpace,
    open_autoencoder,
)
from training.shapes import ShapesWorld


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small(seed=0, **config):
    """A PatchAutoencoder whose every weight matters: nothing is left at its zero start."""
    generator = torch.Generator().manual_seed(seed)
    model = PatchAutoencoder(PatchAutoencoderConfig(channels=4, widths=(8, 16), depth=1, **config)).requires_grad_(
        False
    )
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def held_out_shapes(n):
    world = ShapesWorld(image_size=64, seed=0, split="held-out")
    pictures = np.stack([world[i][0] for i in range(n)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def mean_psnr(x, y):
    return (-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3)))).mean().item()


# --- ours -------------------------------------------------------------------------------------------------------------


def test_a_saved_patch_autoencoder_is_read_back_equal(tmp_path):
    model = small(scaling_factor=0.7, shift_factor=0.3)
    model.load_state_dict(
        {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    )  # what a file can hold
    model.save(tmp_path)
    again = open_autoencoder(tmp_path)
    assert again.config == model.config
    x = images(2, 3, 32, 48)
    assert torch.equal(again.encode(x), model.encode(x))
    assert torch.equal(again.decode(model.encode(x)), model.decode(model.encode(x)))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert all(p.dtype == torch.float32 for p in again.parameters())


def test_scaled_latents_are_raw_latents_shifted_then_scaled():
    model, x = small(), images(1, 3, 16, 16)
    raw = model.encode(x)
    plain = model.decode(raw)
    model.set_scale(scaling_factor=2.5, shift_factor=-0.4)
    torch.testing.assert_close(model.encode(x), (raw + 0.4) * 2.5)
    torch.testing.assert_close(model.decode(model.encode(x)), plain)


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), batch=st.integers(1, 3))
def test_sides_follow_the_factor(rows, columns, batch):
    model = small()
    z = model.encode(images(batch, 3, 8 * rows, 8 * columns))
    assert z.shape == (batch, 4, rows, columns)
    y = model.decode(100 * z)
    assert y.shape == (batch, 3, 8 * rows, 8 * columns)
    assert y.min() >= -1 and y.max() <= 1


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_linear_start_reconstructs_as_well_as_the_best_linear_code(balance):
    x = F.interpolate(images(8, 3, 8, 8), size=(24, 32), mode="bicubic").clamp(-1, 1)
    model = PatchAutoencoder(PatchAutoencoderConfig(channels=16)).requires_grad_(False)
    model.start_from(x, balance)
    patches = x.double().numpy().reshape(8, 3, 3, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 192)
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    best = np.square(singular[16:]).sum() / patches.size  # Eckart and Young 1936
    error = (model.raw_images(model.raw_latents(x)) - x).square().mean()
    assert error.item() == pytest.approx(best, rel=1e-3) and best > 1e-3


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balance_sets_how_even_the_channels_start(balance):
    x = images(16, 3, 64, 64)
    x = (x + 2 * F.interpolate(F.avg_pool2d(x, 8), scale_factor=8.0) + x.mean(1, keepdim=True)) / 4
    model = PatchAutoencoder(PatchAutoencoderConfig(channels=8)).requires_grad_(False)
    patches = F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    std = torch.linalg.svdvals(patches - patches.mean(0))[:8] / len(patches) ** 0.5
    model.start_from(x, balance)
    z = model.raw_latents(x)
    measured = z.std((0, 2, 3), correction=0)
    assert z.square().mean().item() == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(measured / measured[0], (std / std[0]) ** (1 - balance), rtol=1e-2, atol=1e-3)


# --- the shipped weights ----------------------------------------------------------------------------------------------


def test_the_shipped_weights_keep_held_out_shapes_and_have_unit_variance():
    model, x = open_autoencoder("shapes"), held_out_shapes(64)
    z = model.encode(x)
    assert (model.channels, model.factor, z.shape) == (16, 8, (64, 16, 8, 8))
    assert mean_psnr(model.decode(z), x) >= 32
    assert abs(z.mean()) < 0.1 and z.std().item() == pytest.approx(1, abs=0.1)
    noisy = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert mean_psnr(model.decode(noisy), x) >= 30  # small errors of a generative model do little
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 4 * 2**20


# --- the preview ------------------------------------------------------------------------------------------------------


def shrunk(x, factor):
    return F.avg_pool2d(x, factor)


def test_the_preview_is_the_best_linear_map_of_what_it_was_fitted_to():
    model, x = small(), images(4, 3, 32, 24)
    model.fit_preview(x)
    z, colours = model.encode(x), shrunk(x, 8)
    error = model.preview(z) - colours
    for direction in (*z.transpose(0, 1), torch.ones_like(z[:, 0])):  # no further step along any channel helps
        assert (error * direction[:, None]).sum((0, 2, 3)).abs().max() < 1e-2 * (colours**2).sum().sqrt()
    assert error.square().mean() < (colours - colours.mean((0, 2, 3), keepdim=True)).square().mean()


def test_the_preview_finds_a_linear_autoencoder_exactly():
    """Latents that are the colours, turned: least squares turns them back."""

    class Turned(PixelSpace):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]

        def statistics(self, images):
            return torch.einsum("cr,brhw->bchw", self.turn, images) + 0.3

    model, x = Turned(), images(2, 3, 5, 7)
    torch.testing.assert_close(Autoencoder.preview(model, model.encode(x)), x, atol=1e-5, rtol=0)


def test_the_shipped_preview_shows_held_out_shapes():
    model, x = open_autoencoder("shapes"), held_out_shapes(32)
    seen = model.preview(model.encode(x))
    assert seen.shape == (32, 3, 8, 8)
    assert mean_psnr(seen, shrunk(x, 8)) >= 25
    fitted = open_autoencoder("shapes")
    fitted.preview_map = None
    assert mean_psnr(fitted.preview(model.encode(x)), shrunk(x, 8)) >= 20  # fitted to made-up colours


def test_the_preview_is_stored_with_the_weights(tmp_path):
    model, z = small(), images(1, 4, 3, 3)
    model.fit_preview(images(4, 3, 32, 32))
    model.save(tmp_path)
    torch.testing.assert_close(open_autoencoder(tmp_path).preview(z), model.preview(z), atol=1e-4, rtol=0)
    model.preview_map = None
    model.save(tmp_path)
    assert open_autoencoder(tmp_path).preview_map is None
    for text, message in (
        ("[[1, 2, 3]]", r"is a table \(1, 3\), expected \(5, 3\)"),
        ("[[1], 2]", "no table of numbers"),
    ):
        (tmp_path / "preview.json").write_text(text)
        with pytest.raises(ValueError, match=f"preview.json .*{message}"):
            open_autoencoder(tmp_path)


def test_the_preview_serves_a_callback_of_the_sampler():
    model, seen = open_autoencoder("shapes"), []
    z = model.encode(held_out_shapes(1))
    field = samplers.Field(lambda x, t: z, samplers.RectifiedFlow(), "data")
    eps = images(1, 16, 8, 8)
    samplers.sample(field, eps, num_steps=3, callback=lambda step: seen.append(model.preview(step.x_0)))
    assert len(seen) == 3 and all(torch.allclose(picture, model.preview(z), atol=1e-4) for picture in seen)


def test_pixels_are_their_own_preview():
    x = images(1, 3, 4, 4)
    assert torch.equal(open_autoencoder("none").preview(2 * x), (2 * x).clamp(-1, 1))
    with pytest.raises(ValueError, match=r"expected latents of shape \(B, 4, h, w\)"):
        small().preview(x)


# --- pixels, and errors -----------------------------------------------------------------------------------------------


def test_pixel_space_is_the_identity():
    pixels, x = open_autoencoder("none"), images(2, 3, 5, 7)
    assert isinstance(pixels, PixelSpace) and (pixels.channels, pixels.factor) == (3, 1)
    assert torch.equal(pixels.encode(x), x) and torch.equal(pixels.decode(x), x)
    assert torch.equal(pixels.decode(3 * x), (3 * x).clamp(-1, 1))


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 16, 12), (1, 3, 0, 8), (1, 1, 16, 16), (3, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="expected images|multiples of 8"):
        small().encode(torch.zeros(shape))


def test_latents_of_another_channel_count_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\), got \(1, 16, 8, 8\)"):
        small().decode(torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize(
    "config",
    [{"channels": 0}, {"channels": 193}, {"depth": -1}, {"widths": (8,)}, {"widths": (8, 12)}]
    + [{"scaling_factor": 0}, {"scaling_factor": "x"}, {"shift_factor": None}],
)
def test_a_config_out_of_range_is_refused(config):
    with pytest.raises(ValueError, match="channels|widths|scaling_factor"):
        PatchAutoencoderConfig(**config)


def _write(folder, config, weights=None):
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    return folder


def test_folders_that_hold_no_autoencoder_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "missing": "not found",
        tmp_path / "vae.ckpt": "vae.ckpt is a pickle",
        tmp_path / "empty": "no config.json",
        _write(tmp_path / "other", {"_class_name": "UNet2DModel"}): "describes UNet2DModel",
        _write(tmp_path / "unnamed", {}): "no known model",
        _write(tmp_path / "list", "[]"): "no known model",
        _write(tmp_path / "broken", "{"): "config.json",
        _write(tmp_path / "key", {"_class_name": "PatchAutoencoder", "chanels": 4}): "chanels",
        _write(tmp_path / "bare", {"_class_name": "PatchAutoencoder"}): "model.safetensors",
        _write(tmp_path / "torn", {"_class_name": "PatchAutoencoder"}, b"\x10"): "model.safetensors",
        _write(tmp_path / "kl", {"_class_name": "AutoencoderKL"}): "cannot read the autoencoder",
        _write(tmp_path / "kl_torn", {"_class_name": "AutoencoderKL"}, b"\x10"): "cannot read the autoencoder",
    }
    for folder, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            open_autoencoder(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other", [{"channels": 8}, {"widths": [8, 8 * 10**9]}, {"widths": [8, 2**63]}, {"depth": 10**9}]
)
def test_weights_of_another_size_are_refused_before_a_model_is_made(other, tmp_path):
    small().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **other}))
    with pytest.raises(ValueError, match="model.safetensors") as caught:
        open_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)
