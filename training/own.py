"""Classes of one's own, which a config names as "python:MODULE:CLASS".

Only modules that Python already finds are imported (installed, beside the script that runs, or on PYTHONPATH), never a
file beside a config: a run folder or config of somebody else cannot bring code with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from training.captions import Captions
from training.errors import DataError, one_line
from training.order import Layout
from training.settings import ConfigError

if TYPE_CHECKING:
    from training.data import Sample, Source
    from training.images import Size

PREFIX = "python:"
T = TypeVar("T")


def is_own(spec: str) -> bool:
    """Whether a setting names a class of one's own."""
    return spec.startswith(PREFIX)


def load_class(spec: str, base: type[T], key: str) -> type[T]:
    """The subclass of `base` that "python:MODULE:CLASS" names. Raises ConfigError, which begins with the setting's
    `key`, where there is none; errors of the module itself are raised as they are.
    """
    module, _, name = spec.removeprefix(PREFIX).partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(f'{key} is "{spec}", expected "{PREFIX}MODULE:CLASS"')
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # it needs another, which is missing
            raise
        raise ConfigError(
            f"{key} is {spec}, and there is no module {error.name}: install it, or name its folder in PYTHONPATH"
        ) from error
    if found is None:
        why = (
            ": a script's own class is known to that script alone, move it to a module" if module == "__main__" else ""
        )
        raise ConfigError(f"{key} is {spec}, and {module} has no {name}{why}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key} is {spec}, expected a subclass of {base.__module__.split('.')[0]}.{base.__name__}")
    if lacking := getattr(found, "__abstractmethods__", None):
        raise ConfigError(f"{key} is {spec}, which lacks {', '.join(sorted(lacking))}")
    return found


def open_own(spec: str, size: Size | None, step: int, most: int | None) -> Source:
    """The data set "python:MODULE:CLASS": CLASS(size=size) where a size is asked for and it takes one, otherwise
    CLASS().

    Raises ValueError where there is no such subclass of `Source`, or it has more than `most` samples, or pictures that
    do not have that size, or sides that are no multiples of `step`, or one of its attributes makes no sense.
    """
    from training.data import Source

    made: Callable[..., Source] = load_class(spec, Source, "data.source")  # type: ignore[type-abstract]
    given = {} if size is None else {"size": size}
    source = made(**given) if _takes(made, **given) else made() if _takes(made) else None
    if source is None:
        more = f"{spec} cannot be made without arguments, but for `size`"
        raise DataError(more if size or not _takes(made, size=size) else f"{spec} takes a size: set data.image_size")
    if lacking := [name for name in ("image_size", "keys", "skipped") if not hasattr(source, name)]:
        raise DataError(f"{spec} does not set {', '.join(lacking)}")
    _check_samples(spec, source)
    _check_sizes(spec, source)
    if most is not None and len(source) > most:
        raise DataError(f"{spec} has {len(source)} samples, and takes no part of them: set data.num_samples=none")
    if size and tuple(source.image_size) != size:
        raise DataError(f"{spec} has pictures of {_by(source.image_size)} pixels, asked for are {_by(size)}")
    if wrong := [sides for sides in source.layout.sizes if any(side % step for side in sides)]:
        raise DataError(f"{spec} has pictures of {_by(wrong[0])} pixels, expected multiples of {step}")
    return source


def _takes(made: Callable[..., Source], **arguments: Size | None) -> bool:
    try:
        signature(made).bind(**arguments)
    except TypeError:
        return False
    return True


