"""Exact tiling of a convolutional network: a large picture in tiles, with the same result as without tiles.

Running a whole network on each tile is not exact: convolutions are padded at the edges of the tile, and GroupNorms
normalise by the tile's statistics (docs/autoencoder.md measures the error). Here tiling is per layer. A convolution
takes each tile with the halo that its kernel needs; a GroupNorm goes over the tiles twice, once for the statistics of
the whole picture and once to normalise. So no blending of tiles is needed.

Activations stay in main memory, and the weights' device holds one tile at a time, except in attention over all pixels,
which autoencoders have at the smallest resolution.

Shape letters: B batch, C channels, H W sides, G groups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def in_tiles(network: nn.Module, side: int) -> Iterator[None]:
    """Within this context the layers of `network` compute in tiles of `side` pixels at their own resolution, with
    input and output in main memory. Not thread-safe.
    """
    work: dict[type[nn.Module], Callable[..., Tensor]]
    work = {nn.Conv2d: _convolution, nn.GroupNorm: _group_norm, nn.SiLU: _silu}
    patched = [(m, f) for m in network.modules() for kind, f in work.items() if isinstance(m, kind)]
    patched += [(m, _untiled) for m in network.modules() if type(m).__name__ == "Attention"]
    try:
        for module, function in patched:
            vars(module)["forward"] = partial(function, module, side)
        yield
    finally:
        for module, _ in patched:
            vars(module).pop("forward", None)


def _untiled(module: nn.Module, side: int, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The layer without tiles, on the device of its weights."""
    device = next(module.parameters(), x).device
    return type(module).forward(module, x.to(device), *args, **kwargs).to(x.device)


def _silu(module: nn.SiLU, side: int, x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)  # its input is a norm's output, which nothing else reads


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    return [(start, min(start + side, length)) for start in range(0, length, side)]


def _convolution(conv: nn.Conv2d, side: int, x: Tensor) -> Tensor:
    if max(x.shape[-2:]) <= side or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return _untiled(conv, side, x)
    stride, padding = conv.stride, conv.padding
    extent = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    sides = [(x.shape[i - 2] + 2 * padding[i] - extent[i]) // stride[i] + 1 for i in (0, 1)]
    out = x.new_empty(len(x), conv.out_channels, *sides)
    for top, bottom in _spans(sides[0], max(1, side // stride[0])):
        for left, right in _spans(sides[1], max(1, side // stride[1])):
            piece = x
            for axis, first, last in ((0, top, bottom), (1, left, right)):
                length = (last - first - 1) * stride[axis] + extent[axis]
                piece = _padded_slice(piece, axis - 2, first * stride[axis] - padding[axis], length)
            piece = piece.to(conv.weight.device)
            y = F.conv2d(piece, conv.weight, conv.bias, stride, 0, conv.dilation, conv.groups)
            out[..., top:bottom, left:right] = y
    return out


def _padded_slice(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """x[start : start + length] along an axis (-2 or -1), with zeros beyond its ends."""
    first, last = (min(max(end, 0), x.shape[axis]) for end in (start, start + length))
    before = min(length, max(0, -start))
    padding = (before, length - before - (last - first))
    return F.pad(x.narrow(axis, first, last - first), padding if axis == -1 else (0, 0, *padding))


def _group_norm(norm: nn.GroupNorm, side: int, x: Tensor) -> Tensor:
    if x.ndim != 4 or max(x.shape[-2:]) <= side:
        return _untiled(norm, side, x)
    rows, columns = (_spans(length, side) for length in x.shape[2:])
    tiles = [(..., slice(*a), slice(*b)) for a in rows for b in columns]
    shape, device = (len(x), norm.num_groups, -1), norm.weight.device
    variances, means, counts = [], [], []
    for tile in tiles:
        part = x[tile].to(device).reshape(shape).float()
        variance, mean = torch.var_mean(part, dim=-1, correction=0)
        variances.append(variance)
        means.append(mean)
        counts.append(part.shape[-1])
    share = torch.tensor(counts, device=device)[:, None, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    variance = (share * (torch.stack(variances) + (torch.stack(means) - mean).square())).sum(0)
    per_group = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, 1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(per_group, 1) * scale
    out = torch.empty_like(x)
    for tile in tiles:
        out[tile] = (x[tile].to(device).float() * scale[..., None, None] + shift[..., None, None]).to(x.dtype)
    return out
