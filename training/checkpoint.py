"""Checkpoints: one folder each, which is either complete or absent, and is verified when it is read.

`checkpoints/step-00001000/` holds `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and `state.json`
with the step, the seed, a digest of the list of samples, and the SHA-256 of each file and of itself. A checkpoint is
written under another name and renamed, so that a kill at any moment leaves the one before it whole. Every random draw
of a run is a function of (seed, step), so these two are the whole state of the RNG and of the data order. For sharded
models see sharded_checkpoint.py.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.weights_io import check_fit, read_json, read_weights, save_weights, write_json
from training.parallel import ALONE, Ranks
from training.sharding import copy_tensors, shard_like
from training.signed import fsync, read_signed, sha256, sha256_of


class CorruptCheckpoint(ValueError):
    """A checkpoint with files that are missing, cut or changed."""


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; other names in its folder of checkpoints are ignored."""
    found = (run / "checkpoints").glob("step-*")
    own = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(own, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    run: Path, state: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Write one checkpoint and remove all but the newest `keep`; returns its folder."""
    aside = fresh_aside(run, state["step"])
    for name, tensors in weights.items():
        save_weights(tensors, aside / f"{name}.safetensors")
    seal(aside, state, {path.name: sha256(path) for path in sorted(aside.glob("*.safetensors"))})
    return put_in_place(run, aside, keep)


def fresh_aside(run: Path, step: int) -> Path:
    """A new folder to write a checkpoint into; removes unfinished ones that a kill has left."""
    aside = run / "checkpoints" / f".step-{step:08d}.part"
    for leftover in aside.parent.glob(".step-*.part"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    return aside


def seal(aside: Path, state: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write the state with the digests of all files, and sync the folder to disk."""
    written = {**state, "files": dict(files)}
    write_json(aside / "state.json", {**written, "sha256": sha256_of(written)})
    for path in (*aside.iterdir(), aside):
        fsync(path)


def put_in_place(run: Path, aside: Path, keep: int) -> Path:
    """Rename a sealed folder to its final name, and remove all checkpoints but the newest `keep`."""
    folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".part"))
    if folder.exists():
        _set_aside(folder)
    aside.rename(folder)
    fsync(folder.parent)
    for old in _outdated(run, folder, keep):
        old.unlink() if old.is_symlink() else _set_aside(old)
    for old in folder.parent.glob(".step-*.part"):
        shutil.rmtree(old)
    return folder


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint before it is removed, so that a kill leaves no incomplete one under its name."""
    folder.rename(folder.with_name(f".{folder.name}.old.part"))


def _outdated(run: Path, newest: Path, keep: int) -> list[Path]:
    """All but `newest` and the keep - 1 before it. Later steps go too: the run has fallen back to before them."""
    found = list_checkpoints(run)
    place = found.index(newest)
    return [*found[place + 1 :], *found[: max(0, place - keep + 1)]]


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state and weights of a checkpoint. Raises CorruptCheckpoint, which says which file is bad, and how."""
    verify(folder)
    return read_checkpoint(folder)


def read_checkpoint(
    folder: Path, into: Mapping[str, Mapping[str, Tensor]] | None = None, ranks: Ranks = ALONE
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state and weights of a checkpoint that has been verified.

    into, ranks: of a sharded checkpoint, tensors to read into, by group and name, and the processes that read it (see
    `read_sharded`).
    """
    state = read_json(folder / "state.json")
    if state.get("sharded"):
        from training.sharded_checkpoint import read_sharded

        return state, read_sharded(folder, into, ranks)
    return state, {Path(name).stem: dict(read_weights(folder / name)) for name in state["files"]}


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises CorruptCheckpoint where one of its files is not as it was written."""
    try:
        state = read_signed(folder / "state.json")
        changed = [name for name, digest in state["files"].items() if sha256(folder / name) != digest]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{folder.name} is incomplete: {error}") from error
    except ValueError as error:
        raise CorruptCheckpoint(f"{folder.name}: {error}") from error
    if changed:
        raise CorruptCheckpoint(f"{folder.name}/{changed[0]} has changed since it was written")
    return state


def load_latest(run: Path, log: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state and weights of a run's newest whole checkpoint; corrupt ones are named in the log. Raises
    FileNotFoundError where there is none.
    """
    return read_checkpoint(newest_whole(run, log))


def newest_whole(run: Path, log: Callable[[str], None]) -> Path:
    """The folder of the newest whole checkpoint; logs and raises as `load_latest` does."""
    for folder in reversed(list_checkpoints(run)):
        try:
            verify(folder)
            return folder
        except CorruptCheckpoint as error:
            log(f"warning: checkpoint passed over, falling back to the one before: {error}")
    raise FileNotFoundError(f"{run} holds no whole checkpoint to resume from; train afresh into another folder")


def averaged(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of the average in a checkpoint's weights: what is not trained is the model's."""
    return {**weights["model"], **weights.get("ema", {})}


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy full tensors into a module, which may be sharded. Raises ValueError where they do not fit it."""
    check_fit(module.state_dict(), tensors, source)
    copy_tensors(module.state_dict(), tensors)


COUNTERS = ("k", "weight_sum", "lr_max")
"""Counters that schedule-free optimisers keep in a group of parameters."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `<parameter>/<key>`, and `group <number>/<counter>`.

    Python's ints become int64 tensors, its floats float64.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        f"{names[id(p)]}/{key}": value if torch.is_tensor(value) and value.shape == p.shape else _copied(value)
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group {i}/{key}": _copied(group[key]) for key in COUNTERS if key in group}
    return found


def _copied(value: Any) -> Tensor:
    """A number as a tensor, or a copy of a small tensor, which several parameters may share."""
    if torch.is_tensor(value):
        return value.clone()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore the optimiser from `optimizer_tensors`, which are removed one by one, so that memory does not hold both.
    Raises CorruptCheckpoint for a name or shape that the model does not have.
    """
    parameters = dict(model.named_parameters())
    groups = {f"group {i}": group for i, group in enumerate(optimizer.param_groups)}
    for name in [*tensors]:
        value = tensors.pop(name)
        owner, _, key = name.rpartition("/")
        number = value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else None
        if owner in groups and key in groups[owner] and number is not None:
            groups[owner][key] = number
            continue
        p = parameters.get(owner)
        if p is None or (value.ndim and value.shape != p.shape and not key.startswith(("qmap", "absmax"))):
            raise CorruptCheckpoint(f"the optimiser's {name} does not fit the model")
        # The fused optimiser wants its step count on the parameter's device, in float32.
        value = value.to(p.device, copy=True)
        of_weight = value.ndim > 0 and value.shape == p.shape
        optimizer.state[p][key] = number if number is not None else shard_like(value, p) if of_weight else value
