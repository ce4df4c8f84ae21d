"""Batches of images: their order, bad samples among them, resuming, and worker processes."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.training.pictures import Memory, png, take, write_folder, write_shard
from tests.training.processes import PATIENCE
from training.data import DataError, loader, one_pass, open_source, split_by_key


def keys_in(batches, num: int) -> list[str]:
    return [key for _, _, keys, _ in take(batches, num) for key in keys]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 12))
def test_epochs_are_permutations_and_batches_run_across_them(num_samples, batch_size, seed, start):
    source, indices = Memory(40), list(range(0, 40, 40 // num_samples))[:num_samples]
    num_batches = start + 4 * num_samples // batch_size + 1
    keys = keys_in(loader(source, indices, batch_size, seed), num_batches)
    assert len(keys) == num_batches * batch_size
    for first in range(0, len(keys) - num_samples + 1, num_samples):
        assert sorted(keys[first : first + num_samples]) == sorted(f"k{i}" for i in indices)
    assert keys_in(loader(source, indices, batch_size, seed, start), num_batches - start) == keys[start * batch_size :]


def test_order_depends_on_seed_and_epoch():
    keys = keys_in(loader(Memory(50), range(50), 50, seed=0), 2)
    assert keys[:50] != keys[50:] and keys[:50] != keys_in(loader(Memory(50), range(50), 50, seed=1), 1)


def test_a_batch():
    batch = next(loader(Memory(9), range(9), 4, seed=0))
    assert batch.images.shape == (4, 3, 2, 3) and batch.images.dtype == torch.uint8
    numbers = [int(key[1:]) for key in batch.keys]
    assert batch.images[:, 0, 0, 0].tolist() == numbers and batch.captions == [f"caption {i}" for i in numbers]


def test_channels_come_first(tmp_path):
    write_folder(tmp_path, {"a.png": png((10, 20, 30)), "a.txt": b"a"})
    batch = next(loader(open_source(str(tmp_path)), [0], 2, seed=0))
    assert batch.images.shape == (2, 3, 8, 12) and batch.images[1, :, 3, 4].tolist() == [10, 20, 30]


def test_resuming_reads_nothing_of_what_came_before():
    source = Memory(1000)
    next(loader(source, range(1000), 4, seed=0, start_step=12_345))
    assert len(source.reads) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.sets(st.integers(0, 19)))
def test_a_bad_sample_is_replaced_by_the_next_good_one(num_samples, batch_size, bad):
    good = [i for i in range(num_samples) if i not in bad]
    batches = loader(Memory(num_samples, bad), range(num_samples), batch_size, seed=5)
    if not good:
        with pytest.raises(DataError, match=f"none of the {num_samples} samples can be used; one of them is k"):
            next(batches)
        return
    as_drawn = loader(Memory(num_samples), range(num_samples), batch_size, seed=5)
    for batch, drawn in itertools.islice(zip(batches, as_drawn, strict=True), 5):
        skipped = []
        for key, drawn_key in zip(batch.keys, drawn.keys, strict=True):
            i = int(drawn_key[1:])
            while i in bad:
                skipped.append((f"k{i}", f"bad {i}"))
                i = (i + 1) % num_samples
            assert key == f"k{i}"
        assert batch.skipped == skipped


def test_one_pass():
    source = Memory(11, bad={2, 8, 9})
    indices = [10, 2, 3, 0, 8, 9, 7]
    expected = take(one_pass(source, indices, 2), 9)
    assert [keys for _, _, keys, _ in expected] == [["k10"], ["k3", "k0"], [], ["k7"]]
    assert [skipped for *_, skipped in expected] == [[("k2", "bad 2")], [], [("k8", "bad 8"), ("k9", "bad 9")], []]
    assert take(one_pass(source, indices, 2, num_workers=2), 9) == expected
    assert take(one_pass(source, [], 2), 9) == []


@pytest.mark.parametrize(
    ("argument", "value"), [("batch_size", 0), ("seed", -1), ("start_step", -1), ("num_workers", -1), ("indices", [])]
)
def test_bad_arguments_are_refused_at_once(argument, value):
    good = {"indices": [0, 1], "batch_size": 2, "seed": 0, "start_step": 0, "num_workers": 0}
    with pytest.raises(DataError, match=argument):
        loader(Memory(2), **(good | {argument: value}))


# --- worker processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Three shards of 300 samples, one of them cut, with 11 bad images among them."""
    folder, intact = tmp_path_factory.mktemp("mixed"), png(size=(8, 8))
    for s in range(3):
        files = {}
        for i in range(100):
            bad = {13: b"", 14: intact[:40], 57: b"no image", 91: intact}.get(i)
            files |= {f"{s}-{i:02d}.png": png((s, i, 0), (8, 8)) if bad is None else bad}
            files |= {f"{s}-{i:02d}.txt": b"" if i == 91 else f"caption {s} {i}".encode()}
        path = write_shard(folder / f"{s}.tar{'.gz' if s == 0 else ''}", files)
    path.write_bytes(path.read_bytes()[: 512 * 4 * 60 + 700])
    return str(folder)


