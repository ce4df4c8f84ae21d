"""Which samples make which batch: pure functions of (seed, batch number), so that resuming needs no stored state.

`Order` shuffles epochs, `Mix` assigns positions to data sets by weight, `Turns` assigns batches to buckets (images of
one size), and `Plan` joins them: the number of a batch gives its bucket and the places of its samples.

Shapes: B samples in a batch, n samples in all, n_b those of bucket b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

WINDOW = 8
"""Number of blocks (row groups of a Parquet file) whose samples are shuffled together."""


class Order:
    """Places 0 .. n - 1 in the endless concatenation of shuffled epochs: `order[position]`.

    Epoch e is the permutation drawn by default_rng([seed, e, *stream]), at 4 bytes a sample. blocks: the block of each
    place, where a block is read as one; then blocks are shuffled, and samples within every WINDOW blocks.
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
    """Positions 0, 1, 2 ... assigned to parts by weight: `mix[position]` = (part, k), the k-th position of that part.

    Of the first p positions the first part has floor(p w), and the others divide the rest in the same way. Any stretch
    of positions thus has the parts in proportion to their weights, up to a few positions.
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
    """Batches assigned to buckets: `turns[step]` = (bucket, k), the k-th batch of that bucket.

    After e epochs bucket b has had floor(e n_b / B) batches; those of an epoch come in shuffled order. A bucket's
    samples thus come once an epoch, and those that do not fill a last batch begin the first batch of the next epoch.
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
        """The number of batches of each bucket before an epoch."""
        return np.array([epoch * count // self.batch_size for count in self.counts], dtype=np.int64)

    def _load(self, step: int) -> None:
        epoch = step * self.batch_size // sum(self.counts)  # the right epoch, or one too early
        while self._done(epoch + 1).sum() <= step:
            epoch += 1
        before, after = self._done(epoch), self._done(epoch + 1)
        own = [np.arange(first, last) for first, last in zip(before, after, strict=True)]
        turns = np.stack([np.repeat(np.arange(len(own)), after - before), np.concatenate(own)], axis=1)
        shuffled = np.random.default_rng([self.seed, epoch, len(self.counts)]).permutation(len(turns))
        self._first, self._turns = int(before.sum()), turns[shuffled]


@dataclass(frozen=True)
class Layout:
    """How samples fall into buckets (sizes), parts (data sets with weights) and blocks (samples that are read as one).

    bucket, part, block: a number for each sample; None where there is one bucket, one part, or no block. mixed: a batch
    may hold samples of any bucket.
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
        """The layout of a selection of the samples."""
        bucket, part, block = (None if x is None else x[indices] for x in (self.bucket, self.part, self.block))
        return replace(self, bucket=bucket, part=part, block=block)


class Plan:
    """The samples of each batch: `plan.places(step, rows)`.

    A pool is the samples of one part in one bucket (in all of them, where they are mixed); each has its own `Order`.
    """

    def __init__(self, n: int, layout: Layout, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        if layout.mixed:
            layout = replace(layout, sizes=layout.sizes[:1], bucket=None)
        self.pools: list[list[np.ndarray]] = []  # pools[bucket][part]: places
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
        """(bucket, [(pool, index in the pool)]) of some rows of batch number `step`."""
        bucket, k = self.turns[step]
        found = []
        for row in rows:
            s, position = self._mixes[bucket][k * self.batch_size + row]
            found.append((self.pools[bucket][s], self._orders[bucket][s][position]))
        return bucket, found


def _pools(n: int, layout: Layout, bucket: int) -> tuple[list[tuple[np.ndarray, int]], list[float]]:
    """([(places, part)] of the parts that have samples in a bucket, their weights, which over all buckets sum to 1)."""
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
    """The block of each place of a pool; None where its part has no blocks, which is -1 for all."""
    return None if layout.block is None or layout.block[pool[0]] < 0 else layout.block[pool]
