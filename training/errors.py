"""What is raised for data that cannot be used, and errors of libraries and the system in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that says what to do."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the path to an OSError that names none, as when a write to an open file fails on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
