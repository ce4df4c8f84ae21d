"""A cache on a server gives what it gives on a disk, to the bit; what has changed there, is cut or does not answer is
named, and ends a run that can be resumed.
"""

import hashlib
import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import training
from mmdit.autoencoder import PixelSpace
from mmdit.text import LearnedText, TextConfig, Tokenizer
from tests.mmdit.tiny_sd3 import save_encoders
from tests.training.flaky import Flaky, put
from tests.training.runs import assert_bit_equal, config_for, metrics
from training import cache, cache_files, cache_writer, remote
from training.cache import About, Cache, Shard
from training.cache_files import CacheError, RemoteTensor, read_tensors, sha256_of_file
from training.cache_writer import CacheOptions, write_cache
from training.cached import CachedFeed, CachedSource
from training.config import load_config
from training.data import DataError, SourceOptions, is_shapes, open_source
from training.feed import Encoding
from training.remote import Patience
from training.signed import write_signed
from training.wanted import Wanted

URL = "flaky://cache/cache.json"
QUICK = Patience(timeout=10.0, retries=2, pause=0.01)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A cache of eight shards with text features of a T5, several captions a picture."""
    root = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    save_encoders(root)
    for i in range(12):
        (root / "data").mkdir(exist_ok=True)
        _picture(root / "data" / f"{i}.png", i)
        (root / "data" / f"{i}.json").write_text(json.dumps({"a": f"a star {i}", "b": "red " * i + "star"}))
    wishes = ("data.image_size=16", "data.num_samples=none", "data.captions=a=0.5,b=0.5", f"text.encoder={root / 't5'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "BATCH", 4)
        config = load_config("pixels-tiny", [f"data.source={root / 'data'}", *wishes])
        write_cache(config, root / "cache", CacheOptions("fp32", "fp16", shard_mb=0.001), log=print)
    return root / "cache"


def _picture(path: Path, i: int) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def server(written, flaky):
    """The same cache on a server."""
    upload(written)
    return written


def upload(folder: Path) -> None:
    for path in folder.iterdir():
        put(f"flaky://cache/{path.name}", path.read_bytes())


def opened(spec: str, **options) -> training.Source:
    return open_source(spec, options=SourceOptions(wanted=Wanted(patience=QUICK)), **options)


def encoding() -> Encoding:
    tokenizer = Tokenizer.train(["a red star"], 260, 8)
    text = LearnedText(TextConfig(width=8, depth=1, num_heads=1, max_length=8, vocab_size=260), tokenizer)
    return Encoding(PixelSpace(), text, torch.device("cpu"), 0, lambda key, reason: None, False)


def test_every_sample_is_that_of_the_disk(server):
    one, other = Cache(server), Cache(URL, QUICK)
    assert other.is_remote and other.samples == one.samples and len(other.shards) == 3
    for i in range(len(one.samples)):
        a, b = one.read(i), other.read(i)
        assert torch.equal(a.statistics, b.statistics) and a.statistics.dtype == b.statistics.dtype
        pairs = zip((p for c in a.text for p in c), (p for c in b.text for p in c), strict=True)
        assert all(torch.equal(x, y) and x.dtype == y.dtype for p, q in pairs for x, y in zip(p, q, strict=True))
        assert [len(caption) for caption in a.text] == [len(caption) for caption in b.text] == [1, 1]
    assert other.problems() == [] and About.read(URL).source == one.about.source and not is_shapes(URL)


def test_a_sample_is_asked_for_by_itself(server):
    """Its latents, and the states and pooled vectors of all its captions: three ranges once the shard is open."""
    cache = Cache(URL, QUICK)
    cache.read(0)
    Flaky.reads.clear()
    known = cache.read(1)
    sizes = [known.statistics.numel() * 4, *(sum(2 * c[0][k].numel() for c in known.text) for k in (0, 1))]
    assert sorted(end - start for start, end in Flaky.reads) == sorted(sizes)


def test_batches_are_those_of_the_disk(server):
    for spec in (URL, str(server)):
        feed = CachedFeed(opened(spec), np.arange(12), encoding())
        Flaky.faults = ["fails", "cuts"] if spec == URL else []
        batches = feed.batches(4, seed=3)
        found = [next(batches) for _ in range(5)]
        batches.close()
        if spec == URL:
            first, asked = found, len(Flaky.reads)
    assert len(Flaky.reads) == asked  # the disk asks no server
    for a, b in zip(first, found, strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.tokens.ids, b.tokens.ids)


def test_training_and_resuming_are_those_of_the_disk(server, tmp_path):
    encoder = f"text.encoder={server.parent / 't5'}"
    settings = ("data.num_samples=none", "data.held_out=0.3", "training.batch_size=4", encoder, "data.image_size=none")
    for name, spec in (("disk", str(server)), ("server", URL)):
        config = config_for(tmp_path / name, f"data.source={spec}", *settings, "training.num_steps=4")
        training.train(config)
    assert metrics(tmp_path / "disk", "loss") == metrics(tmp_path / "server", "loss")
    assert_bit_equal(tmp_path / "disk", tmp_path / "server")
    more = ["training.num_steps=6"]
    training.resume(tmp_path / "disk", [*more, f"data.source={URL}"])
    training.resume(tmp_path / "server", more)
    assert_bit_equal(tmp_path / "disk", tmp_path / "server")


@pytest.mark.parametrize("where", [0.4, 0.7])
def test_a_byte_that_changes_is_noticed_whenever_it_changes(server, where):
    """Also after the sample has been read: a file on a server may be replaced while it is in use."""
    cache, name = Cache(URL, QUICK), "shard-00001.safetensors"
    for i in range(4, 8):
        cache.read(i)
    data = bytearray((server / name).read_bytes())
    data[int(where * len(data))] ^= 1
    put(f"flaky://cache/{name}", bytes(data))
    with pytest.raises(CacheError, match=r"flaky://cache/shard-00001.safetensors: sample .+ has changed; copy shard-"):
        for i in range(4, 8):
            cache.read(i)
    assert len(cache.problems()) == 1


@pytest.mark.parametrize("name", ["cache.json", "shard-00001.json", "shard-00001.safetensors", "empty.json"])
def test_a_missing_file_is_named(server, name):
    del Flaky.store[f"flaky://cache/{name}"]
    with pytest.raises(DataError, match=rf"flaky://cache/{name}: there is no such file on the server"):
        [Cache(URL, QUICK).read(i) for i in range(12)]


def test_a_changed_table_is_refused(server):
    put("flaky://cache/shard-00002.json", (server / "shard-00002.json").read_bytes().replace(b"star", b"moon"))
    with pytest.raises(CacheError, match="shard-00002.json has changed since it was written; copy shard-00002.* to"):
        Cache(URL, QUICK)


def test_a_server_that_fails_is_no_change_of_the_data(server, monkeypatch):
    """It is named as what it is, while opening, reading and verifying."""
    cache = Cache(URL, QUICK)
    Flaky.faults = ["fails"] * 3
    with pytest.raises(DataError, match=r"shard-00000.safetensors: connection reset by peer \(tried 3 times\)") as info:
        cache.read(0)
    assert type(info.value) is DataError
    cache.read(0)
    Flaky.faults = ["fails"] * 3
    with pytest.raises(DataError, match="tried 3 times"):
        cache.problems()
    Flaky.faults = ["fails"] * 3
    with pytest.raises(DataError, match=r"cache.json: connection reset by peer \(tried 3 times\)"):
        opened(URL)


def _table(shape=(2,), places=(0, 8), dtype="F32") -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": places}}).encode()


def _file(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its header is not one of safetensors"),
        (bytes(8), "its header is not one of safetensors"),
        (_file(b"{}", 1000), "its header is longer than the file"),
        (_file(b"{}", 2**63), "its header is longer than the file"),
        (_file(b"[]"), "its header is not one of safetensors"),
        (_file(b"\xff\xff"), "its header is not one of safetensors"),
        (_file(b"[" * 10_000), "its header is not one of safetensors"),
        (_file(_table(dtype="F99")), "its header is not one of safetensors"),
        (_file(_table(shape=(-1, -2))), "a tensor's size does not fit its shape"),
        (_file(_table(shape=(10**30,))), "a tensor's size does not fit its shape"),
        (_file(_table(shape=(2.0,))), "a tensor's size does not fit its shape"),
        (_file(_table(places=(-8, 0))), "a tensor's size does not fit its shape"),
        (_file(_table(places=(8, 16))), "it is cut off"),
        (_file(_table()), "it has no 'shapes'"),
    ],
)
def test_a_header_that_lies_is_refused(flaky, tmp_path, data, message):
    put("flaky://cache/shard-00000.safetensors", data)
    write_signed(tmp_path / "table", {"file": "", "bytes": len(data), "samples": []})
    put("flaky://cache/shard-00000.json", (tmp_path / "table").read_bytes())
    with pytest.raises(CacheError, match=f"^flaky://cache/shard-00000.safetensors is no shard: .*{message}.*; copy"):
        _ = Shard("flaky://cache/shard-00000", QUICK).tensors


def test_a_header_may_be_long_and_hold_metadata(flaky):
    table = json.loads(_table()) | {"__metadata__": {"about": "x" * 100_000}}
    data = _file(json.dumps(table).encode())
    put("flaky://x", data)
    [(name, x)] = read_tensors("flaky://x", len(data), QUICK).items()
    assert name == "x" and x[:].tolist() == [0, 0]


def test_the_digest_of_a_file_is_of_all_its_parts(flaky, monkeypatch):
    monkeypatch.setattr(cache_files, "CHUNK", 5)
    put("flaky://x", b"twelve bytes")
    assert sha256_of_file("flaky://x", 12, QUICK) == hashlib.sha256(b"twelve bytes").hexdigest()
    assert Flaky.reads == [(0, 5), (5, 10), (10, 12)]


def test_samples_of_a_batch_are_read_beside_each_other(server, monkeypatch):
    """Those of a disk are not."""
    read = CachedSource.read
    threads = []
    monkeypatch.setattr(CachedSource, "read", lambda self, i: threads.append(threading.get_ident()) or read(self, i))
    for spec in (str(server), URL):
        threads.clear()
        CachedFeed(opened(spec), np.arange(12), encoding()).at([0, 1])
        assert (set(threads) == {threading.get_ident()}) == (spec != URL)


def test_rows_of_a_tensor(flaky):
    x = torch.arange(12.0).view(4, 3)
    put("flaky://x", bytes(5) + x.numpy().tobytes())
    remote_x = RemoteTensor("flaky://x", torch.float32, (4, 3), 5, QUICK)
    for rows in (slice(None), slice(1, 3), slice(2, 2), slice(3, 99), slice(-1, None)):
        assert torch.equal(remote_x[rows], x[rows])
    assert RemoteTensor("flaky://x", torch.float32, (4, 0), 5, QUICK)[1:3].shape == (2, 0)


def test_a_folder_on_a_server_says_which_file_to_name(server):
    with pytest.raises(DataError, match="^flaky://cache is a cache: name its cache.json, flaky://cache/cache.json"):
        opened("flaky://cache")


def test_a_cache_is_written_to_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheError, match="s3://bucket/cache: a cache is written to a disk; copy it to the server"):
        write_cache(load_config("pixels-tiny", []), "s3://bucket/cache")
    assert not list(tmp_path.iterdir())


def test_samples_of_a_batch_are_asked_for_together(server, monkeypatch):
    """So many at a time that a server's answers, each 0.05 s late, do not add up."""
    at_once, most, lock, ask = 0, 0, threading.Lock(), remote.read_range
    together = threading.Barrier(4)

    def slow(url, start, end, patience):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        together.wait(60)
        with lock:
            at_once -= 1
        return ask(url, start, end, patience)

    source = opened(URL)
    for i in (0, 4, 8, 9):
        source.read(i)
    monkeypatch.setattr("training.cache_files.read_range", slow)
    found = list(remote.read_each(source.read, (0, 4, 8, 9), source.is_remote))
    assert len(found) == 4 and most >= 4


