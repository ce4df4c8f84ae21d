"""Programs that tests start: in a process group of their own, of which nothing stays."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from training.run import RunFolder

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 600  # seconds for a program: it ends one that hangs, and none on a busy machine


@contextmanager
def python(*words: object, **variables: str) -> Iterator[subprocess.Popen]:
    """`python WORDS` from this source tree, on one thread, with environment variables added; its errors are output."""
    env: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | env,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """One below those that the system gives to connections, so that none takes it meanwhile; nor does another of the
    test processes side by side, which have others.
    """
    first = 20_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10)
    while True:
        port = random.SystemRandom().randrange(first, first + 1_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def together(world: int, *words: object) -> list[str]:
    """What each of `world` processes of one run says that do `python WORDS`, as torchrun would start them; all have to
    succeed.
    """
    own = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(python(*words, **own, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(world)
        ]
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)
    return said


def end(process: subprocess.Popen, sig: int = signal.SIGTERM) -> str:
    """The signal to the whole group, which ends with status 0; returns what is printed from here on."""
    os.killpg(process.pid, sig)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return output


LONG_COMMAND = ("-m", "mmdit_cli", "train", "pixels-tiny", "training.num_steps=100000", "training.checkpoint_every=0")
LONG_COMMAND += ("training.validate_every=0", "training.sample_every=0")


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, found) if b"mmdit_cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until and len(RunFolder(out).metrics()) < steps:
        time.sleep(0.05)


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
