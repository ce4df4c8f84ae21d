"""Memory-mapped safetensors files: reading a file copies nothing.

The mapping is private (copy on write): bytes are read from disk when first used, a write changes the process's copy and
never the file, and the mapping lives as long as its last tensor. A file may be replaced by renaming, as all of this
package does, without changing the tensors; but not written in place.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Suffixes of files that are refused: pickles can execute code when they are opened."""

_POINTER = b"version https://git-lfs"
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors by their names in safetensors, in the order in which a file holds them."""


class Weights(dict[str, Tensor]):
    """Mapped tensors by name, and their memory mappings."""

    def __init__(self, tensors: Mapping[str, Tensor], mappings: Iterable[mmap.mmap]) -> None:
        super().__init__(tensors)
        self.mappings = list(mappings)

    def release(self) -> None:
        """Drop the pages read so far from memory; the system reads them again when they are used.

        Writes to the tensors are lost: call it only before any.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)


def read_weights(path: Path) -> Weights:
    """The mapped tensors of a safetensors file, by name.

    Raises FileNotFoundError if there is no file, ValueError naming the file if it is a pickle, a Git LFS pointer,
    truncated or not safetensors.
    """
    header, start = _header(path)
    header.pop("__metadata__", None)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} in {path} is of type {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        dtype, (first, last) = DTYPES[entry["dtype"]], entry["data_offsets"]
        num = (last - first) // dtype.itemsize
        flat = torch.frombuffer(mapping, dtype=dtype, count=num, offset=start + first) if num else torch.empty(0)
        tensors[name] = flat.to(dtype).view(entry["shape"])
    return Weights(tensors, [mapping])


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises as `read_weights` does."""
    return _header(path)[0].get("__metadata__") or {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of the file, and the offset of the tensors' bytes."""
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` where it came from")
    try:
        with safe_open(path, framework="pt"):  # the library checks that the header is valid and the file complete
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def refuse_pickle(path: Path) -> None:
    """Raises ValueError for a file that would have to be unpickled."""
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any program when it is opened: have it converted to .safetensors by "
            "someone who trusts it"
        )
