"""Batches of images of several sizes, in one row: which size each image takes, what a batch holds, what it costs, and
runs trained on such.
"""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training
from mmdit import MMDiT, MMDiTConfig
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from samplers import resolution_shift, shift_time
from tests.training.pictures import folder_of, members
from tests.training.runs import assert_bit_equal, config_for, metrics
from training import evaluate
from training.buckets import own_sizes
from training.cache import CacheError
from training.cache_writer import CacheOptions, write_cache
from training.config import ConfigError, load_config
from training.data import DataError, SourceOptions, loader, open_source
from training.objectives import Batch, FlowMatching
from training.run import RunFolder
from training.setup import bucket_text
from training.share import Share
from training.telemetry import Telemetry
from training.time_density import LogitNormal, Uniform
from training.trainer import Trainer
from training.wanted import Wanted

SIZES = ((32, 32), (24, 48), (48, 24), (9, 13), (64, 70), (16, 8), (100, 20))
OWN = ("data.buckets=own", "training.packing=true", "data.image_size=32", "data.held_out=0.2", "data.num_samples=none",
       "training.batch_size=8", "training.validate_every=2", "training.sample_every=0")  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20),
    st.sampled_from([4, 8, 16]),
    st.floats(1, 4),
)
def test_an_image_is_taken_near_its_own_size(images, step, ratio):
    heights, widths = np.array(images).T
    sizes, taken = own_sizes(heights, widths, 64 * 64, step, ratio)
    assert sorted(set(sizes)) == sizes and set(taken.tolist()) == set(range(len(sizes)))
    for (height, width), (h, w) in zip(images, (sizes[k] for k in taken), strict=True):
        assert h % step == w % step == 0 and max(h, w) <= max(ratio * min(h, w), step)
        assert h * w <= 64 * 64 + step * (h + w) / 2
        assert h < height + step and w < width + step  # nothing is scaled up further than to the next multiple
        cut = min(height, ratio * width), min(width, ratio * height)
        if cut[0] * cut[1] <= 64 * 64 and ratio * step <= min(cut):
            assert abs(h - cut[0]) <= step * (0.5 + ratio / 2 + 1) and abs(w - cut[1]) <= step * (0.5 + ratio / 2 + 1)


def test_sizes_of_a_few():
    heights, widths = np.array([(32, 32), (9, 13), (64, 70), (100, 20), (3, 3), (33, 20)]).T
    sizes, taken = own_sizes(heights, widths, 32 * 32, 8, 2.0)
    assert [sizes[k] for k in taken] == [(32, 32), (8, 16), (32, 32), (40, 24), (8, 8), (32, 24)]


def opened(folder, **options):
    options = {"buckets": "own", "mixed": True} | options
    return open_source(str(folder), 32, 8, options=SourceOptions(wanted=Wanted(sizes=True), **options))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data") / "mixed", members(range(70), SIZES))


def read(batch) -> list[tuple[str, torch.Tensor]]:
    """(key, image) of each sample."""
    images = {row: image for rows, images in batch.by_size() for row, image in zip(rows, images, strict=True)}
    return [(key, images[row]) for row, key in enumerate(batch.keys)]


@pytest.mark.parametrize("buckets", ["own", True])
def test_a_batch_holds_any_sizes_and_each_sample_comes_once_an_epoch(pictures, buckets):
    source = opened(pictures, buckets=buckets)
    size_of = {key: source.layout.sizes[source.layout.bucket_of(i)] for i, key in enumerate(source.keys)}
    batches = list(islice(loader(source, range(70), 7, 1), 30))
    assert all(len(set(batch.sizes)) > 1 for batch in batches)
    for batch in batches:
        for (key, image), size in zip(read(batch), batch.sizes, strict=True):
            assert image.shape == (3, *size) and size == size_of[key]
            assert image[:, 0, 0].tolist() == [int(key), 0, 77]  # the colour says which picture it is
    keys = [key for batch in batches for key in batch.keys]
    assert all(sorted(keys[k : k + 70]) == sorted(source.keys) for k in (0, 70, 140)) and keys[:70] != keys[70:140]
    plain = islice(loader(open_source(str(pictures), 32, 8), range(70), 7, 1), 30)
    assert keys == [key for batch in plain for key in batch.keys]  # in the order that there is without buckets


def test_workers_shares_and_resuming_change_nothing(pictures):
    how = {"crop": "random", "flip": True}
    alone = list(islice(loader(opened(pictures, **how), range(70), 6, 1), 30))
    for start, num_workers in ((0, 2), (17, 1), (28, 0)):
        batches = loader(opened(pictures, **how), range(70), 6, 1, start, num_workers)
        for one, other in zip(alone[start:], batches, strict=False):
            assert one.keys == other.keys and one.sizes == other.sizes and torch.equal(one.images, other.images)
        batches.close()
    ranks = [loader(opened(pictures, **how), range(70), 6, 1, share=Share(rank, 2)) for rank in range(2)]
    for one in alone[:5]:
        parts = [next(rank) for rank in ranks]
        assert torch.equal(one.images, torch.cat([part.images for part in parts]))


