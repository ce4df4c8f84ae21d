"""A cache gives what images give, bit for bit where it is told to, whoever wrote it and however often it was stopped;
and what is not as it was written, or of other encoders, is refused by name.
"""

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
from mmdit.autoencoder import PixelSpace, open_autoencoder
from mmdit.text_encoders import HiddenStates, open_text_encoder
from tests.mmdit.tiny_sd3 import t5, t5_tokenizer
from tests.training.caches import config, files, made
from tests.training.runs import config_for
from training import cache_writer
from training.cache import Cache, CacheError, Known, Shard, as_tensors, write_shard
from training.cache_samples import CachedSample
from training.cache_writer import CacheOptions, changed, data_of, write_cache
from training.cached import CachedFeed, CachedSource
from training.data import DataError, is_shapes, open_source
from training.feed import Encoding

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Chunks of a few samples."""
    monkeypatch.setattr(cache_writer, "BATCH", 8)


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
        (["data.image_size=40"], "made with another image size, data set:"),
        (["data.num_samples=60"], "made with another data set:"),
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
        CachedFeed(CachedSource(written), np.arange(4), Encoding(autoencoder, words, torch.device("cpu")))


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
    with pytest.raises(CacheError, match="has other samples than .*: 1 gone, such as 3$"):
        changed(cache, data_of(cache, str(tmp_path)))
    for name in ("4", "5"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    with pytest.raises(CacheError, match="has other samples than .*: 2 new, such as 4; 1 gone, such as 3$"):
        changed(cache, data_of(cache, str(tmp_path)))
