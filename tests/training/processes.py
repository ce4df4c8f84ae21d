"""Programs that tests start: in a process group of their own, of which nothing stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


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
