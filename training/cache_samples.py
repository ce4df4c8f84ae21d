"""The samples of a cache, as the tables of its shards list them: in memory each takes 25 bytes, so that millions fit.

The rest of a sample, its key and captions, is read from its table when it is asked for; tables on a server are kept as
they came.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from training.cache_files import CacheError, anew
from training.remote import is_url
from training.table import Lazy, first_string

Bytes = TypeVar("Bytes", bytes, mmap.mmap)
COLUMNS = np.dtype(
    [("good", bool), ("captions", np.int32), ("bucket", np.int32), ("part", np.int32), ("block", np.int32)]
)
"""Of each sample: whether it has an image, its number of captions, and as in `order.Layout`."""
_LIST = '"samples": ['
_scan: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


class CachedSample(NamedTuple):
    """A sample in a shard's .json. content: SHA-256 of its pixels and captions; error: why it has no image; shares: the
    weights of its captions (none: equal ones); bucket, part, block: as in `order.Layout`.
    """

    key: str
    content: str
    captions: list[str]
    error: str | None = None
    shares: Sequence[float] = ()
    bucket: int = 0
    part: int = 0
    block: int = -1


def content_of(pixels: np.ndarray, captions: Sequence[str]) -> str:
    """SHA-256 of a sample's image, uint8 (h, w, 3), and its captions, by which a change of the data is noticed."""
    digest = hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
    for caption in captions:
        digest.update(b"\0" + caption.encode())
    return digest.hexdigest()


class ShardSamples(Lazy[CachedSample]):
    """The samples of a shard, from the bytes of its .json, in which sample i begins at starts[i]. columns: an array of
    `COLUMNS`.
    """

    def __init__(self, file: str, data: bytes) -> None:
        """data: as `write_shard` writes it; any other raises whatever the parser does."""
        self.file, self._size, self._held = file, len(data), data if is_url(file) else None
        self._map: bytes | mmap.mmap | None = None
        text, starts, columns = data.decode("ascii"), list[int](), list[tuple[Any, ...]]()
        end = text.index(_LIST) + len(_LIST)
        while text[end] != "]":
            starts.append(end)
            row, end = _scan(text, end)
            sample = CachedSample(*row)
            columns.append((sample.error is None, len(sample.captions), *sample[5:]))
            end += 2 * (text[end] == ",")  # and a space
        self.starts = np.array([*starts, end + 2], dtype=np.int64)
        self.columns = np.array(columns, dtype=COLUMNS)

    def __len__(self) -> int:
        return len(self.columns)

    def at(self, i: int) -> CachedSample:
        """Raises CacheError where the table has changed since it was opened, or is gone."""
        first, last = self.starts[i : i + 2].tolist()
        return self._parsed(self._mapped()[first : last - 2])[0]  # two more bytes are between it and the next

    def __iter__(self) -> Iterator[CachedSample]:
        yield from self._parsed(self._read()[self.starts[0] : self.starts[-1] - 2])

    def keys(self) -> Iterator[str]:
        """Their keys, for which the rest is not parsed."""
        data = self._read()
        return (first_string(data, start) or self.at(i).key for i, start in enumerate(self.starts[:-1].tolist()))

    def close(self) -> None:
        """Unmap the table, until a sample is asked for again."""
        self._map = None

    def _parsed(self, rows: bytes) -> list[CachedSample]:
        try:
            return [CachedSample(*row) for row in json.loads(b"[" + rows + b"]")]
        except (ValueError, TypeError) as error:
            raise self._changed() from error

    def _read(self) -> bytes:
        """The whole table."""
        return self._held or self._on_disk(lambda: Path(self.file).read_bytes())

    def _mapped(self) -> bytes | mmap.mmap:
        """The whole table; of a file on disk it stays mapped until `close`."""

        def mapped() -> mmap.mmap:
            with open(self.file, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        self._map = self._held or self._map or self._on_disk(mapped)
        return self._map

    def _on_disk(self, read: Callable[[], Bytes]) -> Bytes:
        try:
            if len(data := read()) == self._size:
                return data
        except (OSError, ValueError) as error:
            raise self._changed() from error
        raise self._changed()

    def _changed(self) -> CacheError:
        return CacheError(f"{self.file} has changed since it was opened; {anew(self.file)}")


class AllSamples(Lazy[CachedSample]):
    """The samples of all shards, each of which has `size` (the last one may have fewer)."""

    def __init__(self, parts: Sequence[ShardSamples], size: int) -> None:
        self.parts, self._size, self._count = parts, size, sum(map(len, parts))

    def columns(self) -> np.ndarray:
        """A copy of all their columns."""
        return np.concatenate([np.empty(0, COLUMNS), *(part.columns for part in self.parts)])

    def __len__(self) -> int:
        return self._count

    def at(self, i: int) -> CachedSample:
        return self.parts[i // self._size][i % self._size]

    def __iter__(self) -> Iterator[CachedSample]:
        return chain.from_iterable(self.parts)

    def keys(self) -> Iterator[str]:
        """The keys of all."""
        return chain.from_iterable(part.keys() for part in self.parts)