def test_a_bad_image_is_replaced_by_the_next_of_any_size(tmp_path):
    files = members(range(6), SIZES)
    files["00002.png"] = files["00002.png"][:60]  # its header is whole
    source = opened(folder_of(tmp_path, files))
    batch = next(loader(source, range(6), 6, 0))
    assert [key for key, _ in batch.skipped] == ["00002"] and len(set(batch.keys)) == 5 and len(batch.keys) == 6


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red circle", "two squares"], 300, 12)
    text = LearnedText(TextConfig(300, 12, 16, 1, 2), tokenizer)
    widths = {"num_heads": 2, "head_dim": 16, "context_dim": text.context_dim, "pooled_dim": text.pooled_dim}
    config = MMDiTConfig(in_channels=3, depth=2, sample_size=8, pos_embed_max_size=12, positions="both", **widths)
    model = CaptionedMMDiT(MMDiT(config), text).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


CAPTIONS = ["a red circle", "two", "two squares and a circle", ""]
SHAPES = [(8, 8), (4, 12), (2, 2), (8, 8)]


def images(shapes=SHAPES) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *shape, dtype=torch.float64) for shape in shapes]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_costs_what_its_images_cost_alone(model, packed):
    """Loss, each image's error and the gradients: the mean over images, each with the same weight."""
    latents, tokens, t = images(), model.conditioner.tokenize(CAPTIONS), torch.tensor([0.1, 0.9, 0.5, 0.7]).double()
    model.packed = packed
    row = FlowMatching(Uniform())(model, Batch(latents, tokens), torch.Generator().manual_seed(5), t)
    model.packed = False
    alone = [
        FlowMatching(Uniform(), share=Share(i, 4))(
            model, Batch(x[None], tokens.split(1)[i]), torch.Generator().manual_seed(5), t[i]
        )
        for i, x in enumerate(latents)
    ]
    torch.testing.assert_close(row.errors, torch.cat([one.errors for one in alone]), rtol=1e-6, atol=0)
    total = torch.stack([one.total for one in alone]).mean()
    torch.testing.assert_close(row.total, total, rtol=1e-6, atol=0)
    for x, y in zip(gradients(model, row.total), gradients(model, total), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)


def test_a_row_of_the_models_own_size_is_a_batch_of_it(model):
    model.packed = True
    latents, tokens = images([(8, 8)] * 4), model.conditioner.tokenize(CAPTIONS)
    objective = FlowMatching(LogitNormal(0.0, 1.0), caption_dropout=0.5)
    batches = (Batch(latents, tokens), Batch(torch.stack(latents), tokens))
    row, batch = (objective(model, one, torch.Generator().manual_seed(2)) for one in batches)
    assert torch.equal(row.t, batch.t)
    torch.testing.assert_close(row.errors, batch.errors, rtol=1e-5, atol=0)


def test_times_are_shifted_for_each_images_size(model):
    """As sampling shifts them (SD3, section 5.3.2)."""
    tokens, objective = model.conditioner.tokenize(CAPTIONS), FlowMatching(Uniform())
    found = [objective(model, Batch(images(shapes), tokens), torch.Generator().manual_seed(3)).t
             for shapes in (SHAPES, [(8, 8)] * 4)]  # fmt: skip
    shifts = [resolution_shift(height * width, 64) for height, width in SHAPES]
    expected = [shift_time(t, shift) for t, shift in zip(found[1].tolist(), shifts, strict=True)]
    assert found[0].tolist() == pytest.approx(expected) and found[0][2] < found[1][2]


def test_parts_of_a_batch_are_its_rows(model):
    latents, tokens = images(), model.conditioner.tokenize(CAPTIONS)
    parts = Batch(latents, tokens).to("cpu").split(2)
    assert [x.shape for part in parts for x in part.latents] == [x.shape for x in latents]
    assert torch.equal(torch.cat([part.tokens.ids for part in parts]), tokens.ids)


