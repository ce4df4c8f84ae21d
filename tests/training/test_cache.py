"""A cache gives what images give, bit for bit where it is told to, whoever wrote it and however often it was stopped;
and what is not as it was written, or of other encoders, is refused by name.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import training
import training.cached
from mmdit.autoencoder import PatchAutoencoder, PatchAutoencoderConfig, PixelSpace, open_autoencoder
from mmdit.kl_autoencoder import KLAutoencoder
from mmdit.sd3_text import open_sd3_text
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_encoders import HiddenStates, open_text_encoder
from tests.mmdit.tiny_sd3 import make_pipeline, randomised, save_encoders, t5, t5_tokenizer
from tests.training.pictures import folder_of, members, noisy, parquet_of
from tests.training.test_trainer import assert_bit_equal, config_for, metrics
from training import cache_writer
from training.cache import Cache, CachedSample, CacheError, Known, Shard, as_tensors, write_shard
from training.cache_writer import CacheOptions, changed, data_of, write_cache
from training.cached import CachedFeed, CachedSource
from training.config import ConfigError, load_config
from training.data import DataError, is_shapes, open_source
from training.feed import Encoding, ImageFeed, LatentFeed, NothingUsable, chunks_of
from training.flops import reads_padding, text_places
from training.setup import fingerprint, open_run_source
from training.share import Share

CPU = torch.device("cpu")
EXACT = CacheOptions("fp32", "fp32")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Chunks of a few samples."""
    monkeypatch.setattr(cache_writer, "BATCH", 8)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A T5, SD3's three text encoders, and two autoencoders, in folders."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    save_encoders(root)
    KLAutoencoder(make_pipeline().vae).save(root / "kl")
    patches = PatchAutoencoder(PatchAutoencoderConfig(4, (8, 8), 1, 1.5, 0.1))
    randomised(patches).save(root / "patches")
    return root


def config(*overrides: str):
    return load_config("pixels-tiny", overrides)


def made(out: Path, *overrides: str, options: CacheOptions = EXACT) -> CachedSource:
    """A whole cache of the tiny preset's data: 64 pictures of 32 x 32."""
    assert write_cache(config(*overrides), out, options, log=lambda line: None).missing == 0
    return CachedSource(out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the format ---------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=3)), max_size=5
    ),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 3),
)
def test_what_is_written_is_read(tmp_path_factory, shapes, dtype, bad):
    """Latents of any shape, several captions of any length each, bad samples between."""
    torch.manual_seed(0)

    def text(length):
        return [
            (torch.randn(length, 5).to(dtype), torch.randn(3).to(dtype)),
            (torch.randn(4, 2).to(dtype), torch.ones(0)),
        ]

    known = [Known(torch.randn(2, h, w).to(dtype), [text(n) for n in lengths]) for h, w, lengths in shapes]
    samples = [CachedSample(f"key {i}", "", ["caption"] * len(one.text)) for i, one in enumerate(known)]
    samples.insert(min(bad, len(samples)), CachedSample("bad", "", ["none"], "broken"))
    stem = tmp_path_factory.mktemp("shard") / "shard-00000"
    write_shard(stem, samples, as_tensors(known, Known(torch.empty(0, 0, 0, dtype=dtype), [text(1)])))
    shard = Shard(stem)
    assert [one._replace(shares=()) for one in shard.samples] == samples and shard.problems() == []
    for place, one in zip(shard.good(), known, strict=True):
        read = shard.read(place)
        assert torch.equal(read.statistics, one.statistics) and read.statistics.dtype == dtype
        pairs = zip((p for c in read.text for p in c), (p for c in one.text for p in c), strict=True)
        assert all(torch.equal(a, b) for got, given in pairs for a, b in zip(got, given, strict=True))


def test_a_digest_is_of_every_number_and_of_the_shape():
    states, pooled = torch.ones(4, 5), torch.ones(3)
    texts = [
        [(a, b)] for a in (states, states.clone().index_fill_(0, torch.tensor(3), 2)) for b in (pooled, 2 * pooled)
    ]
    known = [
        Known(x, [text]) for x in (torch.ones(2, 2, 3), torch.ones(2, 3, 2), torch.zeros(2, 2, 3)) for text in texts
    ]
    assert len({one.digest() for one in known}) == len(known) == 12


@pytest.fixture(scope="module")
def written(parts, tmp_path_factory):
    """A cache of four shards with text features."""
    out = tmp_path_factory.mktemp("caches") / "written"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "BATCH", 8)
        made(out, f"text.encoder={parts / 't5'}", options=CacheOptions(shard_mb=0.15))
    return out


