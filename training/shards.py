"""The members of a WebDataset shard: a tar archive, plain or gzip, in which the files of one sample share a key.

A shard that is cut off or corrupt gives all that is whole before the damage, and then raises.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHARD_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError, RecursionError)

Members = dict[str, Any]
"""Of one sample: ".png" -> (path, offset, size), ".txt" or ".json" -> its caption."""


def open_shard(path: Path) -> BinaryIO | gzip.GzipFile:
    """The archive's bytes, decompressed on the way where the file starts as gzip does, whatever its name."""
    with open(path, "rb") as file:
        magic = file.read(2)
    return gzip.open(path) if magic == b"\x1f\x8b" else open(path, "rb")


def read_members(file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """(header, function that reads the data now) of each regular file in a tar, plain or gzip, but hidden ones.

    Raises one of `SHARD_ERRORS` where the archive is cut off or corrupt; tarfile's own iteration takes a corrupt header
    for the end of the archive, and stops in silence.
    """
    length = file.seek(0, io.SEEK_END) if not isinstance(file, gzip.GzipFile) else None
    file.seek(0)
    archive = tarfile.TarFile(fileobj=file)
    archive.offset = 0
    while True:
        file.seek(archive.offset)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("no end mark") from error
        if length is not None and member.offset_data + member.size > length:
            raise tarfile.ReadError(f"it ends within {member.name}")

        def data(member: tarfile.TarInfo = member) -> bytes:
            file.seek(member.offset_data)
            found = file.read(member.size)
            if len(found) < member.size:
                raise tarfile.ReadError(f"it ends within {member.name}")
            return found

        if member.isreg() and not os.path.basename(member.name).startswith("."):
            yield member, data


def split_name(name: str) -> tuple[str, str]:
    """(key, kind), split at the first dot of the base name as WebDataset does: "b.c.PNG" -> "b", ".c.png"."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, kind = base.partition(".")
    return folder + slash + stem, (dot + kind).lower()


def images_of(key: str, members: Members) -> Iterator[tuple[str, tuple[str, int, int], str | None]]:
    """(key, place, caption) of the images among the members of one key.

    That is one, the member with a plain image suffix. Where there is none, names with dots ("b.1.png", "b.2.png") are
    samples of their own, with their own captions or the common one.
    """
    images = [kind for kind in members if kind in IMAGE_SUFFIXES][:1] or [
        k for k in members if k.endswith(IMAGE_SUFFIXES)
    ]
    for kind in images:
        infix = kind[: kind.rindex(".")]
        texts = (members.get(prefix + suffix) for prefix in (infix, "") for suffix in (".txt", ".json"))
        yield key + infix, members[kind], next((text for text in texts if text), None)
