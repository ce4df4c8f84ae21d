"""A convolutional network over a large picture in tiles, with the result that it has in one piece.

A network that is run over each tile of a picture alone sees edges that are none, and its GroupNorms take the mean and
the variance of the tile: docs/autoencoder.md has what that costs. Here it is the layers that are worked in tiles, one
layer after the other. A convolution takes each tile with the rim that its kernel sees; a GroupNorm goes over the
tiles twice, for the statistics of the whole picture and for the result. So nothing has to be blended.

Activations stay in main memory and the device of the weights holds one tile at a time, save in attention over all
pixels, which autoencoders have where the picture is smallest.

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
    """While open, the layers of `network` work in tiles of `side` pixels of their own resolution, on input in main
    memory. Not for two threads at once.
    """
    work: dict[type[nn.Module], Callable[..., Tensor]]
    work = {nn.Conv2d: _convolution, nn.GroupNorm: _group_norm, nn.SiLU: _silu}
    changed = [(m, f) for m in network.modules() for kind, f in work.items() if isinstance(m, kind)]
    changed += [(m, _elsewhere) for m in network.modules() if type(m).__name__ == "Attention"]
    try:
        for module, function in changed:
            vars(module)["forward"] = partial(function, module, side)
        yield
    finally:
        for module, _ in changed:
            vars(module).pop("forward", None)


def _elsewhere(module: nn.Module, side: int, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The layer as it is, on the device of its weights."""
    device = next(module.parameters(), x).device
    return type(module).forward(module, x.to(device), *args, **kwargs).to(x.device)


def _silu(module: nn.SiLU, side: int, x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)  # it follows a norm, whose result nothing else reads


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    return [(start, min(start + side, length)) for start in range(0, length, side)]


def _convolution(conv: nn.Conv2d, side: int, x: Tensor) -> Tensor:
    if max(x.shape[-2:]) <= side or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return _elsewhere(conv, side, x)
    stride, padding = conv.stride, conv.padding
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    sides = [(x.shape[i - 2] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
    out = x.new_empty(len(x), conv.out_channels, *sides)
    for top, bottom in _spans(sides[0], max(1, side // stride[0])):
        for left, right in _spans(sides[1], max(1, side // stride[1])):
            piece = x
            for axis, first, last in ((0, top, bottom), (1, left, right)):
                length = (last - first - 1) * stride[axis] + reach[axis]
                piece = _cut(piece, axis - 2, first * stride[axis] - padding[axis], length)
            piece = piece.to(conv.weight.device)
            y = F.conv2d(piece, conv.weight, conv.bias, stride, 0, conv.dilation, conv.groups)
            out[..., top:bottom, left:right] = y
    return out


def _cut(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """Of an axis (-2 or -1) what lies from `start` on, zeros where there is nothing."""
    first, last = (min(max(end, 0), x.shape[axis]) for end in (start, start + length))
    before = min(length, max(0, -start))
    rim = (before, length - before - (last - first))
    return F.pad(x.narrow(axis, first, last - first), rim if axis == -1 else (0, 0, *rim))


def _group_norm(norm: nn.GroupNorm, side: int, x: Tensor) -> Tensor:
    if x.ndim != 4 or max(x.shape[-2:]) <= side:
        return _elsewhere(norm, side, x)
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
    each = norm.num_channels // norm.num_groups  # channels of a group
    scale = (variance + norm.eps).rsqrt().repeat_interleave(each, 1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(each, 1) * scale
    out = torch.empty_like(x)
    for tile in tiles:
        out[tile] = (x[tile].to(device).float() * scale[..., None, None] + shift[..., None, None]).to(x.dtype)
    return out
