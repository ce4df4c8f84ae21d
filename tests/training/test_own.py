"""Data and objectives of one's own, named in a config as python:MODULE:CLASS: a run with both, and what cannot be."""

import re
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

import training
from samplers.schedules import expand
from tests.training.batches import batch, generator
from tests.training.runs import TRANSFUSION, assert_bit_equal, config_for, metrics
from training.cache_writer import CacheOptions, write_cache
from training.config import ConfigError, load_config
from training.data import DataError, SourceOptions, open_source
from training.time_density import Uniform

MODULE = """
    import numpy as np, torch, training

    class Greys(training.Source):
        image_size, skipped = (16, 16), []
        keys = [f"grey-{i}" for i in range(64)]
        def __len__(self): return len(self.keys)
        def caption(self, i): return f"grey number {i}"
        def __getitem__(self, i):
            return training.Sample(self.keys[i], np.full((*self.image_size, 3), 4 * i, np.uint8), self.caption(i))

    class Sized(Greys):
        def __init__(self, size): self.image_size = size

    class Greedy(Greys):
        def __init__(self, size, more): pass

    class Drawing(Greys):
        def draw(self, i, rng): return self[int(rng().integers(64))]

    class Keyless(Greys):
        keys = property()

    class Short(Greys):
        def __len__(self): return 63

    class Floats(Greys):
        def __getitem__(self, i):
            return training.Sample(self.keys[i], np.full((16, 16, 3), i / 64, np.float32), "grey")

    class Abstract(training.Source):
        def __len__(self): return 1

    class Halved(training.FlowMatching):
        def elementwise_loss(self, v, x_0, eps, t): return super().elementwise_loss(v, x_0, eps, t) / 2

    class HalvedBoth(training.TextAndImages):
        def elementwise_loss(self, v, x_0, eps, t): return super().elementwise_loss(v, x_0, eps, t) / 2

    loss = Halved
    number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A module `mine_for_tests` that Python finds."""
    (tmp_path / "mine_for_tests.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "needs_another.py").write_text("import one_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine_for_tests", None)


GREYS = "data.source=python:mine_for_tests:Greys"
HALVED = "objective.name=python:mine_for_tests:Halved"
FEW = ("training.num_steps=4", "training.log_every=1", "data.held_out=0.1", "data.image_size=none")


def test_a_run_trains_on_both_resumes_and_is_scored(tmp_path):
    whole = training.train(config_for(tmp_path / "whole", *FEW, GREYS, HALVED))
    assert "of python:mine_for_tests:Greys, fitted to 16 x 16" in (whole / "log.txt").read_text()
    part = training.train(config_for(tmp_path / "part", *FEW, GREYS, HALVED, "training.num_steps=2"))
    training.resume(part, ["training.num_steps=4"])
    assert_bit_equal(whole, part)
    assert training.evaluate_run(whole)["validation_loss"] == metrics(whole, "validation_loss")[-1][1]
    plain = training.train(config_for(tmp_path / "plain", *FEW, GREYS))
    first, halved = metrics(plain, "loss")[0][1], metrics(whole, "loss")[0][1]
    assert halved == pytest.approx(first / 2)


def test_an_objective_of_ones_own_may_be_of_text_and_images(tmp_path):
    mixed = (*FEW, GREYS, "training.num_steps=1", *TRANSFUSION)
    plain = training.train(config_for(tmp_path / "plain", *mixed))
    own = training.train(config_for(tmp_path / "own", *mixed, "objective.name=python:mine_for_tests:HalvedBoth"))
    assert metrics(own, "loss_image")[0][1] == pytest.approx(metrics(plain, "loss_image")[0][1] / 2)
    assert metrics(own, "loss_text")[0][1] == pytest.approx(metrics(plain, "loss_text")[0][1])


def test_the_elements_of_packed_sizes_are_in_one_row():
    seen = []

    class Weighted(training.FlowMatching):
        def elementwise_loss(self, v, x_0, eps, t):
            seen.append((v.shape, t.shape))
            return expand(t, v) * super().elementwise_loss(v, x_0, eps, t)

    class Model(torch.nn.Module):
        transformer = SimpleNamespace(config=SimpleNamespace(sample_size=4))

        def forward(self, x_t, t, tokens, drop):
            return x_t

    stacked = batch()
    apart = stacked._replace(latents=list(stacked.latents))
    plain = training.FlowMatching(Uniform())(Model(), stacked, generator(), 0.25).total
    for some in (stacked, apart):
        torch.testing.assert_close(Weighted(Uniform())(Model(), some, generator(), 0.25).total, plain / 4)
    assert seen == [((6, 4, 3, 5), (6,)), ((360,), (360,))]


@pytest.mark.parametrize(
    ("spec", "size", "says"),
    [
        ("mine_for_tests", None, 'data.source is "python:mine_for_tests", expected "python:MODULE:CLASS"'),
        ("mine_for_tests:", None, "expected"),
        ("..mine_for_tests:Greys", None, "expected"),
        ("no_such:Greys", None, "there is no module no_such: install it, or name its folder in PYTHONPATH"),
        ("mine_for_tests.sub:Greys", None, "there is no module mine_for_tests.sub"),
        ("mine_for_tests:Reds", None, "mine_for_tests has no Reds"),
        ("mine_for_tests:number", None, "expected a subclass of training.Source"),
        ("mine_for_tests:Halved", None, "expected a subclass of training.Source"),
        ("os:system", None, "expected a subclass of training.Source"),
        ("mine_for_tests:Abstract", None, "lacks __getitem__, caption"),
        ("mine_for_tests:Keyless", None, "does not set keys"),
        ("mine_for_tests:Short", None, "has 64 keys for 63 samples"),
        ("mine_for_tests:Sized", None, "takes a size: set data.image_size"),
        ("mine_for_tests:Greedy", 24, "takes more than a size"),
        ("mine_for_tests:Greys", 24, "has pictures of 16 x 16 pixels, asked for are 24 x 24"),
    ],
)
def test_data_of_ones_own_that_cannot_be_opened_says_why(spec, size, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        open_source(f"python:{spec}", size, step=8)


def test_data_of_ones_own_is_made_with_the_size_asked_for():
    assert open_source("python:mine_for_tests:Sized", (30, 50), step=16).image_size == (32, 48)
    assert open_source("python:mine_for_tests:Greys", 16, step=16).image_size == (16, 16)
    with pytest.raises(DataError, match="16 x 16 pixels, expected multiples of 32"):
        open_source("python:mine_for_tests:Greys", step=32)


def test_data_of_ones_own_is_neither_cut_nor_mixed():
    with pytest.raises(DataError, match="has 64 samples, and takes no part of them: set data.num_samples=none"):
        open_source("python:mine_for_tests:Greys", num_samples=3)
    with pytest.raises(DataError, match="as they are: no buckets"):
        open_source("python:mine_for_tests:Greys", options=SourceOptions(flip=True))
    with pytest.raises(DataError, match="mix the data in that class"):
        open_source("python:mine_for_tests:Greys=0.5,shards.tar=0.5")


def test_errors_of_the_module_itself_are_raised_as_they_are():
    with pytest.raises(ModuleNotFoundError, match="one_that_is_nowhere"):
        open_source("python:needs_another:Greys")


def test_random_draws_are_not_kept_as_latents(tmp_path):
    drawing = (*FEW, "data.source=python:mine_for_tests:Drawing")
    with pytest.raises(ConfigError, match=re.escape("set data.cache_latents=false")):
        training.train(config_for(tmp_path / "run", *drawing))
    training.train(config_for(tmp_path / "run", *drawing, "data.cache_latents=false"))


def test_images_that_are_no_bytes_are_named(tmp_path):
    with pytest.raises(
        DataError, match=re.escape("the image of grey-") + r"\d+ is float32 \(16, 16, 3\), expected uint8"
    ):
        training.train(config_for(tmp_path / "run", *FEW, "data.source=python:mine_for_tests:Floats"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("huber", 'objective.name is "huber", expected "flow-matching", or "python:MODULE:CLASS"'),
        ("python:mine_for_tests:HalvedBoth", "expected a subclass of training.FlowMatching"),
        ("python:mine_for_tests:Greys", "expected a subclass of training.FlowMatching"),
    ],
)
def test_an_objective_that_cannot_be_says_why(name, says, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(says)):
        training.train(config_for(tmp_path / "run", *FEW, f"objective.name={name}"))
    assert not (tmp_path / "run").exists()


def test_a_cache_of_ones_own_data_trains_alike(tmp_path):
    folder = tmp_path / "cache"
    cached = ("data.source=python:mine_for_tests:Greys", "data.image_size=none")
    write_cache(load_config("pixels-tiny", list(cached)), folder, CacheOptions(dtype="fp32"))
    images = training.train(config_for(tmp_path / "images", *FEW, GREYS))
    latents = training.train(config_for(tmp_path / "latents", *FEW, f"data.source={folder}"))
    assert_bit_equal(images, latents)
