"""Latents to tokens and tokens to velocities (Transfusion, arXiv 2408.11039, section 3.2 and table 7).

Linear: one matrix per patch, each way. U-Net: down blocks that halve the sides until a patch is one pixel, and the
up blocks that reverse this, with skip connections at each size.

Shape letters: B images of one size, C channels, h w latent sides, p patch side, n = (h/p)(w/p) tokens, D width,
W channels of the U-Net's outermost level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.blocks import EPS
from mmdit.config import TransfusionConfig
from mmdit.embeddings import patchify, unpatchify

Skips = Sequence[Tensor]


class LinearIn(nn.Linear):
    """Patches to tokens."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config.in_channels * config.patch_size**2, config.width)
        self.patch_size = config.patch_size

    def forward(self, x: Tensor, silu_c: Tensor) -> tuple[Tensor, Skips]:  # type: ignore[override]
        """x (B, C, h, w) to tokens (B, n, D); there are no skip connections."""
        return super().forward(patchify(x, self.patch_size)), ()


class LinearOut(nn.Linear):
    """Tokens to patches."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config.width, config.in_channels * config.patch_size**2)
        self.patch_size = config.patch_size

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, tokens: Tensor, size: tuple[int, int], silu_c: Tensor, skips: Skips) -> Tensor:  # type: ignore[override]
        """tokens (B, n, D) to velocities (B, C, h, w) of `size` (h, w)."""
        return unpatchify(super().forward(tokens), self.patch_size, *size)


class ResBlock(nn.Module):
    """A residual block of two 3x3 convolutions, the second modulated by the time."""

    def __init__(self, dim_in: int, dim: int, dim_c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(dim_in), _norm(dim)
        self.conv1, self.conv2 = _conv(dim_in, dim), _conv(dim, dim)
        self.modulation = nn.Linear(dim_c, 2 * dim)
        self.short = nn.Identity() if dim_in == dim else nn.Conv2d(dim_in, dim, 1)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        shift, scale = self.modulation(silu_c)[:, :, None, None].chunk(2, dim=1)
        return self.short(x) + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


class UNetIn(nn.Module):
    """Down blocks: at each size a `ResBlock`, then half the sides and twice the channels; p times smaller in all."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.conv = _conv(config.in_channels, widths[0])
        self.blocks = nn.ModuleList(ResBlock(w, w, config.width) for w in widths[:-1])
        self.down = nn.ModuleList(
            nn.Conv2d(w, n, 3, stride=2, padding=1) for w, n in zip(widths, widths[1:], strict=False)
        )
        self.last = ResBlock(widths[-1], widths[-1], config.width)
        self.out = nn.Linear(widths[-1], config.width)

    def forward(self, x: Tensor, silu_c: Tensor) -> tuple[Tensor, Skips]:
        """x (B, C, h, w) and silu of its time (B, D) to tokens (B, n, D), and the skip connections of each size."""
        x = self.conv(x)
        skips = []
        for block, down in zip(self.blocks, self.down, strict=True):
            x = block(x, silu_c)
            skips.append(x)
            x = down(x)
        x = self.last(x, silu_c)
        return self.out(rearrange(x, "b c h w -> b (h w) c")), skips


class UNetOut(nn.Module):
    """Up blocks: `UNetIn` reversed, with its skip connections."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.patch_size = config.patch_size
        self.into = nn.Linear(config.width, widths[-1])
        self.first = ResBlock(widths[-1], widths[-1], config.width)
        self.up = nn.ModuleList(_conv(n, w) for w, n in zip(widths, widths[1:], strict=False))
        self.blocks = nn.ModuleList(ResBlock(2 * w, w, config.width) for w in widths[:-1])
        self.norm, self.conv = _norm(widths[0]), _conv(widths[0], config.in_channels)

    def init_weights(self) -> None:
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, size: tuple[int, int], silu_c: Tensor, skips: Skips) -> Tensor:
        """tokens (B, n, D), silu of the time (B, D) and `UNetIn`'s skips to velocities (B, C, h, w) of `size`."""
        x = rearrange(self.into(tokens), "b (h w) c -> b c h w", h=size[0] // self.patch_size)
        x = self.first(x, silu_c)
        for up, block, skip in reversed(list(zip(self.up, self.blocks, skips, strict=True))):
            x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = block(torch.cat([x, skip], dim=1), silu_c)
        return self.conv(F.silu(self.norm(x)))


CODECS: dict[str, tuple[type, type]] = {"linear": (LinearIn, LinearOut), "unet": (UNetIn, UNetOut)}


def _widths(config: TransfusionConfig) -> list[int]:
    return [config.codec_width * 2**level for level in range(config.patch_size.bit_length())]


def _conv(dim_in: int, dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim, 3, padding=1)


def _norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, dim // 4), dim, eps=EPS)
