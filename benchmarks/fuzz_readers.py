"""Fuzzing of every reader of data and models with damaged and hostile files: only our own errors may be raised.

    python -m benchmarks.fuzz_readers --inputs 10000 --out benchmarks/results/fuzz.md
    python -m benchmarks.fuzz_readers --models --inputs 2800 --out benchmarks/results/fuzz_models.md

An input is a valid file with some bytes changed, removed, duplicated or replaced by strings and numbers that parsers
often get wrong, or one of the hand-made hostile files (`hostile`); of models, runs and caches mostly the values in
their JSON are changed (`fuzz_models`). Input i of a reader is a function of (seed, i). A
crash is an exception that is not ours, a process that dies, takes more than SECONDS or more memory than MEMORY, or a
file touched outside of the input's folder.
"""

from __future__ import annotations

import argparse
import errno
import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.fuzz_models import MODELS, damage, made, reader

SECONDS = 20
MEMORY = 6 << 30
SHARE_HOSTILE = 0.05
WORDS = (
    b"../",
    b"/etc/passwd",
    b"\0",
    b"\xff\xfe",
    b"NaN",
    b"1e999",
    b"9" * 400,
    b"[" * 400,
    b'{"a":' * 300,
    b"\n",
    b'"',
)
NUMBERS = [struct.pack(form, n) for form in ("<I", ">I", "<Q", ">H") for n in (0, 1, 255, 2**15, 2**16 - 1)]

Check = Callable[[Path, bytes], None]


# --- the readers -----------------------------------------------------------------------------------------------------


def _index(name: str) -> Check:
    """Index a data set of this file, for some inputs with image sizes, and read its first samples."""

    def check(folder: Path, data: bytes) -> None:
        from training.data import SourceOptions, open_source
        from training.sources import Wanted

        (folder / name).write_bytes(data)
        wanted = Wanted(captions=(("caption", 1.0), ("txt", 1.0)) if len(data) % 2 else (), sizes=len(data) % 3 == 0)
        options = SourceOptions(buckets=wanted.sizes, wanted=wanted)
        source = open_source(str(folder), image_size=16, need_captions=len(data) % 5 > 0, options=options)
        for i in range(min(4, len(source))):
            sample = source[i]
            assert (sample.image is None) == bool(sample.error)
            sample.key.encode(), sample.caption.encode()

    return check


def _image(folder: Path, data: bytes) -> None:
    from training.images import read_fitted, read_image, read_size

    size = read_size(data)
    assert read_fitted(data, (16, 24)).image.shape == (16, 24, 3)
    if size[0] * size[1] < 10**6:
        assert read_image(data).ndim == 3


def _config(folder: Path, data: bytes) -> None:
    from training.config import load_config

    (folder / "my.toml").write_bytes(data)
    load_config(str(folder / "my.toml"), [])


def _corpus(folder: Path, data: bytes) -> None:
    from training.corpus import Corpus

    (folder / "text.jsonl").write_bytes(data)
    for document in Corpus(str(folder / "text.jsonl")):
        document.encode("utf-8", "replace")


READERS: dict[str, Check] = {
    "shard (.tar)": _index("0.tar"),
    "shard (.tar.gz)": _index("0.tar.gz"),
    "Parquet": _index("0.parquet"),
    "metadata.jsonl": _index("metadata.jsonl"),
    "metadata.csv": _index("metadata.csv"),
    "caption (.json)": _index("good.json"),
    "caption (.txt)": _index("good.txt"),
    "image": _image,
    "corpus (.jsonl)": _corpus,
    "config (.toml)": _config,
    **{name: reader(damaged) for name, damaged in MODELS.items()},
}


# --- valid and hostile files -----------------------------------------------------------------------------------------


def picture(kind: str, mode: str = "RGB") -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert(mode).save(file, kind)
    return file.getvalue()


