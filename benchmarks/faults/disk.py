"""Disks that become full during a save, and checkpoints that were damaged after they were written."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.runs import TINY, Ended, Row, bad_checkpoints, difference, equal_to, newest, run
from training.checkpoint import list_checkpoints, newest_whole

ROUNDING = 1e-5
SHORT = ("train", *TINY, "training.num_steps=12", "training.checkpoint_every=3", "training.keep_checkpoints=3")
KIB = (1600, 2600, 3300, 4100, 4800, 5400, 6000, 6600)  # disk sizes: for less than one checkpoint to four
FSDP, ASYNC = "parallel.strategy=fsdp", "training.async_checkpoint=true"


class Way(NamedTuple):
    """How a run saves its checkpoints, and the disk sizes (KiB) that are tried."""

    name: str
    settings: tuple[str, ...]
    sizes: tuple[int, ...]
    world: int = 1

    @property
    def most(self) -> float:
        """The largest allowed difference of the final weights."""
        return 0.0 if self.world == 1 else ROUNDING


WHOLE = (Way("one file a group", (), KIB), Way("one file a group, async save", (ASYNC,), (4000, 5000)))
PARTS = (
    Way("two processes, FSDP2", (FSDP,), (2600, 4100, 5400, 6600), 2),
    Way("two processes, FSDP2, async save", (FSDP, ASYNC), (2600, 4100, 5400, 6600), 2),
)


def full(folder: Path, ways: Sequence[Way] = WHOLE) -> Iterator[Row]:
    """A small tmpfs that becomes full during a save; when it has room again, the run is continued."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "faults", disk]
    no_disk = bool(os.geteuid() or subprocess.run(mount).returncode)
    try:
        for way in ways:
            yield _full(folder, disk, way) if not no_disk else _row(way, [], 0, "needs root and a tmpfs")
    finally:
        if not no_disk:
            subprocess.run(["umount", disk], check=True)


def full_in_parts(folder: Path) -> Iterator[Row]:
    """The same for two processes that write sharded checkpoints."""
    yield from full(folder, PARTS)


def _full(folder: Path, disk: Path, way: Way) -> Row:
    whole = folder / f"whole{way.world}"
    if not whole.exists():
        settings = (FSDP,) if way.world > 1 else ()
        assert run(folder / "whole.log", *SHORT, *settings, "--out", whole, world=way.world).status == 0
    found = [_one_size(folder, disk, kib, way, whole) for kib in way.sizes]
    stopped = [problems for was_full, problems, _ in found if was_full]
    problems = sorted({problem for some in stopped for problem in some})
    lines = sorted({line for was_full, _, line in found if was_full})
    seen = f"{len(stopped)} of {len(found)} sizes of the disk were too small"
    seen += f", stopped with e.g. `{lines[0] if lines else ''}`; " + ("; ".join(problems) or "each as expected")
    return _row(way, problems, len(stopped), seen)


def _row(way: Way, problems: list[str], times: int, seen: str) -> Row:
    if way.world == 1:
        expected = "status 2, one line that names it; all checkpoints whole; with room again, at last the same bits"
    else:
        expected = "each with status 2 and one line, that of one names it; all checkpoints whole; with room again, at "
        expected += "last equal to rounding"
    return Row(f"full disk during a save, {way.name}", times, seen, expected, not problems)


def _one_size(folder: Path, disk: Path, kib: int, way: Way, whole: Path) -> tuple[bool, list[str], str]:
    """(whether the disk became full, problems, the error line of the run)."""
    out = disk / "run"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)
    first = run(folder / "full.log", *SHORT, *way.settings, "--out", out, world=way.world)
    if first.status == 0:
        return False, [], ""
    problems = [] if _refused(first, way) else [f"{kib} KiB: status {first.status}, {' / '.join(first.errors[-2:])}"]
    if not any("space" in line.lower() for line in first.errors):
        problems.append(f"{kib} KiB: {first.errors} does not say that the disk is full")
    problems += bad_checkpoints(out)
    before = newest(out)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    again = run(folder / "again.log", *SHORT, *way.settings, "--out", out, "--restart", world=way.world)
    if again.status:
        problems.append(f"{kib} KiB, then room: status {again.status} {again.errors}")
    elif (different := difference(whole, out)) > way.most:
        problems.append(equal_to(different))
    if before and f"resumed at step {before}" not in again.output:
        problems.append(f"{kib} KiB: step {before} was saved, and not gone on from")
    problems += [f"{path.name} is left over" for path in out.rglob(".*.part")]
    line = next((line for line in first.errors if "space" in line.lower()), "")
    return True, problems, _without_folder(line, disk)


