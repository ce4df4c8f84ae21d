"""Weights and configs on disk: safetensors and JSON, written aside and renamed, so that no reader ever meets half a
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def write_aside(path: Path, write: Any) -> None:
    """Call `write(temporary path)`, then move the result to `path` in one step; a failure leaves nothing partial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors makes files that their owner alone can read
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON."""
    write_aside(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


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


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    write_aside(path, lambda p: save_file(tensors, p, metadata))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError that names the file where it is cut or not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Read a safetensors file into a module. Raises ValueError that lists missing, extra and misshapen tensors."""
    assign_weights(module, read_weights(path), str(path))


def assign_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into a module; every tensor must be there, in its shape, and none besides."""
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "extra": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ),
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"the weights of {source} do not fit the model: {'; '.join(found)}")
    module.load_state_dict(dict(state))
