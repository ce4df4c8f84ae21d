"""Small captioned pictures in every layout, for the tests of data."""

import io
import itertools
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from training.data import Sample, Source


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


COLOURS = {f"{i:03d}": (10 * i, 255 - 10 * i, 7 * i) for i in range(12)}  # key -> colour of its image


def png(colour=(1, 2, 3), size=(8, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], colour).save(file, "PNG")
    return file.getvalue()


def sample_files(keys=COLOURS) -> dict[str, bytes]:
    """name -> content: an image and a caption for each key."""
    files = {}
    for key in keys:
        files |= {f"{key}.png": png(COLOURS[key]), f"{key}.txt": f"picture {key}".encode(), f"{key}.cls": b"7"}
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_shard(path: Path, files) -> Path:
    """`files` is a dict, or pairs where names repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as shard:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def contents(source: Source) -> dict[str, tuple]:
    """key -> (colour, caption) of a source of flat images, all good."""
    samples = [source[i] for i in range(len(source))]
    assert [s.error for s in samples] == [None] * len(samples)
    assert [s.key for s in samples] == source.keys and len(set(source.keys)) == len(source)
    assert [s.caption for s in samples] == [source.caption(i) for i in range(len(source))]
    assert all((s.image == s.image[0, 0]).all() and s.image.shape == (*source.image_size, 3) for s in samples)
    return {s.key: (tuple(s.image[0, 0].tolist()), s.caption) for s in samples}


EXPECTED = {key: (colour, f"picture {key}") for key, colour in COLOURS.items()}


class Memory(Source):
    """A source in memory whose image i is filled with i; counts its reads."""

    image_size = (2, 3)
    skipped: list[tuple[str, str]] = []

    def __init__(self, num_samples: int, bad: set[int] = frozenset(), deadly: int = -1) -> None:
        self.keys, self.bad, self.deadly, self.reads = [f"k{i}" for i in range(num_samples)], bad, deadly, []

    def __len__(self):
        return len(self.keys)

    def caption(self, i):
        return f"caption {i}"

    def __getitem__(self, i):
        self.reads.append(i)
        if i == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if i in self.bad:
            return Sample(self.keys[i], None, "", f"bad {i}")
        return Sample(self.keys[i], np.full((2, 3, 3), i % 256, np.uint8), self.caption(i))


def take(batches, num: int) -> list[tuple]:
    """Plain values of some batches, after which the iterator is closed."""
    found = [(b.images.tolist(), b.captions, b.keys, b.skipped) for b in itertools.islice(batches, num)]
    batches.close()
    return found


def make_layout(name: str, root: Path) -> str:
    """Write the twelve samples in one of the layouts -> the spec that opens them."""
    first, rest = dict(itertools.islice(COLOURS.items(), 5)), dict(itertools.islice(COLOURS.items(), 5, None))
    match name:
        case "folder":
            write_folder(root, sample_files())
        case "metadata.jsonl":
            rows = [json.dumps({"file_name": f"{key}.png", "text": f"picture {key}"}) for key in COLOURS]
            write_folder(root, {f"{key}.png": png(colour) for key, colour in COLOURS.items()})
            (root / name).write_text("\n".join(rows) + "\n")
        case "metadata.csv":
            rows = ["file_name,caption"] + [f'{key}.png,"picture {key}"' for key in COLOURS]
            write_folder(root, {f"{key}.png": png(colour) for key, colour in COLOURS.items()})
            (root / name).write_text("\n".join(rows))
        case ".tar" | ".tar.gz" | ".tgz":
            return str(write_shard(root / f"000{name}", sample_files()))
        case "folder of shards":
            write_shard(root / "0.tar", sample_files(first))
            write_shard(root / "1.tar.gz", sample_files(rest))
        case "one level down":
            write_shard(root / "train" / "0.tar", sample_files(first))
            write_shard(root / "train" / "1.tar", sample_files(rest))
        case "glob":
            write_shard(root / "a-0.tar", sample_files(first))
            write_shard(root / "a-1.tar", sample_files(rest))
            write_shard(root / "b-0.tar", {"other.png": png(), "other.txt": b"other"})
            return str(root / "a-*.tar")
    return str(root)
