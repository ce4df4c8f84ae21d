"""Frozen dataclasses that check their values, are read from and written to TOML, take overrides, and document fields.

A settings class is a frozen dataclass with simple types (`int`, `float`, `str`, `bool`, `Literal`, tuples, `X | None`,
`Annotated` with a `Range`) and a string under each field that says what it means. All else follows from these
declarations. TOML has no null: there and in overrides None is the string "none".
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message is one line that says what to do."""

    alike = True
    """All processes of a run find it, and the first one on each machine says it."""


@dataclass(frozen=True)
class Range:
    """Allowed numbers: from `low` to `high`, both included unless open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        return (x > self.low if self.open_low else x >= self.low) and (
            x < self.high if self.open_high else x <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]


class Settings:
    """Base of a settings class: fits every field to its declared type, then calls `check`.

    `section` is the part of a key before the dot ("training" in "training.num_steps"), "" at the top level.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value = fit(hints[f.name], getattr(self, f.name), _join(self.section, f.name))
            object.__setattr__(self, f.name, value)  # the dataclass is frozen
        self.check()

    def check(self) -> None:
        """Raises ConfigError for conditions that the type of a single field cannot express."""


S = TypeVar("S")


# --- values -----------------------------------------------------------------------------------------


def fit(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`: lists become tuples, whole floats ints, "none" None. Raises ConfigError, which names
    `key`, where it does not fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fit_range(args[0], args[1], value, key)
    if origin in (Union, UnionType):
        return _fit_union(hint, args, value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key} is {shown(value)}, expected {type_text(hint)}{suggestion(value, args)}")
        return value
    if origin is tuple:
        return _fit_tuple(hint, args, value, key)
    if hint is int and type(value) is float and value.is_integer():  # 1e5 is a float in TOML
        value = int(value)
    if hint in (int, float) and type(value) is int and not -(2**63) <= value < 2**64:
        raise ConfigError(f"{key} is {shown(value)}, expected a number of 64 bits")
    if hint is float and type(value) is int:
        value = float(value)
    # bool is an int in Python, but not in a config.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key} is {shown(value)}, expected {type_text(hint)}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, expected a finite number")
    return value


def _fit_range(base: Any, allowed: Range, value: Any, key: str) -> Any:
    value = fit(base, value, key)
    if value not in allowed:
        raise ConfigError(f"{key} is {shown(value)}, expected {type_text(base)} {allowed}")
    return value


def _fit_union(hint: Any, args: tuple[Any, ...], value: Any, key: str) -> Any:
    if NoneType in args and (value is None or value == "none"):
        return None
    others = [arg for arg in args if arg is not NoneType]
    for arg in others:
        try:
            return fit(arg, value, key)
        except ConfigError as error:
            if len(others) == 1:
                raise ConfigError(f'{error} or "none"') from None
    raise ConfigError(f"{key} is {shown(value)}, expected {type_text(hint)}")


def _fit_tuple(hint: Any, args: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
        raise ConfigError(f"{key} is {shown(value)}, expected {type_text(hint)}")
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
    return tuple(fit(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def type_text(hint: Any) -> str:
    """The type in words, for errors and for the documentation."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{type_text(args[0])} {args[1]}"
    if origin in (Union, UnionType):
        return " or ".join('"none"' if arg is NoneType else type_text(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(shown(arg) for arg in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list [...], each {type_text(args[0])}"
        return f"a list of {len(args)}, each {type_text(args[0])}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))


def shown(value: Any) -> str:
    """A value as TOML writes it; None, which TOML has not, as "none"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(item) for item in value)}]"
    return '"none"' if value is None else str(value)


def suggestion(wrong: Any, known: Iterable[Any]) -> str:
    """'; did you mean "..."?' with the known name nearest to a wrong one, "" where none is near."""
    near = get_close_matches(str(wrong), [str(name) for name in known], n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


# --- tables -----------------------------------------------------------------------------------------


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as nested plain values that TOML and JSON can hold, with None as "none"."""
    table = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {key: to_dict(value) if is_dataclass(value) else _plain(value) for key, value in table.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return "none" if value is None else value


def as_override(value: Any) -> str:
    """A value as it is written after "key=" on the command line."""
    text = str(_plain(value))
    if isinstance(value, tuple):
        return text.replace(" ", "")
    return text.lower() if isinstance(value, bool) else text


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting in which two settings of one class differ; key: of both."""
    if is_dataclass(old):
        for part in fields(old):
            yield from differences(getattr(old, part.name), getattr(new, part.name), _join(key, part.name))
    elif old != new:
        yield key, old, new


def to_toml(settings: Any) -> str:
    """The settings as TOML text; reading it gives equal settings."""
    return tomli_w.dumps(to_dict(settings))


def merged(settings: S, table: Mapping[str, Any], prefix: str = "") -> S:
    """The settings updated with a nested table. Raises ConfigError for an unknown key or a value that does not fit."""
    hints, changes = _hints(type(settings)), {}
    for name, value in table.items():
        key = _join(prefix, name)
        if name not in hints:
            raise ConfigError(_unknown(key, type(settings), prefix))
        if is_section(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} is a section, but {shown(value)} came; write [{key}] and its keys below")
            value = merged(getattr(settings, name), value, key)
        else:
            value = fit(hints[name], value, key)
        changes[name] = value
    return replace(settings, **changes)  # type: ignore[type-var]


def updated(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested table with the changes of another; where it has a value in place of a section, that stays."""
    out = dict(table)
    for name, value in changes.items():
        if not isinstance(value, Mapping):
            out[name] = value
        elif isinstance(table.get(name, {}), Mapping):
            out[name] = updated(table.get(name, {}), value)
    return out


def overridden(settings: S, assignments: Sequence[str]) -> S:
    """The settings with "section.key=value" assignments applied."""
    return merged(settings, table_of(type(settings), assignments))


def table_of(cls: type, assignments: Sequence[str]) -> dict[str, Any]:
    """The nested table of "section.key=value" assignments; a value is TOML, or else a bare string."""
    table: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            raise ConfigError(f'"{assignment}" is no setting; expected key=value, such as {keys(cls)[-1]}=...')
        *path, name = key.split(".")
        place = table
        for part in path:
            place = place.setdefault(part, {})
        place[name] = _parse(text, hint_of(cls, key), key)
    return table


def hint_of(cls: type, key: str) -> Any:
    """The declared type of a dotted key. Raises ConfigError with the nearest key where there is no such key."""
    current: Any = cls
    for part in key.split("."):
        hints = _hints(current) if is_section(current) else {}
        if part not in hints:
            raise ConfigError(_unknown(key, cls, ""))
        current = hints[part]
    if is_section(current):
        raise ConfigError(f"{key} is a section; set one of its keys, such as {key}.{next(iter(_hints(current)))}=...")
    return current


def _parse(text: str, hint: Any, key: str) -> Any:
    """The value of an override: a TOML value, or else the text itself, so that strings need no quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    try:
        return fit(hint, value, key)
    except ConfigError:
        if _allows(hint, str):  # a folder may be named 2024
            return text
        raise


def _allows(hint: Any, kind: type) -> bool:
    return hint is kind or (get_origin(hint) in (Union, UnionType) and kind in get_args(hint))


def is_section(hint: Any) -> bool:
    """Whether a declared type is a settings class of its own."""
    return isinstance(hint, type) and is_dataclass(hint)


def _unknown(key: str, cls: type, prefix: str) -> str:
    """The message for an unknown key, with the most similar known one, in whole or in the part after the dot."""
    known, last = keys(cls, prefix), key.rpartition(".")[2]
    at_this_level = key.rpartition(".")[0] == prefix
    sections = [_join(prefix, name) for name, hint in _hints(cls).items() if is_section(hint) and at_this_level]
    same = [name for name in known if name.rpartition(".")[2] == last]
    lasts = {name.rpartition(".")[2]: name for name in known}
    near = (
        get_close_matches(key, same, n=1, cutoff=0.0)
        or get_close_matches(key, sections, n=1, cutoff=0.8)
        or get_close_matches(key, known, n=1)
        or [lasts[name] for name in get_close_matches(last, lasts, n=1)]
    )
    place = f"the keys here are {', '.join(_join(prefix, name) for name in _hints(cls))}"
    return f'unknown key "{key}"; ' + (f'did you mean "{near[0]}"?' if near else place)


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a settings class, in the order of declaration."""
    found: list[str] = []
    for name, hint in _hints(cls).items():
        found += keys(hint, _join(prefix, name)) if is_section(hint) else [_join(prefix, name)]
    return found


def keys_in(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key in a nested table."""
    found: list[str] = []
    for name, value in table.items():
        key = _join(prefix, name)
        found += keys_in(value, key) if isinstance(value, Mapping) else [key]
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# --- documentation ----------------------------------------------------------------------------------


class FieldDoc(NamedTuple):
    """One setting: its dotted key, type in words, default as TOML writes it ("" where there is none) and meaning."""

    key: str
    type: str
    default: str
    meaning: str


def field_docs(cls: type, prefix: str = "") -> list[FieldDoc]:
    """The settings of a class and of its sections, in the order of declaration."""
    docs: list[FieldDoc] = []
    meanings = _meanings(cls)
    defaults = {f.name: "" if f.default is MISSING else shown(f.default) for f in fields(cls)}  # type: ignore[arg-type]
    for name, hint in _hints(cls).items():
        key = _join(prefix, name)
        if is_section(hint):
            docs += field_docs(hint, key)  # type: ignore[arg-type]
        else:
            docs.append(FieldDoc(key, type_text(hint), defaults[name], meanings.get(name, "")))
    return docs


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, in the order of declaration."""
    return _cached_hints(cls)


@cache
def _cached_hints(cls: Any) -> dict[str, Any]:  # apart, since to mypy not every class is hashable
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def _meanings(cls: type) -> dict[str, str]:
    """The string under each field of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    meanings = {}
    for field, below in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            meanings[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return meanings
