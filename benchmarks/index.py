"""The cost of an index, an order and a cache of many samples: seconds, bytes on disk, and memory that is not shared.

    python -m benchmarks.index [--samples 10000000] [--cached 1000000]

The index is synthetic: shards of 10,000 samples with captions of 60 characters, as `training/sources.py` writes them;
and so is the cache, shards of 1,000 samples with latents of 4 numbers and the same captions. Memory is the growth of
the process's anonymous pages; files are memory-mapped and shared between processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.cache import FIT, OPTIONS, About, Known, as_tensors, shard_name, write_shard
from training.cache_samples import CachedSample
from training.cached import CachedSource
from training.config import DataConfig
from training.data import split_by_key
from training.order import Layout, Order, Plan
from training.setup import fingerprint
from training.table import Entry, Keys, Table, Writer

SHARD, CACHED = 10_000, 1_000  # samples in a shard of the data, and of the cache
BATCH = 256


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def caption_of(i: int) -> str:
    return (f"a caption of the picture with the number {i:08d}" + " and so on" * 2)[:60]


def written(count: int) -> Table:
    """An index of `count` samples."""
    writer = Writer()
    for i in range(count):
        shard, k = divmod(i, SHARD)
        writer.add(
            Entry(f"{i:08d}", (caption_of(i),), f"/data/shards/{shard:05d}.tar", k * 51_200, 50_000), shared=True
        )
    return writer.table(lambda i, entry: f"{i}/{entry.key}")


def cached(folder: Path, count: int) -> Path:
    """A cache of `count` samples, written into the folder."""
    known = Known(torch.zeros(1, 2, 2), [])
    for k, first in enumerate(range(0, count, CACHED)):
        numbers = range(first, min(first + CACHED, count))
        samples = [CachedSample(f"{i:08d}", f"{i:064x}", [caption_of(i)]) for i in numbers]
        write_shard(folder / shard_name(k), samples, as_tensors([known] * len(samples), known))
    options = {name: getattr(DataConfig(), name) for name in OPTIONS}
    shape: dict[str, Any] = {"size": (16, 16), "sizes": ((16, 16),), "fit": FIT, "step": 8, "weights": (1.0,)}
    taken: dict[str, Any] = {"source": "", "options": options, "num_samples": None, "seed": None, "min_bucket": 1}
    stored: dict[str, Any] = {"dtype": "fp32", "text_dtype": "fp32", "text": None, "text_shape": None}
    About(autoencoder="", samples=count, keys="", shard_samples=CACHED, **shape, **taken, **stored).write(folder)
    return folder


class Keyed:
    """The part of a source that a split needs."""

    def __init__(self, table: Table) -> None:
        self.keys = Keys([table])


def measured(what: str, run: Callable[[], Any], disk: Callable[[Any], int] = lambda found: 0) -> Any:
    """Print a row of the table, and return what `run` gives."""
    before, start = anonymous(), time.perf_counter()
    found = run()
    seconds, grown = time.perf_counter() - start, anonymous() - before
    print(f"| {what} | {seconds:.1f} | {grown / 1e6:.0f} | {disk(found) / 1e6:.0f} |", flush=True)
    return found


def index(folder: Path, count: int) -> None:
    """An index, written and found again, and the order of its samples."""

    def kept() -> Table:
        found = Table.found(folder, "index")
        assert found is not None
        return found[0]

    made = [measured("index written", lambda: written(count), lambda found: Path(found.path).stat().st_size)]
    measured("kept in the run folder", lambda: made.pop().keep(folder, "index", {}), lambda _: bytes_in(folder))
    table = measured("found again", kept)
    entries = np.random.default_rng(0).integers(count, size=10_000).tolist()
    measured("10,000 entries read in random order", lambda: [table[i] for i in entries])
    training, _ = measured("split by key", lambda: split_by_key(Keyed(table), 0.01))  # type: ignore[arg-type]
    plan = measured("plan: one size", lambda: Plan(len(training), Layout(((64, 64),)), BATCH, 0))
    measured("its first batch", lambda: plan.places(0, range(BATCH)))
    epoch = len(training) // BATCH
    measured("its batch after an epoch, as a resumed run asks", lambda: plan.places(epoch + 1, range(BATCH)))
    bucket = np.random.default_rng(0).integers(9, size=len(training)).astype(np.int16)
    plan = measured("plan: nine buckets", lambda: Plan(len(training), Layout(((64, 64),) * 9, bucket), BATCH, 0))
    measured("its first 100 batches", lambda: [plan.places(i, range(BATCH)) for i in range(100)])
    order = Order(len(training), 0)
    measured("an epoch's order alone", lambda: order[0])


def cache(folder: Path, count: int) -> None:
    """A cache, opened and read."""
    cached(folder, count)
    source = measured(f"a cache of {count:,} opened", lambda: CachedSource(folder), lambda _: bytes_in(folder))
    measured("its fingerprint, and split by key", lambda: (fingerprint(source), split_by_key(source, 0.01)))
    numbers = np.random.default_rng(0).integers(count, size=10_000).tolist()
    measured("10,000 captions read in random order", lambda: [source.caption(i) for i in numbers])
    measured("10,000 latents read in random order", lambda: [source.read(i) for i in numbers])


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an index, an order and a cache of many samples.")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--cached", type=int, default=1_000_000)
    args = parser.parse_args()
    print("| what | seconds | MB in memory | MB on disk |\n|---|---|---|---|", flush=True)
    for run, count in ((index, args.samples), (cache, args.cached)):
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), count)


if __name__ == "__main__":
    main()