def test_tokens_of_every_size_are_counted(model):
    clock = iter(range(100)).__next__
    told = load_config("pixels-tiny", ["training.packing=true", "training.peak_tflops=1"])
    telemetry = Telemetry(told, model, torch.device("cpu"), torch.float32, print, clock=clock)
    tokens = model.conditioner.tokenize(CAPTIONS)
    telemetry.next(iter([Batch(images(), tokens)]))
    line = telemetry.line()
    assert line["tokens_per_second"] / line["samples_per_second"] == (16 + 12 + 1 + 16 + int(tokens.mask.sum())) / 4


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["memory", "workers", "cache"])
def test_a_run_resumes_to_the_bit_in_the_middle_of_an_epoch(pictures, tmp_path, images):
    """From latents in memory, images that workers read, and a cache; all of them train the same."""
    source, more = pictures, [f"data.source={pictures}", *OWN, "training.grad_accumulation=2", "sampling.num_steps=1"]
    if images == "cache":
        write_cache(load_config("pixels-tiny", more), tmp_path / "cache", CacheOptions("fp32", "fp32"), log=print)
        source = tmp_path / "cache"
    how = ["data.cache_latents=false", "data.num_workers=1"] if images == "workers" else []
    more += ["data.num_samples=30"]  # three batches an epoch
    more, memory = [*more, f"data.source={source}", *how], [*more, "training.num_steps=5"]
    whole = training.train(config_for(tmp_path / "whole", *more, "training.num_steps=5"))
    half = training.train(config_for(tmp_path / "half", *more, "training.num_steps=3"))
    training.resume(half, ["training.num_steps=5"])
    assert_bit_equal(half, whole)
    assert metrics(half, "loss") == metrics(whole, "loss")
    if images != "memory":
        assert_bit_equal(training.train(config_for(tmp_path / "memory", *memory)), whole)


@pytest.mark.parametrize("most", [50, 2])
def test_held_out_images_have_a_loss_for_each_size(pictures, tmp_path, monkeypatch, most):
    """Where there are not too many; all count alike in the mean of all."""
    monkeypatch.setattr(evaluate, "MOST_SIZES", most)
    run = training.train(config_for(tmp_path / "run", f"data.source={pictures}", *OWN, "training.num_steps=2"))
    last = RunFolder(run).metrics()[-1]
    own = {name: x for name, x in last.items() if "x" in name.rsplit("_", 1)[-1]}
    assert ("validation_loss_48x24" in own) == bool(own) == (most == 50)
    assert "fitted to 6 buckets: 8 x 16 (14.3%), " in (run / "log.txt").read_text()


def test_a_transfusion_mixes_sizes_too(pictures, tmp_path):
    own = [*OWN, "training.packing=false", "transfusion.enabled=true", "model.positions=rope", "text.vocab_size=400"]
    config = config_for(tmp_path / "run", f"data.source={pictures}", *own, "training.num_steps=2")
    trainer = Trainer(config, RunFolder.create(tmp_path / "run", config))
    batch = next(trainer.feed.batches(8, 0))
    assert len({x.shape for x in batch.latents}) > 1
    loss, _ = trainer._train_step(trainer.learner, trainer.telemetry.next(iter([batch])))
    assert loss.isfinite() and trainer.telemetry.line()["tokens_per_second"] > 0


def test_many_sizes_are_named_by_the_ends(tmp_path):
    folder = folder_of(tmp_path / "many", members(range(60), [(8 + i, 68 - i) for i in range(60)]))
    options = SourceOptions("own", 8.0, mixed=True, wanted=Wanted(sizes=True))
    source = open_source(str(folder), 200, 1, options=options)
    assert bucket_text(source) == "60 sizes from 8 x 64 to 38 x 38"


def test_small_buckets_stay_where_a_batch_need_not_be_of_one(pictures, tmp_path):
    counts = Counter()
    for packing in ("false", "true"):
        changes = [f"data.source={pictures}", *OWN, "data.buckets=true", "training.batch_size=24"]
        config = config_for(tmp_path / packing, *changes, f"training.packing={packing}")
        counts[packing] = len(training.setup.open_run_source(config, 8).layout.sizes)
    assert counts["false"] < counts["true"]


def test_what_cannot_work_is_refused(pictures, tmp_path):
    with pytest.raises(ConfigError, match="set training.packing=true"):
        load_config("pixels-tiny", ["data.buckets=own"])
    with pytest.raises(ConfigError, match='data.buckets is "owm", expected true or false or one of "own"'):
        load_config("pixels-tiny", ["data.buckets=owm"])
    with pytest.raises(DataError, match="say by data.image_size above which area"):
        open_source(str(pictures), options=SourceOptions("own", mixed=True, wanted=Wanted(sizes=True)))
    own = [f"data.source={pictures}", *OWN]
    write_cache(load_config("pixels-tiny", own), tmp_path / "cache", CacheOptions("fp32", "fp32"), log=print)
    with pytest.raises(CacheError, match="has images in sizes of their own: set training.packing=true"):
        open_source(str(tmp_path / "cache"))


def test_packing_alone_leaves_one_size(pictures, tmp_path):
    """Without buckets all are fitted to image_size."""
    changes = [f"data.source={pictures}", *OWN, "data.buckets=false"]
    config = config_for(tmp_path / "run", *changes)
    batch = next(Trainer(config, RunFolder.create(tmp_path / "run", config)).feed.batches(8, 0))
    assert batch.latents.shape == (8, 3, 32, 32)
