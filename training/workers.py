"""Worker processes that make batches: `run`.

A thread of the trainer receives batches while it computes, so that `next` need not wait for the transfer through shared
memory.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pickle import PicklingError
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from training.ahead import ahead
from training.errors import DataError, one_line
from training.interrupts import STOPS

_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


class _Steps(Dataset):
    """The data set of a worker: a step gives `make(step)`, or its error as a value, for the trainer to raise without
    the worker's traceback.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, step: Any) -> Any:
        try:
            return step if isinstance(step, DataError) else self.make(step)
        except DataError as error:
            return error


def run(make: Callable[[Any], Any], steps: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    """`make(step)` of each step, in order; called in worker processes if there are any."""
    if num_workers == 0:
        return (make(step) for step in steps)
    made = _by_workers(make, steps, num_workers)
    _open.add(made)
    atexit.unregister(_close_open)
    atexit.register(_close_open)
    return made


def _close_open() -> None:
    """Called at exit: a generator that is still open would be closed later, when modules it needs are gone."""
    for made in [*_open]:
        with suppress(ValueError):  # another thread is within it
            made.close()


def _by_workers(make: Callable[[Any], Any], steps: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    workers: DataLoader = DataLoader(
        _Steps(make),
        batch_size=None,
        sampler=_error_last(steps),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_garbage,
        generator=torch.Generator(),  # else it draws from the global one
    )
    with _signals_blocked(), _naming_pickling():
        items: Any = iter(workers)
    stop, taken_over = partial(_stop, items, os.getpid()), ahead(_good(items), 1)
    atexit.register(stop)
    try:
        with naming_dead_workers(ConnectionError, EOFError):  # raised while it sends a batch
            yield from taken_over
    finally:
        taken_over.close()
        atexit.unregister(stop)
        stop()


def _error_last(steps: Iterable[Any]) -> Iterator[Any]:
    """The steps, and an error that ends them as the last one: raised at once it would overtake batches in progress."""
    try:
        yield from steps
    except DataError as error:
        yield error


def _good(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, DataError):
            raise item
        yield item


@contextmanager
def naming_dead_workers(*signs: type[Exception]) -> Iterator[None]:
    """Raises `DataError` in place of torch's error about a worker that died, which can interrupt any computation.

    signs: other errors that mean the same, unless a living worker raised them ("Caught ...").
    """
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        died = isinstance(error, RuntimeError) and "DataLoader worker" in reason
        if not died and (not isinstance(error, signs) or reason.startswith("Caught ")):
            raise
        raise DataError(f"a data worker died, perhaps for want of memory; try num_workers = 0 ({reason})") from error


@contextmanager
def _naming_pickling() -> Iterator[None]:
    """Raises `DataError` where the data cannot be sent to processes that are started afresh instead of forked."""
    try:
        yield
    except (PicklingError, TypeError, AttributeError) as error:
        if "pickle" not in str(error):
            raise
        raise DataError(
            f"the data cannot be sent to worker processes ({one_line(error)}): open files and connections when the "
            "first sample is read, or set num_workers = 0"
        ) from error


def _leave_garbage(_: int) -> None:
    """Called first in a worker: garbage that it inherits is the trainer's to collect, whose threads a fork lacks, and
    could wait for.
    """
    gc.freeze()


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started within ignore the signals `STOPS`: one that is sent to the whole process group must
    not kill the workers of a trainer that is still saving. Blocking is inherited, so a new worker is never without it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows, where no group is sent SIGTERM
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(items: Any, owner: int) -> None:
    """End the workers, even those that hang: at exit, multiprocessing would only send SIGTERM, which they ignore.

    owner: the process that started them; in a fork of it this does nothing.
    """
    if os.getpid() != owner:
        return
    items._shutdown_workers()
    for worker in items._workers:
        if worker.is_alive():
            worker.kill()
    items._workers_status = [True] * len(items._workers)  # a thread may still wait for one
