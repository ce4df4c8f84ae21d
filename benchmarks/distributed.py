"""A run in one process with two threads, and in two processes with one thread each: speed, and memory per process.

    python -m benchmarks.distributed --out benchmarks/results/distributed.md

A training step (forward, backward, communication, clipping, optimiser, average) of an MMDiT with 8 blocks of width 384
(6 heads), 64 image tokens, captions of 32 tokens, 16 images, fp32, uncompiled, on the CPU over gloo. Seconds are
medians, after three warm-up steps. Memory is counted: bytes of weights, gradients, optimiser state and average.
A process sends in a step, by ring algorithms for N processes and P bytes of weights: DDP 2 P (N - 1) / N; FSDP2
3 P (N - 1) / N, or 2 P (N - 1) / N where blocks stay gathered until the backward pass (reshard=false). For Muon's
traffic see docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import hardware
from training.config import load_config
from training.parallel import ranks_of
from training.run import RunFolder
from training.sharding import local
from training.trainer import Trainer

WARM = 3  # steps before those measured
SETTINGS = (
    "data.num_samples=64",
    "data.image_size=64",
    "model.depth=8",
    "model.num_heads=6",
    "model.head_dim=64",
    "text.width=128",
    "training.batch_size=16",
    "training.precision=fp32",
)
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "DDP": (2, ("parallel.strategy=ddp",)),
    "FSDP2": (2, ("parallel.strategy=fsdp",)),
    "FSDP2, reshard=false": (2, ("parallel.strategy=fsdp", "parallel.reshard=false")),
    "one process, 2 parts a batch": (1, ("training.grad_accumulation=2",)),
    "DDP, 2 parts a batch": (2, ("parallel.strategy=ddp", "training.grad_accumulation=2")),
    "FSDP2, 2 parts a batch": (2, ("parallel.strategy=fsdp", "training.grad_accumulation=2")),
    "one process, Muon": (1, ("optimizer.name=muon",)),
    "DDP, Muon": (2, ("parallel.strategy=ddp", "optimizer.name=muon")),
    "FSDP2, Muon": (2, ("parallel.strategy=fsdp", "optimizer.name=muon")),
}


def measure(out: Path, settings: list[str], steps: int) -> None:
    """In each process: train some steps; the first process writes the results."""
    config = load_config("pixels-tiny", [*SETTINGS, f"training.out={out / 'run'}", *settings])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with ranks_of(config) as ranks:
        path = ranks.from_first(lambda: RunFolder.create(config.run_folder, config).path)
        trainer = Trainer(config, RunFolder(path, ranks.rank), ranks=ranks)
        learner = trainer._compiled_learner()
        batches = trainer.feed.batches(config.training.batch_size, config.seed, 0, trainer.share)
        times: list[float] = []
        for _ in range(WARM + steps):
            batch = next(batches)
            ranks.barrier()
            start = time.perf_counter()
            trainer._train_step(learner, batch)
            times.append(time.perf_counter() - start)
            trainer.step += 1
        found = {"seconds": statistics.median(times[WARM:]), **held(trainer)}
        if ranks.first:
            (out / "found.json").write_text(json.dumps(found))


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes that this process keeps between steps; gradients take as many as the weights."""

    def size(tensors: Any) -> int:
        return sum(local(x).numel() * x.element_size() for x in tensors)

    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    weights = size(trainer.model.parameters())
    return {
        "weights": weights,
        "gradients": weights,
        "optimiser": size(states),
        "average": size(trainer.ema.parameters()),
    }


def launch(world: int, settings: tuple[str, ...], steps: int) -> dict[str, float]:
    """Measure in `world` new processes with two threads in all."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["-m", "benchmarks.distributed", "--measure", folder, "--steps", str(steps), *settings]
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        env = os.environ | {"OMP_NUM_THREADS": str(2 // world)}
        command = [sys.executable, *(together if world > 1 else []), *own]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "found.json").read_text())


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| two cores | s a step | pictures/s | MB of weights | gradients | optimiser | average | in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        kinds = [row[kind] / 1e6 for kind in ("weights", "gradients", "optimiser", "average")]
        sizes = " | ".join(f"{size:.1f}" for size in (*kinds, sum(kinds)))
        lines.append(f"| {name} | {row['seconds']:.3f} | {16 / row['seconds']:.1f} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--only", default="", help="measure only the rows with this in their name")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        return measure(asked.measure, asked.settings, asked.steps)
    rows = {}
    for name, (world, settings) in WAYS.items():
        if asked.only not in name:
            continue
        rows[name] = launch(world, settings, asked.steps)
        command = f"python -m benchmarks.distributed --steps {asked.steps}"
        text = f"# One process and two\n\n`{command}`, {hardware()}\n\n{table(rows)}\n"
        if asked.out:
            asked.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