def _refused(ended: Ended, way: Way) -> bool:
    """Whether each process ended with one error line and status 2; torchrun adds its own traceback."""
    if way.world == 1:
        return ended.one_line
    said = [re.match(r"mmdit.*: error: |Traceback ", line)[0] for line in ended.errors]  # type: ignore[index]
    return ended.status == 1 and len({*said}) == len(said) > 1 and "(exitcode: 2)" in ended.output


def _without_folder(line: str, folder: Path) -> str:
    return line.replace(f"{folder}/", "")


def damaged(folder: Path) -> Iterator[Row]:
    """Each file of the newest checkpoint truncated, with one bit flipped, empty or missing; then all checkpoints."""
    harms = {0: ["cut"], 1: ["flipped"], 2: ["empty"], 3: ["missing"]}
    yield from _damaged(folder, Way("", (), ()), harms)


def damaged_in_parts(folder: Path) -> Iterator[Row]:
    """The same for a sharded checkpoint of two processes: two shards, and the state with the digests."""
    harms = {0: ["cut", "missing"], 1: ["flipped", "empty"], 2: ["flipped", "cut", "missing"]}
    yield from _damaged(folder, Way(" in parts", (FSDP,), (), 2), harms)


def _damaged(folder: Path, way: Way, harms: dict[int, list[str]]) -> Iterator[Row]:
    whole = folder / "whole"
    assert run(folder / "whole.log", *SHORT, *way.settings, "--out", whole, world=way.world).status == 0
    rng, problems, num, largest = random.Random(0), [], 0, 0.0
    files = [path.relative_to(whole) for path in sorted(list_checkpoints(whole)[-1].iterdir())]
    assert len(files) == len(harms)
    for file, harm in [(files[i], harm) for i, some in harms.items() for harm in some]:
        out = folder / f"{file.name}-{harm}"
        shutil.copytree(whole, out)
        _damage(out / file, harm, rng)
        ended = run(folder / "again.log", "train", "--resume", out, world=way.world)
        num += 1
        named = f"{file.parent.name}" in ended.output and "falling back to the one before" in ended.output
        if ended.status or not named:
            problems.append(f"{file.name} {harm}: status {ended.status} {ended.errors}")
            continue
        largest = max(largest, different := difference(whole, out))
        if different > way.most or newest(out) != 12:
            problems.append(f"{file.name} {harm}: {equal_to(different)}")
    done = f"named, passed over for the one before, trained on from there: {equal_to(largest)}"
    same = "the same bits" if way.most == 0 else "equal to rounding"
    yield Row(
        f"a file of the newest checkpoint{way.name} cut, one bit flipped, emptied, missing",
        num,
        "; ".join(problems) or done,
        f"named; the one before is taken; at last {same}",
        not problems,
    )
    yield _flipped_bits(folder, whole, rng, way)
    yield _all_damaged(folder, whole, rng, way)


def _all_damaged(folder: Path, whole: Path, rng: random.Random, way: Way) -> Row:
    """One bit flipped in every checkpoint, so that none is whole."""
    out = folder / "all"
    shutil.copytree(whole, out)
    for checkpoint in list_checkpoints(out):
        _damage(sorted(checkpoint.iterdir())[1], "flipped", rng)
    before = sorted(out.rglob("*"))
    ended = run(folder / "again.log", "train", "--resume", out, world=way.world)
    line = _without_folder(ended.errors[0] if ended.errors else ended.output[-200:], folder)
    kept = sorted(path for path in out.rglob("*") if path.name != ".lock") == before
    seen = f"status {ended.status}{' of torchrun' if way.world > 1 else ''}, `{line}`"
    expected = "status 2, one line; nothing removed"
    return Row(f"one bit flipped in every checkpoint{way.name}", 1, seen, expected, _refused(ended, way) and kept)


def _flipped_bits(folder: Path, whole: Path, rng: random.Random, way: Way, num: int = 400) -> Row:
    """Whether one flipped bit at a random position of a random file is detected; checked in this process."""
    out, missed = folder / "bits", 0
    shutil.copytree(whole, out)
    last = list_checkpoints(out)[-1]
    for _ in range(num):
        path = rng.choice(sorted(last.iterdir()))
        good = path.read_bytes()
        _damage(path, "flipped", rng)
        missed += newest_whole(out, lambda text: None) == last
        path.write_bytes(good)
    assert newest_whole(out, print) == last
    seen = f"{num - missed} seen, {missed} missed"
    return Row(f"one bit flipped at a random place of a checkpoint{way.name}", num, seen, "all seen", missed == 0)


def _damage(path: Path, way: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match way:
        case "cut":
            del data[len(data) // 2 :]
        case "empty":
            data.clear()
        case "flipped":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "missing":
            return path.unlink()
    path.write_bytes(data)
