"""Batches from a source, in an order that is a pure function of (seed, step), with or without worker processes.

`order.Plan` says which samples batch number `step` holds. A batch is thus a function of its number: resuming starts
at another number, each worker process builds whole batches on its own, and each rank its rows of them.

Shapes: B samples in a batch, h, w the source's image size.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.errors import DataError
from training.order import Plan
from training.own_data import sample_at
from training.remote import read_each
from training.share import WHOLE, Share
from training.workers import run

if TYPE_CHECKING:
    from training.data import Sample, Source


__all__ = ["ImageBatch", "by_shape", "loader", "make_batch", "one_pass", "rng_for"]


@dataclass(frozen=True)
class ImageBatch:
    """Images uint8 RGB (B, 3, h, w), captions and keys; `skipped` lists bad samples that were met: (key, reason).

    In memory the channels are last, as decoders leave them.

    originals (B, 2): height and width of the upright files; crops (B, 2): top and left of the crops in the scaled
    images, in pixels; flipped (B,): which are mirrored; indices: the samples' numbers in the source. sizes: (h, w) of
    each image where a batch holds several sizes; `images` is then the pixels of all, (P, 3).
    """

    images: torch.Tensor
    captions: list[str]
    keys: list[str]
    skipped: list[tuple[str, str]]
    originals: torch.Tensor
    crops: torch.Tensor
    flipped: torch.Tensor
    indices: list[int]
    sizes: list[tuple[int, int]] | None = None

    def by_size(self) -> list[tuple[list[int], torch.Tensor]]:
        """(rows of the batch, their images (n, 3, h, w)) for each size in it."""
        if self.sizes is None:
            return [(list(range(len(self.images))), self.images)]
        pixels = self.images.split([height * width for height, width in self.sizes])
        images = [some.view(*size, 3) for some, size in zip(pixels, self.sizes, strict=True)]
        return [(rows, some.permute(0, 3, 1, 2)) for rows, some in by_shape(images)]


def loader(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Generator[ImageBatch, None, None]:
    """Endless shuffled batches of exactly `batch_size` of the samples at `indices`, from batch number `start_step` on.

    A batch may span the end of an epoch; it is of one bucket, if the source has buckets and does not mix them. A bad
    sample is replaced by the next good one of its data set and, unless they are mixed, bucket. share: the rows of each
    batch that this process reads. The batches depend neither on `num_workers` nor on the number of processes. The
    iterator's `close()` ends the workers. Raises `DataError` for arguments out of range; while iterating, when no
    sample is good, a server fails or a worker process dies.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("seed", seed, 0)
    _at_least("start_step", start_step, 0)
    _at_least("num_workers", num_workers, 0)
    if len(indices) == 0:
        raise DataError("no samples to train on: the list of indices is empty; use more data, or hold out less of it")
    batch_at = _Shuffled(source, np.asarray(indices), batch_size, seed, share.rows(batch_size))
    return run(batch_at, itertools.count(start_step), num_workers)


def one_pass(
    source: Source, indices: Sequence[int] | np.ndarray, batch_size: int, num_workers: int = 0
) -> Generator[ImageBatch, None, None]:
    """All good samples at `indices` once and in order, in batches of `batch_size` from which bad ones are missing;
    where there are buckets, bucket after bucket. Crops are central, captions the first.

    Raises `DataError` for arguments out of range; while iterating, when a worker process dies.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("num_workers", num_workers, 0)
    chunks = _chunks(source, np.asarray(indices, dtype=np.int64), batch_size)
    return run(partial(_in_order, source, chunks), range(len(chunks)), num_workers)


class _Shuffled:
    """step -> ImageBatch, as `loader` says."""

    def __init__(self, source: Source, indices: np.ndarray, batch_size: int, seed: int, rows: list[int]) -> None:
        self.source, self.indices, self.seed, self.rows = source, indices, seed, rows
        self.plan = Plan(len(indices), source.layout.of(indices), batch_size, seed)

    def __call__(self, step: int) -> ImageBatch:
        bucket, places = self.plan.places(step, self.rows)
        asked = [(pool, place, step, row) for (pool, place), row in zip(places, self.rows, strict=True)]
        found = read_each(self._good_sample, asked, self.source.is_remote)
        skipped: list[tuple[str, str]] = []

        def samples() -> Iterator[tuple[int, Sample]]:
            for i, sample, before in found:
                skipped.extend(before)
                yield i, sample

        layout = self.source.layout
        if layout.mixed:
            return make_row(samples(), skipped)
        return make_batch(layout.sizes[bucket], len(asked), samples(), skipped)

    def _good_sample(self, asked: tuple[np.ndarray, int, int, int]) -> tuple[int, Sample, list[tuple[str, str]]]:
        """(its number, the sample, the bad ones before it), of the first good sample from the one asked for on."""
        pool, place, step, row = asked
        skipped: list[tuple[str, str]] = []
        for offset in range(len(pool)):
            i = int(self.indices[pool[(place + offset) % len(pool)]])
            sample = sample_at(self.source, i, partial(rng_for, self.seed, step, row))
            if sample.error is None:
                return i, sample, skipped
            skipped.append((sample.key, sample.error))
        key, reason = skipped[-1]
        raise DataError(f"none of the {len(pool)} samples can be used; one of them is {key}: {reason}")


def rng_for(seed: int, step: int, row: int) -> np.random.Generator:
    """The generator of the random choices for a row of a batch: its caption, crop and flip."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(step, row))))


