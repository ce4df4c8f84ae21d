"""Detecting changed files: SHA-256 of files, and JSON that contains its own SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit.weights_io import parse_json, write_aside


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(table: Mapping[str, Any]) -> str:
    """The SHA-256 of a table as JSON, in hex."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk; nothing on Windows, where a folder cannot be opened."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_signed(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table as JSON with its own SHA-256, under another name and then renamed, and synced to disk."""
    text = json.dumps({**table, "sha256": sha256_of(table)}, sort_keys=True) + "\n"

    def write(aside: Path) -> None:
        aside.write_text(text)
        fsync(aside)

    write_aside(path, write)


def read_signed(path: Path) -> dict[str, Any]:
    """The table in a file that `write_signed` wrote. Raises ValueError where it is not JSON or has changed."""
    return signed(path.read_bytes(), str(path))


def signed(data: bytes, name: str) -> dict[str, Any]:
    """The table in the bytes of such a file. Raises ValueError, with the file's name, as `read_signed` does."""
    table = parse_json(data, name)
    if isinstance(table, dict) and (digest := table.pop("sha256", None)):
        rest = data.strip().replace(f', "sha256": "{digest}"'.encode(), b"", 1)
        if digest == hashlib.sha256(rest).hexdigest() or digest == sha256_of(table):  # the first is much faster
            return table
    raise ValueError(f"{name} has changed since it was written")
