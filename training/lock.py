"""One run at a time in a run folder, by locks that end with the process that holds them.

Process k of a run locks byte k of `.lock` in the folder, so that a process which outlives the others still keeps a new
run out. These are POSIX record locks: a data worker does not inherit them, and they hold between machines where the
file system supports that. Where there are no such locks (some file systems, Windows), nothing is locked.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from training.config import CONFIG_FILE, ConfigError
from training.errors import named
from training.parallel import Ranks

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
PATIENCE = 30.0  # seconds that a new run waits for one that is ending, which may have to save
MOST = 3  # machines that an error names
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class RunTaken(ValueError):
    """Another run writes in this folder."""


class NotShared(ConfigError):
    """The processes of a run are on machines that do not share the run's folder."""


@contextmanager
def only_run_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """While entered (by all processes of a run), no other run writes in the folder. One without a run is not locked.

    Raises RunTaken where another run still holds the lock after `PATIENCE`, NotShared where a process does not see the
    lock of process 0.
    """
    path, file = folder / LOCK, None

    def locked() -> str | None:
        nonlocal file
        if sys.platform == "win32" or not (folder / CONFIG_FILE).exists():
            return None
        said = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4()}"
        file = _first_byte(path, said)
        return said if file is not None else None

    ended = False
    try:
        said = ranks.from_first(locked)
        if said is not None and not ranks.first:
            file = _own_byte(path, said, ranks.rank)
        _all_see(folder, said is None or file is not None, ranks)
        yield
        ended = True
    finally:
        if file is not None:
            if ranks.first and (ended or ranks.world == 1):  # else other processes may still write
                path.unlink(missing_ok=True)
            file.close()


def _own_byte(path: Path, said: str, byte: int) -> IO[str] | None:
    """The lock file with this process's byte locked; None where it does not hold the text that process 0 wrote."""
    last = time.monotonic() + PATIENCE  # a network file system may show the text late
    while True:
        with suppress(FileNotFoundError):
            file = path.open("r+")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            if file.read() == said:
                return file
            file.close()
        if time.monotonic() > last:
            return None
        time.sleep(0.2)


def _all_see(folder: Path, seen: bool, ranks: Ranks) -> None:
    """Raises NotShared in all processes where one does not see the lock of process 0."""
    answers = ranks.gather((seen, socket.gethostname()))
    if blind := {host: rank for rank, (sees, host) in reversed([*enumerate(answers)]) if not sees}:
        who = [f"process {rank} on {host}" for host, rank in sorted(blind.items(), key=lambda pair: pair[1])]
        more = f" and those of {len(who) - MOST} more machines" if len(who) > MOST else ""
        raise NotShared(
            f"{' and '.join(who[:MOST])}{more} cannot see {folder} as process 0 on {answers[0][1]} does: on several "
            "machines the run's folder has to be on a disk that all of them share"
        )


def _first_byte(path: Path, said: str) -> IO[str] | None:
    """The lock file with its first byte locked, and `said` written in it, once no other process has a byte of it; None
    where the file system has no locks. Raises RunTaken.
    """
    last = time.monotonic() + PATIENCE
    owner = ""
    while True:
        try:
            file = _all_bytes(path)
            break
        except BlockingIOError:
            if not owner:
                owner = f"{path.parent} is being trained by another run{_said_by(path)}"
                print(f"{owner}: waiting for it to end", flush=True)
            if time.monotonic() > last:
                raise RunTaken(f"{owner}: end it, or wait until it has") from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            raise
    try:
        with named(path):
            file.truncate(0)
            file.write(said)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # closing tries to write once more
            file.close()
        raise
    fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)
    return file


def _said_by(path: Path) -> str:
    """Who holds the lock, in words; "" where that is not known."""
    with suppress(FileNotFoundError):
        said = path.read_text().partition("\n")[0]
        return f" ({said} began it)"
    return ""


def _all_bytes(path: Path) -> IO[str]:
    """The lock file with all bytes locked. Raises BlockingIOError where another process has locked one."""
    while True:
        file = path.open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # its last owner removed it meanwhile
