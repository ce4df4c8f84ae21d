"""Captions to choose among, filters, and the index that holds millions of them on disk."""

import itertools
import json
import math
import os
import resource
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import training.run
import training.setup
from tests.training.pictures import folder_of, json_bytes, members, picture, shards_of, tar_of
from training.cache_writer import write_cache
from training.captions import captions_in, captions_of, choose, joined, parse_weights
from training.config import load_config
from training.data import DataError, SourceOptions, loader, open_source
from training.setup import open_run_source, tell_flaws
from training.table import Entry, Table, Writer, forget_old
from training.wanted import Wanted

BOTH = (("original", 0.5), ("synthetic", 0.5))


def test_weights_are_parsed():
    assert parse_weights("a=0.7, b=3", "x") == (("a", 0.7), ("b", 3.0))
    assert parse_weights("a", "x") == (("a", 1.0),) and parse_weights("a,b", "x") == (("a", 1.0), ("b", 1.0))
    for wrong in ("", "a=", "=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1,a=2", "a=1,"):
        with pytest.raises(DataError, match="^data.captions is "):
            parse_weights(wrong, "data.captions")


def test_captions_of_a_row():
    row = {"original": "o", "synthetic": ["s1", "", "s2"], "caption": "c"}
    assert captions_of(row) == (("c",), ()) and captions_of({"text": ["", "first", "second"]}) == (("first",), ())
    assert captions_of(row, BOTH) == (("o", "s1", "s2"), (0.5, 0.25, 0.25))
    assert captions_of({"synthetic": "s"}, BOTH) == (("s",), (0.5,))
    assert captions_of({"caption": "c"}, BOTH) == captions_of([1], BOTH) == ((), ())
    assert captions_in(".txt", b"t", (("txt", 1.0),)) == (("t",), (1.0,))


def test_captions_in_files_may_begin_with_a_mark_and_hold_what_is_no_text():
    for mark in (b"", b"\xef\xbb\xbf"):
        assert captions_in(".txt", mark + b"a \xff b") == (("a \ufffd b",), ())
        assert captions_in(".json", mark + b'{"caption": "a \xff b"}') == (("a \ufffd b",), ())


def test_captions_of_two_files_of_a_sample():
    none, first, second = ((), ()), (("a",), ()), (("b", "c"), ())
    assert joined(first, second, ()) == first and joined(none, second, ()) == second
    weighed = ("a",), (0.5,)
    assert joined(weighed, (("b", "c"), (0.25, 0.25)), BOTH) == (("a", "b", "c"), (0.5, 0.25, 0.25))


@given(st.integers(1, 9), st.floats(0, 1, exclude_max=True))
def test_without_shares_all_captions_are_as_likely(num, u):
    assert choose(num, (), u) == int(u * num) < num


@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
def test_a_number_chooses_by_shares(shares, u):
    place = u * sum(shares)
    i = choose(len(shares), tuple(shares), u)
    assert sum(shares[:i]) <= place + 1e-9 and (place <= sum(shares[: i + 1]) + 1e-9)
    assert choose(4, (), u) == int(4 * u)


@pytest.mark.parametrize("shares", [(), (0.1,)])
def test_the_largest_number_chooses_the_last(shares):
    """Also where shares add up to less than 1 by rounding."""
    largest = math.nextafter(1, 0)
    assert all(choose(n, shares * n, largest) == n - 1 for n in range(1, 1000))


@pytest.fixture
def several(tmp_path):
    """Eight pictures, each with an original caption in .txt and two others in .json."""
    files = {}
    for i in range(8):
        more = json_bytes({"more": [f"a{i}", f"b{i}"]})
        files |= {f"{i}.png": picture(i), f"{i}.txt": f"o{i}".encode(), f"{i}.json": more}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    return tmp_path


def chosen(several, captions="txt=0.5,more=0.5", seed=0, start=0, num=50):
    source = f"data.source={several}"
    config = load_config("pixels-tiny", [source, f"data.captions={captions}", "data.image_size=8", "data.held_out=0",
                                         "data.num_samples=none"])  # fmt: skip
    opened = training.setup.open_run_source(config, 8)
    return [c for b in itertools.islice(loader(opened, range(8), 4, seed, start), num) for c in b.captions]


def test_captions_are_drawn_by_weight_as_a_function_of_seed_and_place(several):
    found = chosen(several, num=500)
    kinds = Counter(caption[0] for caption in found)
    assert kinds["o"] == pytest.approx(1000, abs=90)
    assert kinds["a"] == pytest.approx(500, abs=80) and kinds["b"] == pytest.approx(500, abs=80)
    assert chosen(several, start=20, num=30) == found[80:200]
    assert chosen(several, seed=1, num=50) != found[:200]
    assert set(chosen(several, captions="more=1", num=50)) == {f"{kind}{i}" for kind in "ab" for i in range(8)}


