"""Batches of one image size each, from rows of any size that come one after another.

Rows wait until there are enough of one size for a batch. Those that still wait at the end of an epoch are sorted by
aspect ratio and cut into batches of neighbours in shape; the remainder, fewer than a batch, is filled up with the first
rows of the next epoch. e epochs thus give floor(e n / B) batches, as in a plain order, and the batches of an epoch are
a function of (seed, epoch, n, B): resuming reads the epoch in which its first batch begins.

Letters: B rows of a batch, n rows of an epoch, of which the first (-e n) mod B of epoch e fill up the batch before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from training.images import Size

T = TypeVar("T")


class Bucketful(NamedTuple, Generic[T]):
    """Rows that are fitted to one size."""

    size: Size
    rows: list[T]


def bucketfuls(
    epoch_from: Callable[[int, int], Iterable[T]],
    size_of: Callable[[T], Size],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_rows: int | None = None,
) -> Iterator[Bucketful[T]]:
    """Batches from number `start_step` on, without an end.

    epoch_from(e, k): the rows of epoch e from the k-th on, in an order that is a function of e. num_rows: the number of
    rows in an epoch, if known; else the first epoch is read to count them.
    """
    epoch = step = skip = 0
    begun: list[Bucketful[T]] = []
    while True:
        first = start_step * batch_size // num_rows if num_rows else 0  # the epoch in which the first batch begins
        if num_rows and epoch < first:
            epoch, step, begun = first, -(-first * num_rows // batch_size), []
            skip = step * batch_size - first * num_rows
        rows = _Counted(epoch_from(epoch, skip))
        made, begun = _of_epoch(rows, size_of, batch_size, begun, np.random.default_rng([seed, epoch, 2])), []
        for batch in made:
            if len(batch.rows) < batch_size:
                begun = [batch]
                break
            if step >= start_step:
                yield batch
            step += 1
        num_rows = num_rows or rows.num
        epoch, skip = epoch + 1, 0


class _Counted(Generic[T]):
    """An iterable that counts its items in `num`."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items, self.num = items, 0

    def __iter__(self) -> Iterator[T]:
        for item in self.items:
            self.num += 1
            yield item


def _of_epoch(
    rows: Iterable[T],
    size_of: Callable[[T], Size],
    batch_size: int,
    begun: list[Bucketful[T]],
    rng: np.random.Generator,
) -> Iterator[Bucketful[T]]:
    """The batches of an epoch; the last one may be short, for the next epoch to fill up.

    begun: the short batch of the epoch before, if there is one. rng: shuffles the batches that are made at the end.
    """
    rows = iter(rows)
    for size, some in begun:
        yield Bucketful(size, [*some, *islice(rows, batch_size - len(some))])
    waiting: dict[Size, list[T]] = {}
    for row in rows:
        size = size_of(row)
        waiting.setdefault(size, []).append(row)
        if len(waiting[size]) == batch_size:
            yield Bucketful(size, waiting.pop(size))
    whole, rest = cut_by_shape(waiting, batch_size)
    yield from (whole[k] for k in rng.permutation(len(whole)))
    yield from rest


def cut_by_shape(waiting: dict[Size, list[T]], batch_size: int) -> tuple[list[Bucketful[T]], list[Bucketful[T]]]:
    """(full batches of rows that are neighbours in aspect ratio, the remainder: at most one batch, of fewer rows).

    Each takes the size of its middle row. The remainder is cut from the middle, since rows of any shape will join it.
    """
    sizes = sorted(waiting, key=lambda size: (size[0] / size[1], size))
    rows = [(size, row) for size in sizes for row in waiting[size]]
    num, left = divmod(len(rows), batch_size)
    middle = (num + 1) // 2 * batch_size
    outside, inside = rows[:middle] + rows[middle + left :], rows[middle : middle + left]
    whole = [_of_middle(outside[first : first + batch_size]) for first in range(0, len(outside), batch_size)]
    return whole, [_of_middle(inside)] if inside else []


def _of_middle(rows: list[tuple[Size, T]]) -> Bucketful[T]:
    return Bucketful(rows[len(rows) // 2][0], [row for _, row in rows])
