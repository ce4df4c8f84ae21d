"""Worker processes that make batches, and how a batch comes from one: `run`.

A tensor that is sent from process to process is a new piece of shared memory and a handshake about it. Here workers
write images into memory that all share from the beginning (`Room`), what else there is goes as bytes, and a thread of
the trainer takes batches over while it computes.
"""

from __future__ import annotations

import atexit
import math
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.ahead import ahead
from training.errors import DataError

AHEAD = 2
"""Batches that each worker makes before they are asked for."""
SLOTS = AHEAD + 1
"""Of these one is being copied."""
SMALL = 1 << 14
"""Other tensors of so many bytes are sent as bytes; of more than a pipe holds a worker would not end that lost its
trainer while it sends them.
"""
SHARED = "/dev/shm"


class Room:
    """Shared memory: `SLOTS` slots of `size` bytes for each worker, which it fills in turn."""

    def __init__(self, num_workers: int, size: int) -> None:
        self.memory = torch.empty(num_workers, SLOTS, size, dtype=torch.uint8).share_memory_()
        self.taken = torch.zeros(num_workers, dtype=torch.int64).share_memory_()  # batches copied, of each worker
        self.made = 0  # in a worker: batches sent
        self.lent: _Lent | None = None  # what its next one is being written to

    def lend(self, worker: int, size: int) -> Tensor | None:
        """The next slot of a worker; None where it is too small, or all are full."""
        if self.lent is not None or size > self.memory.shape[2] or self.made - int(self.taken[worker]) >= SLOTS:
            return None
        self.lent = _Lent(worker, self.made % SLOTS)
        return self.memory[worker, self.lent.slot, :size]

    def place_of(self, x: Tensor) -> _Place | None:
        """Where a tensor lies that fills the slot which was lent; None for any other."""
        if self.lent is None or x.data_ptr() != self.memory[self.lent].data_ptr():
            return None
        self.made += 1
        return _Place(*self.lent, x.shape, x.stride())

    def take(self, place: _Place) -> Tensor:
        """A copy of what a worker has sent."""
        size = math.prod(place.shape)
        found = _private(size).copy_(self.memory[place.worker, place.slot, :size])
        self.taken[place.worker] += 1
        return found.as_strided(place.shape, place.stride)


class _Lent(NamedTuple):
    worker: int
    slot: int


class _Place(NamedTuple):
    """A tensor that lies in a slot of the room, from its start on."""

    worker: int
    slot: int
    shape: Sequence[int]
    stride: Sequence[int]


class _Array(NamedTuple):
    values: np.ndarray


def empty(*shape: int) -> Tensor:
    """A uint8 tensor to be filled; in a worker process where the trainer sees it, if there is room."""
    info, size = get_worker_info(), math.prod(shape)
    room = info.dataset.room if info is not None and isinstance(info.dataset, _Steps) else None
    slot = room.lend(info.id, size) if info is not None and room is not None else None
    return _private(size).view(shape) if slot is None else slot.view(shape)


def _private(size: int) -> Tensor:
    """uint8, as numpy takes memory: large pieces in large pages, which come several times faster."""
    return torch.from_numpy(np.empty(size, dtype=np.uint8))


class _Steps(Dataset):
    """What a worker calls: step -> what is made of it, as it is sent, or the error as a value, to be raised without the
    worker's traceback.
    """

    def __init__(self, make: Callable[[Any], Any], room: Room | None) -> None:
        self.make, self.room = make, room

    def __getitem__(self, step: Any) -> Any:
        if self.room is not None:
            self.room.lent = None
        try:
            made = self.make(step)
        except DataError as error:
            return error
        return _tensors_of(made, self._sent)

    def _sent(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if self.room is not None and (place := self.room.place_of(x)) is not None:
            return place
        return _Array(x.numpy()) if x.is_contiguous() and x.nbytes <= SMALL else x


def _tensors_of(item: Any, convert: Callable[[Any], Any]) -> Any:
    """A dataclass with its fields converted, anything else as it is."""
    if not is_dataclass(item) or isinstance(item, type):
        return item
    return replace(item, **{field.name: convert(getattr(item, field.name)) for field in fields(item)})


def _received(items: Iterable[Any], room: Room | None) -> Iterator[Any]:
    def convert(x: Any) -> Any:
        if isinstance(x, _Place):
            assert room is not None
            return room.take(x)
        return torch.from_numpy(x.values) if isinstance(x, _Array) else x

    for item in items:
        if isinstance(item, DataError):
            raise item
        yield _tensors_of(item, convert)


def run(
    make: Callable[[Any], Any], steps: Iterable[Any], num_workers: int, largest: int = 0
) -> Generator[Any, None, None]:
    """What is made of each step, in order, by worker processes if there are any. Steps are whatever `make` takes.

    largest: bytes of the largest tensor that `make` fills (`empty`), for which workers have room from the beginning.
    """
    if num_workers == 0:
        yield from map(make, steps)
        return
    room = Room(num_workers, largest) if _fits(num_workers * SLOTS * largest) else None
    workers: DataLoader = DataLoader(
        _Steps(make, room),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else it draws from the global one
    )
    with _signals_blocked():
        items: Any = iter(workers)
    stop, taken_over = partial(_stop, items), ahead(_received(items, room), 1)
    atexit.register(stop)
    try:
        with naming_dead_workers():
            yield from taken_over
    finally:
        taken_over.close()
        atexit.unregister(stop)
        stop()


def _fits(size: int) -> bool:
    """Whether there is shared memory of so many bytes, and as much again."""
    try:
        return 0 < size < shutil.disk_usage(SHARED).free // 2
    except OSError:  # a system that has no such folder
        return size > 0


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Raises `DataError` in place of what torch raises of a worker that died, in the middle of whatever is computed."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "DataLoader worker" not in reason:
            raise
        raise DataError(f"a data worker died, perhaps for want of memory; try num_workers = 0 ({reason})") from error


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started herein never see SIGINT and SIGTERM: to the whole group they must not take the workers from a
    trainer that still saves. Blocking is inherited, so that there is no moment at which a new worker is open to them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(items: Any) -> None:
    """End the workers, also those that do not answer; needed at exit, where multiprocessing would only send SIGTERM."""
    items._shutdown_workers()
    for worker in items._workers:
        if worker.is_alive():
            worker.kill()
