"""What a step frees the next one takes, without asking the kernel; afterwards all is as it was."""

import os
import platform
from types import SimpleNamespace

import pytest
import torch

from mmdit import memory
from mmdit.memory import GIVES_BACK, KEEPS, keeping_memory

CPU = torch.device("cpu")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")


@pytest.fixture
def asked(monkeypatch):
    """What the C library is asked."""
    found: list = []
    fake = SimpleNamespace(mallopt=lambda *args: found.append(args), malloc_trim=lambda left: found.append("trim"))
    monkeypatch.setattr(memory, "_glibc", lambda: fake)
    return found


def test_the_first_asks_and_the_last_gives_back(asked):
    with keeping_memory(CPU):
        assert asked == list(KEEPS)
        with pytest.raises(KeyboardInterrupt), keeping_memory(CPU):
            raise KeyboardInterrupt
        assert asked == list(KEEPS)
    assert asked == [*KEEPS, *GIVES_BACK, "trim"]


def test_of_a_gpu_nothing_is_asked(asked):
    with keeping_memory(torch.device("cuda")):
        pass
    assert asked == []


def test_where_the_environment_says_how_nothing_is_changed(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert memory._glibc() is None
    with keeping_memory(CPU):
        pass


def test_where_there_is_no_glibc_nothing_is_changed(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert memory._glibc() is None


@glibc
def test_pages_are_asked_for_once_and_go_back_at_the_end(monkeypatch):
    import resource

    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)

    def pages() -> int:
        """Pages that 20 tensors of 8 MB need from the kernel."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(2**21) for _ in range(20)]
        del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    of_all = 20 * 2**23 // resource.getpagesize()
    with keeping_memory(CPU):
        assert [pages() for _ in range(8)][-1] < of_all / 20  # pieces fit each other after a few rounds
    assert pages() > of_all / 2
