"""Files on any server that fsspec knows (s3://, https://, memory://), read in ranges, with a limited number of retries.

A read that fails or times out is tried again, after a pause that doubles each time; after the last try `RemoteError`
says what was asked for and why it failed. Nothing is downloaded whole.
"""

from __future__ import annotations

import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from training.errors import one_line

BLOCK = 1 << 20
"""Fewest bytes to ask for at a time."""

AT_ONCE = 16
"""Files to ask a server for at the same time."""

T = TypeVar("T")
R = TypeVar("R")

_MISSING = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}


class RemoteError(OSError):
    """A read from a server that failed; the message is one line."""

    @property
    def strerror(self) -> str:  # type: ignore[override]  # what a log line shows of an OSError
        return str(self.args[0])


@dataclass(frozen=True)
class Patience:
    """How long to wait: `timeout` seconds for an answer, `retries` further tries, `pause` seconds before the first."""

    timeout: float = 30.0
    retries: int = 5
    pause: float = 0.5


PATIENT = Patience()


class Listed(NamedTuple):
    """A file on a server or a disk: its URL or path, its size in bytes, and a text that changes with its content."""

    url: str
    size: int
    version: str


def is_url(path: str) -> bool:
    """Whether a path is a URL, such as "s3://bucket/file.tar"."""
    scheme, colon, _ = path.partition("://")
    return bool(colon) and scheme.replace("+", "").replace("-", "").isalnum()


def list_urls(spec: str, patience: Patience) -> list[Listed]:
    """The files that a URL names: itself, those that match a glob ("*", "[01]"), or those in a folder.

    Raises `RemoteError` where the server does not answer, or the package for its protocol is missing.
    """
    files, path = _open(spec)

    def look() -> list[Listed]:
        if any(sign in path for sign in "*["):
            found = files.glob(path, detail=True)
        else:
            info = files.info(path)
            found = {path: info} if info.get("type") != "directory" else files.find(path, detail=True)
        return [_listed(files, name, info) for name, info in sorted(found.items()) if info.get("type") != "directory"]

    return _patiently(look, spec, patience)


def _listed(files: Any, name: str, info: dict[str, Any]) -> Listed:
    url = files.unstrip_protocol(name)
    if info.get("size") is None:
        raise RemoteError(f"{url}: the server does not say how large it is, so it cannot be read in parts")
    marks = (info.get(mark) for mark in ("ETag", "etag", "LastModified", "mtime", "created", "generation"))
    return Listed(url, int(info["size"]), next((str(mark) for mark in marks if mark), ""))


def read_range(url: str, start: int, end: int, patience: Patience) -> bytes:
    """Bytes start ... end - 1 of a file. Raises `RemoteError` after the last try; an answer too short is a failure."""
    files, path = _open(url)

    def read() -> bytes:
        data: bytes = files.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            why = ", as from a server that cannot read ranges" * (len(data) > end - start)
            raise RemoteError(f"{len(data)} bytes came in place of {end - start}{why}")
        return data

    return _patiently(read, url, patience)


def read_whole(url: str, patience: Patience) -> bytes:
    """All bytes of a small file. Raises `RemoteError` after the last try."""
    files, path = _open(url)
    data: bytes = _patiently(lambda: files.cat_file(path), url, patience)
    return data


def read_each(read: Callable[[T], R], items: Iterable[T], remote: bool, at_once: int = AT_ONCE) -> Iterable[R]:
    """read(item) of each item, in order; where reading is mostly waiting for a server, several `at_once`.

    An error or a signal is raised at once: then no further read begins, and those that hang are left to their daemon
    threads, for which neither the caller nor the end of the process waits.
    """
    if not remote:
        return map(read, items)
    asked = list(items)
    places = iter(range(len(asked)))  # shared by the threads
    done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            for place in places:
                done.put((place, read(asked[place]), None))
        except BaseException as error:
            done.put((-1, None, error))

    found: dict[int, R] = {}
    try:
        for _ in range(min(at_once, len(asked))):
            threading.Thread(target=work, daemon=True).start()
        for _ in asked:
            place, result, error = _next(done)
            if error is not None:
                raise error
            found[place] = result
    finally:
        for _ in places:  # none is left for the threads
            pass
    return [found[place] for place in range(len(asked))]


