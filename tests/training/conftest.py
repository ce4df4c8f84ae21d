"""What tests of training share."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Sums are taken in one order, and the machine is left to the other tests; before any run that tests share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
