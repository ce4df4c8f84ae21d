"""Batches and training from a cache are those from images, bit for bit where it is told to keep every bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import training
import training.cached
from mmdit.autoencoder import PixelSpace, open_autoencoder
from mmdit.sd3_text import open_sd3_text
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_encoders import open_text_encoder
from tests.training.caches import EXACT, config, made
from tests.training.pictures import folder_of, members, noisy, parquet_of
from tests.training.runs import assert_bit_equal, config_for, metrics
from training import cache_writer
from training.cache import Cache, CacheError
from training.cache_writer import CacheOptions, changed, data_of, write_cache
from training.cached import CachedFeed, CachedSource
from training.config import ConfigError
from training.data import open_source
from training.feed import Encoding, ImageFeed, LatentFeed, NothingUsable, chunks_of
from training.flops import reads_padding, text_places
from training.setup import fingerprint, open_run_source
from training.share import Share

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Chunks of a few samples."""
    monkeypatch.setattr(cache_writer, "BATCH", 8)


def test_data_in_buckets_that_were_joined_is_the_same(tmp_path):
    """As it was for the batches that the cache was made for."""
    folder = folder_of(tmp_path / "data", members(range(12), [(32, 32)] * 5 + [(16, 64)]))
    how = (f"data.source={folder}", "data.num_samples=none", "data.image_size=32", "data.buckets=true")
    for batch_size, sizes in ((4, 1), (2, 2)):
        cache = made(tmp_path / f"cache-{batch_size}", *how, f"training.batch_size={batch_size}").cache
        assert len(cache.about.sizes) == sizes and changed(cache, data_of(cache, str(folder))) == []


@pytest.fixture(scope="module")
def learned():
    return LearnedText(TextConfig(300, 32, 16, 1, 2), Tokenizer.train(["a red circle"], 280, 32))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["none", "patches", "kl"])
def test_batches_are_those_of_images(parts, tmp_path, learned, kind, sampled):
    """The mode, and samples of the posterior, where they are kept in memory and where each is encoded anew."""
    spec = kind if kind == "none" else str(parts / kind)
    autoencoder = open_autoencoder(spec)
    sizes = ("model.patch_size=2",) if kind != "none" else ()
    cached = made(tmp_path / "cache", f"autoencoder={spec}", *sizes)
    images = open_source("shapes", 32, num_samples=64)
    indices, told = np.arange(3, 61), []
    encoding = Encoding(autoencoder, learned, CPU, sampled=sampled)
    feeds = (
        CachedFeed(cached, indices, replace(encoding, skipped=lambda *what: told.append(what))),
        LatentFeed(images, indices, encoding),
        ImageFeed(images, indices, encoding),
    )
    runs = [feed.batches(12, seed=5, start_step=2) for feed in feeds]
    first = None
    for _ in range(7):  # over the end of an epoch
        batch, *others = map(next, runs)
        for other in others:
            assert torch.equal(batch.latents, other.latents) and torch.equal(batch.tokens.ids, other.tokens.ids)
        first = batch.latents if first is None else first
    assert told == [] and feeds[0].captions == feeds[1].captions
    again = next(feeds[0].batches(12, seed=5, start_step=2)).latents
    assert torch.equal(again, first)
    for feed in feeds:  # of two processes the second
        own = feed.batches(12, seed=5, start_step=2, share=Share(1, 2))
        torch.testing.assert_close(next(own).latents, first[6:])
        own.close()
    mode = next(CachedFeed(cached, indices, replace(encoding, sampled=False)).batches(12, seed=5, start_step=2)).latents
    assert torch.equal(first, mode) != (sampled and kind == "kl")
    assert torch.equal(feeds[0].at([1, 2]).latents, feeds[1].at([1, 2]).latents)
    for run in runs:
        run.close()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("buckets", ["true", "own"])