def test_workers_and_resuming_do_not_change_the_batches(mixed):
    source = open_source(mixed)
    training, _ = split_by_key(source, 0.1)
    assert [name for name, _ in source.skipped] == ["2.tar"] and 230 < len(training) < 260
    uninterrupted = take(loader(source, training, 16, seed=7), 36)  # past the end of the second epoch
    bad = {sample.key for sample in (source[int(i)] for i in training) if sample.error is not None}
    assert 9 <= len(bad) <= 12 and {key for *_, skipped in uninterrupted for key, _ in skipped} == bad
    for num_workers, start in ((1, 0), (2, 0), (2, 19), (0, 19)):
        resumed = loader(open_source(mixed), training, 16, seed=7, start_step=start, num_workers=num_workers)
        assert take(resumed, 36 - start) == uninterrupted[start:]


def test_close_ends_the_workers_and_the_global_generator_is_left_alone(monkeypatch):
    """They end by themselves, and are not killed when torch has waited for long."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)
    state = torch.random.get_rng_state()
    batches = loader(Memory(20), range(20), 4, seed=0, num_workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children() and [worker.exitcode for worker in workers] == [0, 0]
    assert torch.equal(state, torch.random.get_rng_state())


def test_workers_leave_signals_to_the_trainer():
    batches = loader(Memory(500), range(500), 4, seed=0, num_workers=2)
    expected = take(loader(Memory(500), range(500), 4, seed=0), 40)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert take(batches, 39) == expected[1:]


def test_a_worker_that_dies_is_a_clear_error():
    batches = loader(Memory(20, deadly=3), range(20), 4, seed=0, num_workers=1)
    with pytest.raises(DataError, match="a data worker died, perhaps for want of memory; try num_workers = 0"):
        take(batches, 6)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("sign", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_a_clear_error_too(sign, monkeypatch):
    """The pipe breaks before torch has noticed; what a server did to a worker that lives stays what it is."""

    raised = [sign, type(sign)("Caught ConnectionResetError in DataLoader worker process 0.")]

    class Breaks(DataLoader):
        def __iter__(self):
            batches = super().__iter__()
            batches._next_data = lambda: (_ for _ in ()).throw(raised.pop(0))
            return batches

    monkeypatch.setattr("training.workers.DataLoader", Breaks)
    with pytest.raises(DataError, match="a data worker died, .*num_workers = 0"):
        next(loader(Memory(20), range(20), 4, seed=0, num_workers=1))
    with pytest.raises(type(sign), match="Caught"):
        next(loader(Memory(20), range(20), 4, seed=0, num_workers=1))
    assert not multiprocessing.active_children()


def test_errors_come_out_of_workers_as_they_are():
    batches = loader(Memory(3, bad={0, 1, 2}), range(3), 4, seed=0, num_workers=1)
    with pytest.raises(DataError, match=r"^none of the 3 samples can be used; one of them is k\d: bad \d$"):
        next(batches)


SCRIPT = """
import itertools, multiprocessing, os, signal
from training.data import loader, open_source

signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that a script puts in the background ignores it
source = open_source("shapes:100", image_size=16)
batches = loader(source, range(100), 4, seed=0, num_workers=2)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
for batch in {rest}:
    pass
"""


@pytest.mark.parametrize("ends_by", ["itself", "Ctrl-C"])
def test_no_worker_outlives_the_program(ends_by):
    rest = "itertools.islice(batches, 3)" if ends_by == "itself" else "batches"
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(rest=rest)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    if ends_by == "Ctrl-C":
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = program.communicate(timeout=PATIENCE)
    assert program.returncode == (0 if ends_by == "itself" else -signal.SIGINT)
    assert "Process-" not in errors  # no traceback of a worker
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
