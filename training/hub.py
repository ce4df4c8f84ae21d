"""Hugging Face datasets, by name or from disk: "hf:NAME", "hf:NAME:SPLIT", "hf:NAME@CONFIG:SPLIT", "hf:FOLDER".

A folder is one that `Dataset.save_to_disk` wrote, or one with files that `load_dataset` reads. Here are map-style
datasets, with access to any row; `training/stream.py` reads streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import DataError, one_line
from training.remote import is_url
from training.rows import Row, bytes_in, columns_to_read, image_column, row_of

if TYPE_CHECKING:
    from training.table import Entry
    from training.wanted import Wanted

_SPLIT = "train"


class HubRows:
    """Rows of a map-style dataset. Raises `DataError` where it cannot be loaded, or `datasets` is missing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data, _ = load(name, streaming=False)
        self.column = image_column(self.data.column_names, name)

    def rows(self, wanted: Wanted) -> Iterator[Row]:
        """All rows, without their images unless sizes are wanted."""
        columns, key = columns_to_read(self.data.column_names, self.column, wanted)
        chosen = self.data.select_columns(columns) if columns else None
        for i in range(len(self.data)):
            values = chosen[i] if chosen is not None else {}
            yield row_of(0, i, values, key, self.column if wanted.measures else None, wanted.captions)

    def image(self, entry: Entry) -> bytes:
        """The image file of a sample. Raises OSError where it cannot be read."""
        return image_in(self.data[entry.size][self.column])


def load(name: str, streaming: bool) -> tuple[Any, str]:
    """(the dataset, with images left encoded; a text that changes with its files, "" where they are not known).

    Raises `DataError` of one line, whatever went wrong.
    """
    path, config, split = parse(name)
    try:
        import datasets
    except ImportError as error:
        raise DataError('Hugging Face datasets need their package: pip install "mmdit[hf]"') from error
    version = ""
    try:
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            data = datasets.load_from_disk(path)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
            version = data._fingerprint
            data = data.to_iterable_dataset(num_shards=min(8, max(1, len(data)))) if streaming else data
        elif streaming:
            builder = datasets.load_dataset_builder(path, config)
            data, version = builder.as_streaming_dataset(split=split), _version(builder, split)
        else:
            data = datasets.load_dataset(path, config, split=split)
        features = data.features or {}
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of any reader or server behind it
        raise DataError(f"hf:{name} cannot be loaded: {one_line(error)}") from error
    return data, version


def _version(builder: Any, split: str) -> str:
    """A digest of the names of a split's files, with the size of local ones, and for remote ones the revision or
    content tag that their server gives.
    """
    files = (builder.config.data_files or {}).get(split) or []
    marks = [file if is_url(file) else f"{Path(file).name} {Path(file).stat().st_size}" for file in files]
    if any(map(is_url, files)):
        marks += map(str, getattr(files, "origin_metadata", ()))  # of skipped files too
    return hashlib.sha256("\n".join(marks).encode()).hexdigest() if marks else ""


def parse(name: str) -> tuple[str, str | None, str]:
    """(path, config, split) of "PATH@CONFIG:SPLIT"."""
    path, _, split = name.partition(":")
    path, _, config = path.partition("@")
    if not path:
        raise DataError("expected a dataset's name, such as hf:NAME, hf:NAME:train or hf:NAME@CONFIG:train")
    return path, config or None, split or _SPLIT


def image_in(value: Any) -> bytes:
    """The image file in a cell. A cell may hold a path instead, to a local file, or in a stream to one on a server, as
    fsspec names it ("zip://1.jpg::https://..."). Raises OSError where it cannot be read.
    """
    if not (isinstance(value, dict) and value.get("bytes") is None and value.get("path")):
        return bytes_in(value)
    if not is_url(value["path"]):
        return Path(value["path"]).read_bytes()
    import fsspec

    try:
        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except Exception as error:  # each file system has its own
        raise OSError(f"{value['path']}: {one_line(error)}") from error
