"""The index of a data set on disk: which samples there are, in which order, and where their bytes lie.

Three layouts, one index. A folder of images with captions in `.txt` (or `.json`) files of the same stem; a folder with
a Hugging Face `metadata.jsonl` or `metadata.csv` (`file_name` and `caption` or `text`); WebDataset shards. Whatever the
layout, a sample is an `Entry`: a unique key, a caption, and a range of bytes in a file, so that any process can read
any sample at any time. Members of a `.tar` are read in place, the images of a `.tar.gz` are unpacked into a temporary
file that goes when the index does. Captions stay in memory. The order depends on names alone, not on the file system.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from training.shards import (
    IMAGE_SUFFIXES,
    SHARD_ERRORS,
    SHARD_SUFFIXES,
    Members,
    images_of,
    open_shard,
    read_members,
    split_name,
)

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_FIELDS = ("caption", "text")
MAX_CAPTION = 10_000
"""Captions are cut after so many characters."""

_LOOKED_FOR = f"images ({' '.join(IMAGE_SUFFIXES)}), metadata.jsonl, or shards ({' '.join(SHARD_SUFFIXES)})"


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: its image is `size` bytes of `path` from `offset` on (all of it where `size` is None)."""

    key: str
    caption: str | None
    path: str
    offset: int = 0
    size: int | None = None


class Index:
    """The samples of a data set in their fixed order, and in `skipped` what could not be indexed: (name, reason).

    `spec` is a folder, a shard, a metadata file or a glob of shards. Raises `DataError` if nothing can be trained on.
    """

    def __init__(self, spec: str, need_captions: bool = True) -> None:
        self.need_captions = need_captions
        self.entries: list[Entry] = []
        self.skipped: list[tuple[str, str]] = []
        self._keys: dict[str, int] = {}  # each key that is taken -> how often it was asked for again as a longer key
        self._spool: BinaryIO | None = None
        root, names = _list_files(spec)
        if metadata := [name for name in names if Path(name).name in METADATA_NAMES]:
            for name in metadata:
                self._add_metadata(root / name, name)
        elif shards := [name for name in names if name.lower().endswith(SHARD_SUFFIXES) and name.count("/") <= 1]:
            for name in shards:
                self._add_shard(root / name, name)
        else:
            self._add_folder(root, names)
        if self._spool is not None:
            self._spool.close()
            self._spool = None  # its path is in the entries
        self._keys.clear()
        self._check(spec, len(names))

    def _check(self, spec: str, num_files: int) -> None:
        why = f"; skipped {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
        if not self.entries:
            raise DataError(f"no images found in {spec}: looked through {num_files} files for {_LOOKED_FOR}{why}")
        if self.need_captions and all(entry.caption is None for entry in self.entries):
            raise DataError(
                f"no captions found: {spec} has {len(self.entries)} images, none with a caption; give each a .txt file "
                "(or a .json file with a 'caption') of the same name, or list them in a metadata.jsonl"
            )

    def _add(self, key: str, longer_key: str, caption: str | None, path: str | Path, *place: int) -> None:
        """Append a sample; where the key is taken it becomes the longer key, then that with a number."""
        key, longer_key = printable(key), printable(longer_key)
        if key in self._keys:
            key = longer_key
        while key in self._keys:
            self._keys[longer_key] += 1
            key = f"{longer_key}#{self._keys[longer_key] + 1}"
        self._keys[key] = 0
        self.entries.append(Entry(key, caption, str(path), *place))

    # --- a folder of images ---

    def _add_folder(self, root: Path, names: list[str]) -> None:
        texts = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".json"):
                texts[stem, suffix.lower()] = root / name
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                caption = None
                for kind in (".txt", ".json"):
                    if caption is None and (path := texts.get((stem, kind))):
                        caption = self._read_caption(path, kind)
                self._add(stem, name, caption, root / name)

    def _read_caption(self, path: Path, kind: str) -> str | None:
        try:
            with open(path, "rb") as file:
                return _caption_in(kind, file.read(4 * MAX_CAPTION if kind == ".txt" else -1))
        except OSError as error:
            self.skipped.append((printable(str(path)), f"caption not readable: {error.strerror}"))
            return None

    # --- Hugging Face metadata ---

    def _add_metadata(self, path: Path, name: str) -> None:
        folder = Path(name).parent
        try:
            text = path.read_bytes().decode("utf-8-sig", errors="replace")
        except OSError as error:
            self.skipped.append((name, f"not readable: {error.strerror}"))
            return
        for number, row in _rows(text, path.suffix):
            file_name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(file_name, str) or not file_name:
                self.skipped.append((f"{name}:{number}", "not a row with a file_name"))
                continue
            key = os.path.splitext((folder / file_name).as_posix())[0]
            self._add(key, key, _caption_of(row), path.parent / file_name)

    # --- shards ---

    def _add_shard(self, path: Path, name: str) -> None:
        stem = name[: name.lower().rindex(".t")]
        for key, same_key in self._read_shard(path, name).items():
            for members in same_key:
                for image_key, place, caption in images_of(key, members):
                    self._add(image_key, f"{stem}/{image_key}", caption, *place)

    def _read_shard(self, path: Path, name: str) -> dict[str, list[Members]]:
        """The samples of each key, of what is whole in a shard; what is not becomes one line in `skipped`."""
        samples: dict[str, list[Members]] = {}
        num_members = 0
        try:
            with open_shard(path) as file:
                for member, read in read_members(file):
                    key, kind = split_name(member.name)
                    value: Any
                    if kind.endswith(IMAGE_SUFFIXES):
                        in_place = (str(path), member.offset_data, member.size)
                        value = self._unpack(read()) if isinstance(file, gzip.GzipFile) else in_place
                    elif kind.endswith((".txt", ".json")):
                        value = _caption_in("." + kind.rpartition(".")[2], read())
                    else:
                        continue
                    num_members += 1
                    same_key = samples.setdefault(key, [{}])
                    if kind in same_key[-1]:  # the same name again: another sample
                        same_key.append({})
                    same_key[-1][kind] = value
        except DataError:
            raise
        except SHARD_ERRORS as error:
            why = " ".join(str(error).split()) or type(error).__name__
            self.skipped.append((name, f"cut off or corrupt: {why}; the {num_members} files before that are used"))
        return samples

    def _unpack(self, data: bytes) -> tuple[str, int, int]:
        """Append an image to the temporary file -> its place there."""
        try:
            if self._spool is None:
                handle, self._spool_path = tempfile.mkstemp(prefix="mmdit-shards-")
                weakref.finalize(self, _remove, self._spool_path, os.getpid())
                self._spool = open(handle, "wb")  # noqa: SIM115
            place = (self._spool_path, self._spool.tell(), len(data))
            self._spool.write(data)
            return place
        except OSError as error:
            raise DataError(
                f"no room to unpack the .tar.gz shards in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a "
                f"folder with more room, or unpack them to .tar"
            ) from error


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker that ends must not take the file from the others
        Path(path).unlink(missing_ok=True)


