"""Small captioned pictures in every layout, for the tests of data."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(i: int, size=(8, 12), kind="PNG") -> bytes:
    """A flat picture whose colour says i (below 2^16)."""
    file = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (i % 256, i // 256, 77)).save(file, kind)
    return file.getvalue()


def noisy(seed: int, size, kind="PNG", **how) -> bytes:
    """A picture of random pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def tar_of(files) -> bytes:
    """A shard; `files` is a dict, or pairs where names repeat."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return file.getvalue()


def members(numbers, sizes=((8, 12),)) -> dict[str, bytes]:
    """Pictures with captions, of the sizes by turns."""
    files = {}
    for i in numbers:
        files[f"{i:05d}.png"] = picture(i, sizes[i % len(sizes)])
        files[f"{i:05d}.txt"] = f"picture {i}".encode()
    return files


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    """A folder of such files."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def shards_of(folder: Path, counts, sizes=((8, 12),)) -> Path:
    """Shards with so many samples each, which are numbered on from shard to shard."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        (folder / f"{number:03d}.tar").write_bytes(tar_of(members(range(first, first + count), sizes)))
        first += count
    return folder


def parquet_of(path: Path, numbers, rows_per_group=4, struct=True, sizes=((8, 12),), **columns) -> Path:
    """A Parquet file of pictures of the sizes by turns, as Hugging Face writes them or as plain bytes."""
    import pyarrow
    import pyarrow.parquet

    images = [picture(i, sizes[i % len(sizes)]) for i in numbers]
    cells = [{"bytes": data, "path": None} for data in images] if struct else images
    table = pyarrow.table({"image": cells, "text": [f"picture {i}" for i in numbers], **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def json_bytes(value) -> bytes:
    return json.dumps(value).encode()
