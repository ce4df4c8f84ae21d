"""Runs of `mmdit` in child processes: to start, kill, wait for and compare."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from training.checkpoint import CorruptCheckpoint, list_checkpoints, load_latest, verify
from training.run import RunFolder

REPOSITORY = Path(__file__).parents[2]
QUIET = ("training.validate_every=0", "training.sample_every=0", "evaluation.prompts_per_question=0")
TINY = ("pixels-tiny", *QUIET, "training.precision=fp32")
PATIENCE = 240  # timeout of a command in seconds


class Row(NamedTuple):
    """A row of the table."""

    fault: str
    times: int
    seen: str
    expected: str
    holds: bool


class Ended(NamedTuple):
    """The result of a command: exit status, output, and duration."""

    status: int
    output: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Error lines of mmdit, and first lines of tracebacks."""
        return [line for line in self.output.splitlines() if re.match(r"mmdit.*: error: |Traceback ", line)]

    @property
    def one_line(self) -> bool:
        """Whether it failed as bad input should: status 2 and one error line."""
        return self.status == 2 and len(self.errors) == 1 and self.errors[0].startswith("mmdit")


class Command:
    """`mmdit WORDS`, under torchrun if `world` > 1; `running` leaves none of its processes."""

    def __init__(self, *words: object, world: int = 1, code: str = "", launch: tuple[str, ...] = ()) -> None:
        program = ["-c", code] if code else ["-m", "mmdit_cli"]
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *launch]
        self._end = b"\0".join(str(word).encode() for word in ("-m", "mmdit_cli", *words, ""))
        self.words = [sys.executable, *(many if world > 1 else []), *program, *map(str, words)]

    def start(self, log: Path) -> Command:
        """Start it, with output to the file `log`."""
        self._ranks: set[int] = set()
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        self.log, self.begun = log, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self.words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env, cwd=log.parent
            )
        return self

    def pids(self) -> list[int]:
        """The process and its descendants, also if it has ended."""
        found = self.orphans() if self.over else [self.process.pid]
        for pid in found:
            found += [child for child in children(pid) if child not in found]
        return found

    def ranks(self) -> list[int]:
        """The ranks: processes that torchrun has started."""
        found = [pid for pid in children(self.process.pid) if b"mmdit_cli" in _command_line(pid)]
        self._ranks.update(found)
        return found

    def orphans(self) -> list[int]:
        """Ranks that are running although torchrun has ended."""
        return [pid for pid in self._ranks if self.over and _command_line(pid).endswith(self._end)]

    def send(self, sig: signal.Signals, pids: Iterable[int]) -> None:
        """Send a signal to those processes that still exist."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sig)

    def kill(self) -> None:
        """SIGKILL to all, which are stopped first, so that none can react to the death of another."""
        pids = self.pids()
        self.send(signal.SIGSTOP, pids)
        self.send(signal.SIGKILL, pids)
        self.process.wait()

    def wait(self) -> None:
        """Wait for the process, at most PATIENCE; orphans are left running."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)

    def end(self) -> Ended:
        """Wait for the end of the command, and kill what is left of it."""
        self.wait()
        self.kill()
        return Ended(self.process.returncode, self.log.read_text(errors="replace"), time.monotonic() - self.begun)

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def until(self, found: Callable[[], object], pause: float = 0.01) -> bool:
        """Wait until `found()` is true; returns whether it was before the command ended."""
        last = time.monotonic() + PATIENCE
        while not self.over and time.monotonic() < last:
            if found():
                return True
            time.sleep(pause)
        return False


@contextmanager
def running(command: Command, log: Path) -> Iterator[Command]:
    """Start a command, and kill all its processes at the end of the context."""
    try:
        yield command.start(log)
    finally:
        command.kill()


def run(log: Path, *words: object, world: int = 1, **how: object) -> Ended:
    """Run `mmdit WORDS` to its end."""
    with running(Command(*words, world=world, **how), log) as command:  # type: ignore[arg-type]
        return command.end()


def children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# --- the state of a run ----------------------------------------------------------------------------------------------


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    found = list_checkpoints(run)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def steps(run: Path) -> int:
    """The last step in the metrics."""
    try:
        rows = RunFolder(run).metrics()
    except OSError:
        return 0
    return int(rows[-1]["step"]) if rows else 0


def bad_checkpoints(run: Path) -> list[str]:
    """The errors of checkpoints of a run that are not whole."""
    problems = []
    for folder in list_checkpoints(run):
        try:
            verify(folder)
        except CorruptCheckpoint as error:
            problems.append(str(error))
    return problems


def in_writing(run: Path) -> list[Path]:
    """Checkpoints being written, or left unfinished by a process that died."""
    return list((run / "checkpoints").glob(".step-*.part"))


def difference(one: Path, other: Path) -> float:
    """The largest difference of the final weights, averages and optimiser states; 0: equal bits, in the losses too.

    Infinity if steps or names differ.
    """
    (a, x), (b, y) = (load_latest(path, print) for path in (one, other))
    tensors = [{f"{g}/{n}": t for g, group in found.items() for n, t in group.items()} for found in (x, y)]
    if a["step"] != b["step"] or tensors[0].keys() != tensors[1].keys():
        return float("inf")
    largest = max((t.double() - tensors[1][n].double()).abs().max().item() for n, t in tensors[0].items())
    same = all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    return largest if largest or (same and losses(one) == losses(other)) else float("inf")


def losses(run: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in RunFolder(run).metrics() if "loss" in row}


def listing(folder: Path, but: Path | None = None) -> dict[str, str]:
    """SHA-256 by path of all files in a folder, except those in the folder `but`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if but is None or not path.is_relative_to(but)
    }


def equal_to(value: float) -> str:
    """A difference in words."""
    return "the same bits" if value == 0 else f"weights differ by at most {value:.1e}"