def tar(files: list[tuple[str, bytes]], **fields: Any) -> bytes:
    """A tar archive of (name, content) pairs; fields: of every header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fields.pop("format", tarfile.GNU_FORMAT)) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [picture("PNG")] * 6, "text": ["one", "two", None, "four", "five", "six"]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=4)
    return file.getvalue()


def _pairs() -> list[tuple[str, bytes]]:
    return [("a.png", picture("PNG")), ("a.txt", b"a cat"), ("b.jpg", picture("JPEG")), ("b.json", b'{"caption": "b"}')]


def good(reader: str) -> list[bytes]:
    """Valid files for the reader."""
    long_name = [("n" * 150 + ".png", picture("PNG")), ("n" * 150 + ".txt", b"long")]
    row = {"file_name": "good.png", "text": "a cat"}
    if reader in MODELS:
        return [made(MODELS[reader].kind)[MODELS[reader].file]]
    match reader:
        case "shard (.tar)":
            return [tar(_pairs()), tar(long_name), tar(long_name, format=tarfile.PAX_FORMAT)]
        case "shard (.tar.gz)":
            return [gzip.compress(tar(_pairs())), gzip.compress(tar(long_name))]
        case "Parquet":
            return [_parquet()]
        case "metadata.jsonl" | "corpus (.jsonl)":
            return [b"\n".join(json.dumps(row | {"n": i}).encode() for i in range(4))]
        case "metadata.csv":
            return [b"file_name,text\ngood.png,a cat\ngood.png,'another, cat'\n"]
        case "caption (.json)":
            return [b'{"caption": ["one", "two"], "width": 40, "text": "three"}']
        case "caption (.txt)":
            return ["ein Bär\n".encode(), b"a cat"]
        case "image":
            kinds = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("JPEG", "L"), ("GIF", "P")]
            return [picture(*how) for how in [*kinds, ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "I;16")]]
        case _:
            return [b'preset = "demo"\nname = "x"\n[data]\nimage_size = [64, 32]\n[optimizer]\nlr = 1e-4\n']


def png_bomb(side: int = 100_000) -> bytes:
    """A PNG whose header claims side x side pixels, with the data of a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")
    )


DEEP, NUMBER, LARGE = b"[" * 200_000, b"9" * 20_000, b"x" * 10_000_000
NAMES = ("../../../../etc/passwd", "/etc/passwd", "a\0b", "..\\..\\x", "~/x", "x" * 5000)


