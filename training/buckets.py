"""Aspect-ratio buckets: sizes of about one area, of which each image takes the nearest in shape; or each its own size.

SD3 (arXiv 2403.03206, section 5.3.2) fine-tunes at mixed aspect ratios with H x W near S^2. Here the heights are all
multiples of the step, and to each belongs the multiple of the step that brings the area nearest to S^2.

Shapes: n images, b buckets; sizes are (height, width).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Size = tuple[int, int]


def bucket_sizes(height: int, width: int, step: int, max_ratio: float) -> list[Size]:
    """All buckets of about the area height * width, longer side over shorter at most max_ratio, by falling width.

    Sides are multiples of `step`. Both the bucket of a height and that of its mirror image are there. Raises ValueError
    for a ratio below 1.
    """
    if max_ratio < 1:
        raise ValueError(f"the largest aspect ratio of a bucket must be at least 1, not {max_ratio:g}")
    area = height * width
    found = {_nearest_square(area, step)}
    for side in range(step, int(math.sqrt(area * max_ratio)) + step, step):
        other = max(1, round(area / side / step)) * step
        if max(side, other) <= max_ratio * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def _nearest_square(area: int, step: int) -> Size:
    side = max(1, round(math.sqrt(area) / step)) * step
    return side, side


def assign(heights: np.ndarray, widths: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """Which bucket (n,) each image takes: the one whose ratio is nearest on the logarithmic scale, so least is cropped.

    sizes: as `bucket_sizes` gives them, by falling width.
    """
    return np.searchsorted(_edges(sizes), np.log(heights / widths)).astype(np.int16)


def _edges(sizes: list[Size]) -> np.ndarray:
    """Logarithms of the ratios between which the nearest bucket is another."""
    logs = np.log([height / width for height, width in sizes])
    return (logs[1:] + logs[:-1]) / 2


def own_sizes(
    heights: np.ndarray, widths: np.ndarray, area: int, step: int, max_ratio: float
) -> tuple[list[Size], np.ndarray]:
    """The sizes that are nearest to the images' own, and which of them (n,) each image takes.

    Sides are multiples of `step`. An image of more than `area` is scaled down to it, and one whose longer side is over
    max_ratio times the shorter is cut to that; none is scaled up, but for what rounding to the step asks for.
    """
    h, w = np.minimum(heights, widths * max_ratio), np.minimum(widths, heights * max_ratio)
    scale = np.minimum(1.0, np.sqrt(area / (h * w)))
    sides = np.maximum(1, np.floor(np.stack([h, w]) * scale / step + 0.5)).astype(np.int64)
    h, w = np.minimum(sides, np.maximum(1, np.floor(sides[::-1] * max_ratio)).astype(np.int64)) * step
    found, taken = np.unique(np.stack([h, w], axis=1), axis=0, return_inverse=True)
    return [(int(height), int(width)) for height, width in found], taken.reshape(-1).astype(np.int32)


def all_own_sizes(area: int, step: int, max_ratio: float) -> list[Size]:
    """All sizes that `own_sizes` may find, whatever the images."""
    area_in_steps = area / step**2 * (1 + 1e-9)  # a rounding error more
    sides = np.arange(1, max(1, math.floor(math.sqrt(area_in_steps * max_ratio) + 0.5)) + 1)
    h, w = np.meshgrid(sides, sides, indexing="ij")
    low_h, low_w = (np.where(side == 1, 0.0, side - 0.5) for side in (h, w))  # what is rounded to them begins here
    least_h, least_w = np.maximum(low_h, low_w / max_ratio), np.maximum(low_w, low_h / max_ratio)
    found = least_h * least_w <= area_in_steps
    h, w = h[found], w[found]
    h, w = (np.minimum(a, np.maximum(1, np.floor(b * max_ratio))).astype(int) * step for a, b in ((h, w), (w, h)))
    return sorted({*zip(h.tolist(), w.tolist(), strict=True)})


class Sizing:
    """`sizing(size)` -> the size that an image of that size is fitted to, of all `sizes` that there may be.

    It is image_size, or the nearest in shape of the buckets of about its area, or the image's own, up to that area. An
    image of no known size takes what one of image_size takes. Raises ValueError for a ratio below 1.
    """

    def __init__(
        self, image_size: Size, step: int = 1, buckets: bool | Literal["own"] = False, max_ratio: float = 1.0
    ) -> None:
        self.image_size, self.step, self.buckets, self.max_ratio = image_size, step, buckets, max_ratio
        self._area = image_size[0] * image_size[1]
        self.sizes: list[Size] = [image_size]
        if buckets == "own":
            self.sizes = all_own_sizes(self._area, step, max_ratio)
        elif buckets:
            self.sizes = bucket_sizes(*image_size, step, max_ratio)
            self._edges = _edges(self.sizes)

    def __call__(self, size: Size | None) -> Size:
        height, width = size or self.image_size
        if self.buckets == "own":
            return own_sizes(np.array([height]), np.array([width]), self._area, self.step, self.max_ratio)[0][0]
        if self.buckets:
            return self.sizes[int(np.searchsorted(self._edges, np.log(height / width)))]
        return self.image_size


def merge_small(bucket: np.ndarray, sizes: list[Size], least: int) -> np.ndarray:
    """Buckets (n,) where those of fewer than `least` images have joined the neighbour in shape, the smallest first.

    A batch of a bucket that cannot fill it would show an image twice. With fewer images than that in all, one is left.
    """
    counts = np.bincount(bucket, minlength=len(sizes))
    into = np.arange(len(sizes))
    logs = np.array([math.log(h / w) for h, w in sizes])
    while True:
        alive = np.flatnonzero(counts)
        small = alive[counts[alive] < least]
        if len(alive) < 2 or not len(small):
            return into[bucket].astype(np.int16)
        b = small[np.argmin(counts[small])]
        others = alive[alive != b]
        to = others[np.argmin(np.abs(logs[others] - logs[b]))]
        counts[to] += counts[b]
        counts[b] = 0
        into[into == b] = to