def test_both_feeds_draw_the_same_captions(several, tmp_path):
    import numpy as np
    import torch

    from mmdit.autoencoder import PixelSpace
    from mmdit.text import LearnedText, TextConfig, Tokenizer
    from training.feed import Encoding, ImageFeed, LatentFeed

    wanted = Wanted(captions=(("txt", 1.0), ("more", 1.0)))
    source = open_source(str(several), options=SourceOptions(wanted=wanted))
    text = LearnedText(TextConfig(260, 6, 16, 1, 2), Tokenizer.train([], 258, 6))
    common = (source, np.arange(8), Encoding(PixelSpace(), text, torch.device("cpu")))
    a, b = ImageFeed(*common).batches(4, 0), LatentFeed(*common).batches(4, 0)
    seen = set()
    for one, other in itertools.islice(zip(a, b, strict=True), 30):
        assert torch.equal(one.tokens.ids, other.tokens.ids) and torch.equal(one.latents, other.latents)
        seen |= {text.tokenizer.decode(ids) for ids in one.tokens.ids}
    assert seen == {f"{kind}{i}" for kind in "oab" for i in range(8)}


def test_without_a_caption_both_feeds_have_an_empty_one(tmp_path):
    """Where none is needed, beside samples that have several."""
    import numpy as np
    import torch

    from mmdit.autoencoder import PixelSpace
    from mmdit.text import LearnedText, TextConfig, Tokenizer
    from training.feed import Encoding, ImageFeed, LatentFeed

    files = {f"{i}.png": picture(i) for i in range(3)} | {"1.json": json_bytes({"more": ["a", "b"]}), "2.txt": b"c"}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    wanted = Wanted(captions=(("txt", 1.0), ("more", 1.0)))
    source = open_source(str(tmp_path), options=SourceOptions(wanted=wanted), need_captions=False)
    text = LearnedText(TextConfig(260, 6, 16, 1, 2), Tokenizer.train([], 258, 6))
    common = (source, np.arange(3), Encoding(PixelSpace(), text, torch.device("cpu")))
    feeds = ImageFeed(*common), LatentFeed(*common)
    assert feeds[1].captions == ["", "a", "c"] and torch.equal(
        feeds[1].at([2, 0]).tokens.ids, text.tokenize(["c", ""]).ids
    )
    for one, other in itertools.islice(zip(*(feed.batches(3, 0) for feed in feeds), strict=True), 9):
        assert torch.equal(one.tokens.ids, other.tokens.ids)


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_what_is_left_out_is_counted_and_named(tmp_path, layout):
    sizes = ((8, 12), (4, 40), (16, 16))
    if layout == "folder":
        folder_of(tmp_path, members(range(9), sizes))
    else:
        shards_of(tmp_path, (4, 5), sizes)

    def left(**wanted):
        source = open_source(str(tmp_path), options=SourceOptions(wanted=Wanted(**wanted)), image_size=8)
        return [int(key) for key in source.keys], source.left_out

    assert left(min_side=9) == ([2, 5, 8], [("a side below 9 pixels", 6, "00000")])
    assert left(max_aspect=2) == ([0, 2, 3, 5, 6, 8], [("sides that are more than 2 to 1", 3, "00001")])
    with pytest.raises(DataError, match="no images left of .*: 9 have a caption of another length than asked for"):
        left(max_caption=8)


@pytest.mark.parametrize("layout", ["txt", "jsonl", "tar"])
def test_captions_that_are_no_utf8_are_counted_and_named(tmp_path, layout):
    data = tmp_path / "data"
    data.mkdir()
    latin = ["égaré".encode("latin-1") if i in (3, 5) else "égaré".encode() for i in range(16)]
    pictures = {f"{i:02d}.png": picture(i) for i in range(16)}
    files = pictures | {f"{i:02d}.txt": text for i, text in enumerate(latin)}
    if layout == "jsonl":
        rows = [b'{"file_name": "%02d.png", "text": "%s"}' % (i, text) for i, text in enumerate(latin)]
        files = pictures | {"metadata.jsonl": b"\n".join(rows)}
    for name, content in {"0.tar": tar_of(files)}.items() if layout == "tar" else files.items():
        (data / name).write_bytes(content)
    config = load_config("pixels-tiny", [f"data.source={data}", "data.image_size=8", "data.num_samples=none"])
    line = "warning: 2 samples have captions that are no UTF-8, such as 03: save these as UTF-8"
    for _ in range(2):  # the second time from the index that is kept of shards
        said: list[str] = []
        tell_flaws(open_run_source(config, 8, tmp_path / "index"), said.append, lambda *told: None)
        assert said == [line]
    said = []
    write_cache(config, tmp_path / "cache", log=said.append)
    assert said == [line]


