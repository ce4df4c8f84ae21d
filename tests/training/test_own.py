"""Data and objectives of one's own, named in a config as python:MODULE:CLASS: a run with both, and what cannot be."""

import pickle
import re
import sys
import textwrap
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import training
from samplers.schedules import expand
from tests.training.batches import batch, generator
from tests.training.runs import TRANSFUSION, assert_bit_equal, config_for, metrics
from training.cache import Cache, CacheError
from training.cache_writer import CacheOptions, changed, data_of, write_cache
from training.config import ConfigError, load_config
from training.data import DataError, SourceOptions, open_source
from training.setup import grid_prompts
from training.sharding import Learner
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

    class Rooted(Greys):
        def __init__(self, root="photos"): assert root == "photos"

    class Wordy(Greys):
        def captions(self, i): return (f"grey number {i}", f"shade {i}"), (1, 3)

    class Renamed(Greys):
        def __getitem__(self, i): return training.Sample("another", super().__getitem__(i).image, "grey")

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
        ("__main__:Reds", None, "__main__ has no Reds: a script's own class is known to that script alone"),
        ("mine_for_tests:number", None, "expected a subclass of training.Source"),
        ("mine_for_tests:Halved", None, "expected a subclass of training.Source"),
        ("os:system", None, "expected a subclass of training.Source"),
        ("mine_for_tests:Abstract", None, "lacks __getitem__, caption"),
        ("mine_for_tests:Keyless", None, "does not set keys"),
        ("mine_for_tests:Short", None, "has 64 keys for 63 samples"),
        ("mine_for_tests:Sized", None, "takes a size: set data.image_size"),
        ("mine_for_tests:Greedy", 24, "cannot be made without arguments, but for `size`"),
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


def test_a_class_that_takes_other_arguments_is_made_without_the_size():
    assert open_source("python:mine_for_tests:Rooted", 16, step=16).image_size == (16, 16)


ARRAY = np.zeros(64, int)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"keys": [], "__len__": lambda self: 0}, "has no samples"),
        ({"keys": [*range(64)]}, "has the key 0, expected strings"),
        ({"keys": iter("abc"), "__len__": lambda self: 3}, "has a str_ascii_iterator for keys"),
        ({"skipped": None}, "has None for skipped, expected a list of (key, reason)"),
        ({"image_size": 16}, "has the size 16, expected (height, width)"),
        ({"image_size": (np.int64(16), 16)}, "expected (height, width) in whole pixels"),
        ({"layout": ((16, 16),)}, "has a tuple for layout, expected a training.Layout"),
        ({"layout": training.Layout(((16, 16),), [0] * 64)}, "whose bucket is no array of 64 whole numbers"),
        ({"layout": training.Layout(((16, 16),), ARRAY[:5])}, "whose bucket is no array of 64 whole numbers"),
        ({"layout": training.Layout(((16, 16),), ARRAY + 1)}, "whose bucket is 1 to 1, expected below 1"),
        ({"layout": training.Layout(((16, 16),), part=ARRAY + 2)}, "whose part is 2 to 2, expected below 1"),
    ],
)
def test_attributes_that_make_no_sense_are_named(attributes, says, monkeypatch):
    from mine_for_tests import Greys

    for name, value in attributes.items():
        monkeypatch.setattr(Greys, name, value, raising=False)
    with pytest.raises(DataError, match=re.escape(says)):
        open_source("python:mine_for_tests:Greys")


def raising(i):
    return {}["a column"]


