"""What tests of training share."""

import json
import threading
from pathlib import Path

import pytest
import torch

import training
from tests.training.runs import TRANSFUSION, config_for, make_autoencoder, make_pictures, make_tokenizer
from training.config import load_config


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


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Path:
    """The tiny preset as it is, trained once."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert training.train(load_config("pixels-tiny", [f"training.out={out}"])) == out
    return out


@pytest.fixture(scope="package")
def material(tmp_path_factory) -> dict[str, Path]:
    """Pictures, an autoencoder and a tokenizer, for the settings that name some."""
    folder = tmp_path_factory.mktemp("material")
    return {
        "pictures": make_pictures(folder / "pictures", 24),
        "autoencoder": make_autoencoder(folder / "autoencoder"),
        "tokenizer": make_tokenizer(folder / "tokenizer"),
    }


@pytest.fixture(scope="package")
def mixed(tmp_path_factory) -> Path:
    """A run of text and images, trained once."""
    return training.train(config_for(tmp_path_factory.mktemp("mixed") / "run", *TRANSFUSION))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Forty documents, of which a few are held out, and a line that is none."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    rows = [{"text": f"number {i} comes after number {i - 1}, " * (1 + i % 3)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    return path
