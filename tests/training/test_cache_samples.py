"""The samples that a cache lists, read from its tables as they are asked for."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.caches import made
from training import cache, cache_writer
from training.cache import Cache, CacheError, Shard
from training.cache_samples import CachedSample, ShardSamples
from training.signed import read_signed, sha256_of, write_signed

TEXT = st.text(max_size=8) | st.sampled_from(['], ["', '"samples": [', "\\", '"', "ä", "星", "\ud800", ""])
SAMPLES = st.lists(
    st.builds(
        CachedSample,
        TEXT,
        TEXT,
        st.lists(TEXT, max_size=3),
        st.none() | TEXT,
        st.lists(st.floats(0, 1), max_size=3),
        *[st.integers(-1, 2**31 - 1)] * 3,
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(SAMPLES)
def test_samples_are_those_that_were_written(tmp_path_factory, samples):
    file = tmp_path_factory.mktemp("table") / "shard-00000.json"
    write_signed(file, {"file": "0" * 64, "bytes": 0, "samples": [list(sample) for sample in samples]})
    found = ShardSamples(str(file), file.read_bytes())
    assert len(found) == len(samples) and list(found) == samples and found[:] == samples
    assert [found[i] for i in range(len(samples))] == samples == [found[i - len(samples)] for i in range(len(samples))]
    assert list(found.keys()) == [sample.key for sample in samples]
    columns = [(s.error is None, len(s.captions), s.bucket, s.part, s.block) for s in samples]
    assert found.columns.tolist() == columns
    with pytest.raises(IndexError):
        found[len(samples)]


def test_a_sample_takes_few_bytes_of_memory(tmp_path):
    file, count = tmp_path / "shard-00000.json", 30_000
    samples = [[f"{i:08d}", "0" * 64, ["a caption of sixty characters" * 2], None, [], 0, 0, -1] for i in range(count)]
    write_signed(file, {"file": "", "bytes": 0, "samples": samples})
    data = file.read_bytes()
    tracemalloc.start()
    try:
        found = ShardSamples(str(file), data)
        del data
        assert found[7].key == "00000007" and sum(map(len, found.keys())) == 8 * count  # and Python keeps some tuples
        assert tracemalloc.get_traced_memory()[0] < 40 * count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ask", [lambda samples: samples[5], list, lambda samples: list(samples.keys())])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_table_that_changes_later_is_named(tmp_path, monkeypatch, ask, change):
    monkeypatch.setattr(cache_writer, "BATCH", 8)
    made(tmp_path / "cache")
    table = tmp_path / "cache" / "shard-00000.json"
    samples = Shard(table.with_suffix("")).samples
    table.write_text(table.read_text()[:40]) if change == "cut" else table.unlink()
    with pytest.raises(CacheError, match=r"shard-00000.json has changed since it was opened; delete shard-00000\.\*"):
        ask(samples)


def test_few_shards_are_mapped_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "BATCH", 8)
    made(tmp_path / "cache", options=cache_writer.CacheOptions("fp32", "fp32", shard_mb=0.01))
    whole, some = Cache(tmp_path / "cache"), Cache(tmp_path / "cache")
    assert len(whole.shards) == 8
    monkeypatch.setattr(cache, "MOST_OPEN", 2)
    order = np.random.default_rng(0).permutation(len(some.samples)).tolist()
    for i in order:
        assert some.samples[i] == whole.samples[i]
        assert some.read(i).digest() == whole.shards[i // 8].read(i % 8).digest()
        assert sum(shard.is_open for shard in some.shards) <= 2
    assert all(shard.is_open for shard in whole.shards)


def test_a_signed_table_is_known_in_any_layout(tmp_path):
    table = {"a": [1.5, "x, y"], "text": {"sha256": "of another"}, "z": "ä"}
    write_signed(tmp_path / "ours.json", table)
    (tmp_path / "theirs.json").write_text(json.dumps({"sha256": sha256_of(table), **table}, indent=2))
    assert read_signed(tmp_path / "ours.json") == read_signed(tmp_path / "theirs.json") == table
    for name in ("ours.json", "theirs.json"):
        text = (tmp_path / name).read_text()
        for old, new in (("1.5", "1.6"), ("of another", "of an other"), (sha256_of(table), "0" * 64)):
            (tmp_path / name).write_text(text.replace(old, new))
            with pytest.raises(ValueError, match="has changed since it was written"):
                read_signed(tmp_path / name)
