"""Worker processes that make batches, and how a batch comes from one: `run`.

A thread of the trainer takes batches over while it computes: a call of `next` is an answer then, not a handshake about
shared memory.
"""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from training.ahead import ahead
from training.errors import DataError, one_line
from training.interrupts import STOPS

_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


class _Steps(Dataset):
    """What a worker calls: step -> what is made of it, or the error as a value, to be raised without the worker's
    traceback.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, step: Any) -> Any:
        try:
            return step if isinstance(step, DataError) else self.make(step)
        except DataError as error:
            return error


def run(make: Callable[[Any], Any], steps: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    """What is made of each step, in order, by worker processes if there are any. Steps are whatever `make` takes."""
    if num_workers == 0:
        return (make(step) for step in steps)
    made = _by_workers(make, steps, num_workers)
    _open.add(made)
    atexit.unregister(_close_open)
    atexit.register(_close_open)
    return made


def _close_open() -> None:
    """At exit; a generator that is left open until then would be closed among modules that are half gone."""
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
        generator=torch.Generator(),  # else it draws from the global one
    )
    with _signals_blocked():
        items: Any = iter(workers)
    stop, taken_over = partial(_stop, items, os.getpid()), ahead(_good(items), 1)
    atexit.register(stop)
    try:
        with naming_dead_workers(ConnectionError, EOFError):  # while it was handing over a batch
            yield from taken_over
    finally:
        taken_over.close()
        atexit.unregister(stop)
        stop()


def _error_last(steps: Iterable[Any]) -> Iterator[Any]:
    """Steps, and the error that ends them as one: raised at once, it would take the place of what is made already."""
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
    """Raises `DataError` in place of what torch raises of a worker that died, in the middle of whatever is computed.

    signs: other errors that tell of it, but where a worker itself had them and lives.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        died = isinstance(error, RuntimeError) and "DataLoader worker" in reason
        if not died and (not isinstance(error, signs) or reason.startswith("Caught ")):
            raise
        raise DataError(f"a data worker died, perhaps for want of memory; try num_workers = 0 ({reason})") from error


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started herein never see `STOPS`: to the whole group they must not take the workers from a trainer that
    still saves. Blocking is inherited, so that there is no moment at which a new worker is open to them.
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
    """End the workers, also those that do not answer; needed at exit, where multiprocessing would only send SIGTERM.

    owner: the process that started them; a fork of it leaves them alone.
    """
    if os.getpid() != owner:
        return
    items._shutdown_workers()
    for worker in items._workers:
        if worker.is_alive():
            worker.kill()
    items._workers_status = [True] * len(items._workers)  # so that a thread which still waits for one sees it gone
