"""Aspect-ratio buckets: sizes of about one area, of which each image takes the nearest in shape; or each its own size.

SD3 (arXiv 2403.03206, section 5.3.2) fine-tunes at mixed aspect ratios with H x W near S^2. Here a bucket's height is
any multiple of the step, and its width the multiple that brings the area nearest to S^2.

Shapes: n images, b buckets; sizes are (height, width).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from training.images import Size


def bucket_sizes(height: int, width: int, step: int, max_ratio: float) -> list[Size]:
    """All buckets of about the area height * width, with aspect ratios up to max_ratio, from the widest to the tallest.

    Sides are multiples of `step`; with (h, w) there always is (w, h). Raises ValueError for a ratio or a step below 1.
    """
    if step < 1:
        raise ValueError(f"the step of a bucket's sides must be at least 1, not {step}")
    if max_ratio < 1:
        raise ValueError(f"the largest aspect ratio of a bucket must be at least 1, not {max_ratio:g}")
    area = height * width
    square = max(1, round(math.sqrt(area) / step)) * step
    found = {(square, square)}
    for side in range(step, int(math.sqrt(area * max_ratio)) + step, step):
        other = max(1, round(area / side / step)) * step
        if max(side, other) <= max_ratio * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def assign(heights: np.ndarray, widths: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """The bucket (n,) of each image: the nearest in log aspect ratio, so that least is cropped.

    sizes: as `bucket_sizes` gives them, sorted by aspect ratio.
    """
    return np.searchsorted(_edges(sizes), np.log(heights / widths)).astype(np.int16)


def _edges(sizes: list[Size]) -> np.ndarray:
    """The log aspect ratios halfway between neighbouring buckets."""
    logs = np.log([height / width for height, width in sizes])
    return (logs[1:] + logs[:-1]) / 2


def own_sizes(
    heights: np.ndarray, widths: np.ndarray, area: int, step: int, max_ratio: float
) -> tuple[list[Size], np.ndarray]:
    """(the sizes nearest to the images' own, the number (n,) of the size that each image takes).

    Sides are multiples of `step`. An image of more than `area` pixels is scaled down to it, one with an aspect ratio
    above max_ratio is cropped to it; none is scaled up by more than rounding to the step takes.
    """
    h, w = np.minimum(heights, widths * max_ratio), np.minimum(widths, heights * max_ratio)
    scale = np.minimum(1.0, np.sqrt(area / (h * w)))
    sides = np.maximum(1, np.floor(np.stack([h, w]) * scale / step + 0.5)).astype(np.int64)
    h, w = np.minimum(sides, np.maximum(1, np.floor(sides[::-1] * max_ratio)).astype(np.int64)) * step
    found, taken = np.unique(np.stack([h, w], axis=1), axis=0, return_inverse=True)
    return [(int(height), int(width)) for height, width in found], taken.reshape(-1).astype(np.int32)


def all_own_sizes(area: int, step: int, max_ratio: float) -> list[Size]:
    """All sizes that `own_sizes` can give, for any images."""
    area_in_steps = area / step**2 * (1 + 1e-9)  # with room for rounding errors
    sides = np.arange(1, max(1, math.floor(math.sqrt(area_in_steps * max_ratio) + 0.5)) + 1)
    h, w = np.meshgrid(sides, sides, indexing="ij")
    low_h, low_w = (np.where(side == 1, 0.0, side - 0.5) for side in (h, w))  # the least that rounds to each side
    least_h, least_w = np.maximum(low_h, low_w / max_ratio), np.maximum(low_w, low_h / max_ratio)
    found = least_h * least_w <= area_in_steps
    h, w = h[found], w[found]
    h, w = (np.minimum(a, np.maximum(1, np.floor(b * max_ratio))).astype(int) * step for a, b in ((h, w), (w, h)))
    return sorted({*zip(h.tolist(), w.tolist(), strict=True)})


class Sizing:
    """`sizing(size)` is the one of `sizes` that an image of that size is fitted to; used where images come singly.

    That is image_size, the nearest bucket of about its area, or with "own" the image's own size up to that area. None,
    an unknown size, counts as image_size. Raises ValueError for a ratio below 1.
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
    """The buckets (n,) of images after merging: one of fewer than `least` images joins the nearest, the smallest first.

    Otherwise a batch could hold an image twice. Where there are fewer images in all, one bucket is left.
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
