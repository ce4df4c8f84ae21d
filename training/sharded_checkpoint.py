"""Checkpoints of a sharded model: every process writes its shards into one folder, named as one process names it.

The format is torch's distributed checkpoint in its safetensors form: one `shard-NNNNN-model-....safetensors` a process,
which also says where each shard lies in its full tensor; nothing is pickled. Any number of processes can read it. All
processes have to see the folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import fresh_aside, put_in_place, seal
from training.parallel import ALONE, Ranks
from training.sharding import local
from training.signed import sha256

PART = 2**28
"""Bytes of a file, which a process has twice in memory while it is written."""


def save_sharded(
    run: Path,
    state: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    ranks: Ranks,
    background: bool = False,
) -> Callable[[], Path]:
    """As `save_checkpoint`, called by all processes, for sharded tensors; the returned function completes it.

    background: only copy the tensors now, and write them in another thread. Raises OSError where one cannot write.
    """
    from torch.distributed.checkpoint import async_save, save
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    aside = ranks.from_first(lambda: fresh_aside(run, state["step"]))
    tensors = _flat(weights)
    writer = HuggingFaceStorageWriter(str(aside), _files(tensors), save_distributed=True)
    how: dict[str, Any] = {"storage_writer": writer, "process_group": ranks.group}
    writing: Any = async_save(tensors, **how) if background else None

    def finish() -> Path:
        try:
            writing.result() if background else save(tensors, **how)
        except CheckpointException as error:
            rank, (first, _) = next(iter(error.failures.items()))
            raise OSError(f"{aside.name} could not be written by process {rank}: {first}") from error
        own = sorted(aside.glob("*.safetensors"))[ranks.rank :: ranks.world]
        files = {name: sha for part in ranks.gather({p.name: sha256(p) for p in own}) for name, sha in part.items()}

        def place() -> Path:
            seal(aside, {**state, "sharded": True}, files)
            return put_in_place(run, aside, keep)

        return ranks.from_first(place)

    return finish


def read_sharded(
    folder: Path, into: Mapping[str, Mapping[str, Tensor]] | None = None, ranks: Ranks = ALONE
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a sharded checkpoint, by group and name; called by all processes of `ranks`.

    into: tensors to read into, by the same names, which may be sharded; those of other names are read in full. Raises
    ValueError where a shape differs.
    """
    reader, found = _open(folder, ranks)
    given = _flat(into or {})
    tensors: dict[str, Any] = {}
    for name, about in found.items():
        like = given.get(name)
        if like is None and name.startswith("optimizer/"):  # state of a weight's shape is sharded as the weight is
            weight = given.get("model/" + name.removeprefix("optimizer/").rpartition("/")[0])
            if weight is not None and weight.shape == about.size:
                like = torch.zeros_like(weight, dtype=about.properties.dtype)
        if like is not None and like.shape != about.size:
            raise ValueError(f"{folder.name} has {name} of {tuple(about.size)}, the model {tuple(like.shape)}")
        tensors[name] = torch.empty(about.size, dtype=about.properties.dtype) if like is None else like
    _load(tensors, reader)
    return _grouped(tensors)


class Stored(Tensor):
    """A tensor in a checkpoint, which `full_tensor` reads, as that of a sharded tensor gathers it."""

    @staticmethod
    def __new__(cls, like: Any, read: Callable[[], Tensor]) -> Any:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    def __init__(self, like: Any, read: Callable[[], Tensor]) -> None:
        self.read = read

    def full_tensor(self) -> Tensor:
        return self.read()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if op is torch.ops.aten.detach.default:
            return cls(args[0], args[0].read)
        raise NotImplementedError(f"{op} of a tensor that has not been read")


def stored(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a sharded checkpoint, by group and name, each of which one process can read by itself."""
    reader, found = _open(folder)

    def tensor(name: str, about: Any) -> Stored:
        like = torch.empty(about.size, dtype=about.properties.dtype, device="meta")

        def read() -> Tensor:
            x = torch.empty_like(like, device="cpu")
            _load({name: x}, reader, no_dist=True)
            return x

        return Stored(like, read)

    return _grouped({name: tensor(name, about) for name, about in found.items()})


def _open(folder: Path, ranks: Ranks = ALONE) -> tuple[Any, dict[str, Any]]:
    """The reader of a checkpoint, and torch's metadata of its tensors by name, which process 0 reads for all."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    metadata = ranks.from_first(reader.read_metadata)  # from all files: not in each process, and once more by `load`
    reader.read_metadata = lambda: metadata  # type: ignore[method-assign]
    return reader, metadata.state_dict_metadata


def _load(tensors: dict[str, Any], reader: Any, **how: Any) -> None:
    from torch.distributed.checkpoint import load

    # One process may read by itself. Not in `catch_warnings`, which holds for other threads too.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    load(tensors, storage_reader=reader, **how)


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, {})[own] = x
    return groups


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, that each tensor is written to: torch makes the bytes of a file in memory."""
    found: dict[str, int] = {}
    number, left = 1, PART
    for name, x in tensors.items():
        size = local(x).nbytes
        if found and left < size:
            number, left = number + 1, PART
        found[name], left = number, left - size
    return found


def _flat(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in weights.items() for name, tensor in tensors.items()}