@pytest.mark.parametrize("where", [0.001, 0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_byte_is_found_and_named(written, tmp_path, where):
    """In the header, the tables and the numbers, by a look at all and by reading."""
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    assert Cache(folder).problems() == []
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    cache = Cache(folder)
    [problem, *_] = cache.problems()
    assert "shard-00001" in problem and "delete shard-00001.*" in problem
    shard = Shard(folder / "shard-00001")
    if where > 0.25:  # in a sample's numbers: it is named, and the others can be read
        named = [sample.key for sample in shard.samples if sample.key in problem]
        assert len(named) == 1
        for place in shard.good():
            if shard.samples[place].key != named[0]:
                shard.read(place)
    with pytest.raises(CacheError, match="shard-00001"):
        for place in shard.good():
            shard.read(place)


@pytest.mark.parametrize("name", ["cache.json", "shard-00002.json", "empty.json"])
def test_a_changed_table_is_refused(written, tmp_path, name):
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    (folder / name).write_text((folder / name).read_text().replace("a", "b", 1))
    with pytest.raises(CacheError, match=f"{name} has changed since it was written"):
        Cache(folder)


def test_a_cut_or_missing_shard_is_refused_and_made_again(parts, written, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    path = folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="shard-00002.safetensors is not as it was written: delete shard-00002"):
        Cache(folder)
    for path in folder.glob("shard-00002.*"):
        path.unlink()
    with pytest.raises(CacheError, match="1 of 4 shards are missing, the first is shard-00002"):
        Cache(folder)
    made(folder, f"text.encoder={parts / 't5'}", options=CacheOptions(shard_mb=0.15))
    assert files(folder) == files(written)


def test_a_folder_of_anything_else_is_refused(tmp_path):
    with pytest.raises(CacheError, match="is no cache: it has no cache.json"):
        Cache(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CacheError, match="exists and is no cache"):
        write_cache(config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- the same bytes, whoever writes and however often it is stopped -------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from training import cache_writer
from training.config import load_config

torch.set_num_threads(1)
cache_writer.BATCH = 8
source, out = sys.argv[1:]
text = cache_writer.open_text_encoder(source, 32)
cache_writer.open_text_encoder = lambda *how: text  # for all that follow
config = load_config("pixels-tiny", [f"text.encoder={source}", "data.num_samples=36"])
options = cache_writer.CacheOptions(shard_mb=0.15)
replace, deaths = os.replace, 0
for n in range(100):
    pid = os.fork()
    if pid == 0:  # dies at a moment of its own: before it puts a file in its place, or just after
        count = 0
        def dying(a, b):
            global count
            count += 1
            if count > n % 4 and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(a, b)
            if count > n % 4:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = dying
        cache_writer.write_cache(config, Path(out), options, log=lambda line: None)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    deaths += os.WIFSIGNALED(status)
    if not status:
        break
print(deaths, status)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(parts, tmp_path):
    """By SIGKILL, again and again, before and after each of the first renamings."""
    out = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(parts / "t5"), str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    deaths, status = map(int, done.stdout.split()[-2:])
    assert deaths >= 12 and status == 0
    how = (f"text.encoder={parts / 't5'}", "data.num_samples=36")
    made(tmp_path / "whole", *how, options=CacheOptions(shard_mb=0.15))
    assert files(out) == files(tmp_path / "whole")


def test_parts_and_workers_change_nothing(parts, written, tmp_path):
    """In one folder, or in two that are put together."""
    how = dict(dtype="fp16", text_dtype="fp16", shard_mb=0.15)
    for i in (2, 0, 1):
        out = tmp_path / ("other" if i == 1 else "cache")
        overrides = [f"text.encoder={parts / 't5'}", f"data.num_workers={2 * (i == 2)}"]
        report = write_cache(config(*overrides), out, CacheOptions(part=(i, 3), **how), log=print)
        assert report.missing_here == 0 and report.missing > 0
    shutil.copytree(tmp_path / "other", tmp_path / "cache", dirs_exist_ok=True)
    assert files(tmp_path / "cache") == files(written)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupt_keeps_what_is_there(written, parts, tmp_path, monkeypatch, damaged):
    """A chunk that is no longer as it was written is made again."""

    class Caught(cache_writer.Interrupts):
        """A signal came in the third chunk."""

        asked = 0

        @property
        def caught(self):
            self.asked += 1
            return self.asked == 3

        @caught.setter
        def caught(self, value):
            pass

    monkeypatch.setattr(cache_writer, "Interrupts", Caught)
    how = config(f"text.encoder={parts / 't5'}"), tmp_path / "cache", CacheOptions(shard_mb=0.15)
    report = write_cache(*how, log=print)
    assert (report.samples, report.missing_here) == (24, 3)
    monkeypatch.undo()
    monkeypatch.setattr(cache_writer, "BATCH", 8)
    if damaged:
        (chunk,) = (tmp_path / "cache").glob(".shard-*/*.safetensors")
        data = chunk.read_bytes()
        chunk.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert write_cache(*how, log=print).samples == 40 + 8 * damaged
    assert files(tmp_path / "cache") == files(written)


def test_of_two_that_write_the_same_part_one_is_told(written, parts, tmp_path, monkeypatch):
    def done_by_another(chunks):
        whole = merged(chunks)
        shutil.rmtree(Path(chunks[0].file).parent)
        return whole

    merged, how = cache_writer.merged, (config(f"text.encoder={parts / 't5'}"), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "merged", done_by_another)
        with pytest.raises(CacheError, match="does another `mmdit cache` write the same part?"):
            write_cache(*how, CacheOptions(shard_mb=0.15), log=print)
    assert write_cache(*how, CacheOptions(shard_mb=0.15), log=print).missing == 0
    assert files(tmp_path / "cache") == files(written)


def test_a_file_that_is_missing_elsewhere_is_named_as_it_is(tmp_path, monkeypatch):
    def read(*_):
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "pictures" / "1.png"))

    monkeypatch.setattr(cache_writer._Writer, "run", read)
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        write_cache(config(), tmp_path / "cache", log=print)


# --- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["autoencoder=PARTS/patches"], 'made with another autoencoder \\("none"\\): name another folder'),
        (["text.max_length=31"], "made with another text encoder:"),
        (["text.encoder=learned"], "made with another text encoder:"),
        (["data.image_size=40"], "made with another image size, data:"),
        (["data.num_samples=60"], "made with another data:"),
        (["seed=1"], "made with another seed:"),
    ],
    ids=str,
)
def test_a_cache_of_another_kind_is_not_gone_on_with(written, parts, changes, message):
    changes = [change.replace("PARTS", str(parts)) for change in changes]
    if "autoencoder" in changes[0]:
        changes.append("model.patch_size=2")
    changes = [f"text.encoder={parts / 't5'}", *changes]
    before = files(written)
    with pytest.raises(CacheError, match=message):
        write_cache(config(*changes), written, CacheOptions(shard_mb=0.15))
    assert files(written) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="bf16"), r"another type of latents \(--dtype\):"),
        (dict(text_dtype="fp32"), r"another type of text features \(--text-dtype\):"),
        (dict(shard_mb=10), r"another size of shards \(--shard-mb\):"),
    ],
    ids=str,
)
def test_options_of_another_kind_are_refused(written, parts, options, message):
    with pytest.raises(CacheError, match=message):
        write_cache(config(f"text.encoder={parts / 't5'}"), written, replace(CacheOptions(shard_mb=0.15), **options))


