"""Shards: their members in any order and under any name, and what is left of one that is cut or damaged."""

import gc
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.pictures import (
    COLOURS,
    EXPECTED,
    contents,
    make_layout,
    png,
    sample_files,
    write_folder,
    write_shard,
)
from training.data import FileSource, open_source
from training.sources import Index


def test_members_of_a_shard_in_any_order_and_dotted_names(tmp_path):
    files = sample_files(["000", "001"])
    files |= {"./d/x.seg.png": png((9, 9, 9)), "d/x.png": png((8, 8, 8)), "d/x.txt": b"plain"}
    files |= {"y.1.png": png((1, 1, 1)), "y.2.png": png((2, 2, 2)), "y.1.txt": b"one", "y.txt": b"common"}
    write_shard(tmp_path / "0.tar", dict(sorted(files.items(), key=lambda item: item[0][::-1])))
    found = contents(open_source(str(tmp_path)))
    assert found.pop("d/x") == ((8, 8, 8), "plain")
    assert found.pop("y.1") == ((1, 1, 1), "one") and found.pop("y.2") == ((2, 2, 2), "common")
    assert found == {key: EXPECTED[key] for key in ("000", "001")}


def test_a_key_is_one_sample_and_hidden_members_are_none(tmp_path):
    """Of two pictures of one key the first is taken; macOS puts "._a.png" beside "a.png"."""
    files = {"a.png": png((1, 1, 1)), "a.bmp": png((2, 2, 2)), "a.txt": b"a"}
    hidden = {"._a.png": b"attributes", "d/._b.png": b"attributes", ".c.png": png(), ".c.txt": b"c"}
    write_shard(tmp_path / "0.tar", hidden | files)
    assert contents(open_source(str(tmp_path))) == {"a": ((1, 1, 1), "a")}


def test_long_names_and_gzip_under_a_plain_name(tmp_path):
    key = "folder/" + "n" * 200
    shard = write_shard(tmp_path / "0.tar.gz", {f"{key}.png": png(), f"{key}.txt": b"long"})
    shard.rename(tmp_path / "0.tar")
    for spec in (tmp_path, f"file://{tmp_path}/0.tar"):  # a server's file is unpacked on the way
        assert contents(open_source(str(spec))) == {key: ((1, 2, 3), "long")}


def test_repeated_keys_become_unique(tmp_path):
    pairs = [("a.png", png((1, 1, 1))), ("a.txt", b"1"), ("a.png", png((2, 2, 2))), ("a.txt", b"2")]
    write_shard(tmp_path / "s" / "0.tar", pairs)
    write_shard(tmp_path / "s" / "1.tar", {"a.png": png((3, 3, 3)), "a.txt": b"3"})
    found = contents(open_source(str(tmp_path)))
    assert found == {"a": ((1, 1, 1), "1"), "s/0/a": ((2, 2, 2), "2"), "s/1/a": ((3, 3, 3), "3")}
    write_folder(tmp_path / "f", {"a.bmp": png(), "a.png": png(), "a.txt": b"same"})
    assert open_source(str(tmp_path / "f")).keys == ["a", "a.png"]


def test_shards_of_the_same_name_in_two_folders_are_both_read(tmp_path):
    for number in range(2):
        write_shard(tmp_path / "ab"[number] / "0.tar", {"x.png": png((number, 0, 0)), "x.txt": b"%d" % number})
    expected = [((0, 0, 0), "0"), ((1, 0, 0), "1")]
    here, there = open_source(str(tmp_path)), open_source(f"file://{tmp_path}/**/*.tar")
    assert contents(here) == dict(zip(("x", "b/0/x"), expected, strict=True))
    assert contents(there) == dict(zip(("x", "0/x"), expected, strict=True))


def test_unpacked_shards_go_with_the_source(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    gc.freeze()  # a fork that collects what other tests have left could wait for their threads
    source = open_source(make_layout(".tar.gz", tmp_path))
    assert len(list((tmp_path / "tmp").iterdir())) == 2  # the index and the images

    def drop_it() -> None:
        nonlocal source
        del source
        gc.collect()

    other = multiprocessing.get_context("fork").Process(target=drop_it)
    other.start()
    other.join()
    gc.unfreeze()
    assert contents(source) == EXPECTED  # a forked process that ends leaves the file alone
    drop_it()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory) -> bytes:
    return write_shard(tmp_path_factory.mktemp("shard") / "0.tar", sample_files()).read_bytes()


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.02, 1))
def test_a_cut_shard_loses_only_its_tail(tmp_path_factory, whole_shard, share):
    path = tmp_path_factory.mktemp("cut") / "0.tar"
    member_size, end = 512 * 6, 512 * 6 * 12  # each sample: three headers and three small files
    cut = int(share * len(whole_shard))
    path.write_bytes(whole_shard[:cut])
    index = Index(str(path), need_captions=False) if cut >= 1024 else None
    if index is None:
        return
    num_whole = min(12, cut // member_size)
    assert [(e.key, e.caption) for e in index.entries[:num_whole]] == [
        (k, EXPECTED[k][1]) for k in list(COLOURS)[:num_whole]
    ]
    assert len(index.entries) <= num_whole + 1
    source = FileSource(index, (8, 12))
    assert all(source[i].error is None for i in range(num_whole))
    assert [name for name, _ in index.skipped] == (["0.tar"] if cut < end + 512 else [])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_cut_gzip_shard_loses_only_its_tail(tmp_path, share):
    rng = np.random.default_rng(0)
    files = {}
    for i in range(200):
        files |= {f"{i:03d}.bmp": rng.bytes(500), f"{i:03d}.txt": b"caption"}
    path = write_shard(tmp_path / "0.tar.gz", files)
    whole = Index(str(path)).entries
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    index = Index(str(path))
    assert len(index.entries) == pytest.approx(200 * share, abs=20)
    assert [e.key for e in index.entries] == [e.key for e in whole][: len(index.entries)]
    assert [name for name, _ in index.skipped] == ["0.tar.gz"] and "ended before" in index.skipped[0][1]


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_corruption_inside_a_shard_is_reported(tmp_path, kind):
    path = write_shard(tmp_path / f"0{kind}", sample_files())
    data = bytearray(path.read_bytes())
    middle = 512 * 6 * 6 if kind == ".tar" else len(data) // 2
    data[middle : middle + 20] = b"\xaa" * 20
    path.write_bytes(bytes(data))
    write_shard(tmp_path / "1.tar", {"other.png": png(), "other.txt": b"other"})
    source = open_source(str(tmp_path), image_size=8)
    assert source.keys[-1] == "other" and 2 <= len(source) < 13
    assert [name for name, _ in source.skipped] == [f"0{kind}"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_a_shard_is_reported_or_harmless(tmp_path_factory, whole_shard, data):
    damaged = bytearray(whole_shard)
    for place in data.draw(st.lists(st.integers(0, 3 * 6 * 512), min_size=1, max_size=6)):
        damaged[place] = data.draw(st.integers(0, 255))
    folder = write_folder(tmp_path_factory.mktemp("damage"), {"0.tar": bytes(damaged)})
    write_shard(folder / "1.tar", {"other.png": png(), "other.txt": b"other"})
    index = Index(str(folder))
    source = FileSource(index, (8, 12))
    assert index.entries[-1].caption == "other" and len(index.skipped) <= 1
    assert len(index.entries) >= 12 or index.skipped  # nothing is lost in silence
    assert all((source[i].image is None) == bool(source[i].error) for i in range(len(source)))
