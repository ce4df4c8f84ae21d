"""Weights and configs on disk: safetensors and JSON, written aside and renamed, so that no reader ever meets half a
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mmdit.mapped import read_weights

T = TypeVar("T")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then move the result to `path` in one step; a failure leaves nothing partial."""
    write_all_aside({path: write})


def write_all_aside(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write every file aside as `write_aside` does, then move all to their places, in order."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in writes}
    made = [folder for path in writes for folder in (path.parent, *path.parents) if not folder.exists()]
    try:
        for path, write in writes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            asides[path].touch()
            mode = asides[path].stat().st_mode
            write(asides[path])
            asides[path].chmod(mode)  # safetensors makes files that their owner alone can read
        for path, aside in asides.items():
            os.replace(aside, path)
    except BaseException:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
        for folder in sorted({*made}, reverse=True):
            with suppress(OSError):  # another has put something there
                folder.rmdir()
        raise


def json_writer(value: Any) -> Callable[[Path], object]:
    """For `write_all_aside`: writes a value as readable JSON."""
    return lambda path: path.write_text(json.dumps(value, indent=2) + "\n")


def weights_writer(state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Callable[[Path], object]:
    """For `write_all_aside`: writes tensors as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    return lambda path: save_file(tensors, path, metadata)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON."""
    write_aside(path, json_writer(value))


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file."""
    write_aside(path, weights_writer(state, metadata))


def read_json(path: Path) -> Any:
    """Read JSON. Raises ValueError that names the file where it is none, FileNotFoundError where there is no file."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_config(kind: Callable[..., T], path: Path) -> T:
    """The config of a class from its JSON. Raises ValueError where that is none of it."""
    try:
        return kind(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Read a safetensors file into a module. Raises ValueError that lists missing, extra and misshapen tensors."""
    assign_weights(module, read_weights(path), str(path))


def assign_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into a module; every tensor must be there, in its shape, and none besides."""
    check_fit(module.state_dict(), state, source)
    module.load_state_dict(dict(state))


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError that lists what of `expected` is missing in `state`, what is extra, and what is misshapen."""
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "extra": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(
            f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
            for name in expected.keys() & state.keys()
            if expected[name].shape != state[name].shape
        ),
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"the weights of {source} do not fit the model: {'; '.join(found)}")
