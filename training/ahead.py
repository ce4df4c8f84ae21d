"""Items that a thread fetches before they are asked for: what is waited for is then an answer, not the work for it.

A loop that computes in torch leaves the interpreter to the thread meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 2.0
"""Seconds for which `close` waits for a fetch that has begun; after these it is left to its thread."""


def ahead(items: Iterable[T], most: int) -> Generator[T, None, None]:
    """The same items in order, of which up to `most` are fetched before they are asked for; errors come in their place.

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
            del item  # let go of it before the next one comes
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
