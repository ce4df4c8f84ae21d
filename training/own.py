"""Classes of one's own, which a config names as "python:MODULE:CLASS".

Only modules that Python already finds are imported (installed, beside the script that runs, or on PYTHONPATH), never a
file beside a config: a run folder or config of somebody else cannot bring code with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

from training.settings import ConfigError

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
