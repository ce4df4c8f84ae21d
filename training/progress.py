"""What a person watches while a run goes on: a bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


def duration(seconds: float) -> str:
    """A time in minutes, from an hour on in hours, from two days on in days."""
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.1f} days"


def say(text: str) -> None:
    """Print a line, or nothing where nobody reads any more: a `tee` that ended by the Ctrl-C at which a run saves, or a
    terminal that is closed. What stdout has no bytes for, as the name of a sample, comes as an escape.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with suppress(OSError):
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class Progress:
    """Progress of `total` steps of so many images each, from `start` on; `rate` is steps a second of late.

    quiet: show nothing, and count alone.
    """

    def __init__(self, title: str, total: int, start: int = 0, images: int = 1, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.images, self.quiet = title, total, start, images, quiet
        self.rate = 0.0
        self._values: dict[str, float] = {}
        self._marks = [(time.perf_counter(), start)]
        self._last_line = time.perf_counter()
        self._bar: Any = None

    @property
    def images_per_second(self) -> float:
        """Images a second of late; 0 before the first `show`."""
        return self.rate * self.images

    def __enter__(self) -> Progress:
        if sys.stdout.isatty() and not self.quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[values]}"))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, values="")
        return self

    def show(self, done: int, **values: float) -> None:
        """Move to `done` steps, with numbers to show beside."""
        now = time.perf_counter()
        self.done = done
        self._values |= values
        self._marks = [*self._marks, (now, done)][-20:]
        (then, before) = self._marks[0]
        self.rate = (done - before) / max(1e-9, now - then)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=self._text())
        elif not self.quiet and (now - self._last_line >= LINE_EVERY or done == self.total):
            self._last_line = now
            left = (self.total - done) / self.rate if self.rate else 0.0
            say(f"{self.title} {done}/{self.total}  {self._text()}  {duration(left)} left")

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        with suppress(OSError):  # of a terminal that is closed
            (self._bar.console.print if self._bar is not None else say)(text)

    def _text(self) -> str:
        values = self._values | {"images/s": self.images_per_second}
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
