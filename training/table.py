"""The samples of a data set as lines of a file on disk; in memory each takes 8 bytes, so that millions fit.

A line is a JSON list, [key, path, offset, size, captions, shares, (height, width)]; `path` is a number where many
samples are in one file. The file is read through a memory map, which processes share. It is temporary, and removed with
the table, unless it was kept (`Table.keep`), to be found again (`Table.found`) when the run is resumed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import weakref
import zipfile
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from operator import eq
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np

from mmdit.weights_io import write_aside

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: its image is `size` bytes of `path` from `offset` on (all of it where `size` is None).

    captions: those to draw from; shares: their weights, empty for equal ones. image_size: (height, width), where it was
    asked for. In a Parquet file `offset` is the row group and `size` the row in it; in a dataset `size` is the row.
    """

    key: str
    captions: tuple[str, ...]
    path: str
    offset: int = 0
    size: int | None = None
    shares: tuple[float, ...] = ()
    image_size: tuple[int, int] | None = None

    @property
    def caption(self) -> str | None:
        """The first caption, None where there is none."""
        return self.captions[0] if self.captions else None


class Writer:
    """Writes the lines of a table one by one; `table` completes it. Raises OSError where the disk is full."""

    def __init__(self) -> None:
        handle, self.path = tempfile.mkstemp(prefix="mmdit-index-")
        self._file: BinaryIO = open(handle, "wb")  # noqa: SIM115
        self._starts, self._hashes = array("q"), array("Q")
        self._columns: dict[str, array] = {name: array("i") for name in ("height", "width", "block")}
        self._files: dict[str, int] = {}
        self._end = 0
        self._remove = weakref.finalize(self, remove, self.path, os.getpid())

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, entry: Entry, shared: bool, block: int | None = None) -> None:
        """Append a sample. shared: whether other samples have its path; block: number of the block that it is in."""
        self._hashes.append(_hash(entry.key))
        self._starts.append(self._end)
        if entry.image_size is not None:
            self._columns["height"].append(entry.image_size[0])
            self._columns["width"].append(entry.image_size[1])
        if block is not None:
            self._columns["block"].append(block)
        self._write(entry, shared)

    def _write(self, entry: Entry, shared: bool) -> None:
        path: Any = self._files.setdefault(entry.path, len(self._files)) if shared else entry.path
        line = [entry.key, path, entry.offset, entry.size, entry.captions, entry.shares, entry.image_size]
        self._end += self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def table(self, longer_key: Callable[[int, Entry], str]) -> Table:
        """The whole table. A key that repeats becomes longer_key(i, entry), with a number if that repeats too."""
        self._file.flush()
        table = self._table()
        for i, key in _renamed(table, np.array(self._hashes, dtype=np.uint64), longer_key):
            entry = replace(table[i], key=key)
            self._starts[i] = self._end
            self._write(entry, entry.path in self._files)
        self._file.close()
        table = self._table()
        self._remove.detach()
        weakref.finalize(table, remove, self.path, os.getpid())
        return table

    def _table(self) -> Table:
        columns = {name: np.array(values, dtype=np.int32) for name, values in self._columns.items() if values}
        return Table(self.path, np.array(self._starts, dtype=np.int64), list(self._files), columns)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _renamed(table: Table, hashes: np.ndarray, longer_key: Callable[[int, Entry], str]) -> Iterator[tuple[int, str]]:
    """(i, new key) of each sample whose key an earlier sample has."""
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    known = hashes[order]
    counts: dict[str, int] = {}  # a new key -> how often it was asked for again
    for i in np.sort(order[again]).tolist():
        longer = longer_key(i, table[i])
        key = longer
        while key in counts or _holds(known, key):
            counts[longer] = counts.get(longer, 0) + 1
            key = f"{longer}#{counts[longer] + 1}"
        counts.setdefault(key, 0)
        yield i, key


def _holds(known: np.ndarray, key: str) -> bool:
    value = np.uint64(_hash(key))
    place = int(np.searchsorted(known, value))
    return place < len(known) and bool(known[place] == value)


