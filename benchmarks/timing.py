"""Timing of several functions in turn, and the name of the hardware, for benchmarks."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds(
    runs: Mapping[str, Callable[[], object]], repeats: int = 7, warm: int = 3, cuda: bool = False
) -> dict[str, float]:
    """Median seconds of each of `runs`, run in turn; of its work on the CUDA device if `cuda`."""
    clock = _on_gpu if cuda else on_cpu
    for run in runs.values():
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(clock(run))
    return {name: statistics.median(each) for name, each in times.items()}


def _on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def on_cpu(run: Callable[[], object]) -> float:
    """Seconds of a run: CPU time if torch has one thread, as other work on the machine affects it less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def hardware() -> str:
    """The CPU, the number of threads and the version of torch."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
