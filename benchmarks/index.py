"""The cost of an index and an order of many samples: seconds, bytes on disk, and memory that is not shared.

    python -m benchmarks.index [--samples 10000000]

The index is synthetic: shards of 10,000 samples with captions of 60 characters, as `training/sources.py` writes them.
Memory is the growth of the process's anonymous pages; the index file is memory-mapped and shared between processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.data import split_by_key
from training.order import Layout, Order, Plan
from training.table import Entry, Keys, Table, Writer

SHARD = 10_000
BATCH = 256


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def written(count: int) -> Table:
    """An index of `count` samples."""
    writer = Writer()
    for i in range(count):
        shard, k = divmod(i, SHARD)
        caption = (f"a caption of the picture with the number {i:08d}" + " and so on" * 2)[:60]
        writer.add(Entry(f"{i:08d}", (caption,), f"/data/shards/{shard:05d}.tar", k * 51_200, 50_000), shared=True)
    return writer.table(lambda i, entry: f"{i}/{entry.key}")


class Keyed:
    """The part of a source that a split needs."""

    def __init__(self, table: Table) -> None:
        self.keys = Keys([table])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an index and an order of many samples.")
    parser.add_argument("--samples", type=int, default=10_000_000)
    count = parser.parse_args().samples
    print("| what | seconds | MB in memory | MB on disk |\n|---|---|---|---|", flush=True)

    def measured(what: str, run: Callable[[], Any], disk: Callable[[Any], int] = lambda found: 0) -> Any:
        before, start = anonymous(), time.perf_counter()
        found = run()
        seconds, grown = time.perf_counter() - start, anonymous() - before
        print(f"| {what} | {seconds:.1f} | {grown / 1e6:.0f} | {disk(found) / 1e6:.0f} |", flush=True)
        return found

    def kept(folder: Path) -> Table:
        found = Table.found(folder, "index")
        assert found is not None
        return found[0]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = measured("index written", lambda: written(count), lambda found: Path(found.path).stat().st_size)
        measured(
            "kept in the run folder",
            lambda: table.keep(folder, "index", {}),
            lambda _: sum(path.stat().st_size for path in folder.iterdir()),
        )
        del table
        table = measured("found again", lambda: kept(folder))
        entries = np.random.default_rng(0).integers(count, size=10_000).tolist()
        measured("10,000 entries read in random order", lambda: [table[i] for i in entries])
        training, _ = measured("split by key", lambda: split_by_key(Keyed(table), 0.01))  # type: ignore[arg-type]
        plan = measured("plan: one size", lambda: Plan(len(training), Layout(((64, 64),)), BATCH, 0))
        measured("its first batch", lambda: plan.places(0, range(BATCH)))
        epoch = len(training) // BATCH
        measured("its batch after an epoch, as a resumed run asks", lambda: plan.places(epoch + 1, range(BATCH)))
        del plan
        bucket = np.random.default_rng(0).integers(9, size=len(training)).astype(np.int16)
        plan = measured("plan: nine buckets", lambda: Plan(len(training), Layout(((64, 64),) * 9, bucket), BATCH, 0))
        measured("its first 100 batches", lambda: [plan.places(i, range(BATCH)) for i in range(100)])
        order = Order(len(training), 0)
        measured("an epoch's order alone", lambda: order[0])


if __name__ == "__main__":
    main()
