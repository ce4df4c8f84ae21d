"""How an image enters and leaves a `Transfusion`: the U-Net's block, levels and start, and images of several sizes."""

import pytest
import torch
from torch.nn import functional as F

from mmdit.codecs import CODECS, ResBlock
from mmdit.config import TransfusionConfig
from mmdit.transfusion import Transfusion

CONFIG = TransfusionConfig(
    vocab_size=40, in_channels=3, depth=1, num_heads=2, head_dim=8, codec="unet", codec_width=8, sample_size=8
)


def alive(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return module


@torch.no_grad()
@pytest.mark.parametrize("dim", [8, 12])
def test_a_block_is_modulated_by_the_time_about_what_it_is(dim):
    block, x = alive(ResBlock(8, dim, 6)), torch.randn(2, 8, 4, 4)
    block.modulation.weight.zero_()
    shift, scale = block.modulation.bias[:, None, None].chunk(2)
    y = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    assert torch.allclose(block(x, torch.randn(2, 6)), block.short(x) + block.conv2(F.silu(y)), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_each_halving_has_a_level_and_what_it_saw_comes_back(patch_size):
    config = TransfusionConfig(**(CONFIG.to_dict() | dict(patch_size=patch_size)))
    into, out = (alive(codec(config)) for codec in CODECS["unet"])
    x, silu_c = torch.randn(2, 3, 16, 8), torch.randn(2, config.width)
    tokens, skips = into(x, silu_c)
    assert tokens.shape == (2, 16 * 8 // patch_size**2, config.width)
    assert [tuple(skip.shape[1:]) for skip in skips] == [
        (8 * 2**level, 16 // 2**level, 8 // 2**level) for level in range(patch_size.bit_length() - 1)
    ]
    v = out(tokens, (16, 8), silu_c, skips)
    assert v.shape == x.shape
    for level, skip in enumerate(skips):
        other = [*skips[:level], 10 * torch.randn_like(skip), *skips[level + 1 :]]
        assert (out(tokens, (16, 8), silu_c, other) - v).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("codec", [*CODECS])
def test_a_fresh_model_predicts_no_velocity(codec):
    model = Transfusion(TransfusionConfig(**(CONFIG.to_dict() | dict(codec=codec))))
    for v in model(model.pack([[torch.randn(3, 8, 4)]]), torch.tensor([0.5])).v:
        assert v.shape == (3, 8, 4) and not v.any()


@torch.no_grad()
@pytest.mark.parametrize("codec", [*CODECS])
def test_images_of_several_sizes_are_as_one_by_one(codec):
    """Each with its own time, which the U-Net's blocks see too."""
    model = alive(Transfusion(TransfusionConfig(**(CONFIG.to_dict() | dict(codec=codec)))))
    images, t = [torch.randn(3, *size) for size in ((4, 8), (8, 8), (4, 8), (2, 2))], torch.rand(4)
    together = model(model.pack([[x] for x in images]), t).v
    for x, time, v in zip(images, t, together, strict=True):
        [alone] = model(model.pack([[x]]), time[None]).v
        torch.testing.assert_close(v, alone, rtol=1e-4, atol=1e-5)