def hostile_tars() -> list[bytes]:
    """Members with paths outside the folder, links, false sizes, and contents too large for memory."""
    outside = [(name, picture("PNG")) for name in ("../../up.png", "/tmp/absolute.png", "a/../../../up.png", "..png")]
    texts = [(name.replace(".png", ".txt"), b"outside") for name, _ in outside]
    lying = {"size": "-1", "GNU.sparse.size": "9" * 30}
    return [
        tar([*outside, *texts]),
        tar(_pairs(), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar(_pairs(), type=tarfile.LNKTYPE, linkname="../../up"),
        tar(_pairs(), type=tarfile.GNUTYPE_SPARSE),
        tar([("a.png", png_bomb()), ("a.txt", LARGE), ("b.png", picture("PNG")), ("b.json", DEEP)]),
        tar([("a.png", picture("PNG"))], pax_headers=lying, format=tarfile.PAX_FORMAT),
        tar([("a.png", picture("PNG")), ("a.json", b'{"caption": ' + NUMBER + b"}")]),
    ]


def hostile_objects() -> list[bytes]:
    """JSON that is deeply nested, very long, or invalid."""
    long = [b'{"caption":' + NUMBER + b"}", b'{"caption": "' + LARGE + b'"}']
    return [DEEP, *long, b"\xff\xfe\x00", b'{"a":' * 100_000]


def hostile_tables() -> list[bytes]:
    """CSV with very long and unclosed cells, and paths outside the folder."""
    head = b"file_name,text\n"
    cells = [head + LARGE, head + b'good.png,"' + LARGE, head + b"a\0b,c\n", b"file_name,file_name\na,b,c,d\n", b'"']
    return [*cells, head + b"\n".join(name.encode() + b",t" for name in NAMES)]


def hostile_configs() -> list[bytes]:
    """TOML that is deeply nested, very long, or out of range."""
    bombs = [b"a = " + DEEP, b"a = " + NUMBER, b"a." * 50_000 + b"b = 1", b"name = '" + LARGE + b"'"]
    wrong = [b"[training]\nbatch_size = 1e400\n", b"[data]\nnum_workers = -9" + NUMBER]
    return [*bombs, *wrong, b"\xff", b"[[data]]\n"]


def hostile(reader: str) -> list[bytes]:
    """Hostile files for the reader, made by hand."""
    match reader:
        case "shard (.tar)":
            return hostile_tars()
        case "shard (.tar.gz)":
            cut = gzip.compress(tar(_pairs()))[:-9] + LARGE[:99]
            return [*map(gzip.compress, hostile_tars()), gzip.compress(bytes(10**8)), cut]
        case "metadata.jsonl" | "corpus (.jsonl)":
            rows = [json.dumps({"file_name": name, "text": "t"}).encode() for name in NAMES]
            return [b"\n".join(rows), *hostile_objects()]
        case "metadata.csv":
            return hostile_tables()
        case "caption (.json)":
            return hostile_objects()
        case "caption (.txt)":
            return [LARGE, b"\xff\xfe\x00\xd8" * 999, bytes(99), "\u202e\u0000 \U000e0001".encode()]
        case "image":
            return [png_bomb(), png_bomb(2**31 - 1), b"GIF89a" + b"\xff" * 99, picture("PNG")[:60], b""]
        case "config (.toml)":
            return hostile_configs()
        case _:
            return []


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A valid file with one to eight mutations."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 16, 100))
        match rng.randrange(7):
            case 0:
                data[at : at + length] = rng.randbytes(length)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at : at + length] = rng.choice(WORDS)
            case 4:
                data[at : at + 4] = rng.choice(NUMBERS)
            case 5 if rng.random() < 0.2:
                del data[at:]
            case 6 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def inputs(reader: str, count: int, seed: int) -> Iterator[bytes]:
    """The inputs of a reader: the hostile files, then mutations of valid files and, in part, of hostile ones."""
    seeds, bad = good(reader), hostile(reader)
    for i in range(count):
        rng = random.Random(f"{seed} {reader} {i}")
        changed = damage(rng, MODELS[reader].file, seeds[0]) if reader in MODELS and rng.random() < 0.7 else None
        if i < len(bad):
            yield bad[i]
        elif changed is not None:
            yield changed
        elif bad and rng.random() < SHARE_HOSTILE:
            small = [data for data in bad if len(data) < 10**6] or bad
            yield mutated(rng, small)
        else:
            yield mutated(rng, seeds)


# --- running the inputs ----------------------------------------------------------------------------------------------

_own: list[str] = []  # folders that may be touched while an input is read
_touched: list[str] = []
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}


def _audit(event: str, args: tuple) -> None:
    if not _own or (event != "open" and event not in _WRITES):
        return
    path = args[0] if args and isinstance(args[0], str | bytes) else None
    if path is None:
        return
    where = f"/proc/self/fd/{args[1]}" if event in ("os.remove", "os.rmdir") and args[1] >= 0 else ""  # its dir_fd
    real = os.path.realpath(os.path.join(where, os.fsdecode(path)))
    if event == "os.remove" and not os.path.isdir(os.path.dirname(real)):
        return  # of an earlier input, garbage-collected late: its folder is gone
    if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        readable = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc", "/sys", "/dev", "/usr")
        if real.startswith(readable):
            return
    if real != os.devnull and not real.startswith(tuple(_own)):
        _touched.append(f"{event} {real}")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """The files touched outside of a folder within this context."""
    if _audit not in _hooks:
        sys.addaudithook(_audit)
        _hooks.append(_audit)
    _touched.clear()
    _own[:] = [os.path.realpath(folder)]
    try:
        yield _touched
    finally:
        _own.clear()


