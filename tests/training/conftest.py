"""What tests of training share."""

import threading

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Sums are taken in one order, and the machine is left to the other tests; before any run that tests share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def flaky():
    """The server of flaky:// (tests/training/flaky.py), empty and without faults."""
    from tests.training.flaky import Flaky

    Flaky.store.clear()
    Flaky.faults, Flaky.reads, Flaky.over = [], [], threading.Event()
    yield
    Flaky.over.set()
