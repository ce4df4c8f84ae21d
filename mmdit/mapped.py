"""Tensors of a safetensors file where they lie: memory-mapped, so that reading a file copies nothing.

The mapping is private: the system reads bytes when they are first used, a write changes the process's copy and never
the file, and the mapping goes with the last of the tensors. What replaces the file by renaming (as everything here
does) leaves them as they were; what writes into it does not.
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
"""Endings of files that are refused: they hold programs, which run when the file is opened."""

_POINTER = b"version https://git-lfs"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights(dict[str, Tensor]):
    """Mapped tensors by name, and the mappings that they lie in."""

    def __init__(self, tensors: Mapping[str, Tensor], mappings: Iterable[mmap.mmap]) -> None:
        super().__init__(tensors)
        self.mappings = list(mappings)

    def release(self) -> None:
        """Give the memory of what was read back to the system, which reads it again where it is used again.

        To be called while nothing has been written to the tensors: it would be lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)


def read_weights(path: Path) -> Weights:
    """The tensors of a safetensors file by name, mapped.

    Raises FileNotFoundError where there is no file, ValueError that names the file where it is a pickle, a Git LFS
    pointer, cut short or not safetensors.
    """
    header, start = _header(path)
    header.pop("__metadata__", None)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} in {path} is of type {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        dtype, (first, last) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        num = (last - first) // dtype.itemsize
        flat = torch.frombuffer(mapping, dtype=dtype, count=num, offset=start + first) if num else torch.empty(0)
        tensors[name] = flat.to(dtype).view(entry["shape"])
    return Weights(tensors, [mapping])


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; raises as `read_weights` does."""
    return _header(path)[0].get("__metadata__") or {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The file's table of tensors, and where their bytes start."""
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` where it came from")
    try:
        with safe_open(path, framework="pt"):  # the library checks that the table is sound and the file whole
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
