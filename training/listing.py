"""Which files a data set's name stands for: a folder, a file, a glob or a URL, listed in an order of names alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from training.errors import DataError
from training.remote import Listed, Patience, RemoteError, is_url, list_urls
from training.shards import SHARD_SUFFIXES

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
PARQUET = ".parquet"


def list_files(spec: str, patience: Patience) -> tuple[Path, list[Listed]]:
    """(root, the files below it) that `spec` names, sorted, with "/"; hidden ones are left out. URLs have no root."""
    if is_url(spec):
        try:
            return Path(), list_urls(spec, patience)
        except RemoteError as error:
            raise DataError(str(error)) from error
    root, names = _local_files(spec)
    return root, [_listed(root, name) for name in names]


def _listed(root: Path, name: str) -> Listed:
    if not name.lower().endswith((*SHARD_SUFFIXES, PARQUET)):  # of other files nothing is kept
        return Listed(name, 0, "")
    about = (root / name).stat()
    return Listed(name, about.st_size, str(about.st_mtime_ns))


def _local_files(spec: str) -> tuple[Path, list[str]]:
    path = Path(spec).expanduser()
    suffixes = (*SHARD_SUFFIXES, PARQUET)
    if path.is_dir():
        return path, sorted(walk(path))
    if path.is_file():
        if path.name.lower().endswith(suffixes) or path.name in METADATA_NAMES:
            return path.parent, [path.name]
        raise DataError(f"{spec} is one file; expected a folder, a shard ({' '.join(suffixes)}) or a metadata.jsonl")
    if glob.has_magic(spec):
        shards = [found for found in glob.glob(str(path), recursive=True) if found.lower().endswith(suffixes)]
        if not shards:
            raise DataError(f"no images found: no shard ({' '.join(suffixes)}) matches {spec}")
        root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards]))
        return root, sorted(Path(os.path.abspath(shard)).relative_to(root).as_posix() for shard in shards)
    raise DataError(f"no images found: there is no folder or file {spec}; give a folder, shards, or 'shapes'")


def walk(root: Path) -> Iterator[str]:
    """Paths of the files below root; follows links to folders, but enters each folder once."""
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
            if not name.startswith(".") and path.is_file():  # not a pipe or a device
                yield path.relative_to(root).as_posix()


def printable(name: str) -> str:
    """A file name as text that can be written to a log: bytes that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
