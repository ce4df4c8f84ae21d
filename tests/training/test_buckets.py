"""Aspect-ratio buckets: their sizes, which image takes which, batches of one bucket each, and runs trained on them."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training
from tests.training.pictures import folder_of, members, noisy, picture, shards_of
from training.buckets import Sizing, assign, bucket_sizes, merge_small, own_sizes
from training.config import ConfigError, load_config
from training.data import DataError, FileSource, SourceOptions, loader, open_source, split_by_key
from training.images import read_fitted
from training.run import RunFolder
from training.setup import open_run_source
from training.sources import Index
from training.trainer import Trainer
from training.wanted import Wanted

SIZES = ((32, 32), (24, 48), (48, 24), (30, 36))


@given(st.integers(2, 40), st.sampled_from([8, 16, 64]), st.floats(1, 4))
def test_sides_are_multiples_of_the_step_and_areas_near_the_square(blocks, step, ratio):
    side = blocks * step
    sizes = bucket_sizes(side, side, step, ratio)
    assert (side, side) in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)  # portrait as landscape
    for h, w in sizes:
        assert h % step == w % step == 0 and max(h, w) <= ratio * min(h, w)
        assert abs(h * w - side * side) <= step * max(h, w) / 2  # no multiple of the step is nearer


def test_the_buckets_of_256_pixels():
    expected = [(192, 384), (192, 320), (256, 256), (320, 192), (384, 192)]
    assert bucket_sizes(256, 256, 64, 2.0) == expected
    with pytest.raises(ValueError, match="at least 1, not 0.5"):
        bucket_sizes(256, 256, 16, 0.5)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        bucket_sizes(256, 256, 0, 2.0)


@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=30))
def test_an_image_takes_the_bucket_that_is_nearest_in_shape(images):
    sizes = bucket_sizes(128, 128, 16, 2.5)
    heights, widths = np.array(images).T
    for h, w, b in zip(heights, widths, assign(heights, widths, sizes), strict=True):
        off = [abs(np.log(h / w) - np.log(a / c)) for a, c in sizes]
        assert off[b] == pytest.approx(min(off), abs=1e-9)


def test_small_buckets_join_their_neighbour():
    sizes = [(16, 64), (24, 48), (32, 32), (48, 24)]
    bucket = np.repeat([0, 1, 2, 3], [2, 3, 10, 8])
    assert Counter(merge_small(bucket, sizes, 4).tolist()) == {1: 5, 2: 10, 3: 8}
    assert Counter(merge_small(bucket, sizes, 6).tolist()) == {2: 15, 3: 8}
    assert Counter(merge_small(bucket, sizes, 8).tolist()) == {2: 15, 3: 8}  # enough is what is asked for
    assert Counter(merge_small(bucket, sizes, 100).tolist()) == {2: 23}
    assert merge_small(bucket, sizes, 1).tolist() == bucket.tolist()
    tall = merge_small(np.repeat([0, 1, 2, 3], [5, 5, 5, 2]), sizes, 4)  # whichever side the neighbour is on
    assert Counter(tall.tolist()) == {0: 5, 1: 5, 2: 7}


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=20),
    st.integers(1, 10),
    st.integers(1, 10),
    st.sampled_from([4, 8, 16]),
    st.floats(1, 4),
)
def test_an_image_alone_takes_the_size_that_it_takes_among_others(images, high, wide, step, ratio):
    size, (heights, widths) = (high * step, wide * step), np.array(images).T
    sizes = bucket_sizes(*size, step, ratio)
    sizing = Sizing(size, step, True, ratio)
    assert [sizing(image) for image in images] == [sizes[b] for b in assign(heights, widths, sizes)]
    assert sizing.sizes == sizes and sizing(None) == sizing(size)
    found, taken = own_sizes(heights, widths, size[0] * size[1], step, ratio)
    own = Sizing(size, step, "own", ratio)
    assert [own(image) for image in images] == [found[k] for k in taken] and {*found} <= {*own.sizes}
    assert {Sizing(size)(image) for image in images} == {size} and Sizing(size).sizes == [size]


def test_all_sizes_that_images_may_have_of_their_own_are_known_before():
    """All of small images, each as large as is tried: no size is missing, and none too many."""
    heights, widths = (x.ravel() for x in np.meshgrid(np.arange(1, 200), np.arange(1, 200)))
    for area, step, ratio in ((32 * 32, 8, 2.0), (24 * 40, 8, 1.5), (16 * 16, 4, 4.0), (20 * 20, 16, 1.0)):
        size = next((h, area // h) for h in range(1, area) if area % h == 0 and h * h >= area)
        assert Sizing(size, step, "own", ratio).sizes == own_sizes(heights, widths, area, step, ratio)[0]


def opened(folder, **options):
    options = SourceOptions(buckets=True, wanted=Wanted(sizes=True), **options)
    return open_source(str(folder), image_size=32, step=8, options=options)


@pytest.fixture
def mixed(tmp_path):
    return folder_of(tmp_path / "mixed", members(range(100), SIZES))


def test_every_batch_is_of_one_bucket_and_each_sample_comes_once_an_epoch(mixed):
    source = opened(mixed)
    assert source.layout.sizes == ((24, 48), (32, 32), (48, 24))
    assert np.bincount(source.layout.bucket).tolist() == [25, 50, 25]
    seen: Counter = Counter()
    shapes: Counter = Counter()
    for batch in islice(loader(source, range(100), 4, 1), 4 * 25 - 2):
        shapes[tuple(batch.images.shape[2:])] += 1
        seen.update(batch.keys)
    assert set(seen) == set(source.keys) and set(seen.values()) <= {3, 4}  # the rest of an epoch is carried on
    assert shapes[32, 32] == pytest.approx(49, abs=1) and shapes[24, 48] == pytest.approx(24.5, abs=1)


def test_workers_and_resuming_change_nothing(mixed):
    source = opened(mixed, crop="random", flip=True)
    alone = [(b.keys, b.images, b.crops) for b in islice(loader(source, range(100), 4, 1), 40)]
    for start, num_workers in ((0, 2), (17, 1), (33, 0)):
        batches = loader(opened(mixed, crop="random", flip=True), range(100), 4, 1, start, num_workers)
        for (keys, images, crops), batch in zip(alone[start:], batches, strict=False):
            assert batch.keys == keys and torch.equal(batch.images, images) and torch.equal(batch.crops, crops)
        batches.close()


def test_crops_are_drawn_and_kept(tmp_path):
    """The crop that the batch tells of is the one that was cut."""
    data = noisy(0, (40, 60))
    whole = read_fitted(data, (40, 60)).image
    folder = folder_of(tmp_path, {"a.png": data, "a.txt": b"a"})
    source = open_source(str(folder), image_size=(40, 40), options=SourceOptions(crop="random", flip=True))
    batch = next(loader(source, [0], 32, seed=2))
    assert batch.originals.tolist() == [[40, 60]] * 32 and batch.crops[:, 0].tolist() == [0] * 32
    lefts = batch.crops[:, 1].tolist()
    assert 0 <= min(lefts) < 5 and 15 < max(lefts) <= 20 and 8 < batch.flipped.sum() < 24
    for image, left, flipped in zip(batch.images.permute(0, 2, 3, 1).numpy(), lefts, batch.flipped, strict=True):
        upright = whole[:, ::-1] if flipped else whole
        off = np.abs(image.astype(int) - upright[:, left : left + 40]).mean()
        assert off < 45  # within half a pixel; other crops of noise are 85 off
    centre = next(loader(open_source(str(folder), image_size=(40, 40)), [0], 2, seed=2))
    assert centre.crops.tolist() == [[0, 10]] * 2 and not centre.flipped.any()


def test_one_pass_goes_bucket_after_bucket(mixed):
    batches = list(training.data.one_pass(opened(mixed), range(100), 16))
    assert [len(b.keys) for b in batches] == [16, 9, 16, 16, 16, 2, 16, 9]
    assert sorted(key for b in batches for key in b.keys) == [f"{i:05d}" for i in range(100)]


def config_for(out, folder, *more):
    return load_config(
        "pixels-tiny",
        [f"data.source={folder}", f"training.out={out}", "data.buckets=true", "data.image_size=32", "data.held_out=0.2",
         "data.num_samples=none", "training.batch_size=4", "training.num_steps=8", "training.checkpoint_every=4",
         "training.validate_every=4", "training.sample_every=0", "training.precision=fp32",
         "training.keep_checkpoints=9", "model.pos_embed_max_size=4", *more],
    )  # fmt: skip


@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_run_trains_on_buckets_and_resumes_to_the_bit(mixed, tmp_path, cached, monkeypatch):
    more = (f"data.cache_latents={cached}", f"data.num_workers={int(cached == 'false')}")
    whole = training.train(config_for(tmp_path / "whole", mixed, *more))
    log = (whole / "log.txt").read_text()
    assert "fitted to 3 buckets: 24 x 48 (25.0%), 32 x 32 (50.0%), 48 x 24 (25.0%)" in log
    last = RunFolder(whole).metrics()[-1]
    assert {"validation_loss_24x48", "validation_loss_32x32", "validation_loss_48x24"} <= last.keys()
    pipe = training.evaluate.TextToImage.load(whole)
    assert pipe.model.transformer.config.pos_embed_max_size >= 48 // pipe.step
    assert pipe("a", height=24, width=48, num_steps=1)[0].size == (48, 24)
    halves = training.train(config_for(tmp_path / "half", mixed, *more, "training.num_steps=4"))
    training.resume(halves, ["training.num_steps=8"])
    one, other = (training.checkpoint.load_latest(run, print)[1]["model"] for run in (whole, halves))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="trained with another training.batch_size: 4, not 8"):
        training.resume(halves, ["training.batch_size=8"])
    steps = [row["loss"] for row in RunFolder(whole).metrics() if "loss" in row]
    assert steps == [row["loss"] for row in RunFolder(halves).metrics() if "loss" in row]
    with pytest.raises(ValueError, match="trained with another training.packing: false, not true"):
        training.resume(halves, ["training.packing=true"])


def test_both_feeds_give_the_same_batches(mixed, tmp_path):
    feeds = []
    for cached in ("true", "false"):
        config = config_for(tmp_path / cached, mixed, f"data.cache_latents={cached}")
        run = RunFolder.create(tmp_path / cached, config)
        feeds.append(Trainer(config, run).feed.batches(4, 0))
    shapes = set()
    for one, other in islice(zip(*feeds, strict=True), 20):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.tokens.ids, other.tokens.ids)
        shapes.add(tuple(one.latents.shape))
    assert len(shapes) == 3


def test_what_cannot_work_is_refused(mixed, tmp_path):
    with pytest.raises(
        ConfigError,
        match="data.flip draws anew each time, .*: leave it out, or train on images with data.cache_latents=false",
    ):
        config_for(tmp_path, mixed, "data.flip=true")
    with pytest.raises(DataError, match="shapes are drawn at one size"):
        open_source("shapes:5", options=SourceOptions(buckets=True, wanted=Wanted(sizes=True)))
    (mixed / "bad.png").write_bytes(picture(0)[:20])
    (mixed / "bad.txt").write_text("no size")
    source = opened(mixed)
    assert len(source) == 100 and [key for key, _ in source.skipped] == ["bad"]
    assert len(split_by_key(source, 0.2)[0]) < 100


def test_the_largest_ratio_is_that_of_the_config(mixed, tmp_path):
    ratios = []
    for most in (1, 4):
        config = config_for(tmp_path / "run", mixed, f"data.bucket_ratio={most}", "training.batch_size=2")
        sizes = open_run_source(config, 4).layout.sizes
        ratios.append(max(max(size) / min(size) for size in sizes))
    assert ratios[0] == 1 < ratios[1] <= 4


def test_buckets_ask_for_sizes_themselves(tmp_path):
    shards = shards_of(tmp_path, (6,), sizes=((8, 16), (16, 8)))
    assert len(open_source(str(shards), 16, 4, options=SourceOptions(buckets=True)).layout.sizes) == 2
    with pytest.raises(DataError, match="buckets need the images' sizes"):
        FileSource(Index(str(shards)), (8, 8), options=SourceOptions(buckets=True))
