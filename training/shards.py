"""The members of a WebDataset shard: a tar archive, plain or gzip, in which the files of one sample share a key.

A shard that is cut off or corrupt gives all that is whole before the damage, and then raises.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from training.captions import Captions
from training.images import Size
from training.remote import Listed, Patience, RemoteFile, is_url

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif")
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf")
"""Pictures that are not read: those of phones, of drawing programs and of cameras."""
SHARD_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError, RecursionError)

MAX_HEADER = 1 << 24
"""Most bytes of one header, its long names and attributes included."""

Place = tuple[str, int, int, Size | str | None]
"""(path, offset, number of bytes, size) of an image; size is (height, width), the reason why it could not be read, or
None where it was not asked for."""
Members = dict[str, Any]
"""The files of one sample by suffix: the `Place` of an image, the `Captions` of a ".txt" or ".json"."""


def open_shard(file: Listed, patience: Patience) -> BinaryIO | gzip.GzipFile:
    """Open an archive's bytes, decompressed where the file begins as gzip does, whatever its name."""
    if is_url(file.url):
        remote: Any = RemoteFile(file, patience)
        magic = remote.read(2)
        remote.seek(0)
        return gzip.GzipFile(fileobj=remote) if magic == b"\x1f\x8b" else remote
    with open(file.url, "rb") as local:
        magic = local.read(2)
    return gzip.open(file.url) if magic == b"\x1f\x8b" else open(file.url, "rb")


class _Headers:
    """The archive as tarfile reads headers from it, with a limit on the size of a read."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._read(size)


def read_members(
    file: BinaryIO | gzip.GzipFile,
) -> Iterator[tuple[tarfile.TarInfo, Callable[[int], bytes]]]:
    """(header, read) of each regular file in a tar that is not hidden; read(n) gives up to n bytes of its data.

    Raises one of `SHARD_ERRORS` where the archive is cut off or corrupt. (tarfile's own iteration takes a corrupt
    header for the end of the archive, and stops without an error.)
    """
    length = file.seek(0, io.SEEK_END) if not isinstance(file, gzip.GzipFile) else None
    file.seek(0)
    archive = tarfile.TarFile(fileobj=_Headers(file))  # type: ignore[arg-type]
    archive.offset = 0
    while True:
        file.seek(archive.offset)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("no end mark") from error
        if archive.offset <= member.offset or member.size < 0:
            raise tarfile.ReadError(f"the size of {member.name} is not valid")
        if length is not None and member.offset_data + member.size > length:
            raise tarfile.ReadError(f"it ends within {member.name}")

        def data(most: int, member: tarfile.TarInfo = member) -> bytes:
            file.seek(member.offset_data)
            wanted = min(member.size, most)
            found = file.read(wanted)
            if len(found) < wanted:
                raise tarfile.ReadError(f"it ends within {member.name}")
            return found

        if member.isreg() and not member.issparse() and not os.path.basename(member.name).startswith("."):
            yield member, data


def split_name(name: str) -> tuple[str, str]:
    """(key, kind), split at the first dot of the base name as WebDataset does: "b.c.PNG" -> "b", ".c.png"."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, kind = base.partition(".")
    return folder + slash + stem, (dot + kind).lower()


def images_of(key: str, members: Members) -> Iterator[tuple[str, Place, list[Captions]]]:
    """(key, place, captions in each text file) of the images among the members of one key.

    Usually that is the one member with a plain image suffix. Where there is none, names with dots ("b.1.png",
    "b.2.png") are samples of their own, with captions of the same names, or those of the key.
    """
    images = [kind for kind in members if kind in IMAGE_SUFFIXES][:1] or [
        k for k in members if k.endswith(IMAGE_SUFFIXES)
    ]
    for kind in images:
        infix = kind[: kind.rindex(".")]
        names = dict.fromkeys(prefix + suffix for prefix in (infix, "") for suffix in (".txt", ".json"))
        yield key + infix, members[kind], [members[name] for name in names if name in members]
