"""Progress of a run: a bar in a terminal, a line every so often anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


def duration(seconds: float) -> str:
    """A time in words: seconds, minutes, hours or, from two days on, days."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.1f} days"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line; nothing where the stream is closed, as by a `tee` that ends at the Ctrl-C at which the run saves.

    Characters that the stream (None: standard output) cannot encode are escaped.
    """
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with suppress(OSError):
        line = text.encode(encoding, "backslashreplace").decode(encoding) + "\n"
        print(line, end="", file=stream, flush=True)  # in one piece: other processes may write there too


class Progress:
    """Progress of `total` steps of so many images each, from `start` on; `rate` is the recent number of steps a second.

    The rate leaves out the first step, which may include compiling or starting workers; before the second step it is 0
    and not shown. images: 0 shows no images a second. quiet: count, but show nothing. stream: where to show; None is
    standard output. Lines that `say` prints meanwhile stay, above the bar.
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        images: int = 1,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.title, self.total, self.done, self.images, self.quiet = title, total, start, images, quiet
        self.stream = sys.stdout if stream is None else stream
        self.rate = 0.0
        self._values: dict[str, float] = {}
        self._marks: list[tuple[float, int]] = []
        self._last_line = time.perf_counter()
        self._bar: Any = None

    @property
    def images_per_second(self) -> float:
        """The recent number of images a second; 0 before the second `show`."""
        return self.rate * self.images

    def __enter__(self) -> Progress:
        if self.stream.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[values]}"), console=Console(file=self.stream))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, values="")
        return self

    def show(self, done: int, **values: float) -> None:
        """Show that `done` steps are done, with some values."""
        now = time.perf_counter()
        self.done = done
        self._values |= values
        self._marks = [*self._marks, (now, done)][-20:]
        then, before = self._marks[0]
        self.rate = (done - before) / max(1e-9, now - then)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=self._text())
        elif not self.quiet and (now - self._last_line >= LINE_EVERY or done == self.total):
            self._last_line = now
            left = (self.total - done) / self.rate if self.rate else 0.0
            words = [f"{self.title} {done}/{self.total}", self._text(), f"{duration(left)} left" if left else ""]
            say("  ".join(filter(None, words)), self.stream)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count for the rate."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self._marks = [(when + paused, done) for when, done in self._marks]

    def _text(self) -> str:
        values = self._values | ({"images/s": self.images_per_second} if self.rate and self.images else {})
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


@contextmanager
def drawing(count: int, shown: bool, callback: Any = None) -> Iterator[Callable[[Any], None]]:
    """A callback for the sampler that shows on standard error how many of `count` pictures are done.

    A solver step counts as its fraction of the pictures in its batch. shown: False shows nothing. callback: another one
    to call.
    """
    parts = 0  # pictures times solver steps
    with Progress("drawing pictures", count, quiet=not shown, stream=sys.stderr) as progress:

        def on_step(step: Any) -> None:
            nonlocal parts
            parts += len(step.x_t)
            progress.show(min(count, parts // step.num_steps))
            if callback is not None:
                callback(step)

        yield on_step
