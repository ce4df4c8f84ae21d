"""Repeated SIGKILL, at random times and while a checkpoint is written; and the final weights of the run."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.runs import (
    TINY,
    Command,
    Row,
    bad_checkpoints,
    difference,
    equal_to,
    in_writing,
    newest,
    run,
    running,
)

ROUNDING = 1e-5
LENGTH = {1: (300, 3), 2: (60, 2)}  # number of processes: (steps, steps between checkpoints)
WHO = {1: ("the process",), 2: ("all", "one of the two", "torchrun alone")}
OUTLIVE, CONNECT = 60.0, 10.0  # seconds: limit for ranks without torchrun; wait for ranks that start
ASYNC = "training.async_checkpoint=true"


class Case(NamedTuple):
    """Runs to be killed; in_saves: always while a checkpoint is written, else in half of the kills."""

    name: str
    settings: tuple[str, ...] = ()
    world: int = 1
    in_saves: bool = False

    @property
    def most(self) -> float:
        """The largest allowed difference of the final weights."""
        return 0.0 if self.world == 1 else ROUNDING


def one_process(folder: Path, kills: int) -> Iterator[Row]:
    """Kills of a run of one process."""
    yield killed(folder, kills, Case("one process"))


def two_processes(folder: Path, kills: int) -> Iterator[Row]:
    """Kills under torchrun, with DDP and FSDP2: in turn of all processes, of one of the two, and of torchrun alone."""
    for name, strategy in (("DDP", "ddp"), ("FSDP2", "fsdp")):
        case = Case(f"two processes, {name}", (f"parallel.strategy={strategy}",), 2)
        yield killed(_new(folder / strategy), kills // 2, case)


def beside(folder: Path, kills: int) -> Iterator[Row]:
    """Kills during asynchronous saves, of one process and of two with sharded checkpoints."""
    yield killed(_new(folder / "one"), kills, Case("one process, async save", (ASYNC,), in_saves=True))
    case = Case("two processes, FSDP2, async save", ("parallel.strategy=fsdp", ASYNC), 2, in_saves=True)
    yield killed(_new(folder / "fsdp"), kills, case)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Tally:
    """Counts and problems of the kills so far."""

    def __init__(self) -> None:
        self.saving = self.before = self.num = self.connecting = 0
        self.who: Counter[str] = Counter()
        self.outlived = 0.0
        self.problems: list[str] = []

    def record(self, out: Path, saved: int, saving: bool, who: str) -> None:
        """Record a kill, and check that all checkpoints are whole and that step `saved` is still there."""
        self.num += 1
        self.saving += saving
        self.who[who] += 1
        self.before += newest(out) == 0
        self.problems += bad_checkpoints(out)
        if newest(out) < saved:
            self.problems.append(f"step {saved} was saved and is gone")


def killed(folder: Path, kills: int, case: Case, seed: int = 0) -> Row:
    """Kill a run `kills` times, and compare its final weights with those of an uninterrupted run."""
    num_steps, every = LENGTH[case.world]
    words = ("train", *TINY, f"training.num_steps={num_steps}", f"training.checkpoint_every={every}", *case.settings)
    whole, rng, tally = folder / "whole", random.Random(seed), Tally()
    begun = time.monotonic()
    assert run(folder / "whole.log", *words, "--out", whole, world=case.world).status == 0
    window, ends = time.monotonic() - begun, [whole]
    while tally.num < kills:
        out = folder / f"run{len(ends)}"
        again = Command(*words, "--out", out, "--restart", world=case.world)
        while not _run_and_kill(again, case, folder, out, rng, tally, window) and tally.num < kills:
            continue
        ended = run(folder / "last.log", *words, "--out", out, "--restart", world=case.world)
        if ended.status:
            tally.problems.append(f"status {ended.status}: {' '.join(ended.errors)}")
            break
        ends.append(out)
    found = max([difference(whole, out) for out in ends[1:]], default=float("inf"))
    left = [path for out in ends for path in (*out.rglob("*.part"), *out.rglob(".lock"))]
    tally.problems += [f"{path.name} is left over" for path in left[:1]]
    return _row(tally, found, len(ends) - 1, case)


def _run_and_kill(
    command: Command, case: Case, folder: Path, out: Path, rng: random.Random, tally: Tally, window: float
) -> bool:
    """Start the run and kill it; returns whether it ended before that."""
    with running(command, folder / "killed.log"):
        if case.in_saves or 2 * tally.saving <= tally.num:  # wait for some saves, the last of them in progress
            first, more = newest(out), rng.randint(1, 4)
            command.until(lambda: newest(out) > first and not in_writing(out))
            for _ in range(more):
                command.until(lambda: in_writing(out), pause=0)
                time.sleep(rng.uniform(0, 0.01))
        else:
            moment = command.begun + rng.uniform(0, window)
            command.until(lambda: time.monotonic() > moment)
        if command.over and command.process.returncode == 0:
            return True
        saved, who = newest(out), WHO[case.world][tally.num % len(WHO[case.world])]
        saving = _kill(command, out, who, rng)
        if command.process.returncode == 0:
            return True
        if command.process.returncode not in (1, -signal.SIGKILL):
            tally.problems.append(f"status {command.process.returncode}: {command.log.read_text()[-300:]}")
        if command.orphans():
            _wait_for_orphans(command, tally)
        tally.record(out, saved, saving, who)
    return False


def _kill(command: Command, out: Path, who: str, rng: random.Random) -> bool:
    """Stop all processes, kill those of `who`, continue the others; returns whether a checkpoint was being written."""
    pids = command.pids()
    ranks = command.ranks()
    command.send(signal.SIGSTOP, pids)
    saving = bool(in_writing(out))
    if who == "one of the two" and len(ranks) == 2:
        command.send(signal.SIGKILL, [rng.choice(ranks)])
    elif who == "torchrun alone":
        command.send(signal.SIGKILL, [command.process.pid])
    else:
        command.send(signal.SIGKILL, pids)
    command.send(signal.SIGCONT, pids)
    command.wait()
    return saving


def _wait_for_orphans(command: Command, tally: Tally) -> None:
    """Wait for ranks whose torchrun was killed. Those not yet connected to it try to connect for two minutes."""
    begun = time.monotonic()
    begins = "computing on" not in command.log.read_text()
    while command.orphans() and time.monotonic() < begun + (CONNECT if begins else OUTLIVE):
        time.sleep(0.02)
    if begins:
        tally.connecting += bool(command.orphans())
    elif command.orphans():
        tally.problems.append(f"{len(command.orphans())} processes live {OUTLIVE:.0f} s after their torchrun")
    else:
        tally.outlived = max(tally.outlived, time.monotonic() - begun)


def _row(tally: Tally, found: float, runs: int, case: Case) -> Row:
    seen = f"{tally.saving} of {tally.num} while a checkpoint was written, {tally.before} before the first"
    if case.world > 1:
        seen += "; killed were " + ", ".join(f"{who} {num} times" for who, num in tally.who.items())
        seen += f" (its two then saved and ended within {tally.outlived:.1f} s; {tally.connecting} times they were not "
        seen += "connected to it yet, had written nothing, and waited for it)"
    seen += f"; {runs} run(s) went on to the end: {equal_to(found)}"
    seen += "".join(f"; {problem}" for problem in sorted({*tally.problems})[:3])
    expected = "a whole checkpoint each time; at last " + ("the same bits" if case.most == 0 else "equal to rounding")
    return Row(f"SIGKILL, {case.name}", tally.num, seen, expected, found <= case.most and not tally.problems)