# --- files -----------------------------------------------------------------------------------------------------------


def _list_files(spec: str) -> tuple[Path, list[str]]:
    """(root, the sorted paths below it with "/") of all regular files that `spec` names; hidden ones are left out."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path, sorted(walk(path))
    if path.is_file():
        if path.name.lower().endswith(SHARD_SUFFIXES) or path.name in METADATA_NAMES:
            return path.parent, [path.name]
        raise DataError(
            f"{spec} is one file; expected a folder, a shard ({' '.join(SHARD_SUFFIXES)}) or a metadata.jsonl"
        )
    if glob.has_magic(spec):
        shards = [found for found in glob.glob(str(path), recursive=True) if found.lower().endswith(SHARD_SUFFIXES)]
        if not shards:
            raise DataError(f"no images found: no shard ({' '.join(SHARD_SUFFIXES)}) matches {spec}")
        root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards]))
        return root, sorted(Path(os.path.abspath(shard)).relative_to(root).as_posix() for shard in shards)
    raise DataError(f"no images found: there is no folder or file {spec}; give a folder, shards, or 'shapes'")


def walk(root: Path) -> Iterator[str]:
    """Paths of the files below root; follows links to folders, but enters each folder once."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():  # not a pipe or a device
                yield path.relative_to(root).as_posix()


def printable(name: str) -> str:
    """A file name as text that can be written to a log: bytes that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# --- captions --------------------------------------------------------------------------------------------------------


def _caption_in(kind: str, data: bytes) -> str | None:
    """The caption in the bytes of a ".txt" or ".json" file, None where there is none."""
    if kind == ".txt":
        return _clean(data.decode("utf-8-sig", errors="replace"))
    try:
        return _caption_of(json.loads(data.decode("utf-8-sig", errors="replace")))
    except (ValueError, RecursionError):
        return None


def _caption_of(row: Any) -> str | None:
    """The caption in a row of metadata; of a list of captions the first."""
    if not isinstance(row, dict):
        return None
    for field in CAPTION_FIELDS:
        value = row.get(field)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and (caption := _clean(value)):
            return caption
    return None


def _clean(text: str) -> str | None:
    """One line of valid Unicode, at most MAX_CAPTION characters; None if nothing is left."""
    text = " ".join(text[: 2 * MAX_CAPTION].split())[:MAX_CAPTION]
    return text.encode("utf-8", "replace").decode() or None  # json can hold lone surrogates, which tokenizers refuse


def _rows(text: str, suffix: str) -> Iterable[tuple[int, Any]]:
    """(line number, row) of a metadata file; a line that is no JSON gives None."""
    if suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text)), start=2)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None
