"""A run is a folder: config, checkpoints, metrics, samples, weights for use.

config.toml     the config as used          metrics.jsonl   one line a logged step
checkpoints/    to resume from              tensorboard/    the same numbers (wandb/ too)
pipeline/       to sample from (EMA)        samples/        a grid of pictures every so often
log.txt         what was printed            loss.png, scores.json, samples.png   at the end
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mmdit.weights_io import write_aside
from training.config import TrainConfig, load_config, to_toml
from training.progress import say

OWN = {"config.toml", "log.txt", "metrics.jsonl", "scores.json", "loss.png", "samples.png"}
OWN |= {"checkpoints", "ema", "index", "pipeline", "profile", "samples", "tensorboard", "wandb"}
"""All that a run writes in its folder, but for what is hidden."""
UNLINKED = ".nfs*"
"""What NFS makes of a file that is removed while it is open (of a lock): it is gone when that is closed."""


class Board(Protocol):
    """Another place that metrics go to."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def taken(path: Path) -> FileExistsError:
    """What is said where a new run finds its folder in use."""
    return FileExistsError(
        f"{path} exists: continue it with `mmdit train --resume {path}`, or name another folder with --out"
    )


class RunFolder:
    """Paths of a run, and the two files that grow: the log and the metrics. quiet: nothing is printed."""

    quiet = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._skipped: set[str] = set()
        self.board: Board | None = None  # gets the metrics too
        self._board: Any = None
        self._purge: int | None = None  # the first step that tensorboard must forget

    @property
    def index(self) -> Path:
        """Folder where indexes of the data are kept that are slow to make."""
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
    def open(cls, path: str | Path) -> RunFolder:
        """A run that exists. Raises FileNotFoundError where the folder is none."""
        if not (Path(path) / "config.toml").exists():
            raise FileNotFoundError(f"{path} is not a run folder: it has no config.toml")
        return cls(path)

    def config(self) -> TrainConfig:
        """The config as used."""
        return load_config(self.path / "config.toml", [])

    def write_config(self, config: TrainConfig) -> None:
        """Keep the config as used."""
        write_aside(self.path / "config.toml", lambda aside: aside.write_text(to_toml(config), encoding="utf-8"))

    def log(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        say(text)
        with named(path := self.path / "log.txt"), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def log_skipped(self, key: str, reason: str) -> None:
        """Name a sample that cannot be used, the first time that it is met."""
        if key not in self._skipped:
            self._skipped.add(key)
            self.log(f"skipped ({len(self._skipped)} so far): {key}: {reason}")

    def write_metrics(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl, and the same to tensorboard."""
        with named(path := self.path / "metrics.jsonl"), path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        with named(self.path / "tensorboard"):
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.path / "tensorboard"), flush_secs=10, purge_step=self._purge)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self.board is not None:
            self.board.write(step, values)

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.jsonl; a line that a kill cut short is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
        return rows

    def rewind_metrics(self, step: int, names: Iterable[str] = ()) -> None:
        """Forget the lines past `step`, and those of it that have one of `names`: a resumed run writes them again."""
        again = {*names}
        rows = [row for row in self.metrics() if row["step"] < step + (not again & row.keys())]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_aside(self.path / "metrics.jsonl", lambda aside: aside.write_text(text))
        self._purge = step + 1

    def remove_leftovers(self) -> None:
        """Remove the files and folders that were being written when a process was killed; while nobody else writes."""
        for path in sorted(self.path.rglob(".*.part"), reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Send what is left; the next metrics go on."""
        if self._board is not None:
            with named(self.path / "tensorboard"):
                self._board.close()
            self._board = None
        if self.board is not None:
            self.board.close()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of writing that say where: those of a file that is open do not, such as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class QuietRun(RunFolder):
    """The run of a process that is not the first of several: it reads, and leaves writing and printing to the first.

    A sample that cannot be used is still named, since each process reads others.
    """

    quiet = True

    def __init__(self, path: str | Path, rank: int) -> None:
        super().__init__(path)
        self.rank = rank

    def write_config(self, config: TrainConfig) -> None:
        """Nothing."""

    def log(self, text: str) -> None:
        """Nothing."""

    def log_skipped(self, key: str, reason: str) -> None:
        """Print it."""
        if key not in self._skipped:
            self._skipped.add(key)
            say(f"process {self.rank} skipped {key}: {reason}")

    def write_metrics(self, step: int, **values: float) -> None:
        """Nothing."""

    def rewind_metrics(self, step: int, names: Iterable[str] = ()) -> None:
        """Nothing."""

    def remove_leftovers(self) -> None:
        """Nothing."""
