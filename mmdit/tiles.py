"""A network over a large picture tile by tile: memory for one tile at a time, seams blended away.

Tiles of one size are spread evenly and overlap by a quarter of their side or more. Across an overlap the weight of one
tile falls linearly while that of the next rises; the outer quarter at each end of the overlap has no weight, since
there a convolution has seen a tile's edge in the place of the picture.

A network that looks no further than that margin gives what it gives untiled. Two things look further: GroupNorm, whose
mean and variance are those of the tile and not of the picture, and attention over all pixels. What that does is
measured in docs/autoencoder.md: it grows with how much a tile differs from its picture, and larger tiles differ less.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, side: int | None, size_in: int, size_out: int) -> Tensor:
    """`network` over tiles of x (B, C, h * size_in, w * size_in), giving (B, C', h * size_out, w * size_out).

    side: of a tile, in units of h and w. None, or a picture no larger than a tile, is worked in one piece.
    """
    height, width = x.shape[-2] // size_in, x.shape[-1] // size_in
    if side is None or max(height, width) <= side:
        return network(x)
    total = x.new_zeros(0)
    across = list(zip(*_tiles(width, side, size_out), strict=True))
    for rows, row_weights in zip(*_tiles(height, side, size_out), strict=True):
        for columns, column_weights in across:
            y = network(x[..., _times(rows, size_in), _times(columns, size_in)])
            if not len(total):
                total = y.new_zeros(*y.shape[:2], height * size_out, width * size_out)
            weights = row_weights.to(y)[:, None] * column_weights.to(y)
            total[..., _times(rows, size_out), _times(columns, size_out)] += weights * y
    return total


def _times(span: slice, size: int) -> slice:
    return slice(span.start * size, span.stop * size)


def _tiles(length: int, side: int, size_out: int) -> tuple[list[slice], list[Tensor]]:
    """Along one axis: where the tiles are, and the weight of each tile's pixels, which together make one everywhere."""
    if length <= side:
        return [slice(0, length)], [torch.ones(length * size_out)]
    overlap = max(1, side // 4)
    num = -(-(length - overlap) // (side - overlap))
    starts = [round(i * (length - side) / (num - 1)) for i in range(num)]
    spans = [slice(start, start + side) for start in starts]
    table = torch.zeros(num, length * size_out)
    for i, span in enumerate(spans):
        table[i, _times(span, size_out)] = 1
        if i > 0:
            table[i, _times(slice(span.start, spans[i - 1].stop), size_out)] *= _ramp(spans[i - 1], span, size_out)
        if i + 1 < num:
            table[i, _times(slice(spans[i + 1].start, span.stop), size_out)] *= 1 - _ramp(span, spans[i + 1], size_out)
    table /= table.sum(0)  # three tiles can meet where the last are close
    return spans, [table[i, _times(span, size_out)] for i, span in enumerate(spans)]


def _ramp(span: slice, following: slice, size_out: int) -> Tensor:
    """Weight of the following tile over the overlap of two: 0 for a quarter, then linear, 1 for a quarter."""
    num = (span.stop - following.start) * size_out
    return (2 * (torch.arange(num) + 0.5) / num - 0.5).clamp(0, 1)