@pytest.mark.parametrize(
    ("method", "gives", "says"),
    [
        (
            "__getitem__",
            lambda self, i: ("image", "caption"),
            "sample 0 of Greys is a tuple, expected a training.Sample",
        ),
        ("__getitem__", lambda self, i: raising(i), "sample 0 of Greys: KeyError: 'a column' (test_own.py, line "),
        ("__getitem__", lambda self, i: training.Sample("a", None, "grey"), "image of a is none, and error is not set"),
        (
            "__getitem__",
            lambda self, i: training.Sample("a", Image.new("RGB", (16, 16)), "grey"),
            "a is a Image, not an",
        ),
        ("__getitem__", lambda self, i: training.Sample("a", None, None), "has a NoneType for its caption"),
        ("draw", lambda self, i, rng: rng.random(), "sample 0 of Greys: AttributeError: "),
        ("captions", lambda self, i: ["a", "b"], "has the captions ['a', 'b'], expected (captions, weights)"),
        ("captions", lambda self, i: (("a", "b"), (1, 2, 3)), "expected (captions, weights)"),
        ("captions", lambda self, i: (("a", None), ()), "sample 0 of Greys has a NoneType for a caption"),
        ("caption", lambda self, i: 3, "has a int for its caption, expected a string"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_make_no_sense_are_named(method, gives, says, num_workers, monkeypatch):
    from mine_for_tests import Greys

    monkeypatch.setattr(Greys, method, gives, raising=False)
    batches = training.loader(Greys(), [0], 1, seed=0, num_workers=num_workers)
    with closing(batches), pytest.raises(DataError, match=re.escape(says)):
        next(batches)


def test_a_caption_for_a_grid_that_cannot_be_read_is_named(monkeypatch):
    from mine_for_tests import Greys

    assert grid_prompts(load_config("pixels-tiny"), Greys(), None)[1] == "grey number 2"
    monkeypatch.setattr(Greys, "caption", lambda self, i: raising(i))
    with pytest.raises(DataError, match="sample 0 of Greys: KeyError"):
        grid_prompts(load_config("pixels-tiny"), Greys(), None)


def test_one_of_several_captions_is_drawn_whether_latents_are_kept_or_not(tmp_path):
    wordy = (*FEW, "data.source=python:mine_for_tests:Wordy")
    kept = training.train(config_for(tmp_path / "kept", *wordy))
    read = training.train(config_for(tmp_path / "read", *wordy, "data.cache_latents=false"))
    assert_bit_equal(kept, read)
    source = open_source("python:mine_for_tests:Wordy")
    captions = next(training.loader(source, range(64), 64, seed=0)).captions
    assert 8 < sum(caption.startswith("grey") for caption in captions) < 24


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


def test_a_cache_of_random_draws_is_refused(tmp_path):
    drawing = ("data.source=python:mine_for_tests:Drawing", "data.image_size=none", "data.cache_latents=false")
    with pytest.raises(CacheError, match="a cache has one picture of each sample, and python:mine_for_tests:Drawing"):
        write_cache(load_config("pixels-tiny", list(drawing)), tmp_path / "cache")


def test_a_cache_knows_samples_by_the_keys_of_the_data(tmp_path):
    config = load_config("pixels-tiny", ["data.source=python:mine_for_tests:Renamed", "data.image_size=none"])
    write_cache(config, tmp_path / "cache")
    cache = Cache(str(tmp_path / "cache"))
    assert [sample.key for sample in cache.samples[:2]] == ["grey-0", "grey-1"]
    assert changed(cache, data_of(cache, config.data.source)) == []


@pytest.mark.parametrize("losses", [lambda x: x.mean(), lambda x: x.flatten(1), lambda x: 1.0, lambda x: x[:, None]])
@pytest.mark.parametrize("packed", [False, True])
def test_losses_that_are_not_of_each_element_are_refused(losses, packed):
    class Wrong(training.FlowMatching):
        def elementwise_loss(self, v, x_0, eps, t):
            return losses(torch.zeros(6, 4, 3, 5))

    some = batch()
    some = some._replace(latents=list(some.latents)) if packed else some
    model = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(sample_size=4)))
    call = type("Model", (), {"__call__": lambda self, x_t, t, tokens, drop: x_t, **vars(model)})()
    with pytest.raises(ValueError, match="elementwise_loss gave .*, expected a loss for each element"):
        Wrong(Uniform())(call, some, generator(), 0.25)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda loss: loss.total, "Own gave a Tensor, expected a training.Loss"),
        (lambda loss: None, "Own gave a NoneType, expected a training.Loss"),
        (lambda loss: loss._replace(total=1.0), "expected a training.Loss with a total"),
        (lambda loss: loss._replace(total=loss.errors), "no scalar"),
        (lambda loss: loss._replace(total=loss.total.detach()), "no gradient"),
    ],
)
def test_an_objective_that_gives_no_loss_is_named(changed, says):
    class Own(training.FlowMatching):
        def __call__(self, model, batch, generator, t=None):
            return changed(super().__call__(model, batch, generator, t))

    with pytest.raises(ValueError, match=re.escape(says)):
        Learner(Scaled(), Own(Uniform()))(batch(), generator())


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, tokens, drop):
        return self.scale * x_t


def test_data_that_cannot_be_sent_to_workers_says_so(monkeypatch):
    from mine_for_tests import Greys

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda self: pickle.dumps(self.dataset))
    source = Greys()
    source.file = open(__file__)  # noqa: SIM115
    with closing(source.file), pytest.raises(DataError, match="cannot be sent to worker processes .*: open files and"):
        next(training.loader(source, [0], 1, seed=0, num_workers=1))


def test_a_cache_of_ones_own_data_trains_alike(tmp_path):
    folder = tmp_path / "cache"
    cached = ("data.source=python:mine_for_tests:Greys", "data.image_size=none")
    write_cache(load_config("pixels-tiny", list(cached)), folder, CacheOptions(dtype="fp32"))
    images = training.train(config_for(tmp_path / "images", *FEW, GREYS))
    latents = training.train(config_for(tmp_path / "latents", *FEW, f"data.source={folder}"))
    assert_bit_equal(images, latents)
