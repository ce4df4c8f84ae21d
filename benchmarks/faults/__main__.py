"""Fault injection: kills, full disks, damaged files and others, in real runs, and a table of what came of each.

    python -m benchmarks.faults --out benchmarks/results/faults.md
    python -m benchmarks.faults --out benchmarks/results/faults.md --only kills disk    # measure only these again

The runs are of the preset pixels-tiny, with a few dozen to a few hundred steps, in processes of one thread. Sections
that are not measured are kept in the file as they were.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults import disk, hostile, kills, processes
from benchmarks.faults.runs import Row
from benchmarks.timing import hardware

Part = Callable[[Path], Iterator[Row]]


def parts(num_kills: int, num_kills_two: int, num_kills_beside: int) -> dict[str, Part]:
    """The functions of all sections, by name."""
    return {
        "kills": partial(kills.one_process, kills=num_kills),
        "kills-two": partial(kills.two_processes, kills=num_kills_two),
        "kills-async": partial(kills.beside, kills=num_kills_beside),
        "disk": disk.full,
        "disk-two": disk.full_in_parts,
        "damage": disk.damaged,
        "damage-two": disk.damaged_in_parts,
        "processes": processes.processes,
        "server": processes.server,
        "batches": processes.not_finite,
        "signals": processes.signals,
        "hostile": hostile.hostile,
    }


def section(name: str, rows: list[Row], seconds: float) -> str:
    """A section of the file."""
    lines = [f"| {row.fault} | {row.times} | {row.seen} | {row.expected} | {_sign(row)} |" for row in rows]
    table = ["| fault | times | seen | expected | holds |", "|---|---|---|---|---|", *lines]
    return f"## {name}\n\n{hardware()}; {seconds:.0f} s\n\n" + "\n".join(table) + "\n"


def _sign(row: Row) -> str:
    return "not tried" if row.times == 0 else "yes" if row.holds else "**no**"


def merged(old: str, new: dict[str, str], names: list[str]) -> str:
    """The file with sections replaced by new ones of the same name, in the order of `names`."""
    kept = {found[1]: found[0].strip() + "\n" for found in re.finditer(r"^## (\S+)\n.*?(?=^## |\Z)", old, re.M | re.S)}
    sections = kept | new
    head = "# Faults\n\n`python -m benchmarks.faults --out benchmarks/results/faults.md`, part by part (`--only`).\n\n"
    return head + "\n".join(sections[name] for name in names if name in sections)


def main(words: list[str] | None = None) -> int:
    """Returns exit status 1 if a row does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; its other sections are kept")
    parser.add_argument("--kills", type=int, default=30, help="kills of one process; half of them during a save")
    parser.add_argument(
        "--kills-two", type=int, default=30, help="kills of two processes; half with DDP, half with FSDP2"
    )
    parser.add_argument(
        "--kills-async", type=int, default=8, help="kills during an asynchronous save; of one process and of two"
    )
    parser.add_argument("--only", nargs="+", choices=list(parts(0, 0, 0)), help="only these sections")
    asked = parser.parse_args(words)
    failed, known = 0, parts(asked.kills, asked.kills_two, asked.kills_async)
    for name in asked.only or known:
        begun, rows = time.monotonic(), []
        with tempfile.TemporaryDirectory(prefix="mmdit-faults-") as folder:
            for row in known[name](Path(folder)):
                rows.append(row)
                failed += not row.holds
                print(f"{_sign(row):9s} {row.fault} ({row.times}): {row.seen}", flush=True)
        if asked.out:
            old = asked.out.read_text() if asked.out.exists() else ""
            new = {name: section(name, rows, time.monotonic() - begun)}
            asked.out.write_text(merged(old, new, list(known)))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
