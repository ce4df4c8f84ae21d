"""Batches from worker processes, through memory that is shared: what one process makes, whatever its size."""

import itertools
import shutil
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from training import workers
from training.ahead import ahead
from training.errors import DataError
from training.workers import SLOTS, Room, empty, run


@dataclass(frozen=True)
class Made:
    """What a step is made into here: a filled tensor, a small and a large one, and a name."""

    filled: Tensor
    small: Tensor
    large: Tensor
    name: str


def make(step: int) -> Made:
    filled = empty(3, 5, 4)
    filled.fill_(step % 256)
    return Made(filled.permute(2, 0, 1), torch.tensor([step]), torch.full((20_000,), float(step)), f"step {step}")


def broken(step: int) -> Made:
    made = make(step)
    if step == 4:
        raise DataError("step 4 cannot be made")
    return made


def alike(one: Made, other: Made) -> bool:
    tensors = all(
        torch.equal(getattr(one, x), getattr(other, x)) and getattr(one, x).dtype == getattr(other, x).dtype
        for x in ("filled", "small", "large")
    )
    return tensors and one.filled.stride() == other.filled.stride() and one.name == other.name


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The slots that are copied from, one after the other."""
    found, take = [], Room.take
    monkeypatch.setattr(Room, "take", lambda room, place: found.append((place.worker, place.slot)) or take(room, place))
    return found


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_comes_from_workers_is_what_one_process_makes(num_workers, taken):
    found = list(run(make, range(14), num_workers, largest=60))  # kept, while slots are filled again
    assert all(alike(one, make(step)) for step, one in enumerate(found)) and len(found) == 14
    assert taken == [(step % num_workers, step // num_workers % SLOTS) for step in range(14)]
    assert not any(one.filled.is_shared() for one in found)


@pytest.mark.parametrize("largest", [0, 59])
def test_what_has_no_room_comes_all_the_same(largest, taken):
    assert all(alike(one, make(step)) for step, one in enumerate(run(make, range(5), 1, largest))) and not taken


def test_memory_that_is_short_is_not_taken(taken, monkeypatch):
    need = 60 * SLOTS
    for free, slots in ((2 * need, 0), (2 * need + 2, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            assert len(list(run(make, range(2), 1, largest=60))) == 2 and len(taken) == slots
    monkeypatch.setattr(workers, "SHARED", "/none")  # a system that does not say
    assert len(list(run(make, range(2), 1, largest=60))) == 2 and len(taken) == 4


def test_an_error_comes_in_its_place_and_takes_no_slot(taken):
    batches = run(broken, range(9), 1, largest=60)
    assert all(alike(next(batches), make(step)) for step in range(4))
    with pytest.raises(DataError, match="step 4 cannot be made"):
        next(batches)


def test_a_slot_is_lent_again_when_its_batch_is_copied():
    room = Room(2, 6)
    places = []
    for number in range(SLOTS):
        room.lent = None
        slot = room.lend(1, 6)
        assert room.lend(1, 1) is None  # one at a time
        slot.fill_(number)
        places.append(room.place_of(slot.view(2, 3).T))
    room.lent = None
    assert room.lend(1, 6) is None and room.lend(0, 7) is None and room.place_of(torch.zeros(6)) is None
    copies = [room.take(place) for place in places]
    assert [int(x[0, 0]) for x in copies] == [*range(SLOTS)] and copies[0].shape == (3, 2)
    again = room.lend(1, 6)
    again.fill_(9)
    assert [int(x[0, 0]) for x in copies] == [*range(SLOTS)] and room.place_of(again).slot == 0


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
