"""Work in tiles: equal to work in one piece where the network looks no further than the margin, else without seams."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mmdit.autoencoder import KLAutoencoder
from mmdit.tiles import _tiles, tiled


@given(length=st.integers(1, 70), side=st.integers(4, 40), size_out=st.sampled_from([1, 2, 8]))
def test_tiles_cover_a_line_and_their_weights_make_one(length, side, size_out):
    spans, weights = _tiles(length, side, size_out)
    total = torch.zeros(length * size_out)
    for span, weight in zip(spans, weights, strict=True):
        assert span.start >= 0 and span.stop <= length and span.stop - span.start == min(length, side)
        assert (weight >= 0).all()
        total[span.start * size_out : span.stop * size_out] += weight
    torch.testing.assert_close(total, torch.ones(length * size_out))
    starts = [span.start for span in spans]
    assert starts == sorted(set(starts)) and all(
        b - a <= side - side // 4 for a, b in zip(starts, starts[1:], strict=False)
    )


@pytest.mark.parametrize(("size_in", "size_out"), [(1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize(("height", "width"), [(9, 31), (40, 16), (23, 24)])
def test_a_network_of_short_sight_gives_what_it_gives_in_one_piece(size_in, size_out, height, width):
    """Two 3x3 convolutions on the smaller grid see 2 units; an overlap of 8 has a margin of 2."""
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    seen = []

    def network(x):
        seen.append(x.shape[-2:])
        y = convolutions(F.avg_pool2d(x, size_in))
        return F.interpolate(y, scale_factor=float(size_out), mode="nearest")

    x = torch.randn(2, 2, height * size_in, width * size_in)
    with torch.no_grad():
        whole = network(x)
        seen.clear()
        torch.testing.assert_close(tiled(network, x, 32, size_in, size_out), whole, atol=2e-6, rtol=0)
        assert max(max(shape) for shape in seen) <= 32 * size_in
        one = tiled(network, x, 40, size_in, size_out)
    assert torch.equal(one, whole)  # a picture no larger than a tile is not cut


def random_vae(**config):
    """An AutoencoderKL as SD3's in kind: GroupNorm and attention, which look at all pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    size = {"block_out_channels": (16, 32, 32), "latent_channels": 4, "norm_num_groups": 8, "layers_per_block": 1}
    return KLAutoencoder(AutoencoderKL(**levels, **size, **config).requires_grad_(False).eval())


def steps(x):
    """Largest difference of neighbouring pixels, along each axis."""
    return x.diff(dim=-1).abs().max(), x.diff(dim=-2).abs().max()


def test_seams_of_a_random_vae_are_below_one_step_of_a_byte():
    """Also where tiles differ in brightness, which moves their GroupNorms: that is spread out, and makes no edge."""
    model = random_vae()
    z = torch.randn(1, 4, 48, 80, generator=torch.Generator().manual_seed(1))
    z = z + torch.linspace(-2, 2, 80)
    whole, pieces = model.decode(z), model.decode(z, tile=128)
    assert whole.shape == pieces.shape == (1, 3, 192, 320)
    error = pieces - whole
    assert error.abs().max() > 0
    assert max(steps(error)) < 2 / 255  # images are in [-1, 1], where a byte has steps of 2 / 255
    x = F.interpolate(torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(2)) * 2 - 1, scale_factor=16.0)
    error = model.encode(x, tile=128) - model.encode(x)
    assert max(steps(error)) < 2 / 255 * model.scaling_factor


def test_a_sample_of_the_posterior_takes_the_same_noise_in_tiles():
    model = random_vae()
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def noise(seed, tile):
        return (model.encode(x, torch.Generator().manual_seed(seed), tile) - model.encode(x, None, tile)).flatten()

    whole, pieces, other = noise(3, None), noise(3, 64), noise(4, 64)
    assert F.cosine_similarity(whole, pieces, dim=0) > 0.999
    assert F.cosine_similarity(other, pieces, dim=0).abs() < 0.1


@pytest.mark.parametrize("tile", [0, 8, 130, -64])
def test_a_tile_that_does_not_fit_is_refused(tile):
    with pytest.raises(ValueError, match=f"tile is {tile}, expected a multiple of 4 from 16 on"):
        random_vae().decode(torch.zeros(1, 4, 8, 8), tile)
