"""Data on s3://, by s3fs as its users set it up: endpoint and keys in the environment, a server on this machine."""

import itertools

import pytest

from tests.training.pictures import parquet_of, shards_of
from tests.training.s3_server import KEY, Server
from training.cache_writer import write_cache
from training.config import load_config
from training.data import DataError, SourceOptions, loader, open_source
from training.remote import Patience, RemoteError, read_each, read_range
from training.wanted import Wanted

s3fs = pytest.importorskip("s3fs")

QUICK = Patience(timeout=10.0, retries=2, pause=0.01)


def options(patience=QUICK, **wanted) -> SourceOptions:
    return SourceOptions(wanted=Wanted(patience=patience, **wanted))


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def shards(server, tmp_path):
    """Three shards, here and there."""
    local = shards_of(tmp_path / "set", (5, 3, 4))
    server.objects |= {f"set/{path.name}": path.read_bytes() for path in local.iterdir()}
    return local


@pytest.mark.parametrize(
    ("spec", "num_workers"),
    [("set", 0), ("set", 1), ("set/*.tar", 0), ("set/00[0-2].tar", 0), ("set/{000..002}.tar", 1)],
)
def test_shards_in_a_bucket_are_those_on_disk(shards, spec, num_workers):
    one, other = open_source(str(shards)), open_source(f"s3://bucket/{spec}", options=options())
    assert other.is_remote and other.keys == one.keys and other.image_size == one.image_size
    pairs = zip(loader(one, range(12), 4, 0), loader(other, range(12), 4, 0, num_workers=num_workers), strict=True)
    for a, b in itertools.islice(pairs, 4):
        assert a.keys == b.keys and a.captions == b.captions and a.images.equal(b.images)


def test_batches_go_on_where_they_stopped(shards):
    source = open_source("s3://bucket/set", options=options())
    whole = [batch.keys for batch in itertools.islice(loader(source, range(12), 5, 0), 6)]
    again = open_source("s3://bucket/set", options=options())
    assert [batch.keys for batch in itertools.islice(loader(again, range(12), 5, 0, start_step=4), 2)] == whole[4:]


def test_an_index_is_found_again_until_a_shard_changes(shards, server, tmp_path):
    wanted = options(cache=tmp_path / "index")
    first = open_source("s3://bucket/set", image_size=8, options=wanted)
    server.asked.clear()
    assert open_source("s3://bucket/set", image_size=8, options=wanted).keys == first.keys
    assert not any(".tar" in path for path in server.asked)
    server.objects["set/003.tar"] = (shards_of(tmp_path / "more", (2,)) / "000.tar").read_bytes()
    assert len(open_source("s3://bucket/set", image_size=8, options=wanted)) == len(first.keys) + 2


def test_parquet_in_a_bucket(server, tmp_path):
    pytest.importorskip("pyarrow")
    local = parquet_of(tmp_path / "rows.parquet", range(10))
    server.objects["rows.parquet"] = local.read_bytes()
    one, other = open_source(str(local)), open_source("s3://bucket/rows.parquet", options=options())
    assert all((one[i].image == other[i].image).all() and one[i].key == other[i].key for i in range(10))


def test_a_cache_in_a_bucket(server, tmp_path):
    write_cache(load_config("pixels-tiny", ["data.num_samples=6"]), tmp_path / "cache", log=print)
    server.objects |= {f"cache/{path.name}": path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    one, other = (open_source(spec) for spec in (str(tmp_path / "cache"), "s3://bucket/cache/cache.json"))
    assert other.is_remote and other.keys == one.keys and other.captions(5) == one.captions(5)
    found = read_each(other.read, range(6), remote=True, at_once=6)
    assert all(known.statistics.equal(one.read(i).statistics) for i, known in enumerate(found))
    assert other.cache.problems() == []
    del server.objects["cache/shard-00000.safetensors"]
    with pytest.raises(DataError, match="shard-00000.safetensors: there is no such file on the server"):
        open_source("s3://bucket/cache/cache.json").read(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobucket/set", "s3://nobucket/set: there is no such file on the server"),
        ("bucket/none.tar", "s3://bucket/none.tar: there is no such file on the server"),
        ("bucket/set/{001..004}.tar", "s3://bucket/set/00[34].tar: there is no such file on the server"),
        ("bucket/none*.tar", r"no images found in s3://bucket/none\*.tar"),
        ("bucket/cache", "s3://bucket/cache is a cache: name its cache.json, s3://bucket/cache/cache.json"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(shards, server, spec, message):
    server.objects["cache/cache.json"] = b"{}"
    patience = Patience(timeout=10.0, retries=2, pause=100.0)
    with pytest.raises(DataError, match=f"^{message}"):
        open_source(f"s3://{spec}", options=options(patience))


def test_wrong_keys_are_said_at_once(shards, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with pytest.raises(DataError, match=r"^s3://bucket/set: the server refuses it \(.+\); are the credentials there"):
        open_source("s3://bucket/set", options=options(Patience(10.0, 2, 100.0)))


def test_a_busy_or_silent_server_is_asked_again(shards, server):
    source = open_source("s3://bucket/set", options=options())
    for fault, patience in (("busy", QUICK), ("silent", Patience(1.0, 9, 0.01))):
        server.faults[:] = [fault] * 2
        assert read_range("s3://bucket/set/000.tar", 3, 9, patience) == server.objects["set/000.tar"][3:9]
    server.faults[:] = ["busy"] * 99
    server.asked.clear()
    with pytest.raises(RemoteError, match=r"000.tar: .*reduce your request rate.* \(tried 3 times\)$"):
        read_range("s3://bucket/set/000.tar", 3, 9, QUICK)
    assert len(server.asked) == 3  # s3fs would ask five times more, each time
    with pytest.raises(DataError, match="reduce your request rate"):
        next(loader(source, range(12), 4, 0))