class Table(Sequence[Entry]):
    """The samples in their order; a slice is a table of some of them.

    columns: arrays with a number for each sample: "height" and "width" where sizes were asked for, and "block" where
    several samples are read as one.
    """

    def __init__(self, path: str, starts: np.ndarray, files: list[str], columns: dict[str, np.ndarray]) -> None:
        self.path, self.starts, self.files, self.columns = path, starts, files, columns
        self._map: mmap.mmap | None = None
        self._whole: Table | None = None  # of a slice: the table that owns the file, kept alive by this

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> Entry: ...
    @overload
    def __getitem__(self, i: slice) -> Table: ...
    def __getitem__(self, i: int | slice) -> Entry | Table:
        if isinstance(i, slice):
            part = Table(self.path, self.starts[i], self.files, {name: x[i] for name, x in self.columns.items()})
            part._whole = self._whole or self
            return part
        key, path, offset, size, captions, shares, sides = self._line_at(int(self.starts[i]))
        path = self.files[path] if isinstance(path, int) else path
        image_size = (sides[0], sides[1]) if sides else None
        return Entry(key, tuple(captions), path, offset, size, tuple(shares), image_size)

    def key(self, i: int) -> str:
        """The key alone."""
        return self._key_at(int(self.starts[i]))

    def keys(self) -> Iterator[str]:
        """All keys, in order."""
        for some in range(0, len(self), 2**16):  # as Python's integers, not all at once
            yield from map(self._key_at, self.starts[some : some + 2**16].tolist())

    def _key_at(self, start: int) -> str:
        return first_string(self._file, start) or self._line_at(start)[0]

    def _line_at(self, start: int) -> list[Any]:
        return json.loads(self._file[start : self._file.find(b"\n", start)])

    @property
    def _file(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    # --- keeping and finding again ---

    def keep(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        """Write the table into a folder, with `about` for `found` to return. Raises OSError where there is no room."""

        def arrays(aside: Path) -> None:
            with aside.open("wb") as file:
                np.savez(file, **{"starts": self.starts, **self.columns})  # type: ignore[arg-type]

        size = Path(self.path).stat().st_size
        head = {"files": self.files, "size": size, "count": len(self), **about}
        write_aside(folder / f"{name}.jsonl", lambda aside: shutil.copyfile(self.path, aside))
        write_aside(folder / f"{name}.npz", arrays)
        write_aside(folder / f"{name}.json", lambda aside: aside.write_text(json.dumps(head)))

    @classmethod
    def found(cls, folder: Path, name: str) -> tuple[Table, dict[str, Any]] | None:
        """The table and `about` as `keep` wrote them; None where they are missing or not whole."""
        path = folder / f"{name}.jsonl"
        try:
            head = json.loads((folder / f"{name}.json").read_text())
            columns = dict(np.load(folder / f"{name}.npz"))
            starts = columns.pop("starts")
            if path.stat().st_size != head["size"] or len(starts) != head["count"]:
                return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None
        with suppress(OSError):  # of a folder that cannot be written
            os.utime(folder / f"{name}.json")  # the last use, for `forget_old`
        return cls(str(path), starts, head["files"], columns), head


def forget_old(folder: Path) -> None:
    """Of the tables "DATA.FILES" kept in a folder, remove all of the same DATA but the one that was used last."""
    heads = sorted(folder.glob("*.*.json"), key=lambda head: head.stat().st_mtime_ns)
    last = {head.name.partition(".")[0]: head.stem for head in heads}
    for path in folder.glob("*.*.*"):
        if path.stem != last.get(path.name.partition(".")[0], path.stem):
            path.unlink()


class Lazy(Sequence[T]):
    """A sequence whose items are read as they are asked for. It equals any sequence of the same items."""

    @abstractmethod
    def at(self, i: int) -> T:
        """Item i, from 0."""

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        places = range(len(self))[i]
        return [self.at(k) for k in places] if isinstance(places, range) else self.at(places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(eq, self, other))


class Keys(Lazy[str]):
    """The keys of several tables, one after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables
        self.ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, i: int) -> str:
        table = int(np.searchsorted(self.ends, i, side="right"))
        return self.tables[table].key(i - int(self.ends[table]))

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(table.keys() for table in self.tables)


def first_string(data: bytes | mmap.mmap, start: int) -> str | None:
    """The string that begins a JSON list, which begins at data[start]; None where it is empty or has escapes: parsing
    takes far longer.
    """
    found = data[start + 2 : data.find(b'"', start + 2)]
    return found.decode() if b"\\" not in found else None


def remove(path: str, owner: int) -> None:
    """Remove a temporary file, if this is the process that made it: a forked worker that ends must leave it."""
    if os.getpid() == owner:
        Path(path).unlink(missing_ok=True)
