"""Work in tiles gives what work in one piece gives: each layer, and whole autoencoders with GroupNorm and attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmdit.autoencoder import KLAutoencoder, open_autoencoder
from mmdit.tiles import in_tiles


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    side=st.integers(4, 20),
)
def test_a_convolution_in_tiles_is_the_convolution(kernel, stride, padding, dilation, groups, height, width, side):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups).requires_grad_(False)
    x = torch.randn(2, 2, height, width)
    whole = conv(x)
    with in_tiles(conv, side):
        torch.testing.assert_close(conv(x), whole, atol=1e-5, rtol=0)
    assert torch.equal(conv(x), whole)  # as before


@pytest.mark.parametrize("how", [dict(padding="same"), dict(padding=1, padding_mode="reflect")])
def test_other_kinds_of_padding_go_in_one_piece(how):
    conv, x = nn.Conv2d(2, 4, 3, **how).requires_grad_(False), torch.randn(1, 2, 24, 24)
    whole = conv(x)
    with in_tiles(conv, 8):
        assert torch.equal(conv(x), whole)


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), side=st.integers(4, 20), offset=st.sampled_from([0.0, 50.0])
)
def test_a_group_norm_in_tiles_has_the_statistics_of_the_picture(height, width, side, offset):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(2, 6, height, width) * torch.linspace(0.1, 3, width) + offset
    whole = norm(x)
    with in_tiles(norm, side):
        torch.testing.assert_close(norm(x), whole, atol=1e-4, rtol=0)


def random_vae():
    """An AutoencoderKL as SD3's in kind: GroupNorm and attention, which look at all pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    size = {"block_out_channels": (16, 32, 32), "latent_channels": 4, "norm_num_groups": 8, "layers_per_block": 1}
    return KLAutoencoder(AutoencoderKL(**levels, **size).requires_grad_(False).eval())


@pytest.mark.parametrize("make", [random_vae, lambda: open_autoencoder("shapes")], ids=["random", "shapes"])
def test_an_autoencoder_in_tiles_is_the_autoencoder(make, monkeypatch):
    """To far less than a step of a byte (2 / 255), with tiles that differ as much as dark and light do."""
    model = make()
    g = torch.Generator().manual_seed(1)
    z = torch.randn(1, model.channels, 18, 26, generator=g) + torch.linspace(-2, 2, 26)
    height, width = 10 * model.factor, 14 * model.factor
    x = torch.rand(1, 3, height, width, generator=g) * 2 - 1 + torch.linspace(-1, 1, width)
    decoded, encoded = model.decode(z), model.encode(x)
    sizes, plain = [], torch.nn.functional.conv2d
    monkeypatch.setattr("torch.nn.functional.conv2d", lambda x, *a: sizes.append(max(x.shape[-2:])) or plain(x, *a))
    assert (model.decode(z, tile=32) - decoded).abs().max() < 0.1 * 2 / 255
    assert (model.encode(x, tile=32) - encoded).abs().max() < 1e-3
    assert 0 < max(sizes) <= 32 + 2  # a 3x3 kernel's rim


def test_a_sample_of_the_posterior_takes_the_same_noise_in_tiles():
    model, x = random_vae(), torch.rand(1, 3, 96, 96) * 2 - 1
    draws = [model.encode(x, torch.Generator().manual_seed(3), tile) for tile in (None, 32)]
    torch.testing.assert_close(draws[0], draws[1], atol=1e-4, rtol=0)


def test_layers_are_as_before_after_an_error():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.SiLU(), nn.GroupNorm(1, 3))
    with pytest.raises(RuntimeError, match="stop"), in_tiles(network, 16):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_tile_that_is_too_small_is_refused():
    for tile in (0, -64, 15):
        with pytest.raises(ValueError, match=f"tile is {tile}, expected a side of at least 16 pixels"):
            random_vae().decode(torch.zeros(1, 4, 8, 8), tile)


@pytest.mark.gpu
def test_on_a_gpu_the_picture_comes_and_goes_and_is_the_same():
    model, z = random_vae(), torch.randn(1, 4, 18, 26, generator=torch.Generator().manual_seed(1))
    expected = model.decode(z)
    decoded = model.cuda().decode(z.cuda(), tile=32)
    assert decoded.device.type == "cuda"
    torch.testing.assert_close(decoded.cpu(), expected, atol=5e-3, rtol=0)


def test_derivatives_in_tiles_are_those_of_one_piece():
    model, latents = random_vae(), torch.randn(1, 4, 12, 12, requires_grad=True)
    weight = torch.randn(1, 3, 48, 48)
    whole, tiled = (
        torch.autograd.grad((model.decode(latents, tile=tile) * weight).sum(), latents)[0] for tile in (None, 16)
    )
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
