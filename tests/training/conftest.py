"""What tests of training share."""

import json
import threading
from pathlib import Path

import pytest
import torch

import training
from mmdit.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from tests.training.caches import made
from tests.training.runs import TRANSFUSION, config_for, make_autoencoder, make_pictures, make_tokenizer
from training import cache_writer
from training.cache_writer import CacheOptions
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


@pytest.fixture(scope="package")
def parts(tmp_path_factory):
    """A T5, SD3's three text encoders, and two autoencoders, in folders."""
    from mmdit.kl_autoencoder import KLAutoencoder
    from tests.mmdit.tiny_sd3 import make_pipeline, randomised, save_encoders

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    save_encoders(root)
    KLAutoencoder(make_pipeline().vae).save(root / "kl")
    patches = PatchAutoencoder(PatchAutoencoderConfig(4, (8, 8), 1, 1.5, 0.1))
    randomised(patches).save(root / "patches")
    return root


@pytest.fixture(scope="package")
def written(parts, tmp_path_factory):
    """A cache of four shards with text features."""
    out = tmp_path_factory.mktemp("caches") / "written"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "BATCH", 8)
        made(out, f"text.encoder={parts / 't5'}", options=CacheOptions(shard_mb=0.15))
    return out


@pytest.fixture
def group(tmp_path, monkeypatch):
    """One process with a group of its own, which shares as the config says: it holds all the parts."""
    monkeypatch.setattr("training.sharding.strategy", lambda config, ranks: config.strategy)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
