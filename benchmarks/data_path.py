"""From shards to batches: images per second on one core, compared with webdataset and PIL; and how long training waits.

    python -m benchmarks.data_path FOLDER ... [--out FILE]

"bare" reads the shards in order with webdataset and decodes each image to RGB with PIL; "and fitted" also resizes it to
the size of the batch with PIL. "ours" gives shuffled batches of that size with captions, by `loader`. All run in one
process, where torch and the decoders have one thread; rounds alternate, and the table has median images per second of
CPU time.
The wait is the share of time that a loop which computes for B / speed seconds per batch spends in `next(batches)`, with
one worker, and the median of one call; `make demo` trained at 230 to 280 images a second on two cores. * one worker
makes fewer.
A JPEG much larger than requested is decoded at a fraction of its size, at least twice that of the batch. The last table
has the PSNR, in dB, against images decoded at full size: of ours, of a fraction down to the batch's size itself, and of
images decoded at full size but resized by a bicubic filter in place of Lanczos.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import hardware
from training.data import FileSource, loader, open_source
from training.images import read_fitted

BATCH = 64
ROUNDS = 5
KINDS = ("jpg", "png", "jpeg")


def generated(folder: Path, side: int, count: int) -> Path:
    """A shard of synthetic JPEGs (quality 90), smooth with some noise, as photographs are."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / f"generated-{side}.tar", "w") as shard:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
            pixels = (pixels + rng.integers(-12, 13, (side, side, 3))).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            for name, data in ((f"{i:05d}.jpg", file.getvalue()), (f"{i:05d}.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return folder / f"generated-{side}.tar"


def bare(spec: Path, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """The images by webdataset and PIL, resized if a size is given."""
    import webdataset

    shards = [str(spec)] if spec.is_file() else sorted(map(str, spec.rglob("*.tar*")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        data = next(sample[kind] for kind in KINDS if kind in sample)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        yield np.asarray(image)


def rate(run: Callable[[], int]) -> float:
    """Images per second of CPU time; `run` returns the number of its images."""
    start = time.process_time()
    count = run()
    return count / (time.process_time() - start)


def count_of(images: Iterator[np.ndarray], most: int) -> int:
    """Read at most `most` images; how many there were."""
    done = 0
    for _ in images:
        done += 1
        if done == most:
            break
    return done


def ours(source: FileSource, most: int) -> int:
    """Read `most` images in batches; how many there were."""
    batches = loader(source, range(len(source)), BATCH, 0)
    for _ in range(most // BATCH):
        next(batches)
    batches.close()
    return most // BATCH * BATCH


def compared(spec: Path, size: int | tuple[int, int] | None, most: int) -> tuple[str, float]:
    """A row of the table of speeds, and the images per second of ours."""
    source = open_source(str(spec), image_size=size)
    most = min(most, len(source)) // BATCH * BATCH
    runs: dict[str, Callable[[], int]] = {
        "bare": lambda: count_of(bare(spec, None), most),
        "fitted": lambda: count_of(bare(spec, source.image_size), most),
        "ours": lambda: ours(source, most),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(rate(run))
    bare_, fitted, own = (statistics.median(found[name]) for name in runs)
    row = (
        f"| {name_of(spec, source)} | {bare_:.0f} | {fitted:.0f} | {own:.0f} | {own / bare_:.2f} | {own / fitted:.2f} |"
    )
    return row, own


def name_of(spec: Path, source: FileSource) -> str:
    """Cells of a row: the data and the image size of its batches."""
    return f"{spec.parent.name if spec.name == 'train' else spec.stem} | {' x '.join(map(str, source.image_size))}"


def wait(source: FileSource, speed: float, batches: int = 30) -> tuple[float, float]:
    """(share of time that a loop at `speed` images per second waits for batches, median seconds of a call); the first
    two batches are left out.
    """
    reader = loader(source, range(len(source)), BATCH, 0, num_workers=1)
    begun, calls = [], []
    x = torch.randn(192, 192)
    for _ in range(batches + 2):
        start = time.perf_counter()
        next(reader)
        now = time.perf_counter()
        begun.append(start)
        calls.append(now - start)
        while time.perf_counter() < now + BATCH / speed:
            x @ x
    total = time.perf_counter() - begun[2]
    reader.close()
    return sum(calls[2:]) / total, statistics.median(calls[2:])


def waits(spec: Path, size: int | None, speeds: Sequence[float], made: float) -> str:
    """A row of the table of waits; made: images per second that a worker makes."""
    source = open_source(str(spec), image_size=size)
    cells = [f"{share:.2%}, {call * 1e6:.0f} us{' *' * (made < speed)}"
             for speed in speeds for share, call in [wait(source, speed)]]  # fmt: skip
    return f"| {name_of(spec, source)} | {' | '.join(cells)} |"


def psnr_row(spec: Path, most: int = 60) -> list[str]:
    """The row of the table of PSNR for JPEGs resized to a quarter of their size; none for other formats and for small
    images.
    """
    import webdataset

    shards = [str(spec)] if spec.is_file() else sorted(map(str, spec.rglob("*.tar*")))
    found: list[tuple[float, ...]] = []
    for sample in itertools.islice(webdataset.WebDataset(shards, shardshuffle=False), most):
        if "jpg" not in sample:
            return []
        whole = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        h, w = whole.height // 4, whole.width // 4
        if min(h, w) < 64:
            return []
        exact = np.asarray(whole.resize((w, h), Image.Resampling.LANCZOS))
        closest = Image.open(io.BytesIO(sample["jpg"]))
        closest.draft(None, (w, h))
        others = (
            read_fitted(sample["jpg"], (h, w)).image,
            np.asarray(closest.convert("RGB").resize((w, h), Image.Resampling.LANCZOS)),
            np.asarray(whole.resize((w, h), Image.Resampling.BICUBIC)),
        )
        found.append(tuple(psnr(other, exact) for other in others))
    cells = " | ".join(f"{statistics.median(column):.1f}" for column in zip(*found, strict=True))
    return [f"| {spec.parent.name if spec.name == 'train' else spec.stem} | {cells} |"]


def psnr(image: np.ndarray, exact: np.ndarray) -> float:
    """PSNR of 8-bit images."""
    return float(10 * np.log10(255**2 / np.square(image.astype(float) - exact).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second from shards to batches, and the wait of training.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of WebDataset shards")
    parser.add_argument("--most", type=int, default=640, help="images per round")
    parser.add_argument("--speed", type=float, default=320.0, help="images per second that training takes")
    parser.add_argument("--waits", action=argparse.BooleanOptionalAction, default=True, help="the table of waits")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speeds = (options.speed, 2 * options.speed)
    rates = [
        "| data | size | bare | and fitted | ours | ours / bare | ours / fitted |",
        "|---|---|---|---|---|---|---|",
    ]
    waited = [f"| data | size | {' | '.join(f'at {x:g} images/s' for x in speeds)} |", "|---|---|---|---|"]
    near = ["| data, at a quarter of its size | ours | down to the size itself | bicubic |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        large, larger = generated(Path(folder), 512, 320), generated(Path(folder), 1024, 128)
        cases: list[tuple[Path, int | None]] = [(path, None) for path in options.folders]
        for spec, size in [*cases, (large, None), (large, 256), (larger, 256)]:
            row, made = compared(spec, size, options.most)
            rates.append(row)
            print(row, flush=True)
            if options.waits:
                waited.append(waits(spec, size, speeds, made))
                print(waited[-1], flush=True)
        near += [row for spec in (*options.folders, larger) for row in psnr_row(spec)]
    tables = {"Images per second:": rates}
    if options.waits:
        tables["Share of time spent waiting, and a call of `next`:"] = waited
    tables["PSNR (dB):"] = near
    text = "\n\n".join(f"{title}\n\n" + "\n".join(table) for title, table in tables.items())
    print(text)
    if options.out:
        names = " ".join(f"{path.parent.name}/{path.name}" for path in options.folders)
        command = f"OMP_NUM_THREADS=1 python -m benchmarks.data_path {names} --most {options.most}"
        command += "" if options.waits else " --no-waits"
        about = (__doc__ or "").split("\n\n")[2].strip()
        options.out.write_text(f"# From shards to batches\n\n    {command}\n\n{about}\n\n{hardware()}\n\n{text}\n")


if __name__ == "__main__":
    main()