_hooks: list[Any] = []


def outcome(reader: str, data: bytes, folder: Path) -> str:
    """ "accepted", "refused", or "crash: " with the reason."""
    with tempfile.TemporaryDirectory(dir=folder) as own, watched(Path(own)) as touched:
        before, tempfile.tempdir = tempfile.tempdir, own
        try:
            (Path(own) / "data").mkdir()
            (Path(own) / "data" / "good.png").write_bytes(GOOD_PICTURE)
            READERS[reader](Path(own) / "data", data)
            result = "accepted"
        except ValueError as error:
            ours = type(error) is ValueError or type(error).__module__.startswith(("training", "mmdit", "samplers"))
            one_line = "\n" not in str(error)
            result = "refused" if ours and one_line else f"crash: {type(error).__name__}: {str(error)[:100]}"
        except FileNotFoundError as error:  # of a checkpoint or model, of which no other is left
            result = "refused" if error.args[0] != errno.ENOENT else f"crash: {error}"
        except BaseException as error:
            result = f"crash: {type(error).__name__}: {str(error)[:100]}"
        finally:
            tempfile.tempdir = before
        found = sorted(set(touched))
    return f"crash: touched {found[0]}" if found else result


GOOD_PICTURE = picture("PNG")


def _work(reader: str, first: int, count: int, seed: int, folder: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for i, data in enumerate(inputs(reader, count, seed)):
        if i >= first:
            signal.alarm(SECONDS)
            result = outcome(reader, data, Path(folder))
            signal.alarm(0)
            pipe.send((i, result))
    pipe.send((count, "done"))


def fuzz(reader: str, count: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """(numbers of inputs refused, accepted and crashed, descriptions of the crashes); inputs run in a child process."""
    counts: Counter = Counter()
    crashes: list[str] = []
    context, done = multiprocessing.get_context("fork"), 0
    while done < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(reader, done, count, seed, str(folder), theirs))
        process.start()
        theirs.close()
        try:
            while True:
                i, result = ours.recv()
                if result == "done":
                    done = count
                    break
                done = i + 1
                counts[result.partition(":")[0]] += 1
                if result.startswith("crash"):
                    crashes.append(f"input {i}: {result}")
        except EOFError:
            process.join()
            counts["crash"] += 1
            crashes.append(f"input {done}: crash: the process died ({process.exitcode})")
            done += 1
        process.join()
    return counts, crashes


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz every reader of data with damaged and hostile files.")
    parser.add_argument("--inputs", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", action="store_true", help="readers of models, runs and caches instead of data")
    parser.add_argument("--reader", choices=sorted(READERS), help="only this one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = [options.reader] if options.reader else [name for name in READERS if (name in MODELS) == options.models]
    each = -(-options.inputs // len(names))
    lines = ["| reader | inputs | refused | accepted | crashes |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for name in names:
            counts, crashes = fuzz(name, each, options.seed, Path(folder))
            lines.append(f"| {name} | {each} | {counts['refused']} | {counts['accepted']} | {counts['crash']} |")
            print(lines[-1], *crashes[:20], sep="\n    ", flush=True)
    text = "\n".join(lines)
    print(text)
    if options.out:
        which = "--models " if options.models else ""
        command = f"python -m benchmarks.fuzz_readers {which}--inputs {options.inputs} --seed {options.seed}"
        head = (__doc__ or "").split("\n\n")
        options.out.write_text(f"# Damaged and hostile files\n\n    {command}\n\n{head[2].strip()}\n\n{text}\n")


if __name__ == "__main__":
    main()
