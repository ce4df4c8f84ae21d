"""The cost of telemetry: the time spent in its calls, as a share of the training steps of a preset.

python -m benchmarks.telemetry [PRESET] [--steps N] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from training.config import load_config
from training.run import RunFolder
from training.trainer import Trainer


def measure(preset: str, steps: int, settings: list[str]) -> dict[str, float]:
    """Seconds of a step ("step"), and per step those in each call of telemetry; batches are fetched beforehand."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(preset, [f"training.out={Path(folder) / 'run'}", "data.num_samples=2000", *settings])
        trainer = Trainer(config, RunFolder.create(config.run_folder, config))
        source = trainer.feed.batches(config.training.batch_size, config.seed)
        batches = iter([next(source) for _ in range(steps + 10)])
        spent: dict[str, float] = {}
        for name in ("next", "add", "gradients", "line"):
            setattr(trainer.telemetry, name, _timed(getattr(trainer.telemetry, name), name, spent))
        for trainer.step in range(10):
            trainer._train_step(trainer.learner, trainer.telemetry.next(batches))
        trainer.telemetry.line()
        spent.clear()
        start = time.perf_counter()
        for trainer.step in range(10, 10 + steps):
            trainer._train_step(trainer.learner, trainer.telemetry.next(batches))
            if (trainer.step + 1) % config.training.log_every == 0:
                trainer.telemetry.line()
        return {"step": (time.perf_counter() - start) / steps, **{k: v / steps for k, v in spent.items()}}


def _timed(call: Any, name: str, spent: dict[str, float]) -> Any:
    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        out = call(*args)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return out

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="demo")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("settings", nargs="*")
    asked = parser.parse_args()
    step, *parts = measure(asked.preset, asked.steps, asked.settings).items()
    print(f"a step of {asked.preset}: {1e3 * step[1]:.2f} ms")
    for name, seconds in parts:
        print(f"  telemetry.{name:10s} {1e6 * seconds:6.1f} us a step")
    print(f"  in all {sum(s for _, s in parts) / step[1]:.2%}")


if __name__ == "__main__":
    main()
