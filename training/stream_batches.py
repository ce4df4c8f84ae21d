"""Batches of one size each, of rows that come one after another and each have a size of their own.

Rows wait until as many of one size have come as make a batch. What still waits at the end of an epoch is put in the
order of shape and cut into batches, so that neighbours in shape come together; the rest, fewer than a batch, is filled
up with the first rows of the next epoch. All batches of e epochs are thus floor(e n / B), as those of a plain order
are, and the batches of an epoch a function of (seed, epoch, n, B): to resume is to read the epoch in which the batch
begins.

Letters: B rows of a batch, n rows of an epoch, of which the first (-e n) mod B of epoch e fill up the batch before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from training.buckets import Size

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

    epoch_from(e, k): the rows of epoch e from the k-th on, in an order that is a function of e. num_rows: of an epoch,
    where that is known; else the first is read, to know it.
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
    """Items, and how many of them have come."""

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
    """The batches of an epoch; the last one may be short, and is what the next epoch goes on with.

    begun: that of the epoch before, or none. rng: draws the order of the batches in which what is left comes.
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
    """(batches of rows that are neighbours in shape, what is left: at most one, of fewer rows).

    Each has the size of its middle row. What is left is the middle of all, for rows of any shape will join it.
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
