"""Batches from worker processes, taken over by a thread: what one process makes, in its order."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from tests.training.processes import PATIENCE
from training.ahead import ahead
from training.errors import DataError
from training.workers import run


def make(step: int) -> tuple[torch.Tensor, str]:
    return torch.full((3, 5, 4), step).permute(2, 0, 1), f"step {step}"


def broken(step: int) -> tuple[torch.Tensor, str]:
    if step == 4:
        raise DataError("step 4 cannot be made")
    return make(step)


def alike(one: tuple[torch.Tensor, str], step: int) -> bool:
    image, name = make(step)
    return torch.equal(one[0], image) and one[0].stride() == image.stride() and one[1] == name


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_comes_from_workers_is_what_one_process_makes(num_workers):
    found = list(run(make, range(14), num_workers))
    assert all(alike(one, step) for step, one in enumerate(found)) and len(found) == 14


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_comes_in_its_place(num_workers):
    batches = run(broken, range(9), num_workers)
    assert all(alike(next(batches), step) for step in range(4))
    with pytest.raises(DataError, match="step 4 cannot be made"):
        next(batches)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_error_of_the_steps_comes_after_what_was_made(num_workers):
    def steps():
        yield from range(5)
        raise DataError("no more steps")

    batches = run(make, steps(), num_workers)
    assert all(alike(next(batches), step) for step in range(5))
    with pytest.raises(DataError, match="no more steps"):
        next(batches)


def test_workers_start_where_signals_cannot_be_blocked(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    assert alike(next(run(make, range(3), 1)), 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_fork_that_ends_leaves_the_workers_alone():
    found = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (found.stdout.split(), found.returncode) == (["left", "39"], 0), found.stderr


def collecting(step: int) -> int:
    gc.collect()
    return step


def test_workers_collect_no_garbage_of_the_trainer(tmp_path):
    class Left:
        def __init__(self):
            self.itself = self

        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Left()
        assert list(run(collecting, range(2), 1)) == [0, 1]
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
        gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


FORKS = """
import os, sys
from training.workers import run
items = run(int, range(40), 1)
next(items)
if os.fork() == 0:
    sys.exit()
os.wait()
print("left", sum(1 for _ in items))
"""


def test_the_next_item_is_fetched_while_the_last_one_is_used_and_no_more():
    fetched, before = [], {*threading.enumerate()}
    items = ahead((fetched.append(i) or i for i in itertools.count()), 2)
    for number in range(4):
        assert next(items) == number
        deadline = time.monotonic() + 60
        while len(fetched) < number + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert fetched == [*range(number + 3)]
    [thread] = {*threading.enumerate()} - before
    items.close()
    thread.join(60)
    assert not thread.is_alive()


def dies(step: int) -> torch.Tensor:
    if step == 3:
        os._exit(1)
    return torch.zeros(2)


def test_the_thread_of_a_worker_that_died_ends():
    before = {*threading.enumerate()}
    with pytest.raises(DataError, match="a data worker died"):
        list(run(dies, itertools.count(), 2))
    for thread in {*threading.enumerate()} - before:
        thread.join(20)
        assert not thread.is_alive()


LEFT_OPEN = """
import itertools, multiprocessing
from training.workers import run
batches = run(float, itertools.count(), 1)
print(next(batches), flush=True)
"""


def test_batches_that_are_left_open_say_nothing_at_exit():
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0\n", "")


def test_what_is_fetched_ahead_comes_in_order_with_its_error():
    def items():
        yield from range(20)
        raise DataError("broken")

    fetched = ahead(items(), 3)
    assert [next(fetched) for _ in range(20)] == list(range(20))
    with pytest.raises(DataError, match="broken"):
        next(fetched)
    endless = ahead(itertools.count(), 2)
    assert next(endless) == 0
    endless.close()
