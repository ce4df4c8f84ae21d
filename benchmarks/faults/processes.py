"""Processes that die or are stopped by signals, servers that are slow or stop answering, and NaN in batches."""

from __future__ import annotations

import functools
import http.server
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.runs import (
    TINY,
    Command,
    Ended,
    Row,
    bad_checkpoints,
    children,
    difference,
    equal_to,
    in_writing,
    listing,
    newest,
    run,
    running,
    steps,
)
from benchmarks.fuzz_readers import picture, tar

GRACE = 30.0  # seconds between SIGTERM and SIGKILL
ROUNDING = 1e-5
ENDLESS = ("train", *TINY, "training.num_steps=100000", "training.checkpoint_every=5")
WORKERS = ("data.cache_latents=false", "data.num_workers=2")


def _difference_after_resume(folder: Path, out: Path, *settings: str, world: int = 1) -> float:
    """Resume a stopped run for two steps; returns its difference from an uninterrupted run."""
    last = (f"training.num_steps={newest(out) + 2}", *settings)
    assert (
        run(folder / "whole.log", "train", *TINY, *last, "--out", folder / f"{out.name}-whole", world=world).status == 0
    )
    if run(folder / "again.log", "train", "--resume", out, *last, world=world).status:
        return float("inf")
    return difference(folder / f"{out.name}-whole", out)


def processes(folder: Path) -> Iterator[Row]:
    """One of two ranks dies, torchrun dies, and a data worker dies."""
    words = ("train", *TINY, "training.num_steps=40", "training.checkpoint_every=5", "parallel.strategy=ddp")
    out, whole = folder / "rank", folder / "whole"
    assert run(folder / "whole.log", *words, "--out", whole, world=2).status == 0
    with running(Command(*words, "--out", out, world=2, launch=("--max-restarts", "1")), folder / "log") as command:
        command.until(lambda: steps(out) >= 12)
        os.kill(command.ranks()[1], signal.SIGKILL)
        ended = command.end()
    different = difference(whole, out) if ended.status == 0 else float("inf")
    told = [line for line in ended.errors if "another one of the 2 ended" in line]
    yield Row(
        "a rank of two dies (SIGKILL; torchrun --max-restarts 1)",
        1,
        f"{len(told)} line of the other; torchrun's second attempt came to the end, status {ended.status}: "
        + equal_to(different),
        "one line; torchrun starts all again from the newest checkpoint; equal to rounding",
        len(told) == 1 and different <= ROUNDING,
    )
    yield _without_torchrun(folder, whole, words)
    out = folder / "worker"
    with running(Command(*ENDLESS, *WORKERS, "--out", out), folder / "log") as command:
        command.until(lambda: steps(out) >= 12)
        os.kill(random.Random(0).choice(_workers(command)), signal.SIGKILL)
        ended = command.end()
    different = _difference_after_resume(folder, out, *WORKERS)
    yield Row(
        "a data worker dies (SIGKILL)",
        1,
        f"status {ended.status}, `{''.join(ended.errors[-1:])}`; resumed: {equal_to(different)}",
        "status 2, one line; resumed from the newest checkpoint to the same bits",
        ended.one_line and different == 0 and not bad_checkpoints(out),
    )


def _without_torchrun(folder: Path, whole: Path, words: tuple[str, ...]) -> Row:
    """torchrun dies while one of its two ranks is stopped, and new runs are started in the same folder."""
    out = folder / "orphans"
    with running(Command(*words, "--out", out, world=2), folder / "log") as command:
        command.until(lambda: steps(out) >= 12)
        ranks = command.ranks()
        os.kill(ranks[1], signal.SIGSTOP)
        command.send(signal.SIGKILL, [command.process.pid])
        command.wait()
        time.sleep(1.0)  # until the other waits for it
        before = listing(out, but=out / "tensorboard")
        refused = run(folder / "refused.log", "train", "--resume", out)
        untouched = listing(out, but=out / "tensorboard") == before
        with running(Command(*words, "--out", out, "--restart", world=2), folder / "again.log") as again:
            again.until(lambda: "waiting for it to end" in again.log.read_text())
            os.kill(ranks[1], signal.SIGCONT)
            ended = again.end()
        left = command.orphans()
    told = re.findall(r"stopped at step (\d+), all saved", command.log.read_text())
    went_on = bool(told) and f"resumed at step {told[0]}" in ended.output
    different = difference(whole, out) if ended.status == 0 else float("inf")
    line = "".join(refused.errors[-1:]).replace(f"{folder}/", "")
    return Row(
        "torchrun alone dies (SIGKILL), one of its two processes asleep; a new run begun in their folder",
        2,
        f"asleep: status {refused.status} after {refused.seconds:.0f} s, `{line}`; awake: both saved step "
        f"{''.join(told)} and ended, the new run had waited and went on: {equal_to(different)}",
        "one line, nothing touched; they save and end, the new run goes on: equal to rounding",
        refused.one_line and untouched and went_on and not left and different <= ROUNDING,
    )


