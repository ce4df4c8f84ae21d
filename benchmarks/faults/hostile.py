"""Hostile files given to real commands: each ends in one clear error or a skipped sample, and touches nothing else."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import TINY, Ended, Row, listing, newest, run
from benchmarks.fuzz_readers import picture, png_bomb, tar
from training.checkpoint import list_checkpoints
from training.signed import sha256, sha256_of

SHORT = ("train", *TINY, "training.num_steps=2")
OUTSIDE = (Path("/tmp/absolute.png"), Path("/tmp/absolute.txt"))  # where members with absolute names would be written
REFUSED = "status 2, one line; nothing touched"


class Opener:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def hostile(folder: Path) -> Iterator[Row]:
    """Hostile weights, data sets, captions and configs."""
    good = folder / "good"
    assert run(folder / "log", *SHORT, "training.checkpoint_every=1", "--out", good).status == 0
    yield from _weights(folder, good)
    yield from _data(folder)
    yield _configs(folder, good)


class Watched:
    """Runs commands in a folder, and records what they change outside of their output."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ended, self.touched = folder, [], []  # type: ignore[var-annotated]

    def run(self, *words: object, out: Path) -> Ended:
        """Run a command, which may write only below `out`."""
        log = self.folder.parent / f"{self.folder.name}.log"
        before, there = listing(self.folder, out), [path.exists() for path in OUTSIDE]
        ended = run(log, *words)
        after = listing(self.folder, out)
        self.touched += [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        self.touched += [str(path) for path, was in zip(OUTSIDE, there, strict=True) if path.exists() != was]
        self.ended.append(ended)
        return ended

    def row(self, fault: str) -> Row:
        """A row of the table: each of the commands should have been refused."""
        bad = [f"status {ended.status} {ended.errors[-2:]}" for ended in self.ended if not ended.one_line]
        line = self.ended[0].errors[-1] if self.ended[0].errors else ""
        for place in sorted({str(self.folder), str(self.folder.parent)}, key=len, reverse=True):
            line = line.replace(f"{place}/", "")
        short = line if len(line) < 200 else line[:197] + "..."
        seen = "; ".join(bad) or f"each refused in one line, such as `{short}`"
        seen += f"; touched: {', '.join(self.touched[:3])}" if self.touched else ""
        return Row(fault, len(self.ended), seen, REFUSED, not bad and not self.touched)


def lying_headers() -> list[bytes]:
    """safetensors with a header longer than the file, false offsets, shapes or dtypes, or invalid JSON."""

    def file(header: bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    def tensor(shape: list[int], offsets: list[int], kind: str = "F32") -> bytes:
        return json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": offsets}}).encode()

    return [
        file(b"{}", 2**60),
        file(b"{}", 2**63 + 5),
        file(tensor([4, 4], [0, 2**40])),
        file(tensor([2**31, 2**31], [0, 64])),
        file(tensor([4, 4], [64, 0])),
        file(tensor([4, 4], [0, 64], "F99")),
        file(b"[" * 100_000),
        file(b"\xff\xfe"),
    ]


def _weights(folder: Path, good: Path) -> Iterator[Row]:
    """Weights in a checkpoint with matching digests, in a pipeline, and as initial weights (--init)."""
    own = folder / "weights"
    own.mkdir()
    evil = pickle.dumps(Opener(own / "unpickled"))
    for name, files in (("a pickle in place of weights", [evil]), ("safetensors with a lying header", lying_headers())):
        watch = Watched(own)
        for i, data in enumerate(files):
            out = own / "run"
            shutil.copytree(good, out)
            _replace_weights(out, data)
            if i < 2:
                watch.run("train", "--resume", out, "training.num_steps=3", out=out)
            (out / "pipeline" / "transformer" / _weights_name(out)).write_bytes(data)
            watch.run("sample", out, "a red star", "--out", out / "x.png", out=out)
            if i < 2:
                (own / "weights.safetensors").write_bytes(data)
                watch.run(*SHORT, "--init", own / "weights.safetensors", "--out", own / "new", out=out)
            shutil.rmtree(out)
        yield watch.row(f"{name}: of a checkpoint (digests made to fit), of a pipeline, for --init")


def _weights_name(run: Path) -> str:
    [path] = (run / "pipeline" / "transformer").glob("*.safetensors")
    return path.name


def _replace_weights(run: Path, data: bytes) -> None:
    """Replace the weights of all checkpoints, with matching digests."""
    for folder in list_checkpoints(run):
        (folder / "model.safetensors").write_bytes(data)
        state = json.loads((folder / "state.json").read_text())
        state.pop("sha256")
        state["files"]["model.safetensors"] = sha256(folder / "model.safetensors")
        (folder / "state.json").write_text(json.dumps({**state, "sha256": sha256_of(state)}))


def _data(folder: Path) -> Iterator[Row]:
    """Hostile samples among good ones: they are skipped and named, and the run continues."""
    good = [(f"{i:02d}{kind}", x) for i in range(16) for kind, x in ((".png", picture("PNG")), (".txt", b"a picture"))]
    names = ("../../up", "/tmp/absolute", "a/../../../up")
    outside = [(name + kind, x) for name in names for kind, x in ((".png", picture("PNG")), (".txt", b"outside"))]
    one = picture("PNG")
    kinds = {
        "members of a shard named ../../up.png and /tmp/absolute.png": (
            outside,
            "read in place, or skipped; no such file",
        ),
        "a PNG of 100,000 x 100,000 pixels": ([("x.png", png_bomb()), ("x.txt", b"huge")], "skipped and named"),
        "a caption of 10 MB": ([("x.png", one), ("x.txt", b"word " * 2_000_000)], "cut or skipped"),
        "captions that are no UTF-8": ([("x.png", one), ("x.txt", b"\xff\xfe\x00\xd8" * 9)], "read in part or skipped"),
        "a caption in JSON nested 200,000 deep": ([("x.png", one), ("x.json", b"[" * 200_000)], "skipped and named"),
    }
    for i, (name, (members, expected)) in enumerate(kinds.items()):
        own = folder / f"data{i}"
        (own / "set").mkdir(parents=True)
        (own / "set" / "0.tar").write_bytes(tar([*good, *members]))
        watch = Watched(own)
        ended = watch.run(*SHORT, "--data", own / "set", "--out", own / "run", out=own / "run")
        said = [line for line in ended.output.splitlines() if "skipped" in line and "so far" in line]
        seen = f"trained on, status {ended.status}; " + (f"`{said[0][:160]}`" if said else "no sample skipped")
        seen += f"; touched: {watch.touched[:3]}" if watch.touched else "; nothing touched outside of the run"
        holds = ended.status == 0 and newest(own / "run") == 2 and not watch.touched
        yield Row(name, 1, seen, f"{expected}; the run goes on; nothing touched", holds)


def _configs(folder: Path, good: Path) -> Row:
    """TOML for `mmdit train`, and JSON in a run folder."""
    own = folder / "configs"
    own.mkdir()
    watch, out = Watched(own), own / "run"
    deep, number = b"[" * 200_000, b"9" * 20_000
    for bomb in (
        b"a = " + deep,
        b"a." * 50_000 + b"b = 1",
        b"a = " + number,
        b"name = '" + b"x" * 10_000_000 + b"'",
        b"\xff",
    ):
        (own / "my.toml").write_bytes(bomb)
        watch.run("train", own / "my.toml", "--out", out, out=out)
    for bomb in (deep, b'{"a":' * 100_000, b'{"depth":' + number + b"}"):
        out = own / "run"
        shutil.copytree(good, out)
        (out / "pipeline" / "transformer" / "config.json").write_bytes(bomb)
        watch.run("sample", out, "a red star", "--out", out / "x.png", out=out)
        for checkpoint in list_checkpoints(out):
            (checkpoint / "state.json").write_bytes(bomb)
        watch.run("train", "--resume", out, "training.num_steps=3", out=out)
        shutil.rmtree(out)
    return watch.row("TOML bombs for `mmdit train`; JSON bombs as config and state in a run")