def test_batches_of_several_sizes_are_those_of_images(parts, tmp_path, learned, buckets, sampled):
    sizes = ((32, 32), (16, 40), (40, 16), (8, 8))
    folder = folder_of(tmp_path / "data", {f"{i}.png": noisy(i, sizes[i % 4]) for i in range(24)})
    for i in range(24):
        (folder / f"{i}.txt").write_text(f"picture {i}")
    overrides = [f"data.source={folder}", f"autoencoder={parts / 'kl'}", f"data.buckets={buckets}"]
    overrides += ["training.packing=true", "data.image_size=32", "data.num_samples=none", "model.patch_size=2"]
    assert write_cache(config(*overrides), tmp_path / "cache", EXACT, log=print).missing == 0
    images = open_run_source(config(*overrides), 4)
    cached = open_run_source(config(*overrides, f"data.source={tmp_path / 'cache'}", "data.image_size=none"), 4)
    assert cached.layout.sizes == images.layout.sizes and cached.layout.mixed
    indices = np.arange(1, 24)
    encoding = Encoding(open_autoencoder(str(parts / "kl")), learned, CPU, sampled=sampled)
    feeds = (
        CachedFeed(cached, indices, encoding),
        LatentFeed(images, indices, encoding),
        ImageFeed(images, indices, encoding),
    )
    runs = [feed.batches(6, seed=5, start_step=2) for feed in feeds]
    for _ in range(6):
        ours, *others = map(next, runs)
        assert len({x.shape for x in ours.latents}) > 1
        for other in others:
            assert torch.equal(ours.tokens.ids, other.tokens.ids)
            assert all(torch.equal(a, b) for a, b in zip(ours.latents, other.latents, strict=True))
    for run in runs:
        run.close()
    assert list(chunks_of(feeds[0], 9)) == [range(9), range(9, 18), range(18, 23)] == list(chunks_of(feeds[1], 9))
    ours, theirs = (feed.at([3, 1, 8]) for feed in feeds[:2])  # in validation: the mode
    assert all(torch.equal(a, b) for a, b in zip(ours.latents, theirs.latents, strict=True))
    assert changed(Cache(tmp_path / "cache"), data_of(Cache(tmp_path / "cache"), str(folder))) == []


