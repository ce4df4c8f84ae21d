"""Classes of one's own, which a config names as "python:MODULE:CLASS".

Only modules that Python already finds are imported (installed, beside the script that runs, or on PYTHONPATH), never a
file beside a config: a run folder or config of somebody else cannot bring code with it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, TypeVar

from training.errors import DataError
from training.settings import ConfigError

if TYPE_CHECKING:
    from training.data import Source
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
        raise ConfigError(f"{key} is {spec}, and {module} has no {name}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key} is {spec}, expected a subclass of {base.__module__.split('.')[0]}.{base.__name__}")
    if lacking := getattr(found, "__abstractmethods__", None):
        raise ConfigError(f"{key} is {spec}, which lacks {', '.join(sorted(lacking))}")
    return found


def open_own(spec: str, size: Size | None, step: int, most: int | None) -> Source:
    """The data set "python:MODULE:CLASS": CLASS(size) where a size is asked for and it takes one, otherwise CLASS().

    Raises ValueError where there is no such subclass of `Source`, or it has more than `most` samples, or pictures that
    do not have that size, or sides that are no multiples of `step`.
    """
    from training.data import Source

    made: Callable[..., Source] = load_class(spec, Source, "data.source")  # type: ignore[type-abstract]
    given = () if size is None else (size,)
    source = made(*given) if _takes(made, *given) else made() if _takes(made) else None
    if source is None:
        raise DataError(f"{spec} takes more than a size" if size else f"{spec} takes a size: set data.image_size")
    if lacking := [name for name in ("image_size", "keys", "skipped") if not hasattr(source, name)]:
        raise DataError(f"{spec} does not set {', '.join(lacking)}")
    if len(source.keys) != len(source):
        raise DataError(f"{spec} has {len(source.keys)} keys for {len(source)} samples")
    if most is not None and len(source) > most:
        raise DataError(f"{spec} has {len(source)} samples, and takes no part of them: set data.num_samples=none")
    if size and tuple(source.image_size) != size:
        raise DataError(f"{spec} has pictures of {_by(source.image_size)} pixels, asked for are {_by(size)}")
    if wrong := [sides for sides in source.layout.sizes if any(side % step for side in sides)]:
        raise DataError(f"{spec} has pictures of {_by(wrong[0])} pixels, expected multiples of {step}")
    return source


def _takes(made: Callable[..., Source], *arguments: Size) -> bool:
    try:
        signature(made).bind(*arguments)
    except TypeError:
        return False
    return True


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
