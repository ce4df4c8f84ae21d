"""Batches from worker processes, taken over by a thread: what one process makes, in its order."""

import itertools
import threading
import time

import pytest
import torch

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


def test_the_next_item_is_fetched_while_the_last_one_is_used_and_no_more():
    fetched = []
    items = ahead((fetched.append(i) or i for i in itertools.count()), 2)
    for number in range(4):
        assert next(items) == number
        deadline = time.monotonic() + 5
        while len(fetched) < number + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert fetched == [*range(number + 3)]
    threads = threading.active_count()
    items.close()
    assert threading.active_count() == threads - 1
