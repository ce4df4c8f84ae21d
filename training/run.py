"""A run is a folder: config, checkpoints, metrics, samples, weights for use.

config.toml     the config as used          metrics.jsonl   one line a logged step
checkpoints/    to resume from              samples/        a grid of pictures every so often
pipeline/       to sample from (EMA)        tensorboard/    the same numbers and pictures (wandb/ too)
log.txt         what was printed            loss.png, scores.json, samples.png   at the end
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from mmdit.weights_io import write_aside
from training.boards import Board, Tensorboard
from training.config import CONFIG_FILE, TrainConfig, load_config, to_toml
from training.errors import named
from training.progress import say
from training.table import forget_old

OWN = {CONFIG_FILE, "log.txt", "metrics.jsonl", "scores.json", "loss.png", "samples.png"}
OWN |= {"checkpoints", "ema", "index", "pipeline", "profile", "samples", "tensorboard", "wandb"}
"""All names that a run writes in its folder, except hidden ones."""
UNLINKED = ".nfs*"
"""The name under which NFS keeps a file that is removed while it is open, as a lock may be, until it is closed."""


def taken(path: Path) -> FileExistsError:
    """The error for a new run whose folder is in use."""
    return FileExistsError(
        f"{path} exists: continue it with `mmdit train --resume {path}`, or name another folder with --out"
    )


class RunFolder:
    """The folder of a run: its config, log and metrics, as the process of a rank uses it.

    Process 0 alone writes and prints; the others are `quiet`. They still print samples that cannot be used, since each
    process reads different ones.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path, self.rank, self.quiet = Path(path), rank, rank > 0
        self._skipped: set[str] = set()
        self.boards: list[Board] = [] if self.quiet else [Tensorboard(self.path / "tensorboard")]

    @property
    def index(self) -> Path:
        """The folder that keeps indexes of the data which are slow to make."""
        return self.path / "index"

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunFolder:
        """A new run. Raises FileExistsError where the folder already holds something."""
        path = Path(path)
        empty = path.is_dir() and all(entry.match(UNLINKED) for entry in path.iterdir())
        if path.exists() and not empty:
            raise taken(path)
        try:
            path.mkdir(parents=True, exist_ok=empty)
        except FileExistsError:  # by another run, just now
            raise taken(path) from None
        run = cls(path)
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path, rank: int = 0) -> RunFolder:
        """A run that exists. Raises FileNotFoundError where the folder is not a run's."""
        if not (Path(path) / CONFIG_FILE).exists():
            raise FileNotFoundError(f"{path} is not a run folder: it has no {CONFIG_FILE}")
        return cls(path, rank)

    def config(self) -> TrainConfig:
        """The config as used."""
        return load_config(self.path / CONFIG_FILE, [])

    def write_config(self, config: TrainConfig) -> None:
        """Write the config as used."""
        if self.quiet:
            return
        write_aside(self.path / CONFIG_FILE, lambda aside: aside.write_text(to_toml(config), encoding="utf-8"))

    def log(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.quiet:
            return
        say(text)
        with named(path := self.path / "log.txt"), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def log_skipped(self, key: str, reason: str) -> None:
        """Log a sample that cannot be used, the first time that it is met."""
        if key not in self._skipped:
            self._skipped.add(key)
            if self.quiet:
                say(f"process {self.rank} skipped {key}: {reason}")
            self.log(f"skipped ({len(self._skipped)} so far): {key}: {reason}")

    def write_metrics(self, step: int, **values: float) -> None:
        """Append a line to metrics.jsonl, and write the same values to the boards."""
        if self.quiet:
            return
        with named(path := self.path / "metrics.jsonl"), path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for board in self.boards:
            board.write(step, values)

    def show(self, step: int, name: str, image: Image.Image) -> None:
        """Show a picture on the boards."""
        for board in self.boards:
            board.show(step, name, image)

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.jsonl, without those that a kill or a disk has damaged."""
        return list(self.rows())

    def rows(self) -> Iterator[dict[str, float]]:
        """`metrics` one by one: those of weeks fill gigabytes."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        yield row

    def rewind_metrics(self, step: int, names: Iterable[str] = ()) -> None:
        """Remove the lines past `step`, and those of that step that have one of `names`: they will be written again."""
        if self.quiet:
            return
        names = {*names}

        def write(aside: Path) -> None:
            with aside.open("w") as file:
                for row in self.rows():
                    if row["step"] < step or (row["step"] == step and not names & row.keys()):
                        file.write(json.dumps(row) + "\n")

        write_aside(self.path / "metrics.jsonl", write)
        for board in self.boards:
            board.rewind(step)

    def remove_leftovers(self) -> None:
        """Remove unfinished files and folders of a killed process, and indexes of the data as it was before it changed.
        Only while no process of the run writes.
        """
        if self.quiet:
            return
        for path in sorted(self.path.rglob(".*.part"), reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        forget_old(self.index)

    def close(self) -> None:
        """Flush the boards; what is written later opens them again."""
        for board in self.boards:
            board.close()