def _next(done: SimpleQueue[T]) -> T:
    """The next item. A signal that comes just as the wait begins, which Python would see after it, waits a second."""
    while True:
        with suppress(Empty):
            return done.get(timeout=1)


class RemoteFile(io.RawIOBase):
    """A seekable file on a server. It keeps the last block, so that reading forward asks for each byte once."""

    def __init__(self, file: Listed, patience: Patience) -> None:
        self.file, self.patience = file, patience
        self._place, self._start, self._block = 0, 0, b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.file.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        end = self.file.size if size is None or size < 0 else min(self.file.size, self._place + size)
        if end <= self._place:
            return b""
        if not self._start <= self._place <= end <= self._start + len(self._block):
            last = min(self.file.size, max(end, self._place + BLOCK))
            self._start, self._block = self._place, read_range(self.file.url, self._place, last, self.patience)
        data = self._block[self._place - self._start : end - self._start]
        self._place = end
        return data


_REFUSED = "the server refuses it ({}); are the credentials there, and right?"

# --- retries ---------------------------------------------------------------------------------------------------------


def _open(url: str) -> tuple[Any, str]:
    """(the file system, the path on it); opened anew each time, for connections do not survive a fork."""
    import fsspec

    scheme = url.partition("://")[0]
    own = {"use_listings_cache": False} if scheme in ("s3", "s3a") else {}  # an instance that no one else has
    try:
        files, path = fsspec.core.url_to_fs(url, **own)
        if own:
            files.retries = 1  # its own retries would go on past the timeout
    except (ImportError, ValueError) as error:
        need = f'; pip install "{_MISSING[scheme]}"' if scheme in _MISSING else ""
        raise RemoteError(f"{url} cannot be read: {one_line(error)}{need}") from error
    return files, path


def _patiently(ask: Callable[[], Any], what: str, patience: Patience) -> Any:
    """The result of `ask`, called again while it fails or times out."""
    reason = ""
    for attempt in range(patience.retries + 1):
        if attempt:
            time.sleep(patience.pause * 2 ** (attempt - 1) * (0.5 + random.Random(os.urandom(4)).random()))
        try:
            return within(ask, patience.timeout)
        except FileNotFoundError as error:
            reason = _behind(error)
            if not reason:
                raise RemoteError(f"{what}: there is no such file on the server") from error
        except PermissionError as error:
            raise RemoteError(f"{what}: {_REFUSED.format(one_line(error))}") from error
        except TimeoutError:
            reason = f"no answer within {patience.timeout:g} s"
        except Exception as error:  # each file system has its own
            if getattr(error, "status", 0) in (401, 403):  # of http
                raise RemoteError(f"{what}: {_REFUSED.format(one_line(error))}") from error
            reason = one_line(error)
    tries = patience.retries + 1
    raise RemoteError(f"{what}: {reason} (tried {tries} time{'s' * (tries > 1)})")


def _behind(error: FileNotFoundError) -> str:
    """Why fsspec reports a missing file although it has not reached the server; "" where the file is missing there."""
    cause = error.__cause__
    answer = getattr(cause, "response", None)  # of s3
    status = answer["ResponseMetadata"]["HTTPStatusCode"] if isinstance(answer, dict) else getattr(cause, "status", 0)
    if cause is None or isinstance(cause, FileNotFoundError | KeyError) or status in (404, 410):  # KeyError: memory://
        return ""
    return one_line(cause)


def within(ask: Callable[[], Any], seconds: float) -> Any:
    """The result of `ask`. Raises TimeoutError after so long; a call that hangs is left to its daemon thread."""
    answer: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not answer:
        raise TimeoutError
    return answer[0]