def _check_samples(spec: str, source: Source) -> None:
    """Raises DataError unless there are samples, and a string for each as its key."""
    if len(source) == 0:
        raise DataError(f"{spec} has no samples")
    if not hasattr(source.keys, "__len__"):
        raise DataError(f"{spec} has a {type(source.keys).__name__} for keys, expected a list of strings")
    if len(source.keys) != len(source):
        raise DataError(f"{spec} has {len(source.keys)} keys for {len(source)} samples")
    if wrong := [key for key in source.keys if not isinstance(key, str)][:1]:
        raise DataError(f"{spec} has the key {wrong[0]!r}, expected strings")
    skipped = source.skipped
    if not (isinstance(skipped, list | tuple) and all(isinstance(x, tuple | list) and len(x) == 2 for x in skipped)):
        raise DataError(f"{spec} has {skipped!r} for skipped, expected a list of (key, reason)")


def _check_sizes(spec: str, source: Source) -> None:
    """Raises DataError unless sizes are pairs of whole numbers, and the layout has one of them for each sample."""
    layout = source.layout
    if not isinstance(layout, Layout):
        raise DataError(f"{spec} has a {type(layout).__name__} for layout, expected a training.Layout")
    for sides in (source.image_size, *layout.sizes):
        if not (isinstance(sides, tuple | list) and len(sides) == 2 and all(type(x) is int and x > 0 for x in sides)):
            raise DataError(f"{spec} has the size {sides!r}, expected (height, width) in whole pixels")
    numbers = {"bucket": (layout.bucket, len(layout.sizes)), "part": (layout.part, len(layout.weights))}
    for name, (of, most) in (numbers | {"block": (layout.block, 2**31)}).items():
        if of is None:
            continue
        if not isinstance(of, np.ndarray) or of.shape != (len(source),) or of.dtype.kind not in "iu":
            raise DataError(f"{spec} has a layout whose {name} is no array of {len(source)} whole numbers")
        if of.min() < (-1 if name == "block" else 0) or of.max() >= most:
            raise DataError(f"{spec} has a layout whose {name} is {of.min()} to {of.max()}, expected below {most}")


def sample_at(source: Source, i: int, rng: Callable[[], np.random.Generator] | None = None) -> Sample:
    """Sample i of a source, drawn where `rng` is given. Of a class of one's own, raises DataError for what is no
    `Sample`, and in place of its errors, naming the sample and the line of its code.
    """
    if _is_ours(source):
        return source[i] if rng is None else source.draw(i, rng)
    from training.data import Sample

    with _naming(source, i):
        sample = source[i] if rng is None else source.draw(i, rng)
    name = _name(source, i)
    if not isinstance(sample, Sample):
        raise DataError(f"{name} is a {type(sample).__name__}, expected a training.Sample")
    if sample.error is None and not isinstance(sample.caption, str):
        raise DataError(f"{name} has a {type(sample.caption).__name__} for its caption, expected a string")
    return sample


def captions_at(source: Source, i: int) -> Captions:
    """The captions of sample i and their weights. Of a class of one's own, raises DataError as `sample_at` does."""
    if _is_ours(source):
        return source.captions(i)
    with _naming(source, i):
        found: Any = source.captions(i)
    good = isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, tuple | list) for part in found)
    texts, weights = found if good else ((), ())
    if not good or (weights and (len(weights) != len(texts) or min(weights) < 0 or not 0 < sum(weights) < np.inf)):
        raise DataError(
            f"{_name(source, i)} has the captions {found!r}, expected (captions, weights): two tuples, as long as each "
            "other, or the second empty"
        )
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise DataError(f"{_name(source, i)} has a {wrong[0]} for a caption, expected a string")
    return tuple(texts) or ("",), tuple(weights)


def _is_ours(source: Source) -> bool:
    return type(source).__module__.startswith("training.")


def _name(source: Source, i: int) -> str:
    return f"sample {i} of {type(source).__name__}"


@contextmanager
def _naming(source: Source, i: int) -> Iterator[None]:
    """Raises DataError in place of an error of the source's code, since a worker process sends no traceback."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        frames = extract_tb(error.__traceback__)[1:]
        file = getattr(sys.modules.get(type(source).__module__), "__file__", None)
        frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
        where = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
        raise DataError(f"{_name(source, i)}: {type(error).__name__}: {one_line(error)} ({where})") from error


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
