"""Weights and configs on disk: safetensors and JSON, written to a temporary file and renamed, so that no reader ever
sees a partial file.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdit.mapped import DTYPES, read_weights

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then move the result to `path` in one step; a failure leaves nothing partial."""
    write_all_aside({path: write})


def write_all_aside(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write every file to a temporary one as `write_aside` does, then move all to their places, in order."""
    own = secrets.token_hex(4)  # not a process id, which another machine may have too
    asides = {path: path.with_name(f".{path.name}.{own}.part") for path in writes}
    made = [folder for path in writes for folder in (path.parent, *path.parents) if not folder.exists()]
    try:
        for path, write in writes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(asides[path])
        if taken := [path for path in writes if path.is_dir()]:
            raise IsADirectoryError(f"{taken[0]} is a folder, expected the name of a file to write")
        for path, aside in asides.items():
            os.replace(aside, path)
    except BaseException:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
        _remove_empty(made)
        raise


def _remove_empty(made: Sequence[Path]) -> None:
    for folder in sorted({*made}, reverse=True):
        with suppress(OSError):  # not empty: another process has written there
            folder.rmdir()


def json_writer(value: Any) -> Callable[[Path], object]:
    """For `write_all_aside`: write a value as indented JSON."""
    return lambda path: path.write_text(json.dumps(value, indent=2) + "\n")


def weights_writer(
    state: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    finish: Callable[[str, Tensor], Tensor] = lambda name, x: x,
) -> Callable[[Path], object]:
    """For `write_all_aside`: write tensors as one safetensors file, each brought to the CPU when its turn comes.

    A sharded one is gathered then, for which the other processes call `gather_in_order`. finish: what is written for a
    name and its tensor on the CPU, of the same shape and type. Raises ValueError for a type that `read_weights` does
    not take.
    """
    names, end = file_order(state), 0
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name in names:
        x = state[name]
        begin, end = end, end + x.numel() * x.itemsize
        header[name] = {"dtype": _NAMES[x.dtype], "shape": [*x.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned

    def write(path: Path) -> None:
        try:
            with path.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for name in names:
                    x = finish(name, whole(state[name]).detach().cpu()).contiguous()
                    file.write(x.flatten().view(torch.uint8).numpy().data)
        except OSError as error:  # such as a full disk, without the file's name
            raise OSError(f"cannot write {path.parent}: {error}") from error

    return write


def file_order(state: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in the order that safetensors gives them: wide types first, then by name."""
    if wrong := [f"{name} is of type {x.dtype}" for name, x in state.items() if x.dtype not in _NAMES]:
        raise ValueError(f"{wrong[0]}, expected one of {', '.join(map(str, _NAMES))}")
    types = [*_NAMES]
    return sorted(state, key=lambda name: (types.index(state[name].dtype), name))


def gather_in_order(state: Mapping[str, Tensor]) -> None:
    """Take part in gathering the sharded tensors of a file that another process writes."""
    for name in file_order(state):
        whole(state[name])


def whole(x: Tensor) -> Tensor:
    """The full tensor; all processes have to ask for a sharded one."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def write_folder_aside(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary folder)`, then move the result to `folder`; if it exists, file by file, weights before
    configs. A failure leaves the folder as it was.
    """
    new = not folder.exists()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part") if new else folder / f".{os.getpid()}.part"
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        write(aside)
        if new:
            os.replace(aside, folder)
            return
        files = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: (path.suffix == ".json", path)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / file, folder / file)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    write_aside(path, json_writer(value))


def save_weights(state: Mapping[str, Tensor], path: Path, *how: Any) -> None:
    """Write tensors as one safetensors file; how: see `weights_writer`."""
    write_aside(path, weights_writer(state, *how))


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that no model computes in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"dtype is {dtype!r}, expected a floating type of torch: torch.float32, torch.bfloat16, ...")


def read_json(path: Path) -> Any:
    """Read JSON. Raises ValueError naming the file if it is not JSON, FileNotFoundError if there is no file."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> Any:
    """The JSON in the bytes of a file. Raises ValueError, with the file's name, if it is not JSON."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def read_config(kind: Callable[..., T], path: Path) -> T:
    """A config of class `kind` from its JSON. Raises ValueError if the fields do not fit."""
    try:
        return kind(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error


def shapes_of(build: Callable[[], M], num_blocks: int, state: Mapping[str, Tensor], source: str) -> M:
    """The module that `build` makes, without memory, so that a config of false sizes is found before it takes any.

    num_blocks: the config's, of which each has tensors. Raises ValueError where the weights `state` are fewer, and for
    sizes that no tensor can have.
    """
    if num_blocks > len(state):
        raise ValueError(f"{source} has {len(state)} tensors, too few for {num_blocks} blocks")
    try:
        with torch.device("meta"):
            return build()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{source} has a config with sizes that no tensor can have") from error


def load_built(build: Callable[[], M], num_blocks: int, path: Path) -> M:
    """The module that `build` makes, with the weights of a safetensors file. Raises ValueError as `shapes_of` and
    `check_fit` do, before it is made.
    """
    state = read_weights(path)
    check_fit(shapes_of(build, num_blocks, state, str(path)).state_dict(), state, str(path))
    module = build()  # what it draws moves the seeded draws of a run that begins after it: they stay as they were
    module.load_state_dict(dict(state))
    return module


def load_weights(module: nn.Module, path: Path) -> None:
    """Read a safetensors file into a module. Raises ValueError listing missing, extra and misshapen tensors."""
    assign_weights(module, read_weights(path), str(path))


def assign_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into a module. Raises ValueError as `check_fit` does."""
    check_fit(module.state_dict(), state, source)
    module.load_state_dict(dict(state))


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError listing the tensors of `state` that are missing, extra or misshapen, compared to `expected`."""
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
