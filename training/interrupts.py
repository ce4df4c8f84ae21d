"""Stopping a run without loss: on Ctrl-C, a scheduler's SIGTERM, a terminal that closes, or the end of torchrun."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal, or the connection to it, is closed; Windows has none
STOPS = tuple(sig for sig in (signal.SIGINT, signal.SIGTERM, HANGUP) if sig is not None)


class Interrupted(KeyboardInterrupt):
    """One of the signals `STOPS` came while no step was in progress."""


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP raise `Interrupted`; within `deferred`, where a step is in progress,
    they only set `caught`.

    A second signal acts at once, except SIGHUP, which kernel and shell may both send; under nohup SIGHUP is ignored.
    `caught` is also set where the torchrun that started this process has ended, since nothing would stop it any more.
    """

    def __enter__(self) -> Interrupts:
        self._caught = self._deferred = False
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._old: dict[int, Any] = {}
        for sig in STOPS:
            if sig == HANGUP and signal.getsignal(sig) is signal.SIG_IGN:
                continue
            try:
                self._old[sig] = signal.signal(sig, self._catch)
            except ValueError:  # not in the main thread, where Python delivers no signals
                continue
        return self

    @property
    def caught(self) -> bool:
        """Whether to stop after the step in progress."""
        return self._caught or self.orphaned

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that started this process has ended."""
        return self._parent is not None and os.getppid() != self._parent

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        yield
        self._deferred = False  # not after an error: a signal must not take its place

    def _catch(self, sig: int, frame: Any) -> None:
        self._caught = True
        self.__exit__()
        if sig == HANGUP:
            signal.signal(sig, signal.SIG_IGN)
        if not self._deferred:
            raise Interrupted

    def __exit__(self, *error: Any) -> None:
        for sig, handler in self._old.items():
            signal.signal(sig, handler)
