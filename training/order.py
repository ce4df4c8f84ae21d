"""Which samples make which batch: pure functions of (seed, number), so that a run resumes by counting on.

`Order` shuffles epochs, `Mix` deals positions to sources by weight, `Turns` deals batches to buckets (images of one
size), and `Plan` joins them: number of a batch -> the bucket, and the places of its samples.

Shapes: B samples in a batch, n samples in all, n_b those of bucket b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

WINDOW = 8
"""Blocks (row groups of a Parquet file) whose samples are shuffled among each other."""


class Order:
    """Places 0 .. n - 1 in the endless concatenation of shuffled epochs: `order[position]`.

    Epoch e is the permutation drawn by default_rng([seed, e, *stream]); of each, 4 bytes a sample are kept. blocks: the
    block of each place, where those of one block are best read together: blocks are shuffled, then the samples within
    WINDOW blocks.
    """

    def __init__(self, n: int, seed: int, stream: tuple[int, ...] = (), blocks: np.ndarray | None = None) -> None:
        self.n, self.seed, self.stream, self.blocks = n, seed, stream, blocks
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, k = divmod(position, self.n)
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}  # keep the one before
            self._epochs[epoch] = self._permutation(np.random.default_rng([self.seed, epoch, *self.stream]))
        return int(self._epochs[epoch][k])

    def _permutation(self, rng: np.random.Generator) -> np.ndarray:
        if self.blocks is None:
            order = np.arange(self.n, dtype=np.uint32 if self.n < 2**32 else np.int64)
            rng.shuffle(order)  # the draws of rng.permutation, in half its memory
            return order
        ids, block = np.unique(self.blocks, return_inverse=True)
        window = rng.permutation(len(ids))[block] // WINDOW
        return np.lexsort((rng.random(self.n), window)).astype(np.uint32)


class Mix:
    """Positions 0, 1, 2 ... dealt to parts by weight: `mix[position]` = (part, k), the k-th position of that part.

    Of the first p positions the first part has floor(p w), and the others are dealt likewise what is left: each part
    has its share of any stretch, but for a few positions.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        rest, self._shares = sum(map(Fraction, weights)), []
        for weight in weights:
            share = (Fraction(weight) / rest).limit_denominator(10**9) if rest > 0 else Fraction(1)
            self._shares.append((share.numerator, share.denominator))
            rest -= Fraction(weight)

    def __getitem__(self, position: int) -> tuple[int, int]:
        for part, (above, below) in enumerate(self._shares):
            before = position * above // below
            if (position + 1) * above // below > before:
                return part, before
            position -= before
        raise AssertionError("the last part takes all that is left")


