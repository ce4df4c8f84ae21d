"""The trunk's inputs: patches, their positions, the time, and the pooled text.

SD3 (arXiv 2403.03206): patches of the latent become tokens; a 2-D sin-cos table gives their positions, centre-cropped
to the latent's size; the conditioning vector is the sum of an embedded time and an embedded pooled text.

Shape letters: B batch, C latent channels, h w latent sides, N image tokens = (h/p)(w/p), p patch side, D width, d
head width.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

IMAGE_BASE = 100.0  # of rotary frequencies: low, as a picture has tens of positions per axis, a text thousands


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Latents (B, C, h, w) to patch vectors (B, N, C*p*p), row by row."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def patch_grid(what: str, size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of a latent of size (h, w). ValueError, naming `what`, if the patch does not fit."""
    height, width = size
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"{what} is {height} x {width}, both sides must be multiples of the patch ({patch_size})")
    return height // patch_size, width // patch_size


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Predicted patch vectors (B, N, p*p*C) to latents (B, C, h, w); channels come last inside a patch, as in DiT and
    SD3.
    """
    p = patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=height // p, w=width // p)


def sinusoid(x: Tensor, dim: int) -> Tensor:
    """cos and sin of x times `dim / 2` geometric frequencies from 1 to 1 / 10,000: (n,) to (n, dim), cosines first."""
    half = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    angle = x.float()[:, None] * torch.exp(-math.log(10_000.0) / (dim // 2) * half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_table(dim: int, max_size: int, trained_size: int) -> Tensor:
    """SD3's 2-D sin-cos table, (1, max_size**2, dim) in float32.

    Coordinates are (p - (max - s) / 2) * 16 / s with s = `trained_size` tokens, so that the central grid of the trained
    size spans 0 to 16 at any resolution (SD3, section 5.3.2 with S = 16 s). The first half of the channels holds the
    column, the second the row; sines come before cosines.
    """
    p = (torch.arange(max_size, dtype=torch.float64) - (max_size - trained_size) / 2) * 16 / trained_size
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axis = torch.cat([torch.sin(p[:, None] * omega), torch.cos(p[:, None] * omega)], dim=-1).float()  # (max, dim / 2)
    columns, rows = axis[None, :, :].expand(max_size, -1, -1), axis[:, None, :].expand(-1, max_size, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, max_size * max_size, dim)


def init_positions(trunk: Any) -> None:
    """Fill the `pos_embed` of a trunk that has one."""
    c = trunk.config
    if c.positions != "rope":
        trunk.pos_embed.copy_(position_table(c.width, c.pos_embed_max_size, max(1, c.sample_size // c.patch_size)))


def extended_positions(table: Tensor, side: int, trained_size: int) -> Tensor:
    """A table (1, max**2, D) of at least `side` x `side` tokens: the given one, or extended by its formula.

    Raises ValueError if it has to be extended and is not one of `position_table`.
    """
    own = math.isqrt(table.shape[1])
    if side <= own:
        return table
    longer = own + 2 * math.ceil((side - own) / 2)  # by an even number, so that the centre stays
    if table.is_meta:
        return table.new_empty(1, longer**2, table.shape[2])
    if torch.compiler.is_exporting():  # where the table's values cannot be compared
        raise ValueError(
            f"a picture of {side} tokens is beyond the position table of {own} x {own} and cannot be exported: "
            "build the model with a larger pos_embed_max_size"
        )
    out = _position_table(table.shape[2], longer, max(1, trained_size)).to(table)
    if not torch.allclose(crop_positions(out, own, own), table, atol=1e-2 if table.dtype != torch.float32 else 1e-3):
        raise ValueError(
            f"a picture of {side} tokens does not fit the position table of {own} x {own}, which is not of a known "
            "form and cannot be continued: sample smaller"
        )
    return out


_position_table = lru_cache(maxsize=1)(position_table)


def crop_positions(table: Tensor, height: int, width: int) -> Tensor:
    """The centre (height, width) tokens of a square table (1, max**2, D): (1, height * width, D)."""
    side = math.isqrt(table.shape[1])
    if height > side or width > side:
        raise ValueError(
            f"a picture of {height} x {width} tokens does not fit the position table of {side} x {side}: "
            "sample smaller, or build the model with a larger pos_embed_max_size"
        )
    top, left = (side - height) // 2, (side - width) // 2
    grid = table.view(1, side, side, -1)[:, top : top + height, left : left + width]
    return grid.reshape(1, height * width, -1)


def rotary_2d(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Axial rotary angles (Su et al. 2021, on two axes): cos and sin, each (N, d / 2), rows first, then columns.

    Positions are counted from the picture's centre, so that pictures of different sizes agree where they overlap, as
    with SD3's centre-cropped table.
    """
    omega = IMAGE_BASE ** (-torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    rows = (torch.arange(height, device=device) - (height - 1) / 2)[:, None] * omega
    columns = (torch.arange(width, device=device) - (width - 1) / 2)[:, None] * omega
    angle = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).reshape(
        height * width, -1
    )
    return angle.cos(), angle.sin()


def rotary_mixed(coordinates: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotary angles of text and patches in one sequence: coordinates (S, 3), step of the text, row, column, to cos and
    sin, each (S, d / 2).

    Half of the channel pairs rotate with the step, as in a language model, a quarter with the row and a quarter with
    the column, as in `rotary_2d`; text has row and column 0.
    """
    step, row, column = coordinates.float().unbind(1)

    def angles(x: Tensor, num: int, base: float) -> Tensor:
        return x[:, None] * base ** (-torch.arange(num, device=x.device, dtype=torch.float32) / num)

    n = head_dim // 8
    angle = torch.cat([angles(step, 2 * n, 10_000.0), angles(row, n, IMAGE_BASE), angles(column, n, IMAGE_BASE)], dim=1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs (i, i + d/2) of x (B, H, N, d) by the angles whose cos and sin are (N, d / 2)."""
    cos, sin = (a.to(x.dtype) for a in rotary)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class VectorEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: a vector (B, in) to the conditioning width (B, D)."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1(x)))


class TimeEmbedding(VectorEmbedding):
    """Time t (B,) in [0, 1] to (B, D): a 256-wide sinusoid of 1000 t, then two linear layers.

    It computes in the dtype of its weights, without autocast: half precision would save nothing here.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(256, dim)

    def forward(self, t: Tensor) -> Tensor:
        kind = t.device.type
        has_autocast = torch.amp.is_autocast_available(kind)  # "meta" has no autocast to turn off
        with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
            return super().forward(sinusoid(t * 1000, 256).to(self.fc1.weight.dtype))
