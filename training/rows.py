"""The columns of Parquet files and Hugging Face datasets: which hold images, captions and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from training.captions import CAPTION_FIELDS, Captions, Weights, captions_of, joined
from training.errors import DataError
from training.wanted import Wanted

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
KEY_COLUMNS = ("__key__", "key")
JSON = "json"
"""The column that `datasets` makes of the .json files in a WebDataset shard."""


class Row(NamedTuple):
    """Row number `row` of block number `block` (a row group); image: its bytes, where they were asked for."""

    block: int
    row: int
    captions: Captions
    key: str | None = None
    image: bytes | None = None


def image_column(names: Sequence[str], where: str) -> str:
    """The column of images. Raises `DataError` where there is none."""
    for name in IMAGE_COLUMNS:
        if name in names:
            return name
    raise DataError(f"{where} has no column of images: expected one of {', '.join(IMAGE_COLUMNS)}, found {list(names)}")


def caption_columns(names: Sequence[str], fields: Weights) -> list[str]:
    """The columns in which captions are looked for."""
    asked = [name for name, _ in fields] or list(CAPTION_FIELDS)
    return [name for name in dict.fromkeys((*asked, JSON)) if name in names]


def captions_in_row(values: dict[str, Any], fields: Weights) -> Captions:
    """The captions in a row's columns, and in the object in its column "json"."""
    return joined(captions_of(values, fields), captions_of(values.get(JSON), fields), fields)


def key_column(names: Sequence[str]) -> str | None:
    """The column of keys, if there is one."""
    return next((name for name in KEY_COLUMNS if name in names), None)


def columns_to_read(names: Sequence[str], image: str, wanted: Wanted) -> tuple[list[str], str | None]:
    """(the columns that an index needs: captions, keys, and images where their sizes are; the column of keys)."""
    key = key_column(names)
    columns = [*caption_columns(names, wanted.captions), *([key] if key else [])]
    if wanted.measures and image not in columns:
        columns.append(image)
    return columns, key


def row_of(block: int, row: int, values: dict[str, Any], key: str | None, image: str | None, fields: Weights) -> Row:
    """A row from the values of its columns; key, image: names of these columns, None where they were not read."""
    name = values.get(key) if key else None
    captions = captions_in_row(values, fields)
    return Row(
        block, row, captions, str(name) if name is not None else None, bytes_in(values[image]) if image else None
    )


def bytes_in(value: Any) -> bytes:
    """The image file in a cell: bytes, or Hugging Face's {"bytes", "path"}; empty where there is none."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""
