"""From shards to batches: images a second on one core, beside webdataset with PIL alone; and how long training waits.

    python -m benchmarks.data_path FOLDER ... [--out FILE]

"bare" reads the shards in order with webdataset and decodes each image with PIL to RGB pixels, and does no more; "and
fitted" scales each to the size of the batch with PIL too. "ours" gives shuffled batches of that size with captions, by
`loader`. All in one process, whose torch and decoders have one thread; rounds of all take turns, the medians count.
The wait is what a loop spends on `next(batches)` that computes for B / speed seconds a batch, beside one worker.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.data import FileSource, loader, open_source

BATCH = 64
ROUNDS = 5
KINDS = ("jpg", "png", "jpeg")


def generated(folder: Path, side: int, count: int) -> Path:
    """A shard of JPEGs (quality 90) that are smooth with some detail, as photographs are."""
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
    """The images by webdataset and PIL; brought to a size where one is given."""
    import webdataset

    shards = [str(spec)] if spec.is_file() else sorted(map(str, spec.rglob("*.tar*")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        data = next(sample[kind] for kind in KINDS if kind in sample)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        yield np.asarray(image)


def rate(run: Callable[[], int]) -> float:
    """Images a second of a run that says how many it had."""
    start = time.process_time()
    count = run()
    return count / (time.process_time() - start)


def count_of(images: Iterator[np.ndarray], most: int) -> int:
    """Read so many."""
    done = 0
    for _ in images:
        done += 1
        if done == most:
            break
    return done


def ours(source: FileSource, most: int) -> int:
    """Read so many in batches."""
    batches = loader(source, range(len(source)), BATCH, 0)
    for _ in range(most // BATCH):
        next(batches)
    batches.close()
    return most // BATCH * BATCH


def compared(spec: Path, size: int | tuple[int, int] | None, most: int) -> str:
    """A row of the table."""
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
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    h, w = source.image_size
    return (
        f"| {spec.parent.name if spec.name == 'train' else spec.stem} | {h} x {w} | {middle['bare']:.0f} "
        f"| {middle['fitted']:.0f} | {middle['ours']:.0f} | {middle['ours'] / middle['bare']:.2f} |"
    )


def wait(source: FileSource, speed: float, batches: int = 30) -> float:
    """Share of the time that a loop at `speed` images a second waits for its batches, after the first two."""
    reader = loader(source, range(len(source)), BATCH, 0, num_workers=1)
    waited = 0.0
    x = torch.randn(192, 192)
    for step in range(batches + 2):
        start = time.perf_counter()
        next(reader)
        now = time.perf_counter()
        if step == 2:
            first, waited = start, 0.0
        waited += now - start
        while time.perf_counter() < now + BATCH / speed:
            x @ x
    total = time.perf_counter() - first
    reader.close()
    return waited / total


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second from shards to batches, and the wait of training.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of WebDataset shards")
    parser.add_argument("--most", type=int, default=1280, help="images a round")
    parser.add_argument("--speed", type=float, default=120.0, help="images a second that training takes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| data | size | bare | and fitted | ours | ours / bare |", "|---|---|---|---|---|---|"]
    waits = [f"| data | at {options.speed:g} images/s | at {2 * options.speed:g} images/s |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        large = generated(Path(folder), 512, 320)
        cases = [(path, None) for path in options.folders] + [(large, None), (large, 256)]
        for spec, size in cases:
            lines.append(compared(spec, size, options.most))
            print(lines[-1], flush=True)
            shares = [wait(open_source(str(spec), image_size=size), k * options.speed) for k in (1, 2)]
            name = lines[-1].split(" | ")
            waits.append(f"| {name[0].strip('| ')}, {name[1]} | " + " | ".join(f"{s:.1%}" for s in shares) + " |")
            print(waits[-1], flush=True)
    text = "\n".join([*lines, "", "Share of the time spent waiting, with one worker:", "", *waits])
    print(text)
    if options.out:
        command = "python -m benchmarks.data_path " + " ".join(path.as_posix() for path in options.folders)
        about = (__doc__ or "").split("\n\n")[2].strip()
        options.out.write_text(f"# From shards to batches\n\n    {command}\n\n{about}\n\nImages a second:\n\n{text}\n")


if __name__ == "__main__":
    main()
