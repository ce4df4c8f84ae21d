"""Ctrl-C, SIGTERM as a scheduler sends it, a terminal that closes, and the end of torchrun: they lose nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal, or the connection to it, is closed; Windows has none
STOPS = tuple(sig for sig in (signal.SIGINT, signal.SIGTERM, HANGUP) if sig is not None)


class Interrupted(KeyboardInterrupt):
    """One of `STOPS` came while no step was in progress."""


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP raise `Interrupted`; where deferred, so that the step in progress ends,
    they only leave a mark: `caught`. A second one acts at once, but for SIGHUP, which both kernel and shell may send;
    under nohup that one is left alone. It is `caught` too where torchrun has ended before this process that it started:
    nobody would end it any more, or start it again.
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
        """Whether to end after the step in progress."""
        return self._caught or self.orphaned

    @property
    def orphaned(self) -> bool:
        """Whether torchrun has ended."""
        return self._parent is not None and os.getppid() != self._parent

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        yield
        self._deferred = False  # but not after an error: that is on its way to be said, and no signal takes its place

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
