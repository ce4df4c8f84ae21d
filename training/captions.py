"""Captions: found in text, JSON and rows of metadata, cleaned, and drawn from where a sample has several.

A sample's captions come with shares, the weights by which one is drawn. `data.captions =
"original=0.5,synthetic=0.5"` names fields and their weights; the captions of a list divide its field's weight equally,
and where a sample lacks a field the others keep theirs. Without this setting the first caption that is found is taken.
"""

from __future__ import annotations

import json
import re
from typing import Any

from training.errors import DataError

CAPTION_FIELDS = ("caption", "text", "txt")
MAX_CAPTION = 10_000
"""Captions are cut after so many characters."""
MAX_TEXT = 8 * MAX_CAPTION
"""Bytes of a .txt file that are read."""
MAX_JSON = 16_000_000
"""Most bytes of a JSON file with captions; a larger one is not read."""
REPLACED = "\ufffd"
"""The character that replaces bytes which are not UTF-8."""

Weights = tuple[tuple[str, float], ...]
Captions = tuple[tuple[str, ...], tuple[float, ...]]
"""The captions of a sample and their shares, both empty where there is none."""

NONE: Captions = ((), ())


def parse_weights(text: str, what: str) -> Weights:
    """ "a=0.7,b=0.3" as pairs; a name alone has weight 1. Raises `DataError` for an empty name or a weight that is not
    a number above 0; `what` is the setting that it names.
    """
    pairs = []
    for part in items_in(text):
        name, _, number = part.rpartition("=") if "=" in part else (part, "", "1")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name.strip() or not 0 < weight < float("inf"):
            raise DataError(f'{what} is "{text}": expected names with weights above 0, such as "a=0.7,b=0.3"')
        pairs.append((name.strip(), weight))
    if len({name for name, _ in pairs}) < len(pairs):
        raise DataError(f'{what} is "{text}": a name comes twice')
    return tuple(pairs)


def items_in(text: str) -> list[str]:
    """The text split at commas, but not at those within braces."""
    return re.split(r",(?![^{]*\})", text)


def captions_in(kind: str, data: bytes, fields: Weights = ()) -> Captions:
    """The captions in the bytes of a ".txt" file, which counts as the field "txt", or of a ".json" file."""
    if kind == ".txt":
        return captions_of({"txt": data[:MAX_TEXT].decode("utf-8-sig", errors="replace")}, fields)
    if len(data) > MAX_JSON:
        return NONE
    try:
        return captions_of(json.loads(data.decode("utf-8-sig", errors="replace")), fields)
    except (ValueError, RecursionError):
        return NONE


def captions_of(row: Any, fields: Weights = ()) -> Captions:
    """The captions in a row: those of the given fields, or else the first of "caption", "text" and "txt"."""
    if not isinstance(row, dict):
        return NONE
    if not fields:
        first = next((found[0] for name in CAPTION_FIELDS if (found := _all(row.get(name)))), None)
        return ((first,), ()) if first else NONE
    captions: list[str] = []
    shares: list[float] = []
    for name, weight in fields:
        own = _all(row.get(name))
        captions += own
        shares += [weight / len(own) for _ in own]
    return tuple(captions), tuple(shares)


def joined(first: Captions, second: Captions, fields: Weights) -> Captions:
    """The captions of two files of one sample: of both, where fields are given, else of the first that has any."""
    if not fields:
        return first if first[0] else second
    return first[0] + second[0], first[1] + second[1]


def choose(num: int, shares: tuple[float, ...], u: float) -> int:
    """The number of the caption, out of `num`, that a draw u in [0, 1) chooses; equal shares where none are given."""
    if not shares:
        return int(u * num)
    total, place = sum(shares), 0.0
    for i, share in enumerate(shares):
        place += share / total
        if u < place:
            return i
    return num - 1


def _all(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for item in values[:100] if isinstance(item, str) and (text := clean(item))]


def clean(text: str) -> str | None:
    """One line of valid Unicode, at most MAX_CAPTION characters; None if nothing is left."""
    text = " ".join(text[: 2 * MAX_CAPTION].split())[:MAX_CAPTION]
    return text.encode("utf-8", "replace").decode() or None  # JSON allows lone surrogates, tokenizers do not
