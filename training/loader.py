"""Batches from a source, in an order that is a pure function of (seed, step), with or without worker processes.

Batch number `step` holds what `order.Plan` says. A batch is thus a function of its number: to resume is to start
counting elsewhere, each worker process builds whole batches on its own, and each rank its own rows of them.

Shapes: B samples in a batch, h, w the source's image size.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.errors import DataError
from training.order import Layout, Order, Plan
from training.share import WHOLE, Share
from training.workers import run

if TYPE_CHECKING:
    from training.data import Sample, Source


__all__ = ["Batch", "Order", "layout_of", "loader", "make_batch", "one_pass", "rng_for"]

READ_AHEAD = 16
"""Samples of a batch that are asked of a server at the same time."""


@dataclass(frozen=True)
class Batch:
    """Images uint8 RGB (B, 3, h, w), captions and keys; `skipped` lists the bad samples met: (key, reason).

    The images' channels lie last in memory, as decoders leave them.

    originals (B, 2): height and width of the upright files; crops (B, 2): how far down and right the images begin in
    the scaled ones, in pixels; flipped (B,): which are mirrored; indices: the samples' numbers in the source.
    """

    images: torch.Tensor
    captions: list[str]
    keys: list[str]
    skipped: list[tuple[str, str]]
    originals: torch.Tensor
    crops: torch.Tensor
    flipped: torch.Tensor
    indices: list[int]


def loader(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Generator[Batch, None, None]:
    """Endless shuffled batches of exactly `batch_size` of the samples at `indices`, from batch number `start_step` on.

    Batches run across the ends of epochs; each is of one bucket, if the source has buckets. In place of a bad sample
    stands the next good one of its bucket and source. share: the rows of each batch that this process reads; all
    shares together are the batches of one process. The batches do not depend on `num_workers`. The iterator's
    `close()` ends the workers. Raises `DataError` for arguments out of range; while iterating, when no sample is good,
    a server fails or a worker process dies.
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
) -> Generator[Batch, None, None]:
    """All good samples at `indices` once and in order, in batches of `batch_size` less the bad ones; where there are
    buckets, bucket after bucket. Crops are central, captions the first.

    Raises `DataError` for arguments out of range; while iterating, when a worker process dies.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("num_workers", num_workers, 0)
    chunks = _chunks(source, np.asarray(indices, dtype=np.int64), batch_size)
    return run(partial(_in_order, source, chunks), range(len(chunks)), num_workers)


class _Shuffled:
    """step -> Batch, as `loader` says."""

    def __init__(self, source: Source, indices: np.ndarray, batch_size: int, seed: int, rows: list[int]) -> None:
        self.source, self.indices, self.seed, self.rows = source, indices, seed, rows
        self.plan = Plan(len(indices), layout_of(source).of(indices), batch_size, seed)
        self.draw = getattr(source, "draw", None)

    def __call__(self, step: int) -> Batch:
        bucket, places = self.plan.places(step, self.rows)
        asked = [(pool, place, step, row) for (pool, place), row in zip(places, self.rows, strict=True)]
        if getattr(self.source, "is_remote", False):
            with ThreadPoolExecutor(READ_AHEAD) as pool:
                found: Iterable[Any] = list(pool.map(self._good_sample, asked))
        else:
            found = map(self._good_sample, asked)
        skipped: list[tuple[str, str]] = []

        def samples() -> Iterator[tuple[int, Sample]]:
            for i, sample, before in found:
                skipped.extend(before)
                yield i, sample

        return make_batch(layout_of(self.source).sizes[bucket], len(asked), samples(), skipped)

    def _good_sample(self, asked: tuple[np.ndarray, int, int, int]) -> tuple[int, Sample, list[tuple[str, str]]]:
        """(number and sample, or those of the next good one of its pool; the bad ones before it)."""
        pool, place, step, row = asked
        skipped: list[tuple[str, str]] = []
        for offset in range(len(pool)):
            i = int(self.indices[pool[(place + offset) % len(pool)]])
            sample = self.source[i] if self.draw is None else self.draw(i, partial(rng_for, self.seed, step, row))
            if sample.error is None:
                return i, sample, skipped
            skipped.append((sample.key, sample.error))
        key, reason = skipped[-1]
        raise DataError(f"none of the {len(pool)} samples can be used; one of them is {key}: {reason}")


def rng_for(seed: int, step: int, row: int) -> np.random.Generator:
    """What is drawn for a row of a batch: which caption, where to crop."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(step, row))))


def layout_of(source: Source) -> Layout:
    """How a source's samples fall into buckets and parts: by default one of each."""
    layout: Layout | None = getattr(source, "layout", None)
    return layout or Layout((source.image_size,))


def _in_order(source: Source, chunks: Sequence[np.ndarray], step: int) -> Batch:
    samples = [(int(i), source[int(i)]) for i in chunks[step]]
    skipped = [(sample.key, sample.error) for _, sample in samples if sample.error is not None]
    layout, first = layout_of(source), int(chunks[step][0])
    size = layout.sizes[0 if layout.bucket is None else layout.bucket[first]]
    good = [(i, sample) for i, sample in samples if sample.error is None]
    return make_batch(size, len(good), good, skipped)


def _chunks(source: Source, indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The indices in order, in batches of one bucket each, bucket after bucket."""
    bucket = layout_of(source).bucket
    groups = [indices] if bucket is None else [indices[bucket[indices] == b] for b in range(bucket.max(initial=0) + 1)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def make_batch(
    size: tuple[int, int], count: int, numbered: Iterable[tuple[int, Sample]], skipped: list[tuple[str, str]]
) -> Batch:
    """The batch of `count` good samples of one size (h, w), with their numbers; each image is let go when copied."""
    images = np.empty((count, *size, 3), dtype=np.uint8)
    samples, numbers = [], []
    for slot, (i, sample) in zip(images, numbered, strict=True):
        assert sample.image is not None
        slot[:] = sample.image
        samples.append(replace(sample, image=None))
        numbers.append(i)
    captions, keys = [sample.caption for sample in samples], [sample.key for sample in samples]
    originals = torch.tensor([sample.original or size for sample in samples]).view(-1, 2)
    crops = torch.tensor([sample.crop for sample in samples]).view(-1, 2)
    flipped = torch.tensor([sample.flipped for sample in samples], dtype=torch.bool)
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Batch(channels_first, captions, keys, skipped, originals, crops, flipped, numbers)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise DataError(f"{name} must be at least {low}, not {value}")
