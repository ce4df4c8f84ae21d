"""Data sets of one's own: opened from "python:MODULE:CLASS", checked, and asked for samples and captions."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import numpy as np

from training.captions import Captions
from training.errors import DataError, one_line
from training.order import Layout
from training.own import load_class

if TYPE_CHECKING:
    from training.data import Sample, Source
    from training.images import Size


def open_own(spec: str, size: Size | None, step: int, most: int | None) -> Source:
    """The data set "python:MODULE:CLASS": CLASS(size=size) where a size is asked for and it takes one, otherwise
    CLASS().

    Raises ValueError where there is no such subclass of `Source`, or it has more than `most` samples, or pictures that
    do not have that size, or sides that are no multiples of `step`, or one of its attributes makes no sense.
    """
    from training.data import Source

    made: Callable[..., Source] = load_class(spec, Source, "data.source")  # type: ignore[type-abstract]
    if size is not None and _takes(made, size=size):
        source = made(size=size)
    elif _takes(made):
        source = made()
    elif size is None and _takes(made, size=(1, 1)):
        raise DataError(f"{spec} takes a size: set data.image_size")
    else:
        raise DataError(f"{spec} cannot be made without arguments, but for `size`")
    for fault in _faults(source, size, step, most):
        raise DataError(f"{spec} {fault}")
    return source


def _takes(made: Callable[..., Source], **arguments: Size) -> bool:
    try:
        signature(made).bind(**arguments)
    except TypeError:
        return False
    return True


def _faults(source: Source, size: Size | None, step: int, most: int | None) -> Iterator[str]:
    """What is wrong with a source, in words that follow its name. Each check relies on the ones before it."""
    if lacking := [name for name in ("image_size", "keys", "skipped") if not hasattr(source, name)]:
        yield f"does not set {', '.join(lacking)}"
    n, keys, skipped, layout = len(source), source.keys, source.skipped, source.layout
    if n == 0:
        yield "has no samples"
    if not hasattr(keys, "__len__"):
        yield f"has a {type(keys).__name__} for keys, expected a list of strings"
    if len(keys) != n:
        yield f"has {len(keys)} keys for {n} samples"
    if wrong := [key for key in keys if not isinstance(key, str)]:
        yield f"has the key {wrong[0]!r}, expected strings"
    if not (isinstance(skipped, list | tuple) and all(isinstance(x, tuple | list) and len(x) == 2 for x in skipped)):
        yield f"has {skipped!r} for skipped, expected a list of (key, reason)"
    if not isinstance(layout, Layout):
        yield f"has a {type(layout).__name__} for layout, expected a training.Layout"
    for sides in (source.image_size, *layout.sizes):
        if not (isinstance(sides, tuple | list) and len(sides) == 2 and all(type(x) is int and x > 0 for x in sides)):
            yield f"has the size {sides!r}, expected (height, width) in whole pixels"
    for name, least, end in (("bucket", 0, len(layout.sizes)), ("part", 0, len(layout.weights)), ("block", -1, 2**31)):
        numbers = getattr(layout, name)
        if numbers is None:
            continue
        if not isinstance(numbers, np.ndarray) or numbers.shape != (n,) or numbers.dtype.kind not in "iu":
            yield f"has a layout whose {name} is no array of {n} whole numbers"
        if numbers.min() < least or numbers.max() >= end:
            yield f"has a layout whose {name} is {numbers.min()} to {numbers.max()}, expected below {end}"
    if most is not None and n > most:
        yield f"has {n} samples, and takes no part of them: set data.num_samples=none"
    if size and tuple(source.image_size) != size:
        yield f"has pictures of {_by(source.image_size)} pixels, asked for are {_by(size)}"
    if odd := [sides for sides in layout.sizes if any(side % step for side in sides)]:
        yield f"has pictures of {_by(odd[0])} pixels, expected multiples of {step}"


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


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