def test_shards_open_at_the_same_time_and_each_once(server, monkeypatch):
    opened, together, real = [], threading.Barrier(2), cache.read_tensors

    def read_tensors(file, *how):
        opened.append(file)
        together.wait(20)
        return real(file, *how)

    monkeypatch.setattr(cache, "read_tensors", read_tensors)
    remote.read_each(Cache(URL, QUICK).read, (0, 1, 4, 5), remote=True)
    assert sorted(opened) == [f"flaky://cache/shard-0000{k}.safetensors" for k in (0, 1)]


def _tables(**changes) -> dict[str, torch.Tensor]:
    """The tensors of a shard of one sample of 1 x 2 x 2 with one caption of 3 tokens."""
    shapes, lengths = torch.tensor([[1, 2, 2]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    text = {"text.0.states": torch.zeros(3, 4), "text.0.lengths": lengths, "text.0.pooled": torch.zeros(1, 4)}
    good = {"latents": torch.zeros(4), "shapes": shapes, "digests": torch.zeros(1, 32, dtype=torch.uint8), **text}
    return good | {name.replace("__", "."): x for name, x in changes.items()}


def _shard(where: Path, tensors: dict[str, torch.Tensor], **table) -> Shard:
    data = save(tensors)
    row = {"file": "", "bytes": len(data), "samples": [["a", "", ["a star"]]]}
    write_signed(where / "s.json", {name: x for name, x in (row | table).items() if x is not ...})
    put("flaky://cache/s.json", (where / "s.json").read_bytes())
    put("flaky://cache/s.safetensors", data)
    return Shard("flaky://cache/s", QUICK)


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": torch.tensor(3)},
        {"shapes": torch.tensor([[1.0, 2.0, 2.0]])},
        {"digests": torch.tensor(3)},
        {"latents": torch.tensor(3.0)},
        {"latents": torch.zeros(4, 2)},
        {"text__0__lengths": torch.tensor(3)},
        {"text__0__lengths": torch.tensor([[3]])},
        {"text__0__pooled": torch.tensor(3.0)},
        {"text__0__pooled": torch.zeros(2, 4)},
        {"text__0__states": torch.tensor(3.0)},
        {"text__0__states": torch.zeros(4, 4)},
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(flaky, tmp_path, change):
    assert set(_shard(tmp_path, _tables()).tensors) == set(_tables())
    with pytest.raises(CacheError, match=r"^flaky://cache/s.safetensors is no shard: its tables have changed; copy s"):
        _ = _shard(tmp_path, _tables(**change)).tensors


@pytest.mark.parametrize("size", [-5, 1.5, "many", None])
def test_a_size_that_is_none_is_refused(flaky, tmp_path, size):
    with pytest.raises(CacheError, match=f"^flaky://cache/s.json says that .*s.safetensors has {size} bytes; copy s"):
        _shard(tmp_path, _tables(), bytes=size)


@pytest.mark.parametrize("table", [{"file": ...}, {"bytes": ...}, {"samples": ...}, {"samples": 3}, {"samples": [[]]}])
def test_another_signed_table_is_no_shard(flaky, tmp_path, table):
    """Such as cache.json under a shard's name."""
    with pytest.raises(CacheError, match="^flaky://cache/s.json is not the table of a shard; copy s"):
        _shard(tmp_path, _tables(), **table)