def _workers(command: Command) -> list[int]:
    return [pid for pid in children(command.process.pid) if b"resource_tracker" not in _name(pid)]


def _name(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


# --- a server --------------------------------------------------------------------------------------------------------


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files. Every `late_every`-th answer takes `late` seconds; after `answers` of them none comes."""

    late_every, late, answers = 10**9, 0.0, 10**9
    asked = 0
    closed = threading.Event()

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        own = type(self)
        own.asked += 1
        if own.asked % own.late_every == 0:
            time.sleep(own.late)
        if own.asked > own.answers:
            own.closed.wait()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers.get("Range", f"bytes=0-{len(data) - 1}")
        first, last = map(int, re.findall(r"\d+", asked)[:2])
        part = data[first : last + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        try:
            self.wfile.write(part)
        except OSError:  # the client has given up
            self.close_connection = True


@contextmanager
def _served(folder: Path, **how: float) -> Iterator[str]:
    handler: type[_Server] = type("Handler", (_Server,), {**how, "asked": 0, "closed": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        server.block_on_close = False
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/pictures.tar"
        finally:
            handler.closed.set()
            server.shutdown()


def server(folder: Path) -> Iterator[Row]:
    """Of shards: one that answers late again and again, and one that stops to answer."""
    data = folder / "data"
    data.mkdir()
    pairs = [
        (f"{i:02d}{kind}", x) for i in range(24) for kind, x in ((".png", picture("PNG")), (".txt", b"picture %d" % i))
    ]
    (data / "pictures.tar").write_bytes(tar(pairs))
    words = ("train", *TINY, "training.num_steps=12", "training.checkpoint_every=3", "data.cache_latents=false")
    impatient = ("data.timeout=0.5", "data.retries=3")
    assert run(folder / "log", *words, "--data", data / "pictures.tar", "--out", folder / "whole").status == 0
    with _served(data, late_every=15, late=1.0) as url:
        ended = run(folder / "log", *words, *impatient, "--data", url, "--out", folder / "late")
    different = difference(folder / "whole", folder / "late") if ended.status == 0 else float("inf")
    yield Row(
        "a server of shards that answers every 15th time after 1 s, where 0.5 s are allowed",
        1,
        f"status {ended.status} {' '.join(ended.errors)}: {equal_to(different)} as from disk",
        "asked again; the same bits as from disk",
        different == 0,
    )
    with _served(data, answers=60) as url:
        ended = run(folder / "log", *words, *impatient, "--data", url, "--out", folder / "never")
        line = ended.errors[-1].replace(url, "http://.../pictures.tar") if ended.errors else ""
    saved = newest(folder / "never")
    with _served(data) as url:
        again = run(folder / "log", "train", "--resume", folder / "never", f"data.source={url}")
    different = difference(folder / "whole", folder / "never") if again.status == 0 else float("inf")
    yield Row(
        "a server of shards that stops to answer",
        1,
        f"status {ended.status} after {ended.seconds:.0f} s, `{line}`; step {saved} saved; server back, resumed: "
        + equal_to(different),
        "status 2, one line after the last try; resumed to the same bits",
        ended.one_line and different == 0,
    )


# --- batches ---------------------------------------------------------------------------------------------------------

SPOILED = """
import sys
from mmdit_cli.main import main
from training.feed import LatentFeed
real, spoiled = LatentFeed.batches, set(map(int, sys.argv.pop(1).split(",")))
def batches(self, batch_size, seed, start_step=0, *share):
    for k, batch in enumerate(real(self, batch_size, seed, start_step, *share), start=start_step + 1):
        if k in spoiled:
            batch.latents[0, 0, 0, 0] = float("nan")
        yield batch
LatentFeed.batches = batches
main()
"""


def not_finite(folder: Path) -> Iterator[Row]:
    """NaN in one number of a batch: in single steps and two in a row, and in three in a row."""
    words = ("train", *TINY, "training.num_steps=12", "training.checkpoint_every=3", "training.max_bad_steps=3")
    out = folder / "some"
    ended = run(folder / "log", "4,8,9", *words, "--out", out, code=SPOILED)
    told = re.findall(r"step (\d+) is left out", ended.output)
    yield Row(
        "NaN in the batches of steps 4, 8 and 9",
        1,
        f"steps {', '.join(told)} left out and counted, status {ended.status}",
        "left out, counted, trained on",
        told == ["4", "8", "9"] and ended.status == 0 and newest(out) == 12,
    )
    out = folder / "many"
    ended = run(folder / "log", "7,8,9", *words, "--out", out, code=SPOILED)
    different = difference_of_resumed(folder, out, words)
    yield Row(
        "NaN in three batches in a row, `training.max_bad_steps=3`",
        1,
        f"status {ended.status}, `{''.join(ended.errors[-1:])}`; resumed without NaN: {equal_to(different)}",
        "status 2, one line; the checkpoint before is whole, resumed to the same bits",
        ended.one_line and different == 0,
    )


def difference_of_resumed(folder: Path, out: Path, words: tuple[str, ...]) -> float:
    """Resume the run; returns its difference from an uninterrupted run."""
    assert run(folder / "log", *words, "--out", folder / "whole").status == 0
    again = run(folder / "log", "train", "--resume", out)
    return difference(folder / "whole", out) if again.status == 0 else float("inf")


# --- signals ---------------------------------------------------------------------------------------------------------


def signals(folder: Path, times: int = 6) -> Iterator[Row]:
    """SIGTERM with a grace period of 30 s: to a single process, to one of two ranks, to torchrun."""
    rng, statuses, slowest, problems, different = random.Random(0), [], 0.0, [], 0.0
    for i in range(times):
        out = folder / f"one{i}"
        with running(Command(*ENDLESS, "--out", out), folder / "log") as command:
            command.until(lambda out=out: steps(out) >= 1)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.5))
            if i % 2:
                command.until(lambda out=out: in_writing(out), pause=0)  # type: ignore[misc]
            ended, seconds = _terminated(command, command.process.pid)
        statuses.append(ended.status)
        slowest = max(slowest, seconds)
        if newest(out) != steps(out) or "all saved" not in ended.output:
            problems.append(f"saved step {newest(out)} of {steps(out)}")
        problems += bad_checkpoints(out)
        different = max(different, _difference_after_resume(folder, out)) if i < 2 else different
    yield Row(
        "SIGTERM to one process, half of them while a checkpoint is written",
        times,
        f"status {', '.join(map(str, sorted({*statuses})))}, ended within {slowest:.1f} s, the last step saved; "
        f"resumed: {equal_to(different)}" + "".join(f"; {p}" for p in problems[:3]),
        f"status 0 within {GRACE:.0f} s, the step saved; resumed to the same bits",
        {*statuses} == {0} and not problems and different == 0 and slowest < GRACE,
    )
    for who in ("a rank of two", "torchrun itself"):
        yield _to_two(folder, who)


def _to_two(folder: Path, who: str) -> Row:
    out = folder / ("rank" if who == "a rank of two" else "torchrun")
    with running(Command(*ENDLESS, "--out", out, world=2), folder / "log") as command:
        command.until(lambda: steps(out) >= 7)
        target = command.ranks()[1] if who == "a rank of two" else command.process.pid
        ended, seconds = _terminated(command, target)
    saved = newest(out) == steps(out) and ended.output.count("all saved") == 1 and not bad_checkpoints(out)
    different = _difference_after_resume(folder, out, world=2) if saved else float("inf")
    last = [line for line in ended.output.splitlines() if "SignalException" in line][-1:]
    return Row(
        f"SIGTERM to {who}",
        1,
        f"status {ended.status} after {seconds:.1f} s{'; torchrun: `' + last[0].strip() + '`' if last else ''}; "
        f"step {newest(out)} of {steps(out)} saved, resumed: {equal_to(different)}",
        "both stop at the same step, saved"
        + (", status 0" if who == "a rank of two" else "; torchrun says it was stopped"),
        saved and different <= ROUNDING and seconds < GRACE and (ended.status == 0) == (who == "a rank of two"),
    )


def _terminated(command: Command, pid: int) -> tuple[Ended, float]:
    begun = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    ended = command.end()
    return ended, time.monotonic() - begun
