"""The files that a data set's name stands for: a folder, a file, a glob, names in braces, or a URL of these; sorted."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from training.errors import DataError
from training.remote import Listed, Patience, RemoteError, is_url, list_urls, read_each
from training.shards import SHARD_SUFFIXES

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
PARQUET = ".parquet"
MAX_NAMES = 1_000_000
"""Most names that braces may stand for."""


def list_files(spec: str, patience: Patience) -> tuple[Path, list[Listed]]:
    """(root, the files below it) that `spec` names, sorted, with "/"; hidden ones are left out. URLs have no root."""
    if is_url(spec):
        try:
            found = list(read_each(lambda name: list_urls(name, patience), expanded(spec), remote=True))
        except RemoteError as error:
            raise DataError(str(error)) from error
        return Path(), sorted({file for files in found for file in files})
    root, names = _local_files(spec)
    return root, [_listed(root, name) for name in names]


def expanded(pattern: str) -> list[str]:
    """The names that braces stand for, as in a shell: "{000..002}" numbers with their zeros, "{a,b}" either.

    Raises `DataError` where they are too many.
    """
    names = list(islice(_expanded(pattern), MAX_NAMES + 1))
    if len(names) > MAX_NAMES:  # counted with those that come twice
        raise DataError(f"{pattern} stands for more than {MAX_NAMES:,} names")
    return list(dict.fromkeys(names))


def _expanded(pattern: str) -> Iterator[str]:
    for braces in re.finditer(r"\{([^{}]*)\}", pattern):  # innermost ones
        if choices := _choices(braces[1]):
            for choice in choices:
                yield from _expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])
            return
    yield pattern


def _choices(text: str) -> Iterable[str]:
    """The choices that a text in braces stands for; none where the braces belong to the name."""
    if not (ends := re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", text)):
        return text.split(",") if "," in text else ()
    first, last = int(ends[1]), int(ends[2])
    width = max(map(len, ends.groups())) if any(re.match(r"0\d", end) for end in ends.groups()) else 1
    step = 1 if first <= last else -1
    return (f"{number:0{width}d}" for number in range(first, last + step, step))


def _listed(root: Path, name: str) -> Listed:
    if not name.lower().endswith((*SHARD_SUFFIXES, PARQUET)):  # only an index of these is kept, and needs size and time
        return Listed(name, 0, "")
    about = (root / name).lstat() if _is_broken_link(root / name) else (root / name).stat()
    return Listed(name, about.st_size, str(about.st_mtime_ns))


def _local_files(spec: str) -> tuple[Path, list[str]]:
    path = Path(spec).expanduser()
    suffixes = (*SHARD_SUFFIXES, PARQUET)
    if os.path.isdir(path):
        return path, sorted(walk(path))
    if os.path.isfile(path):
        if path.name.lower().endswith(suffixes) or path.name in METADATA_NAMES:
            return path.parent, [path.name]
        raise DataError(
            f"{spec} is one file; expected a folder, a shard ({' '.join(suffixes)}), or a table that is called "
            "metadata.jsonl or metadata.csv, with the columns file_name and text"
        )
    itself = "{" in spec and any(glob.iglob(str(path), recursive=True))  # the braces are part of names
    patterns = [str(path)] if itself else expanded(str(path))
    if glob.has_magic(spec) or patterns != [str(path)]:
        found = {name for pattern in patterns for name in glob.glob(pattern, recursive=True) or _alone(pattern)}
        shards = [name for name in found if name.lower().endswith(suffixes)]
        if not shards:
            raise DataError(f"no images found: no shard ({' '.join(suffixes)}) matches {spec}")
        root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards]))
        return root, sorted(Path(os.path.abspath(shard)).relative_to(root).as_posix() for shard in shards)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    raise DataError(f"no images found: there is no folder or file {spec}{where}; give a folder, shards, or 'shapes'")


def _alone(pattern: str) -> list[str]:
    """[] for a glob that matches nothing. Raises `DataError` where it is a file's name."""
    if not glob.has_magic(pattern):
        raise DataError(f"no images found: there is no file {pattern}")
    return []


def walk(root: Path) -> Iterator[str]:
    """Paths of the files below root, and of links to files that are gone, which the reader then names; follows links to
    folders, but enters each folder once.
    """
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and (path.is_file() or _is_broken_link(path)):  # not a pipe or a device
                yield path.relative_to(root).as_posix()


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def printable(name: str) -> str:
    """A file name as text for a log: bytes that are not UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
