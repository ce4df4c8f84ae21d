"""An iterator that a thread reads ahead, so that its consumer does not wait for the work behind an item.

The thread runs while the consumer computes in torch, which releases the interpreter's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 2.0
"""Seconds that `close` waits for an item that is being fetched; after these the thread is left alone."""


def ahead(items: Iterable[T], most: int) -> Generator[T, None, None]:
    """The same items in order, up to `most` of them fetched ahead; an error is raised in the place where it came.

    Its `close()` ends the thread.
    """
    fetched: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    room, stopped = threading.Semaphore(most), threading.Event()
    thread = threading.Thread(target=_fetch, args=(items, fetched, room, stopped), daemon=True)
    thread.start()
    try:
        while True:
            good, item = fetched.get()
            if not good:
                if item is None:
                    return
                raise item
            room.release()
            yield item
            del item  # free it before the next one comes
    finally:
        stopped.set()
        room.release()
        thread.join(GRACE)


def _fetch(
    items: Iterable[Any],
    fetched: queue.SimpleQueue[tuple[bool, Any]],
    room: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    iterator = iter(items)
    try:
        while True:
            room.acquire()
            if stopped.is_set():
                return
            fetched.put((True, next(iterator)))
    except StopIteration:
        fetched.put((False, None))
    except BaseException as error:
        fetched.put((False, error))