def test_a_shard_holds_a_chunk_at_least(tmp_path):
    cached = made(tmp_path / "cache", options=CacheOptions(shard_mb=1e-6))
    assert [len(shard.samples) for shard in cached.cache.shards] == [8] * 8


@pytest.mark.parametrize(
    "wrong", [dict(dtype="int8"), dict(text_dtype="x"), dict(part=(2, 2)), dict(part=(0, 0)), dict(shard_mb=0)], ids=str
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(CacheError, match=next(iter(wrong)).replace("part", "the part")):
        CacheOptions(**wrong)


def test_training_with_another_encoder_is_refused(parts, written, tmp_path):
    def train(*overrides, source=written):
        encoder = f"text.encoder={parts / 't5'}"
        return training.train(config_for(tmp_path / "run", f"data.source={source}", encoder, *overrides))

    other = tmp_path / "t5"
    shutil.copytree(parts / "t5", other)
    t5(t5_tokenizer(), 32).save_pretrained(other)
    learned = tmp_path / "learned"
    made(learned)
    for message, overrides, source in [
        ("was made with another text encoder: it differs in weights", [f"text.encoder={other}"], written),
        ("was made with another text encoder: it differs in max_length", ["text.max_length=20"], written),
        ("no text encoder in nowhere", ["text.encoder=nowhere"], written),
        ("has no text features: make a cache with text.encoder", [], learned),
        (
            'was made with another autoencoder \\("none"\\): name that one',
            [f"autoencoder={parts / 'patches'}", "model.patch_size=1"],
            written,
        ),
        ("has images of 32 x 32: leave out data.image_size", ["data.image_size=40"], written),
        ('multiples of 24: it was made for 8, with autoencoder = "none"', ["model.patch_size=24"], written),
        ('multiples of 64: it was made for 8, with autoencoder = "none"', ["autoencoder=shapes"], written),
    ]:
        with pytest.raises(ValueError, match=message):
            train(*overrides, source=source)
        assert not (tmp_path / "run").exists()
    autoencoder, words = open_autoencoder(parts / "patches"), open_text_encoder(parts / "t5", 32)
    with pytest.raises(CacheError, match="was made with another autoencoder"):
        CachedFeed(CachedSource(written), np.arange(4), Encoding(autoencoder, words, CPU))


def test_sizes_that_a_cache_is_asked_for(tmp_path):
    """Those that round to its own; and each side is a multiple of the model's step."""
    made(tmp_path / "cache", "data.image_size=[32,40]", "data.num_samples=8")
    assert CachedSource(tmp_path / "cache", (33, 39), 8).image_size == (32, 40)
    with pytest.raises(CacheError, match="has images of 32 x 40, the model needs multiples of 16"):
        CachedSource(tmp_path / "cache", step=16)


def test_images_of_one_size_are_a_batch_though_several_may_be_in_one(written):
    assert CachedSource(written, mixed=True).layout.mixed is False


def test_a_cache_is_no_source_of_images(written, tmp_path):
    source = open_source(str(written))
    assert isinstance(source, CachedSource) and is_shapes(str(written))
    with pytest.raises(CacheError, match="is a cache of latents, not of images"):
        source[0]
    with pytest.raises(CacheError, match="is a cache already"):
        write_cache(config(f"data.source={written}"), tmp_path / "cache")
    with pytest.raises(DataError, match="is a cache, which is trained on by itself: mix the data"):
        open_source(f"{written}=0.5,other=0.5")


def test_numbers_that_do_not_fit_are_refused(parts, tmp_path, monkeypatch):
    """Half precision ends at 65504."""
    monkeypatch.setattr(PixelSpace, "statistics", lambda self, x: 1e5 * x)
    with pytest.raises(CacheError, match="shapes-0.*: a number is not finite in fp16: use --dtype fp32"):
        write_cache(config(), tmp_path / "cache")
    assert write_cache(config(), tmp_path / "other", CacheOptions("bf16")).missing == 0


@pytest.mark.parametrize(("num_captions", "name"), [(1, "the empty caption"), (8, "shapes-0.*")])
def test_text_features_that_do_not_fit_are_refused(parts, tmp_path, monkeypatch, num_captions, name):
    """Of the empty caption, which is encoded alone, and of a sample's."""
    encode = HiddenStates.encode

    def large(self, ids, mask):
        states, pooled = encode(self, ids, mask)
        return states * (1e9 if len(ids) == num_captions else 1), pooled

    monkeypatch.setattr(HiddenStates, "encode", large)
    with pytest.raises(CacheError, match=f"{name}: a number is not finite in fp16: use --text-dtype fp32"):
        write_cache(config(f"text.encoder={parts / 't5'}"), tmp_path / "cache")


def test_changed_data_is_found_by_content(written, tmp_path):
    """The same names, one picture and one caption others."""
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.txt").write_text("bad")
    said = []
    how = config(f"data.source={tmp_path}", "data.num_samples=none", "data.image_size=16")
    assert write_cache(how, tmp_path / "cache", log=said.append).bad == 1
    assert len(said) == 1 and said[0].startswith("skipped: bad: ")
    cache = Cache(tmp_path / "cache")
    assert changed(cache, data_of(cache, str(tmp_path))) == []
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "1.png")
    (tmp_path / "2.txt").write_text("another")
    assert [line.partition(":")[0] for line in changed(cache, data_of(cache, str(tmp_path)))] == ["1", "2"]
    (tmp_path / "3.png").unlink()
    with pytest.raises(CacheError, match="has other samples than"):
        changed(cache, data_of(cache, str(tmp_path)))


# --- the same batches and the same training as from images -----------------------------------------------------------


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