def by_shape(tensors: Sequence[torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
    """(places in the list, the tensors there stacked (n, ...)) for each shape among them."""
    groups: dict[torch.Size, list[int]] = {}
    for place, x in enumerate(tensors):
        groups.setdefault(x.shape, []).append(place)
    return [(places, torch.stack([tensors[place] for place in places])) for places in groups.values()]


def _in_order(source: Source, chunks: Sequence[np.ndarray], step: int) -> ImageBatch:
    samples = [(int(i), sample_at(source, int(i))) for i in chunks[step]]
    skipped = [(sample.key, sample.error) for _, sample in samples if sample.error is not None]
    layout, first = source.layout, int(chunks[step][0])
    size = layout.sizes[layout.bucket_of(first)]
    good = [(i, sample) for i, sample in samples if sample.error is None]
    return make_batch(size, len(good), good, skipped)


def _chunks(source: Source, indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The indices in order, in batches of one bucket each, bucket after bucket."""
    bucket = source.layout.bucket
    groups = [indices]
    if bucket is not None:
        indices = indices[np.argsort(bucket[indices], kind="stable")]
        groups = np.split(indices, np.flatnonzero(np.diff(bucket[indices])) + 1)
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def make_batch(
    size: tuple[int, int], count: int, numbered: Iterable[tuple[int, Sample]], skipped: list[tuple[str, str]]
) -> ImageBatch:
    """The batch of `count` good samples of one size (h, w), given with their numbers; an image is freed once copied."""
    images = np.empty((count, *size, 3), dtype=np.uint8)
    kept = []
    for slot, (i, sample) in zip(images, numbered, strict=True):
        slot[:] = _pixels(sample, size)
        kept.append((i, replace(sample, image=None, original=sample.original or size)))
    return _batch(torch.from_numpy(images).permute(0, 3, 1, 2), kept, skipped)


def make_row(numbered: Iterable[tuple[int, Sample]], skipped: list[tuple[str, str]]) -> ImageBatch:
    """The batch of good samples of any sizes, given with their numbers."""
    pixels, sizes, kept = [], [], []
    for i, sample in numbered:
        image = _pixels(sample)
        sizes.append((image.shape[0], image.shape[1]))
        pixels.append(image.reshape(-1, 3))
        kept.append((i, replace(sample, image=None, original=sample.original or sizes[-1])))
    return _batch(torch.from_numpy(np.concatenate(pixels)), kept, skipped, sizes)


def _pixels(sample: Sample, size: tuple[int, int] | None = None) -> np.ndarray:
    """The image of a good sample. Raises `DataError` unless it is uint8 RGB, and of the size (h, w) where one is given:
    numpy would otherwise stretch a single channel, and cut numbers between 0 and 1 to 0.
    """
    image = sample.image
    if not isinstance(image, np.ndarray):
        found = "none, and error is not set" if image is None else f"a {type(image).__name__}, not an array of numpy"
    elif image.dtype == np.uint8 and image.shape == (*(size or image.shape[:2]), 3):
        return image
    else:
        found = f"{image.dtype} {image.shape}"
    high, wide = size or ("h", "w")
    raise DataError(f"the image of {sample.key} is {found}, expected uint8 ({high}, {wide}, 3)")


def _batch(
    images: torch.Tensor,
    numbered: Sequence[tuple[int, Sample]],
    skipped: list[tuple[str, str]],
    sizes: list[tuple[int, int]] | None = None,
) -> ImageBatch:
    numbers, samples = [i for i, _ in numbered], [sample for _, sample in numbered]
    captions, keys = [sample.caption for sample in samples], [sample.key for sample in samples]
    originals = torch.tensor([sample.original for sample in samples]).view(-1, 2)
    crops = torch.tensor([sample.crop for sample in samples]).view(-1, 2)
    flipped = torch.tensor([sample.flipped for sample in samples], dtype=torch.bool)
    return ImageBatch(images, captions, keys, skipped, originals, crops, flipped, numbers, sizes)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise DataError(f"{name} must be at least {low}, not {value}")
