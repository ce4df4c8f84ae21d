"""The files of a cache, on a disk or on a server: signed tables, and safetensors of which any rows can be read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmdit.mapped import DTYPES, read_weights
from training.errors import DataError
from training.remote import Patience, RemoteError, is_url, read_range, read_whole
from training.signed import sha256

T = TypeVar("T")
CACHE_JSON = "cache.json"
HEAD = 1 << 16  # bytes to ask for first: the header of a shard is shorter
MAX_HEADER = 100_000_000  # the library's own limit
NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
CHUNK = 1 << 23  # bytes to ask for at a time where a file is read whole


class CacheError(DataError):
    """A cache that is missing, not whole, changed, or made for another model; the message is one line."""


def is_cache(spec: str | Path) -> bool:
    """Whether this names a cache: a folder with the cache.json that `mmdit cache` writes first, or the URL of one."""
    if is_url(str(spec)):
        return str(spec).endswith("/" + CACHE_JSON)
    return os.path.isfile(Path(spec) / CACHE_JSON)  # also of a spec that is too long for a name


def file_of(cache: str | Path, name: str) -> str:
    """The path or URL of a file of a cache."""
    return f"{str(cache).removesuffix('/' + CACHE_JSON) if is_url(str(cache)) else cache}/{name}"


def anew(file: str) -> str:
    """What to do about a file of a cache that cannot be used."""
    name = file.rpartition("/")[2].rpartition(".")[0]
    if is_url(file):
        return f"copy {name}.* to the server again, from a folder that `mmdit cache --verify` finds whole"
    return f"delete {name}.* and run `mmdit cache` again"


def read_table(file: str, patience: Patience, parse: Callable[[bytes, str], T]) -> T:
    """What `parse` makes of the bytes and the name of a table, as `signed` does. Raises CacheError where it is missing
    or `parse` raises ValueError, DataError where the server fails.
    """
    try:
        return parse(read_whole(file, patience) if is_url(file) else Path(file).read_bytes(), file)
    except FileNotFoundError:
        raise CacheError(f"{file} is missing: run `mmdit cache` again") from None
    except RemoteError as error:
        raise DataError(str(error)) from error
    except (ValueError, OSError) as error:
        raise CacheError(f"{error}; {anew(file)}") from error


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor in a safetensors file on a server, whose bytes begin at `start`; `x[first:last]` reads these rows."""

    url: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    patience: Patience

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Raises DataError where the server fails."""
        (first, last, step), row = rows.indices(len(self)), math.prod(self.shape[1:]) * self.dtype.itemsize
        assert step == 1
        if first >= last or not row:
            return torch.empty(max(0, last - first), *self.shape[1:], dtype=self.dtype)
        try:
            data = read_range(self.url, self.start + first * row, self.start + last * row, self.patience)
        except RemoteError as error:
            raise DataError(str(error)) from error
        return torch.frombuffer(bytearray(data), dtype=self.dtype).view(-1, *self.shape[1:])


def read_tensors(file: str, size: int, patience: Patience) -> Mapping[str, Tensor | RemoteTensor]:
    """The tensors of a safetensors file of `size` bytes, by name: mapped, or on a server.

    Raises ValueError where the file is no valid safetensors file of that size, DataError where the server fails.
    """
    if not is_url(file):
        return read_weights(Path(file))
    try:
        head = read_range(file, 0, min(size, HEAD), patience)
        (length,) = struct.unpack("<Q", head[:8])
        if 8 + length > min(size, MAX_HEADER):
            raise ValueError("its header is longer than the file")
        if 8 + length > len(head):
            head = read_range(file, 0, 8 + length, patience)
        table = json.loads(head[8 : 8 + length])
        table.pop("__metadata__", None)
        return {name: _remote(file, entry, 8 + length, size, patience) for name, entry in table.items()}
    except RemoteError as error:
        raise DataError(str(error)) from error
    except (struct.error, KeyError, TypeError, AttributeError, RecursionError, *NO_JSON) as error:
        raise ValueError("its header is not one of safetensors") from error


def _remote(url: str, entry: dict[str, Any], data: int, size: int, patience: Patience) -> RemoteTensor:
    """A tensor by its entry in the header; the tensors' bytes begin at `data`."""
    dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, first, last)
    if not all(type(n) is int and n >= 0 for n in numbers) or math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError("a tensor's size does not fit its shape")
    if data + last > size:
        raise ValueError("it is cut off")
    return RemoteTensor(url, dtype, shape, data + first, patience)


def sha256_of_file(file: str, size: int, patience: Patience) -> str:
    """The SHA-256 of a file of `size` bytes, in hex. Raises DataError where the server fails."""
    if not is_url(file):
        return sha256(Path(file))
    digest = hashlib.sha256()
    try:
        for start in range(0, size, CHUNK):
            digest.update(read_range(file, start, min(size, start + CHUNK), patience))
    except RemoteError as error:
        raise DataError(str(error)) from error
    return digest.hexdigest()