@pytest.mark.parametrize("mixed", [False, True])
def test_buckets_mixes_and_captions_are_those_of_images(tmp_path, learned, mixed):
    """Images of three shapes in buckets, of two data sets, with captions to draw among; the split of a batch too."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 14)):
        (tmp_path / name).mkdir()
        for i in range(count):
            size = [(32, 32), (64, 32), (32, 64)][i % 3]
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
            captions = {"original": f"{name} {i}", "synthetic": [f"{name} {i} again", f"{name} {i} once more"][: i % 3]}
            (tmp_path / name / f"{i}.json").write_text(json.dumps(captions))
    spec = f"{tmp_path / 'a'}=0.7,{tmp_path / 'b'}=0.3" if mixed else str(tmp_path / "a")
    overrides = ["data.num_samples=none", "data.buckets=true", "data.image_size=32", "model.patch_size=8"]
    overrides += ["data.captions=original=0.5,synthetic=0.5", "training.batch_size=4", f"data.source={spec}"]
    cached, images = made(tmp_path / "cache", *overrides), open_run_source(config(*overrides), 8)
    assert len(cached.layout.sizes) == 3 and fingerprint(cached) == fingerprint(images)
    encoding, indices = Encoding(PixelSpace(), learned, CPU), np.arange(2, len(images))
    feeds = CachedFeed(cached, indices, encoding), LatentFeed(images, indices, encoding)
    assert feeds[0].captions == feeds[1].captions
    for share in (Share(), Share(1, 2)):
        runs = [feed.batches(4, seed=3, start_step=1, share=share) for feed in feeds]
        shapes = set()
        for _ in range(20):
            ours, theirs = map(next, runs)
            assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.tokens.ids, theirs.tokens.ids)
            shapes.add(tuple(ours.latents.shape))
        assert len(shapes) == 3
        for run in runs:
            run.close()
    for ours, theirs in zip(chunks_of(feeds[0], 5), chunks_of(feeds[1], 5), strict=True):
        assert ours == theirs and torch.equal(feeds[0].at(ours).latents, feeds[1].at(theirs).latents)
    left_out = config(f"data.source={tmp_path / 'cache'}", "data.num_samples=none", "data.image_size=none")
    assert fingerprint(open_run_source(left_out, 8)) == fingerprint(images)  # what is not said is as the cache has it
    some = [*range(10), *(range(30, 40) if mixed else ())]  # the first of each data set
    few = CachedSource(tmp_path / "cache", num_samples=10)
    assert list(few.keys) == [images.keys[i] for i in some]
    feeds = CachedFeed(few, np.arange(len(some)), encoding), LatentFeed(images, np.array(some), encoding)
    assert feeds[0].captions == feeds[1].captions
    for rows in chunks_of(feeds[1], 5):
        assert torch.equal(feeds[0].at(rows).latents, feeds[1].at(rows).latents)
    assert changed(Cache(tmp_path / "cache"), data_of(Cache(tmp_path / "cache"), spec)) == []


def test_the_order_of_row_groups_is_kept(tmp_path, learned):
    pytest.importorskip("pyarrow")
    for number in range(2):
        parquet_of(tmp_path / f"{number}.parquet", range(60 * number, 60 * number + 60))
    how = (f"data.source={tmp_path}", "data.num_samples=none", "data.image_size=16")
    cached, images = made(tmp_path / "cache", *how), open_run_source(config(*how), 8)
    encoding = Encoding(PixelSpace(), learned, CPU)
    plain = next(LatentFeed(images, np.arange(120), encoding).batches(90, 3))
    assert torch.equal(next(CachedFeed(cached, np.arange(120), encoding).batches(90, 3)).latents, plain.latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.min_side=8"], "was made with data.min_side = 0, not 8: leave it out"),
        (["data.buckets=true"], "was made with data.buckets = False, not True"),
        (["data.flip=true", "data.cache_latents=false"], "has one crop of each image: leave out data.crop and"),
        (["data.crop=random", "data.cache_latents=false"], "has one crop of each image: leave out data.crop and"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_other_samples_is_refused(written, changes, message):
    with pytest.raises(CacheError, match=message):
        open_run_source(config(f"data.source={written}", *changes), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.crop=random"], 'one crop of each image: set data.crop="center"'),
        (["data.source=hf-stream:nowhere"], "is a stream, whose samples have no numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_cached_is_refused(tmp_path, changes, message):
    with pytest.raises(CacheError, match=message):
        write_cache(config("data.cache_latents=false", *changes), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_bad_samples_are_told_and_left_out(tmp_path, learned):
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    (tmp_path / "1.png").write_bytes(b"no picture")
    how = ("data.num_samples=none", "data.image_size=16", f"data.source={tmp_path}")
    cached, told = made(tmp_path / "cache", *how), []
    made(tmp_path / "cache", *how, "seed=1")  # of files no number depends on it
    encoding = Encoding(PixelSpace(), learned, CPU, skipped=lambda *what: told.append(what))
    feed = CachedFeed(cached, np.arange(3), encoding)
    assert feed.captions == ["caption 0", "caption 2"] and [key for key, _ in told] == ["1"]
    with pytest.raises(NothingUsable, match="none of the 0 samples can be used$"):
        CachedFeed(cached, np.arange(0), encoding)
    with pytest.raises(NothingUsable, match="none of the 1 samples can be used; one of them is 1: "):
        CachedFeed(cached, np.array([1]), encoding)


@pytest.mark.parametrize("dropped", ["zeros", "empty"])
@pytest.mark.parametrize("kind", ["t5", "sd3", "without clip_g", "without clip_l, t5"])
def test_known_features_are_what_the_encoders_say(parts, tmp_path, kind, dropped):
    """With each encoder's caption dropped by itself; in fp16 to its rounding."""
    captions = ["a red circle", "", "two blue stars left of a green square " * 3, "star"]
    drop = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.464
    assert drop.any() and not drop.all()
    if kind == "t5":
        text, drop = open_text_encoder(parts / "t5", 32), drop[:, :1]
    else:
        root, without = tmp_path / "sd3", [name for name in ("clip_l", "clip_g", "t5") if name in kind]
        shutil.copytree(parts / "sd3", root)
        (root / "transformer").mkdir()  # says how wide what is left out would be
        about = {"joint_attention_dim": 32, "pooled_projection_dim": 20}
        (root / "transformer" / "config.json").write_text(json.dumps(about))
        text = open_sd3_text(root, 32, dropped=dropped, without=without)
    tokens = text.tokenize(captions)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3)):  # other batches: sums in another order
        features, empty = (
            training.cached.features(_stored(text, some, dtype), text.shape) for some in (captions, [""])
        )
        known = training.cached.KnownText(text.about(), text.shape, empty, lambda: text)
        assert (known.num_encoders, known.context_dim, known.pooled_dim) == (
            text.num_encoders,
            text.context_dim,
            text.pooled_dim,
        )
        for where in (drop, None):
            got, real = known(features, where), text(tokens, where)
            there = torch.ones(real.context.shape[:2], dtype=torch.bool) if real.mask is None else real.mask
            assert got.context.dtype == torch.float32
            torch.testing.assert_close(got.context[there], real.context[there], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(got.pooled, real.pooled, rtol=tolerance, atol=tolerance)
            assert (got.mask is None and real.mask is None) or torch.equal(got.mask, real.mask)
            assert reads_padding(known) == reads_padding(text) == (real.mask is None)
        for conditioner, words in ((known, features), (text, tokens)):  # what telemetry counts
            assert text_places(conditioner, words.mask.shape[1]) == real.context.shape[1]
        assert all(torch.equal(a, b) for a, b in zip(known(tokens, drop)[:2], text(tokens, drop)[:2], strict=True))


def _stored(text, captions, dtype):
    """As a cache stores them."""
    writer = object.__new__(cache_writer._Writer)
    writer.text, writer.device = text, CPU
    names = {torch.float32: "fp32", torch.float16: "fp16"}
    writer.options = CacheOptions(text_dtype=names[dtype])
    return writer._texts(captions)


@pytest.mark.parametrize("kind", ["learned", "t5", "sd3", "transfusion"])
def test_training_from_a_cache_is_training_from_images(parts, tmp_path, monkeypatch, kind):
    """The same losses, weights and validation, and no encoder is opened; a stop in the middle changes nothing."""
    how = ["training.num_steps=4", "training.checkpoint_every=2", "objective.caption_dropout=0.464"]
    how += ["training.log_every=1", "training.validate_every=2"]
    if kind == "transfusion":
        how += ["transfusion.enabled=true", "model.positions=both", "text.vocab_size=512"]
    elif kind != "learned":
        how.append(f"text.encoder={parts / kind}")
    with monkeypatch.context() as patch:
        patch.setattr(training.trainer.Trainer, "_finish", lambda self: None)
        images = training.train(config_for(tmp_path / "images", *how))
        made(tmp_path / "cache", *how)
        for name in ("open_text_encoder", "load_encoder"):
            patch.setattr(training.cached, name, lambda *how: pytest.fail("a text encoder is opened"))
        source = f"data.source={tmp_path / 'cache'}"
        cached = training.train(config_for(tmp_path / "cached", *how, source))
        assert_bit_equal(images, cached)
        name = "validation_loss"
        assert metrics(images, "loss") == metrics(cached, "loss")
        assert metrics(images, name) == metrics(cached, name) and len(metrics(cached, name)) == 2
        part = training.train(config_for(tmp_path / "part", *how[1:], "training.num_steps=2", source))
        training.resume(part, ["training.num_steps=4"])
        assert_bit_equal(images, part)
        other = training.train(config_for(tmp_path / "other", *how[1:], "training.num_steps=2"))
        training.resume(other, ["training.num_steps=4", source])  # from images to their cache
        assert_bit_equal(images, other)
    if kind == "t5":  # what follows opens the encoder: pictures and scores
        assert training.evaluate_run(cached)["validation_loss"] == metrics(images, name)[-1][1]


def test_grids_open_the_encoder_and_leave_it_on_the_cpu(parts, written, tmp_path, monkeypatch):
    opened = []
    real = training.cached.open_text_encoder
    monkeypatch.setattr(training.cached, "open_text_encoder", lambda *how: opened.append(how) or real(*how))
    monkeypatch.setattr(training.trainer.Trainer, "_finish", lambda self: None)
    how = (f"data.source={written}", f"text.encoder={parts / 't5'}", "training.num_steps=2")
    run = training.train(config_for(tmp_path / "run", *how, "training.sample_every=1"))
    assert len(opened) == 1 and len(list((run / "samples").iterdir())) == 2
    about = json.loads((run / "pipeline" / "text" / "config.json").read_text())
    assert about == open_text_encoder(parts / "t5", 32).about()


@pytest.mark.parametrize("source", ["shapes", "cache"])
def test_samples_of_the_posterior_need_one_and_change_the_training(parts, written, tmp_path, source, monkeypatch):
    monkeypatch.setattr(training.trainer.Trainer, "_finish", lambda self: None)
    how = [f"autoencoder={parts / 'kl'}", "model.patch_size=2", "training.num_steps=2", "training.log_every=1"]
    if source == "cache":
        made(tmp_path / "cache", *how)
        how.append(f"data.source={tmp_path / 'cache'}")
    mode, sample = (
        metrics(training.train(config_for(tmp_path / p, *how, f"data.posterior={p}")), "loss")
        for p in ("mode", "sample")
    )
    assert mode != sample
    with pytest.raises(ConfigError, match='data.posterior is "sample": the autoencoder has none'):
        training.train(config_for(tmp_path / "none", "data.posterior=sample"))


def test_an_autoencoder_is_known_by_what_it_computes(parts, tmp_path):
    """A copy has the same fingerprint, another weight or scale has not; where it is kept does not count."""
    for kind in ("kl", "patches"):
        model = open_autoencoder(parts / kind)
        model.save(tmp_path / kind)
        assert open_autoencoder(tmp_path / kind).fingerprint() == model.fingerprint()
        other = open_autoencoder(parts / kind)
        with torch.no_grad():
            next(other.parameters()).view(-1)[0] += 1e-3
        assert other.fingerprint() != model.fingerprint()
    scaled = open_autoencoder(parts / "patches")
    scaled.set_scale(1.6, 0.1)
    assert scaled.fingerprint() != model.fingerprint() != PixelSpace().fingerprint()
