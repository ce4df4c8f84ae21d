"""The index of a data set: its samples in a fixed order, and where the bytes of each are.

A folder of images with captions in `.txt` (or `.json`) files of the same stem; a folder with a Hugging Face
`metadata.jsonl` or `metadata.csv` (`file_name` and `caption` or `text`); WebDataset shards and Parquet files, on disk
or behind a URL; a Hugging Face dataset. Whatever the layout, a sample is an `Entry`: a unique key, captions, and a
place, so that any process can read any sample at any time. Members of a `.tar` are read in place, never extracted by
name; the images of a `.tar.gz` are unpacked into a temporary file, which is removed with the index. A sample takes 8
bytes of memory, the rest is on disk (`table.py`). The order depends on names alone, not on the file system.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import tarfile
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from training.captions import (
    MAX_JSON,
    MAX_TEXT,
    NONE,
    REPLACED,
    Captions,
    captions_in,
    captions_of,
    joined,
)
from training.errors import DataError, one_line
from training.images import BadImage, ImageData, Size, read_size
from training.listing import METADATA_NAMES, PARQUET, list_files, printable
from training.remote import AT_ONCE, Listed, Patience, RemoteError, is_url, read_each, read_range
from training.shards import (
    IMAGE_SUFFIXES,
    SHARD_ERRORS,
    SHARD_SUFFIXES,
    UNREAD_SUFFIXES,
    Members,
    Place,
    images_of,
    open_shard,
    read_members,
    split_name,
)
from training.table import Entry, Table, Writer, remove
from training.wanted import ANY, Wanted

if TYPE_CHECKING:
    from training.rows import Row

__all__ = ["Entry", "Index", "Wanted"]

HUB = "hf:"
MAX_LINE = 16_000_000
"""A line of metadata is cut after so many characters."""
MAX_IMAGE = 1 << 30
"""Bytes of an image file at most."""
HEAD = 1 << 16
"""Bytes of an image in which its size is looked for first."""

_LOOKED_FOR = (
    f"images ({' '.join(IMAGE_SUFFIXES)}), metadata.jsonl, shards ({' '.join(SHARD_SUFFIXES)}) or {PARQUET} files"
)
_FORMAT = 2  # of a kept index


class Index:
    """The samples of a data set in their fixed order.

    skipped: (name, reason) of what could not be indexed. left_out: for each reason why `Wanted` refused samples, their
    number and the key of the first. garbled: number and first key of the samples whose captions are not UTF-8.

    `spec` is a folder, a shard, a metadata or Parquet file, a glob of shards or Parquet files, a URL of those, or
    "hf:NAME". Raises `DataError` if nothing can be trained on.
    """

    def __init__(self, spec: str, need_captions: bool = True, wanted: Wanted = ANY) -> None:
        self.need_captions, self.wanted = need_captions, wanted
        self.skipped: list[tuple[str, str]] = []
        self.left_out: dict[str, tuple[int, str]] = {}
        self.garbled: tuple[int, str] = (0, "")
        self._spool: BinaryIO | None = None
        self._lock = threading.Lock()
        self._blocks = 0
        self._rows: Any = None  # reads the rows of Parquet files, or of a dataset
        self._begun: list[tuple[int, str]] = []  # of each file its first sample, and the prefix for keys that repeat
        self._root: Path | None = None  # of a folder of images
        root, files = (Path(), []) if spec.startswith(HUB) else list_files(spec, wanted.patience)
        name = self._name_of(spec, files)
        if name is None or not self._found(name):
            self._writer = Writer()
            self._read(spec, root, files)
            self.entries: Table = self._writer.table(self._longer_key)
            del self._writer
            about = {"skipped": self.skipped, "left_out": self.left_out, "garbled": self.garbled}
            if name is not None and wanted.cache is not None and len(self.entries):
                self.entries.keep(wanted.cache, name, about)
        if self._spool is not None:
            self._spool.close()
            self._spool = None  # its path is in the entries
        self._check(spec, len(files))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    def _read(self, spec: str, root: Path, files: list[Listed]) -> None:
        names = [file.url for file in files]
        if spec.startswith(HUB):
            from training.hub import HubRows

            self._rows = HubRows(spec.removeprefix(HUB))
            self._add_rows(self._rows.rows(self.wanted), spec.removeprefix(HUB), HUB)
        elif metadata := [name for name in names if Path(name).name in METADATA_NAMES and not is_url(name)]:
            rest = dict.fromkeys(names)
            for name in metadata:
                self._add_metadata(root / name, name, rest)
            self._pass_over(rest, IMAGE_SUFFIXES, "no row in a metadata file")
        elif shards := [file for file in files if file.url.lower().endswith(SHARD_SUFFIXES) and _near(file.url)]:
            self._add_shards(root, shards)
            self._pass_over(names, IMAGE_SUFFIXES, "files of their own beside shards")
        elif parquet := [file for file in files if file.url.lower().endswith(PARQUET)]:
            for file in parquet:
                self._add_parquet(root, file)
            self._pass_over(names, IMAGE_SUFFIXES, f"files of their own beside {PARQUET} files")
        elif names and is_url(names[0]):
            if any(name.endswith("/cache.json") for name in names):
                raise DataError(f"{spec} is a cache: name its cache.json, {spec.rstrip('/')}/cache.json")
            raise DataError(f"{spec} holds no shards ({' '.join(SHARD_SUFFIXES)}) and no {PARQUET} files")
        else:
            self._add_folder(root, names)
            self._pass_over(names, UNREAD_SUFFIXES, "a format that is not read (convert these to .jpg or .png)")
            if not len(self._writer) and (unread := [name for name in names if name.lower().endswith(UNREAD_SUFFIXES)]):
                raise DataError(
                    f"no images of a format that is read in {spec}: {len(unread)} are of others, such as "
                    f"{printable(unread[0])}; convert these to .jpg or .png"
                )

    def _check(self, spec: str, num_files: int) -> None:
        why = f"; skipped {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
        if not len(self.entries):
            if self.left_out:
                reason, (count, key) = next(iter(self.left_out.items()))
                raise DataError(f"no images left of {spec}: {count} have {reason}, such as {key}; widen the filter")
            raise DataError(f"no images found in {spec}: looked through {num_files} files for {_LOOKED_FOR}{why}")
        if self.need_captions and all(entry.caption is None for entry in self.entries):
            asked = ", ".join(name for name, _ in self.wanted.captions)
            fields, other = (f" in {asked}", "") if asked else ("", "; another field is named by data.captions=prompt")
            raise DataError(
                f"no captions found{fields}: {spec} has {len(self.entries)} images, none with a caption; give each a "
                ".txt file (or a .json file with a 'caption') of the same name, or list them in a metadata.jsonl"
                + other
            )

    # --- a sample ---

    def _measured(self, image: ImageData) -> Size | str | None:
        """(height, width) of an image, or the reason why it has none; None where sizes are not asked for."""
        if not self.wanted.measures:
            return None
        try:
            return read_size(image)
        except (BadImage, OSError) as error:
            return str(error)

    def _add(self, entry: Entry, size: Size | str | None, shared: bool = False, block: int | None = None) -> None:
        """Append a sample, unless it is left out, or its size could not be measured."""
        key = printable(entry.key)
        texts, shares = self.wanted.fitting((entry.captions, entry.shares))
        if isinstance(size, str):
            self.skipped.append((key, size))
        elif entry.captions and not texts:
            self._leave_out("a caption of another length than asked for", key)
        elif size is not None and (reason := self.wanted.refuses(size)):
            self._leave_out(reason, key)
        else:
            if any(REPLACED in text for text in texts):
                self.garbled = self.garbled[0] + 1, self.garbled[1] or key
            try:
                self._writer.add(replace(entry, key=key, captions=texts, shares=shares, image_size=size), shared, block)
            except OSError as error:
                raise _no_room("the index", error) from error

    def _leave_out(self, reason: str, key: str) -> None:
        count, first = self.left_out.get(reason, (0, key))
        self.left_out[reason] = (count + 1, first)

    def _pass_over(self, names: Iterable[str], suffixes: tuple[str, ...], reason: str) -> None:
        """Count files with one of these suffixes as left out, if there are samples beside them."""
        for name in names if len(self._writer) else ():
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes:
                self._leave_out(reason, printable(stem))

    def _begin(self, prefix: str) -> None:
        """The samples that follow are of another file; prefix: put before those of its keys that an earlier one has."""
        self._begun.append((len(self._writer), prefix))

    def _longer_key(self, i: int, entry: Entry) -> str:
        if self._root is not None:
            return printable(os.path.relpath(entry.path, self._root))
        prefix = self._begun[bisect_right(self._begun, (i, chr(0x10FFFF))) - 1][1] if self._begun else ""
        return f"{prefix}/{entry.key}" if prefix else entry.key

    def read(self, entry: Entry) -> ImageData:
        """The image file of a sample: its bytes or its path. Raises OSError where it cannot be read."""
        if self._rows is not None:
            return self._rows.image(entry)
        if entry.size is None:
            return entry.path
        if is_url(entry.path):
            return read_range(entry.path, entry.offset, entry.offset + entry.size, self.wanted.patience)
        with open(entry.path, "rb") as file:  # opened anew each time: nothing to share between processes
            file.seek(entry.offset)
            return file.read(entry.size)

    @property
    def is_remote(self) -> bool:
        """Whether images are read from a server."""
        return bool(self.entries.files) and is_url(self.entries.files[0])

    # --- a folder of images ---

    def _add_folder(self, root: Path, names: list[str]) -> None:
        self._root, texts = root, {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".json"):
                texts[stem, suffix.lower()] = root / name
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                captions = NONE
                for kind in (".txt", ".json"):
                    if (self.wanted.captions or not captions[0]) and (path := texts.get((stem, kind))):
                        captions = joined(captions, self._read_captions(path, kind), self.wanted.captions)
                image = str(root / name)
                self._add(Entry(stem, captions[0], image, shares=captions[1]), self._measured(image))

    def _read_captions(self, path: Path, kind: str) -> Captions:
        try:
            with open(path, "rb") as file:
                return captions_in(kind, file.read(MAX_TEXT if kind == ".txt" else MAX_JSON + 1), self.wanted.captions)
        except OSError as error:
            self.skipped.append((printable(str(path)), f"caption not readable: {error.strerror}"))
            return NONE

    # --- Hugging Face metadata ---

    def _add_metadata(self, path: Path, name: str, rest: dict[str, None]) -> None:
        """Add the samples of a metadata file's rows, and take their files out of `rest`."""
        folder = Path(name).parent
        self._begin("")
        try:
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                for number, row in _rows(file, path.suffix):
                    file_name = row.get("file_name") if isinstance(row, dict) else None
                    if not isinstance(file_name, str) or not file_name or "\0" in file_name:
                        self.skipped.append((f"{name}:{number}", f"not a row with a file_name{_columns(row)}"))
                        continue
                    if _leads_outside(file_name):
                        self.skipped.append((f"{name}:{number}", "its file_name leads out of the folder"))
                        continue
                    rest.pop(within := (folder / file_name).as_posix(), None)
                    key = os.path.splitext(within)[0]
                    image, (texts, shares) = str(path.parent / file_name), captions_of(row, self.wanted.captions)
                    self._add(Entry(key, texts, image, shares=shares), self._measured(image))
        except (OSError, csv.Error) as error:
            self.skipped.append((name, f"not readable: {getattr(error, 'strerror', None) or error}"))

    # --- shards ---

    def _add_shards(self, root: Path, shards: list[Listed]) -> None:
        """Add shards in order; those of a server are read several at a time, for most of the time is waiting."""
        remote = is_url(shards[0].url)
        at_once = AT_ONCE if remote else 1
        for first in range(0, len(shards), at_once):
            some = shards[first : first + at_once]
            found = read_each(lambda file: self._read_shard(root, file), some, remote)
            for file, samples in zip(some, found, strict=True):
                self._add_shard(file.url, samples)

    def _add_shard(self, name: str, samples: dict[str, list[Members]]) -> None:
        stem = name[: name.lower().rindex(".t")]
        self._begin(stem.rpartition("/")[2] if is_url(name) else stem)
        for key, same_key in samples.items():
            for members in same_key:
                for image_key, (path, offset, length, size), texts in images_of(key, members):
                    captions = NONE
                    for found in texts:
                        if self.wanted.captions or not captions[0]:
                            captions = joined(captions, found, self.wanted.captions)
                    self._add(Entry(image_key, captions[0], path, offset, length, captions[1]), size, shared=True)

    def _read_shard(self, root: Path, listed: Listed) -> dict[str, list[Members]]:
        """The samples of a shard by key, up to where it is cut off or corrupt, which is noted in `skipped`."""
        samples: dict[str, list[Members]] = {}
        name, num_members = listed.url, 0
        path = name if is_url(name) else str(root / name)
        try:
            with open_shard(listed._replace(url=path), self.wanted.patience) as file:
                for member, read in read_members(file):
                    key, kind = split_name(member.name)
                    value: Any
                    if kind.endswith(IMAGE_SUFFIXES):
                        value = self._image(path, member, read, isinstance(file, gzip.GzipFile))
                    elif kind.endswith((".txt", ".json")):
                        suffix = "." + kind.rpartition(".")[2]
                        most = MAX_TEXT if suffix == ".txt" else MAX_JSON + 1
                        value = captions_in(suffix, read(most), self.wanted.captions)
                    else:
                        continue
                    num_members += 1
                    same_key = samples.setdefault(key, [{}])
                    if kind in same_key[-1]:  # the same name again: another sample
                        same_key.append({})
                    same_key[-1][kind] = value
        except DataError:
            raise
        except RemoteError as error:
            raise DataError(str(error)) from error
        except SHARD_ERRORS as error:
            reason = f"cut off or corrupt: {one_line(error)}; the {num_members} files before that are used"
            self.skipped.append((name, reason))
        return samples

    def _image(self, path: str, member: tarfile.TarInfo, read: Callable[[int], bytes], unpack: bool) -> Place:
        """The place of an image in a shard, and its size if that is asked for."""
        if unpack:
            data = read(MAX_IMAGE)
            return (*self._unpack(data), self._measured(data))
        size: Size | str | None = None
        if self.wanted.measures:
            size = self._measured(read(HEAD))
            if isinstance(size, str) and member.size > HEAD:
                size = self._measured(read(MAX_IMAGE))
        return path, member.offset_data, member.size, size

    def _unpack(self, data: bytes) -> tuple[str, int, int]:
        """Append an image to the temporary file; returns its place there."""
        with self._lock:
            try:
                if self._spool is None:
                    handle, self._spool_path = tempfile.mkstemp(prefix="mmdit-shards-")
                    weakref.finalize(self, remove, self._spool_path, os.getpid())
                    self._spool = open(handle, "wb")  # noqa: SIM115
                place = (self._spool_path, self._spool.tell(), len(data))
                self._spool.write(data)
                return place
            except OSError as error:
                raise _no_room("the images of .tar.gz shards (or unpack them to .tar)", error) from error

    # --- rows ---

    def _add_parquet(self, root: Path, listed: Listed) -> None:
        from training.parquet import ParquetRows

        name = listed.url
        self._rows = self._rows or ParquetRows(self.wanted.patience)
        path = name if is_url(name) else str(root / name)
        try:
            self._add_rows(self._rows.rows(listed._replace(url=path), self.wanted), name.removesuffix(PARQUET), path)
        except DataError:
            raise
        except RemoteError as error:
            raise DataError(str(error)) from error
        except (OSError, ValueError) as error:
            self.skipped.append((name, f"not readable: {one_line(error)}"))

    def _add_rows(self, rows: Iterable[Row], name: str, path: str) -> None:
        """Add the rows of a Parquet file (whose row groups are blocks, read as one) or of a dataset."""
        self._begin("")
        first, last = self._blocks, -1
        for number, row in enumerate(rows):
            size = self._measured(row.image) if row.image is not None else None
            key = row.key or f"{name.rpartition('/')[2]}-{number:08d}"
            entry = Entry(key, row.captions[0], path, row.block, row.row, row.captions[1])
            self._add(entry, size, shared=True, block=first + row.block if path != HUB else None)
            last = max(last, row.block)
        self._blocks += last + 1

    # --- an index that is kept ---

    def _name_of(self, spec: str, files: list[Listed]) -> str | None:
        """The name under which the index is kept, "DATA.FILES" with digests; None where it is not kept."""
        if self.wanted.cache is None or not files or not _kept(files):
            return None
        wishes = replace(self.wanted, cache=None, patience=Patience())
        texts = f"{_FORMAT} {self.need_captions} {wishes} {spec}", "\n".join(map(str, files))
        return ".".join(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32] for text in texts)

    def _found(self, name: str) -> bool:
        found = Table.found(self.wanted.cache, name) if self.wanted.cache is not None else None
        if found is None:
            return False
        self.entries, about = found
        self.skipped = [(key, reason) for key, reason in about["skipped"]]
        self.left_out = {reason: (count, key) for reason, (count, key) in about["left_out"].items()}
        self.garbled = tuple(about["garbled"])
        if any(path.lower().endswith(PARQUET) for path in self.entries.files):
            from training.parquet import ParquetRows

            self._rows = ParquetRows(self.wanted.patience)
        return True


def _no_room(what: str, error: OSError) -> DataError:
    return DataError(
        f"no room for {what} in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder with more room"
    )


def _near(name: str) -> bool:
    """Whether a shard lies in the folder itself or one level down."""
    return is_url(name) or name.count("/") <= 1


def _kept(files: list[Listed]) -> bool:
    """Whether an index of these files is slow enough to be kept: of plain .tar shards, and of Parquet files."""
    names = [file.url.lower() for file in files]
    return not any(Path(name).name in METADATA_NAMES for name in names) and (
        any(name.endswith((".tar", PARQUET)) for name in names) and not any(name.endswith("gz") for name in names)
    )


def _leads_outside(name: str) -> bool:
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")


def _columns(row: Any) -> str:
    return f"; its columns are {', '.join(map(repr, row))[:200]}" if isinstance(row, dict) and row else ""


def _rows(file: TextIO, suffix: str) -> Iterable[tuple[int, Any]]:
    """(line number, row) of a metadata file; the row is None where a line is not JSON."""
    if suffix == ".csv":
        yield from enumerate(csv.DictReader(file), start=2)
        return
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None
