"""SIGKILL again and again, at any moment and while a checkpoint is written, and what the run comes to at last."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

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
LENGTH = {1: (300, 3), 2: (60, 2)}  # steps, and steps from checkpoint to checkpoint, by the number of processes


def one_process(folder: Path, kills: int) -> Iterator[Row]:
    """Of a run alone."""
    yield killed(folder, kills, ())


def two_processes(folder: Path, kills: int) -> Iterator[Row]:
    """Under torchrun, in parts: by turns all processes at once, and one, after which torchrun ends the other."""
    yield killed(folder, kills, ("parallel.strategy=fsdp",), world=2)


class Tally:
    """What was seen of the kills so far."""

    def __init__(self) -> None:
        self.saving = self.other = self.before = 0
        self.problems: list[str] = []

    def look(self, out: Path, saved: int) -> None:
        """After a kill: whether it came in a save, whether all there is is whole, and what was there before still."""
        if in_writing(out):
            self.saving += 1
        else:
            self.other += 1
        self.before += newest(out) == 0
        self.problems += bad_checkpoints(out)
        if newest(out) < saved:
            self.problems.append(f"step {saved} was saved and is gone")


def killed(folder: Path, kills: int, settings: tuple[str, ...], world: int = 1, seed: int = 0) -> Row:
    """Kill a run `kills` times, half of them in a save, and compare it with one that was left alone."""
    num_steps, every = LENGTH[world]
    words = ("train", *TINY, f"training.num_steps={num_steps}", f"training.checkpoint_every={every}", *settings)
    whole, rng, tally = folder / "whole", random.Random(seed), Tally()
    begun = time.monotonic()
    assert run(folder / "whole.log", *words, "--out", whole, world=world).status == 0
    window, ends = time.monotonic() - begun, [whole]
    while tally.saving + tally.other < kills:
        out = folder / f"run{len(ends)}"
        while not _once(Command(*words, "--out", out, "--restart", world=world), folder, out, rng, tally, window):
            if tally.saving + tally.other >= kills:
                break
        ended = run(folder / "last.log", *words, "--out", out, "--restart", world=world)
        if ended.status:
            tally.problems.append(f"status {ended.status}: {' '.join(ended.errors)}")
            break
        ends.append(out)
    found = max([difference(whole, out) for out in ends[1:]], default=float("inf"))
    left = [path for out in ends for path in out.rglob("*.part")]
    tally.problems += [f"{path.name} is left over" for path in left[:1]]
    return _row(tally, found, len(ends) - 1, world)


def _once(command: Command, folder: Path, out: Path, rng: random.Random, tally: Tally, window: float) -> bool:
    """Start, and kill; whether the run came to its end before that."""
    with running(command, folder / "killed.log"):
        if tally.saving <= tally.other:  # wait for some saves, then for one that is in the middle
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
        saved = newest(out)
        if len(command.ranks()) == 2 and rng.random() < 0.5:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(command.ranks()), signal.SIGKILL)
            ended = command.end()
            if ended.status == 0:
                return True
        else:
            command.kill()
        if command.process.returncode not in (1, -signal.SIGKILL):
            tally.problems.append(f"status {command.process.returncode}: {command.log.read_text()[-300:]}")
        tally.look(out, saved)
    return False


def _row(tally: Tally, found: float, runs: int, world: int) -> Row:
    many = f"{tally.saving} of {tally.saving + tally.other} while a checkpoint was written"
    seen = f"{many}, {tally.before} before the first; {runs} run(s) went on to the end: {equal_to(found)}"
    seen += "".join(f"; {problem}" for problem in sorted({*tally.problems})[:3])
    name = "SIGKILL, one process" if world == 1 else "SIGKILL of all or one of two processes (FSDP2)"
    expected = "a whole checkpoint each time; at last " + ("the same bits" if world == 1 else "equal to rounding")
    most = 0.0 if world == 1 else ROUNDING
    return Row(name, tally.saving + tally.other, seen, expected, found <= most and not tally.problems)
