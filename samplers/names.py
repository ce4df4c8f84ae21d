"""Lookup by name, with an error that suggests the nearest one."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def lookup(what: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`; for an unknown name a ValueError with the nearest one, or with all."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = get_close_matches(str(name), table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(table))}"
    raise ValueError(f"unknown {what} {name!r}: {hint}")