def test_a_run_names_what_is_left_out(tmp_path):
    files = members(range(12), ((8, 8), (8, 40)))
    files["00000.txt"] = b"a caption that is too long"
    folder_of(tmp_path / "data", files)
    filters = ("data.max_aspect=4", "data.max_caption=12", "data.image_size=8", "data.num_samples=none")
    out = tmp_path / "run"
    config = load_config("pixels-tiny", [f"data.source={tmp_path / 'data'}", f"training.out={out}", *filters])
    run = training.run.RunFolder.create(out, config)
    assert len(training.setup.open_data(config, run, 1)) == 5
    log = (out / "log.txt").read_text()
    assert "left out: 6 samples with sides that are more than 4 to 1, such as 00001" in log
    assert "left out: 1 samples with a caption of another length than asked for, such as 00000" in log


def test_of_several_captions_those_that_fit_are_kept():
    wanted = Wanted(min_caption=2, max_caption=4)
    assert wanted.fitting((("a", "abc", "abcdef"), (0.5, 0.3, 0.2))) == (("abc",), (0.3,))
    assert wanted.fitting((("a", "abc"), ())) == (("abc",), ())
    bounds = ("a", "ab", "abcd", "abcde"), ()
    assert wanted.fitting(bounds) == (("ab", "abcd"), ())


def test_bounds_of_sizes_are_allowed_themselves():
    wanted = Wanted(min_side=8, max_aspect=2.0)
    assert wanted.refuses((8, 16)) is None and wanted.refuses((16, 8)) is None
    assert wanted.refuses((7, 8)) == "a side below 8 pixels"
    assert wanted.refuses((8, 17)) == "sides that are more than 2 to 1"
    assert not Wanted().measures and Wanted(min_side=1).measures and Wanted(max_aspect=1.0).measures


# --- the index on disk -----------------------------------------------------------------------------------------------


def test_an_index_takes_eight_bytes_a_sample_in_memory(tmp_path):
    writer = Writer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(100_000):
        writer.add(Entry(f"key {i}", (f"a caption of number {i}",), "shard.tar", 512 * i, 400), shared=True)
    table = writer.table(lambda i, entry: entry.key)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert table.starts.nbytes == 800_000 and not table.columns
    assert grown < 100_000 * 150  # what objects would take several times over
    assert table[99_999] == Entry("key 99999", ("a caption of number 99999",), "shard.tar", 512 * 99_999, 400)
    assert len(table[10:20]) == 10 and table[10:20][3].key == "key 13"


@given(st.lists(st.text(max_size=3), max_size=30))
def test_keys_become_unique(keys):
    writer = Writer()
    for key in keys:
        writer.add(Entry(key, (), "x"), shared=True)
    table = writer.table(lambda i, entry: f"long/{entry.key}")
    found = [entry.key for entry in table]
    assert len(set(found)) == len(keys)
    for i, (key, now) in enumerate(zip(keys, found, strict=True)):
        assert now == key if key not in keys[:i] else now.startswith(f"long/{key}")


def test_what_is_kept_is_found(tmp_path):
    writer = Writer()
    for i in range(5):
        writer.add(Entry(f"k{i}", (f"c{i}",), "x", i, 1, (), (i + 1, 2)), shared=True, block=i // 2)
    table = writer.table(lambda i, entry: entry.key)
    table.keep(tmp_path, "name", {"told": [1]})
    again, about = Table.found(tmp_path, "name")
    assert list(again) == list(table) and about["told"] == [1]
    assert again.columns["block"].tolist() == [0, 0, 1, 1, 2] and again.columns["height"].tolist() == [1, 2, 3, 4, 5]
    assert Table.found(tmp_path, "other") is None
    (tmp_path / "name.jsonl").write_text(json.dumps([1]))
    assert Table.found(tmp_path, "name") is None


def test_of_each_data_set_the_table_used_last_stays(tmp_path):
    writer = Writer()
    writer.add(Entry("k", ("c",), "x"), shared=True)
    table = writer.table(lambda i, entry: entry.key)
    for name in ("a.1", "a.2", "a.3", "b.1"):
        table.keep(tmp_path, name, {})
        os.utime(tmp_path / f"{name}.json", (0, 0))
    (tmp_path / "stream-1.json").write_text("20")
    assert Table.found(tmp_path, "a.2") is not None
    forget_old(tmp_path)
    assert all(Table.found(tmp_path, name) for name in ("a.2", "b.1"))
    assert len(list(tmp_path.iterdir())) == 2 * 3 + 1
