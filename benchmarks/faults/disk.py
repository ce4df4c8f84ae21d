"""A disk that is full in the middle of a save, and checkpoints that have changed since they were written."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import TINY, Row, bad_checkpoints, difference, equal_to, newest, run
from training.checkpoint import list_checkpoints, newest_whole

SHORT = ("train", *TINY, "training.num_steps=12", "training.checkpoint_every=3", "training.keep_checkpoints=3")
KIB = (1600, 2600, 3300, 4100, 4800, 5400, 6000, 6600)  # room for a run: from less than a checkpoint to four of them
WAYS = {
    "": KIB,
    "training.async_checkpoint=true": (4000, 5000),
}


def full(folder: Path) -> Iterator[Row]:
    """A small file system in memory that fills up during a save; with room again, the run goes on."""
    name = "full disk during a save"
    expected = "status 2, one line that names it; all checkpoints whole; with room again, at last the same bits"
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "faults", disk]).returncode:
        yield Row(name, 0, "needs root and a tmpfs", expected, True)
        return
    try:
        assert run(folder / "whole.log", *SHORT, "--out", folder / "whole").status == 0
        found = [_filled(folder, disk, kib, how.split()) for how, sizes in WAYS.items() for kib in sizes]
    finally:
        subprocess.run(["umount", disk], check=True)
    stopped = [problems for was_full, problems, _ in found if was_full]
    problems = sorted({problem for some in stopped for problem in some})
    lines = sorted({line for was_full, _, line in found if was_full})
    seen = f"{len(stopped)} of {len(found)} sizes of the disk were too small"
    seen += f", stopped with e.g. `{lines[0] if lines else ''}`; " + ("; ".join(problems) or "each as expected")
    yield Row(name, len(stopped), seen, expected, bool(stopped) and not problems)


def _filled(folder: Path, disk: Path, kib: int, how: list[str]) -> tuple[bool, list[str], str]:
    """(whether the disk was full, what was not as expected, the line that the run ended with)."""
    out = disk / "run"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)
    first = run(folder / "full.log", *SHORT, *how, "--out", out)
    if first.status == 0:
        return False, [], ""
    problems = [] if first.one_line else [f"{kib} KiB: status {first.status}, {' / '.join(first.errors[-2:])}"]
    if not any("space" in line.lower() for line in first.errors):
        problems.append(f"{kib} KiB: {first.errors} does not say that the disk is full")
    problems += bad_checkpoints(out)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    again = run(folder / "again.log", *SHORT, *how, "--out", out, "--restart")
    if again.status or (different := difference(folder / "whole", out)):
        problems.append(
            f"{kib} KiB, then room: status {again.status} {again.errors}" if again.status else equal_to(different)
        )
    problems += [f"{path.name} is left over" for path in out.rglob(".*.part")]
    return True, problems, _anywhere(first.errors[-1] if first.errors else "", disk)


def _anywhere(line: str, folder: Path) -> str:
    return line.replace(f"{folder}/", "")


def damaged(folder: Path) -> Iterator[Row]:
    """Each file of the newest checkpoint cut, changed in one bit, emptied or missing; then all checkpoints."""
    whole = folder / "whole"
    assert run(folder / "whole.log", *SHORT, "--out", whole).status == 0
    rng, problems, num = random.Random(0), [], 0
    files = [path.relative_to(whole) for path in sorted(list_checkpoints(whole)[-1].iterdir())]
    for file, way in zip(files, ("cut", "flipped", "empty", "missing"), strict=True):
        out = folder / f"{way}"
        shutil.copytree(whole, out)
        _damage(out / file, way, rng)
        ended = run(folder / "again.log", "train", "--resume", out)
        num += 1
        named = f"{file.parent.name}" in ended.output and "falling back to the one before" in ended.output
        if ended.status or not named:
            problems.append(f"{file.name} {way}: status {ended.status} {ended.errors}")
        elif (different := difference(whole, out)) or newest(out) != 12:
            problems.append(f"{file.name} {way}: {equal_to(different)}")
    yield Row(
        "a file of the newest checkpoint cut, one bit flipped, emptied, missing",
        num,
        "; ".join(problems) or "named, passed over for the one before, trained on from there: the same bits",
        "named; the one before is taken; at last the same bits",
        not problems,
    )
    yield _bits(folder, whole, rng)
    out = folder / "all"
    shutil.copytree(whole, out)
    for checkpoint in list_checkpoints(out):
        _damage(checkpoint / "model.safetensors", "flipped", rng)
    before = sorted(out.rglob("*"))
    ended = run(folder / "again.log", "train", "--resume", out)
    line = _anywhere(ended.errors[-1] if ended.errors else ended.output[-200:], folder)
    kept = sorted(out.rglob("*")) == before
    yield Row(
        "one bit flipped in every checkpoint",
        1,
        f"status {ended.status}, `{line}`",
        "status 2, one line; nothing removed",
        ended.one_line and kept,
    )


def _bits(folder: Path, whole: Path, rng: random.Random, num: int = 400) -> Row:
    """One bit at a random place of a random file, seen or not; read in this process."""
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
    return Row("one bit flipped at a random place of a checkpoint", num, seen, "all seen", missed == 0)


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