class Turns:
    """Batches dealt to buckets: `turns[step]` = (bucket, k), the k-th batch of that bucket.

    After e epochs bucket b has had floor(e n_b / B) batches; those of an epoch come in shuffled order. So a bucket's
    samples come once an epoch, and what does not fill its last batch is carried into the next.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        self.counts, self.batch_size, self.seed = [int(count) for count in counts], batch_size, seed
        self._first, self._turns = 0, np.zeros((0, 2), dtype=np.int64)

    def __getitem__(self, step: int) -> tuple[int, int]:
        if len(self.counts) == 1:
            return 0, step
        if not self._first <= step < self._first + len(self._turns):
            self._load(step)
        bucket, k = self._turns[step - self._first]
        return int(bucket), int(k)

    def _done(self, epoch: int) -> np.ndarray:
        """Batches of each bucket before an epoch."""
        return np.array([epoch * count // self.batch_size for count in self.counts], dtype=np.int64)

    def _load(self, step: int) -> None:
        epoch = step * self.batch_size // sum(self.counts)  # never more than are due by then
        while self._done(epoch + 1).sum() <= step:
            epoch += 1
        before, after = self._done(epoch), self._done(epoch + 1)
        own = [np.arange(first, last) for first, last in zip(before, after, strict=True)]
        turns = np.stack([np.repeat(np.arange(len(own)), after - before), np.concatenate(own)], axis=1)
        shuffled = np.random.default_rng([self.seed, epoch, len(self.counts)]).permutation(len(turns))
        self._first, self._turns = int(before.sum()), turns[shuffled]


@dataclass(frozen=True)
class Layout:
    """How a source's samples fall into buckets (sizes) and parts (sources with weights), and in which blocks they lie.

    bucket, part, block: one number a sample, None where all are 0 (or, for blocks, where each lies alone). mixed: a
    batch holds samples of any bucket.
    """

    sizes: tuple[tuple[int, int], ...]
    bucket: np.ndarray | None = None
    part: np.ndarray | None = None
    weights: tuple[float, ...] = (1.0,)
    block: np.ndarray | None = None
    mixed: bool = False

    def bucket_of(self, i: int) -> int:
        """The bucket of a sample."""
        return 0 if self.bucket is None else int(self.bucket[i])

    def of(self, indices: np.ndarray) -> Layout:
        """That of some of the samples."""
        bucket, part, block = (None if x is None else x[indices] for x in (self.bucket, self.part, self.block))
        return replace(self, bucket=bucket, part=part, block=block)


class Plan:
    """`plan[step]` -> (bucket, pool of places, positions in the pool): see `places`.

    A pool is what one source has of one bucket, in its own shuffled epochs; where buckets are mixed, of all.
    """

    def __init__(self, n: int, layout: Layout, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        if layout.mixed:
            layout = replace(layout, sizes=layout.sizes[:1], bucket=None)
        self.pools: list[list[np.ndarray]] = []  # of each bucket, of each part: places
        self._orders: list[list[Order]] = []
        self._mixes: list[Mix] = []
        counts = []
        for b in range(len(layout.sizes)):
            pools, weights = _pools(n, layout, b)
            alone = len(layout.sizes) == 1 == len(layout.weights)
            self.pools.append([pool for pool, _ in pools])
            self._orders.append([Order(len(pool), seed, () if alone else (b + 1, s + 1), _blocks(layout, pool))
                                 for pool, s in pools])  # fmt: skip
            self._mixes.append(Mix(weights or [1.0]))
            counts.append(max(len(pools) > 0, round(n * sum(weights))))
        self.turns = Turns(counts, batch_size, seed)

    def places(self, step: int, rows: Sequence[int]) -> tuple[int, list[tuple[np.ndarray, int]]]:
        """(bucket, [(pool, place in the pool)]) of some rows of a batch."""
        bucket, k = self.turns[step]
        found = []
        for row in rows:
            s, position = self._mixes[bucket][k * self.batch_size + row]
            found.append((self.pools[bucket][s], self._orders[bucket][s][position]))
        return bucket, found


def _pools(n: int, layout: Layout, bucket: int) -> tuple[list[tuple[np.ndarray, int]], list[float]]:
    """(places and number of each part that has samples of a bucket, their weights, which add up to 1 over buckets)."""
    inside = np.ones(n, dtype=bool) if layout.bucket is None else layout.bucket == bucket
    pools, weights = [], []
    sizes = np.bincount(layout.part, minlength=len(layout.weights)) if layout.part is not None else np.array([n])
    total = sum(weight for weight, size in zip(layout.weights, sizes, strict=True) if size)
    for s, weight in enumerate(layout.weights):
        own = inside if layout.part is None else inside & (layout.part == s)
        if own.any():
            pools.append((np.flatnonzero(own).astype(np.uint32 if n < 2**32 else np.int64), s))
            weights.append(weight / total * float(own.sum()) / float(sizes[s]))
    return pools, weights


def _blocks(layout: Layout, pool: np.ndarray) -> np.ndarray | None:
    """The block of each place of a pool; those of one source have numbers of their own, or are all -1: none."""
    return None if layout.block is None or layout.block[pool[0]] < 0 else layout.block[pool]
