"""What all tests share: threads, hypothesis, a folder outside the repository, the CPU, and the `gpu` mark."""

import os
import signal
import tempfile

# Before torch is imported anywhere: test processes side by side share the cores, or their threads wait for each other.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _PROCESSES = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _PROCESSES))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

# A shell starts jobs in the background with Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A helper's assertion shows its values as a test's does.
pytest.register_assert_rewrite("tests.training", "tests.mmdit", "tests.mmdit_cli")

# The same examples on every run, no deadline on a busy machine, no database left behind.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
# HYPOTHESIS_PROFILE=search looks further, with new examples each time.
settings.register_profile("search", deadline=None, database=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory):
    """Tests run outside the repository, so that none writes into it by a relative path; and what libraries leave in the
    folder for temporary files is removed. Its path is short, for sockets lie in it.
    """
    own = tempfile.TemporaryDirectory(prefix="mmdit-tests-", ignore_cleanup_errors=True)  # some may be written still
    with pytest.MonkeyPatch.context() as patch, own as temporary:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        patch.setenv("TMPDIR", temporary)
        patch.setattr(tempfile, "tempdir", None)  # it remembers the other
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests compute on the CPU, as do programs that they start, also where there is a GPU; those marked may use it."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr("torch.cuda.is_available", lambda: False)
        return (yield)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):  # on a busy machine several times as slow
            item.add_marker(pytest.mark.timeout(900))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
