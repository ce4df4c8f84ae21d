"""Data sets on disk in every layout, whole and damaged; the held-out split; batches, workers and resuming."""

import gc
import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.training.processes import PATIENCE
from training.captions import MAX_CAPTION
from training.config import load_config
from training.data import (
    DataError,
    FileSource,
    Sample,
    ShapesSource,
    Source,
    SourceOptions,
    loader,
    one_pass,
    open_source,
    split_by_key,
)
from training.shapes import ShapesWorld
from training.sources import Index, Wanted

COLOURS = {f"{i:03d}": (10 * i, 255 - 10 * i, 7 * i) for i in range(12)}  # key -> colour of its image


def png(colour=(1, 2, 3), size=(8, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], colour).save(file, "PNG")
    return file.getvalue()


def sample_files(keys=COLOURS) -> dict[str, bytes]:
    """name -> content: an image and a caption for each key."""
    files = {}
    for key in keys:
        files |= {f"{key}.png": png(COLOURS[key]), f"{key}.txt": f"picture {key}".encode(), f"{key}.cls": b"7"}
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_shard(path: Path, files) -> Path:
    """`files` is a dict, or pairs where names repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as shard:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def contents(source: Source) -> dict[str, tuple]:
    """key -> (colour, caption) of a source of flat images, all good."""
    samples = [source[i] for i in range(len(source))]
    assert [s.error for s in samples] == [None] * len(samples)
    assert [s.key for s in samples] == source.keys and len(set(source.keys)) == len(source)
    assert [s.caption for s in samples] == [source.caption(i) for i in range(len(source))]
    assert all((s.image == s.image[0, 0]).all() and s.image.shape == (*source.image_size, 3) for s in samples)
    return {s.key: (tuple(s.image[0, 0].tolist()), s.caption) for s in samples}


EXPECTED = {key: (colour, f"picture {key}") for key, colour in COLOURS.items()}


# --- layouts ---------------------------------------------------------------------------------------------------------


def make_layout(name: str, root: Path) -> str:
    """Write the twelve samples in one of the layouts -> the spec that opens them."""
    first, rest = dict(itertools.islice(COLOURS.items(), 5)), dict(itertools.islice(COLOURS.items(), 5, None))
    match name:
        case "folder":
            write_folder(root, sample_files())
        case "metadata.jsonl":
            rows = [json.dumps({"file_name": f"{key}.png", "text": f"picture {key}"}) for key in COLOURS]
            write_folder(root, {f"{key}.png": png(colour) for key, colour in COLOURS.items()})
            (root / name).write_text("\n".join(rows) + "\n")
        case "metadata.csv":
            rows = ["file_name,caption"] + [f'{key}.png,"picture {key}"' for key in COLOURS]
            write_folder(root, {f"{key}.png": png(colour) for key, colour in COLOURS.items()})
            (root / name).write_text("\n".join(rows))
        case ".tar" | ".tar.gz" | ".tgz":
            return str(write_shard(root / f"000{name}", sample_files()))
        case "folder of shards":
            write_shard(root / "0.tar", sample_files(first))
            write_shard(root / "1.tar.gz", sample_files(rest))
        case "one level down":
            write_shard(root / "train" / "0.tar", sample_files(first))
            write_shard(root / "train" / "1.tar", sample_files(rest))
        case "glob":
            write_shard(root / "a-0.tar", sample_files(first))
            write_shard(root / "a-1.tar", sample_files(rest))
            write_shard(root / "b-0.tar", {"other.png": png(), "other.txt": b"other"})
            return str(root / "a-*.tar")
    return str(root)


LAYOUTS = ("folder", "metadata.jsonl", "metadata.csv", ".tar", ".tar.gz", ".tgz", "folder of shards", "one level down")


@pytest.mark.parametrize("layout", [*LAYOUTS, "glob"])
def test_every_layout_holds_the_same_samples(layout, tmp_path):
    source = open_source(make_layout(layout, tmp_path))
    assert isinstance(source, Source) and source.skipped == []
    assert contents(source) == EXPECTED
    assert source.keys == list(COLOURS)


def test_nested_folders_links_and_hidden_files(tmp_path):
    write_folder(tmp_path / "elsewhere", {"z.PNG": png(), "z.TXT": b"linked"})
    write_folder(tmp_path / "data", {"b/c/x.png": png(), "b/c/x.txt": b"deep", "._y.png": b"?", ".git/q.png": b"?"})
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    source = open_source(str(tmp_path / "data"))
    assert [(key, source.caption(i)) for i, key in enumerate(source.keys)] == [("a/z", "linked"), ("b/c/x", "deep")]


def test_every_suffix(tmp_path):
    image = Image.new("RGB", (8, 8), "white")
    suffixes = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "JPG")
    for suffix in suffixes:
        image.save(tmp_path / f"{suffix}.{suffix}")
        (tmp_path / f"{suffix}.txt").write_text("white")
    found = contents(open_source(str(tmp_path)))
    assert set(found) == {*suffixes} and set(found.values()) == {((255, 255, 255), "white")}


@pytest.mark.parametrize("layout", ["folder", "one level down"])
def test_order_does_not_depend_on_the_file_system(layout, tmp_path, monkeypatch):
    spec = make_layout(layout, tmp_path)
    keys = open_source(spec).keys
    walk = os.walk
    backwards = lambda *args, **kw: ((f, dirs, sorted(files)[::-1]) for f, dirs, files in walk(*args, **kw))  # noqa: E731
    monkeypatch.setattr(os, "walk", backwards)
    assert open_source(spec).keys == keys == sorted(keys)


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


def test_several_captions_of_one_image_stay_on_one_side_of_the_split(tmp_path):
    write_folder(tmp_path, {f"{i}.png": png() for i in range(40)})
    rows = [{"file_name": f"{i}.png", "text": f"caption {j}"} for j in range(3) for i in range(40)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path))
    assert len(set(source.keys)) == 120 and "7#3" in source.keys
    training, held_out = ({source.keys[i].partition("#")[0] for i in side} for side in split_by_key(source, 0.4))
    assert training and held_out and not training & held_out


def test_metadata_of_subfolders_and_bad_rows(tmp_path):
    write_folder(tmp_path, {"train/img/a.png": png(), "unlisted.png": png()})
    rows = ['{"file_name": "img/a.png", "text": "good"}', "{not json", '{"text": "no file"}', "[1]", "",
            '{"file_name": "img/gone.png", "text": "missing"}']  # fmt: skip
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(rows))
    source = open_source(str(tmp_path))
    assert source.keys == ["train/img/a", "train/img/gone"] and source[0].error is None
    assert source[1].error == "no such file or directory" and source[1].image is None
    assert [name for name, _ in source.skipped] == [f"train/metadata.jsonl:{line}" for line in (2, 3, 4)]


def test_pictures_that_the_layout_passes_over_are_counted_and_named(tmp_path):
    listed, shards, photos = (tmp_path / name for name in ("listed", "shards", "photos"))
    write_folder(listed, {"b/in.png": png(), "a/beside.png": png(), "a/beside.txt": b"x", "out.JPG": png()})
    (listed / "b" / "metadata.jsonl").write_text('{"file_name": "./in.png", "text": "in"}')
    assert open_source(str(listed)).left_out == [("no row in a metadata file", 2, "a/beside")]
    write_shard(shards / "0.tar", sample_files())
    write_folder(shards, {"beside.png": png()})
    assert open_source(str(shards)).left_out == [("files of their own beside shards", 1, "beside")]
    write_folder(photos, {"a.png": png(), "a.txt": b"a", "IMG_1.HEIC": b"heic", "IMG_1.txt": b"b"})
    assert open_source(str(photos)).left_out == [("a format that is not read (.heic .heif .jxl)", 1, "IMG_1")]
    (photos / "a.png").unlink()
    with pytest.raises(DataError, match="no images found"):
        open_source(str(photos))


def test_num_samples_and_pickle(tmp_path):
    source = open_source(make_layout(".tar.gz", tmp_path), num_samples=3)
    assert len(source) == 3 == len(source.keys)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)  # as spawned workers get it


def test_unpacked_shards_go_with_the_source(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    source = open_source(make_layout(".tar.gz", tmp_path))
    assert len(list((tmp_path / "tmp").iterdir())) == 2  # the index and the images

    def drop_it() -> None:
        nonlocal source
        del source
        gc.collect()

    other = multiprocessing.get_context("fork").Process(target=drop_it)
    other.start()
    other.join()
    assert contents(source) == EXPECTED  # a forked process that ends leaves the file alone
    drop_it()
    assert not list((tmp_path / "tmp").iterdir())


# --- captions --------------------------------------------------------------------------------------------------------


def caption_of(tmp_path, **files: bytes) -> Sample:
    write_folder(tmp_path, {"good.png": png(), "good.txt": b"good", "x.png": png()})
    write_folder(tmp_path, {f"x.{suffix}": content for suffix, content in files.items()})
    source = open_source(str(tmp_path))
    return source[source.keys.index("x")]


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": "  ein Bär\n\tim Wald \r\n".encode()}, "ein Bär im Wald"),
        ({"txt": b"\xef\xbb\xbfmarked"}, "marked"),
        ({"txt": b"caf\xe9 \xff"}, "caf\ufffd \ufffd"),
        ({"txt": b"a" * 50_000}, "a" * MAX_CAPTION),
        ({"json": b'{"caption": "from json", "text": "other"}'}, "from json"),
        ({"json": b'{"text": "from text", "caption": 3}'}, "from text"),
        ({"json": b'{"caption": ["first", "second"]}'}, "first"),
        ({"json": b'{"caption": "half \\ud83d pair"}'}, "half ? pair"),
        ({"txt": b" \n", "json": b'{"caption": "fallback"}'}, "fallback"),
    ],
)
def test_captions(tmp_path, files, caption):
    sample = caption_of(tmp_path, **files)
    assert sample.error is None and sample.caption == caption


@pytest.mark.parametrize(
    "files",
    [{}, {"cls": b"3"}, {"txt": b" \n"}, {"json": b"{"}, {"json": b"[" * 10**5}, {"json": b"[1]"}, {"json": b"{}"}],
)
def test_missing_caption_is_an_error_of_the_sample(tmp_path, files):
    sample = caption_of(tmp_path, **files)
    assert (sample.error, sample.caption, sample.image) == ("missing caption", "", None)
    sample = open_source(str(tmp_path), need_captions=False)[1]
    assert (sample.error, sample.caption) == (None, "") and sample.image is not None


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None), max_size=40) | st.binary(max_size=40))
def test_any_caption_is_one_line_of_valid_unicode(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("captions")
    row = json.dumps({"file_name": "a.png", "text": text}).encode() if isinstance(text, str) else text
    files = {"a.png": png(), "b.png": png()}
    files |= (
        {"metadata.jsonl": row + b'\n{"file_name": "b.png", "text": "b"}'} if isinstance(text, str) else {"a.txt": row}
    )
    source = open_source(str(write_folder(folder, files)), need_captions=False)
    caption = source.caption(0)
    assert caption.encode("utf-8").decode() == caption == " ".join(caption.split())


# --- nothing to train on ---------------------------------------------------------------------------------------------


def test_no_images_found(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=rf"no images found in {tmp_path}: looked through 1 files for images \(.png"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no data is named: give --data"):
        open_source(load_config("latent").data.source)
    with pytest.raises(DataError, match="no images found: there is no folder or file"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(DataError, match=f"there is no folder or file none in {os.getcwd()};"):
        open_source("none")
    with pytest.raises(DataError, match="no shard .* matches"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match="is one file; expected a folder, .* or a table that is called metadata.jsonl"):
        open_source(str(tmp_path / "notes.md"))
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match="no images found .* skipped empty.tar: cut off or corrupt"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_no_captions_found(tmp_path, layout):
    files = {f"{i}{suffix}": content for i in range(3) for suffix, content in ((".png", png()), (".cls", b"3"))}
    write_folder(tmp_path, files) if layout == "folder" else write_shard(tmp_path / "0.tar", files)
    with pytest.raises(DataError, match="no captions found: .* has 3 images, none with a caption; give each a .txt"):
        open_source(str(tmp_path))


def test_a_caption_under_another_name(tmp_path):
    write_folder(tmp_path, {"a.png": png(), "metadata.jsonl": b'{"file_name": "a.png", "prompt": "a star"}'})
    with pytest.raises(DataError, match="no captions found: .* another field is named by data.captions=prompt"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no captions found in title: .* in a metadata.jsonl$"):
        open_source(str(tmp_path), options=SourceOptions(wanted=Wanted(captions=(("title", 1.0),))))
    assert (
        open_source(str(tmp_path), options=SourceOptions(wanted=Wanted(captions=(("prompt", 1.0),))))[0].caption
        == "a star"
    )


def test_no_image_can_be_read(tmp_path):
    write_folder(tmp_path, {"a.png": b"", "a.txt": b"a"})
    with pytest.raises(DataError, match="no image can be read, of 1 images found; one of them is a: the file is empty"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("spec", ["shapes:", "shapes:0", "shapes:-3", "shapes:ten", "shapes:1e3", "shapes:²"])
def test_bad_numbers_of_shapes(spec):
    with pytest.raises(DataError, match="expected 'shapes' or 'shapes:N'"):
        open_source(spec)


@pytest.mark.parametrize("size", [0, -8, (8,), (8, 0), (8, 8, 3), 8.5, "8"])
def test_bad_sizes(size):
    with pytest.raises(DataError, match="image_size must be a side or"):
        open_source("shapes", image_size=size)
    with pytest.raises(DataError, match="num_samples must be at least 1"):
        open_source("shapes", num_samples=0)


# --- damaged data ----------------------------------------------------------------------------------------------------


def test_bad_images_carry_their_reason(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "JPEG")
    files = {"good.png": png(), "empty.png": b"", "half.jpg": noise.getvalue()[:1500], "text.png": b"no image"}
    files |= {Path(name).stem + ".txt": b"caption" for name in files}
    write_folder(tmp_path / "folder", files)
    write_shard(tmp_path / "shards" / "0.tar", files)
    for spec in (tmp_path / "folder", tmp_path / "shards"):
        source = open_source(str(spec), image_size=8)
        errors = {sample.key: sample.error for sample in (source[i] for i in range(4))}
        assert errors.pop("good") is None
        assert "empty" in errors["empty"] and "truncated" in errors["half"] and "not an image" in errors["text"]


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
def test_any_damage_to_a_shard_is_reported_at_most(tmp_path_factory, whole_shard, data):
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


# --- image size ------------------------------------------------------------------------------------------------------


def test_image_size(tmp_path):
    files = {f"{i}.png": png(size=(20, 30) if i % 3 else (10, 60)) for i in range(30)}
    write_folder(tmp_path, files | {name.replace(".png", ".txt"): b"caption" for name in files})
    for size, step, expected in [(None, 1, (20, 30)), (None, 16, (16, 32)), (64, 1, (64, 64)), ((33, 47), 8, (32, 48))]:
        source = open_source(str(tmp_path), image_size=size, step=step)
        assert source.image_size == expected
        assert {source[i].image.shape for i in range(6)} == {(*expected, 3)}


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes():
    source = open_source("shapes:5", image_size=(32, 50), step=16, seed=3)
    assert isinstance(source, ShapesSource) and isinstance(source, Source)
    assert len(source) == 5 == len(set(source.keys)) and source.image_size == (32, 48)
    image, caption, _ = ShapesWorld((32, 48), seed=3, split="train")[4]
    np.testing.assert_array_equal(source[4].image, image)
    assert source[4].caption == source.caption(4) == caption and source[-1].caption == caption
    with pytest.raises(IndexError):
        source[5]
    assert len(open_source("shapes", num_samples=7)) == 7 and open_source("shapes", num_samples=7).image_size == (
        64,
        64,
    )


# --- split -----------------------------------------------------------------------------------------------------------


class Memory(Source):
    """A source in memory whose image i is filled with i; counts its reads."""

    image_size = (2, 3)
    skipped: list[tuple[str, str]] = []

    def __init__(self, num_samples: int, bad: set[int] = frozenset(), deadly: int = -1) -> None:
        self.keys, self.bad, self.deadly, self.reads = [f"k{i}" for i in range(num_samples)], bad, deadly, []

    def __len__(self):
        return len(self.keys)

    def caption(self, i):
        return f"caption {i}"

    def __getitem__(self, i):
        self.reads.append(i)
        if i == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if i in self.bad:
            return Sample(self.keys[i], None, "", f"bad {i}")
        return Sample(self.keys[i], np.full((2, 3, 3), i % 256, np.uint8), self.caption(i))


@given(st.lists(st.text(max_size=8), unique=True, max_size=40), st.floats(0, 1), st.data())
def test_the_split_depends_on_the_key_alone(keys, fraction, data):
    def held_out(keys):
        source = Memory(0)
        source.keys = keys
        training, held_out = split_by_key(source, fraction)
        assert sorted([*training, *held_out]) == list(range(len(keys)))
        return {keys[i] for i in held_out}

    some = data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    assert held_out(some) == held_out(keys) & set(some)


def test_the_split_has_the_fraction():
    source = Memory(20_000)
    for fraction in (0.0, 0.01, 0.3, 1.0):
        training, held_out = split_by_key(source, fraction)
        assert len(held_out) == pytest.approx(20_000 * fraction, abs=4 * (20_000 * fraction * (1 - fraction)) ** 0.5)
    assert [int(i) for i in split_by_key(Memory(40), 0.1)[1]] == [2, 11, 30]  # in every version
    with pytest.raises(DataError, match="held_out_fraction must be in"):
        split_by_key(source, 1.5)


# --- batches ---------------------------------------------------------------------------------------------------------


def take(batches, num: int) -> list[tuple]:
    """Plain values of some batches, after which the iterator is closed."""
    found = [(b.images.tolist(), b.captions, b.keys, b.skipped) for b in itertools.islice(batches, num)]
    batches.close()
    return found


def keys_in(batches, num: int) -> list[str]:
    return [key for _, _, keys, _ in take(batches, num) for key in keys]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 12))
def test_epochs_are_permutations_and_batches_run_across_them(num_samples, batch_size, seed, start):
    source, indices = Memory(40), list(range(0, 40, 40 // num_samples))[:num_samples]
    num_batches = start + 4 * num_samples // batch_size + 1
    keys = keys_in(loader(source, indices, batch_size, seed), num_batches)
    assert len(keys) == num_batches * batch_size
    for first in range(0, len(keys) - num_samples + 1, num_samples):
        assert sorted(keys[first : first + num_samples]) == sorted(f"k{i}" for i in indices)
    assert keys_in(loader(source, indices, batch_size, seed, start), num_batches - start) == keys[start * batch_size :]


def test_order_depends_on_seed_and_epoch():
    keys = keys_in(loader(Memory(50), range(50), 50, seed=0), 2)
    assert keys[:50] != keys[50:] and keys[:50] != keys_in(loader(Memory(50), range(50), 50, seed=1), 1)


def test_a_batch():
    batch = next(loader(Memory(9), range(9), 4, seed=0))
    assert batch.images.shape == (4, 3, 2, 3) and batch.images.dtype == torch.uint8
    numbers = [int(key[1:]) for key in batch.keys]
    assert batch.images[:, 0, 0, 0].tolist() == numbers and batch.captions == [f"caption {i}" for i in numbers]


def test_channels_come_first(tmp_path):
    write_folder(tmp_path, {"a.png": png((10, 20, 30)), "a.txt": b"a"})
    batch = next(loader(open_source(str(tmp_path)), [0], 2, seed=0))
    assert batch.images.shape == (2, 3, 8, 12) and batch.images[1, :, 3, 4].tolist() == [10, 20, 30]


def test_resuming_reads_nothing_of_what_came_before():
    source = Memory(1000)
    next(loader(source, range(1000), 4, seed=0, start_step=12_345))
    assert len(source.reads) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.sets(st.integers(0, 19)))
def test_a_bad_sample_is_replaced_by_the_next_good_one(num_samples, batch_size, bad):
    good = [i for i in range(num_samples) if i not in bad]
    batches = loader(Memory(num_samples, bad), range(num_samples), batch_size, seed=5)
    if not good:
        with pytest.raises(DataError, match=f"none of the {num_samples} samples can be used; one of them is k"):
            next(batches)
        return
    as_drawn = loader(Memory(num_samples), range(num_samples), batch_size, seed=5)
    for batch, drawn in itertools.islice(zip(batches, as_drawn, strict=True), 5):
        skipped = []
        for key, drawn_key in zip(batch.keys, drawn.keys, strict=True):
            i = int(drawn_key[1:])
            while i in bad:
                skipped.append((f"k{i}", f"bad {i}"))
                i = (i + 1) % num_samples
            assert key == f"k{i}"
        assert batch.skipped == skipped


def test_one_pass():
    source = Memory(11, bad={2, 8, 9})
    indices = [10, 2, 3, 0, 8, 9, 7]
    expected = take(one_pass(source, indices, 2), 9)
    assert [keys for _, _, keys, _ in expected] == [["k10"], ["k3", "k0"], [], ["k7"]]
    assert [skipped for *_, skipped in expected] == [[("k2", "bad 2")], [], [("k8", "bad 8"), ("k9", "bad 9")], []]
    assert take(one_pass(source, indices, 2, num_workers=2), 9) == expected
    assert take(one_pass(source, [], 2), 9) == []


@pytest.mark.parametrize(
    ("argument", "value"), [("batch_size", 0), ("seed", -1), ("start_step", -1), ("num_workers", -1), ("indices", [])]
)
def test_bad_arguments_are_refused_at_once(argument, value):
    good = {"indices": [0, 1], "batch_size": 2, "seed": 0, "start_step": 0, "num_workers": 0}
    with pytest.raises(DataError, match=argument):
        loader(Memory(2), **(good | {argument: value}))


# --- worker processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Three shards of 300 samples, one of them cut, with 11 bad images among them."""
    folder, intact = tmp_path_factory.mktemp("mixed"), png(size=(8, 8))
    for s in range(3):
        files = {}
        for i in range(100):
            bad = {13: b"", 14: intact[:40], 57: b"no image", 91: intact}.get(i)
            files |= {f"{s}-{i:02d}.png": png((s, i, 0), (8, 8)) if bad is None else bad}
            files |= {f"{s}-{i:02d}.txt": b"" if i == 91 else f"caption {s} {i}".encode()}
        path = write_shard(folder / f"{s}.tar{'.gz' if s == 0 else ''}", files)
    path.write_bytes(path.read_bytes()[: 512 * 4 * 60 + 700])
    return str(folder)


def test_workers_and_resuming_do_not_change_the_batches(mixed):
    source = open_source(mixed)
    training, _ = split_by_key(source, 0.1)
    assert [name for name, _ in source.skipped] == ["2.tar"] and 230 < len(training) < 260
    uninterrupted = take(loader(source, training, 16, seed=7), 36)  # past the end of the second epoch
    bad = {sample.key for sample in (source[int(i)] for i in training) if sample.error is not None}
    assert 9 <= len(bad) <= 12 and {key for *_, skipped in uninterrupted for key, _ in skipped} == bad
    for num_workers, start in ((1, 0), (2, 0), (2, 19), (0, 19)):
        resumed = loader(open_source(mixed), training, 16, seed=7, start_step=start, num_workers=num_workers)
        assert take(resumed, 36 - start) == uninterrupted[start:]


def test_close_ends_the_workers_and_the_global_generator_is_left_alone(monkeypatch):
    """They end by themselves, and are not killed when torch has waited for long."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)
    state = torch.random.get_rng_state()
    batches = loader(Memory(20), range(20), 4, seed=0, num_workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children() and [worker.exitcode for worker in workers] == [0, 0]
    assert torch.equal(state, torch.random.get_rng_state())


def test_workers_leave_signals_to_the_trainer():
    batches = loader(Memory(500), range(500), 4, seed=0, num_workers=2)
    expected = take(loader(Memory(500), range(500), 4, seed=0), 40)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert take(batches, 39) == expected[1:]


def test_a_worker_that_dies_is_a_clear_error():
    batches = loader(Memory(20, deadly=3), range(20), 4, seed=0, num_workers=1)
    with pytest.raises(DataError, match="a data worker died, perhaps for want of memory; try num_workers = 0"):
        take(batches, 6)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("sign", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_one_too(sign, monkeypatch):
    """The pipe breaks before torch has noticed; what a server did to a worker that lives stays what it is."""

    raised = [sign, type(sign)("Caught ConnectionResetError in DataLoader worker process 0.")]

    class Breaks(DataLoader):
        def __iter__(self):
            batches = super().__iter__()
            batches._next_data = lambda: (_ for _ in ()).throw(raised.pop(0))
            return batches

    monkeypatch.setattr("training.workers.DataLoader", Breaks)
    with pytest.raises(DataError, match="a data worker died, .*num_workers = 0"):
        next(loader(Memory(20), range(20), 4, seed=0, num_workers=1))
    with pytest.raises(type(sign), match="Caught"):
        next(loader(Memory(20), range(20), 4, seed=0, num_workers=1))
    assert not multiprocessing.active_children()


def test_errors_come_out_of_workers_as_they_are():
    batches = loader(Memory(3, bad={0, 1, 2}), range(3), 4, seed=0, num_workers=1)
    with pytest.raises(DataError, match=r"^none of the 3 samples can be used; one of them is k\d: bad \d$"):
        next(batches)


SCRIPT = """
import itertools, multiprocessing, os, signal
from training.data import loader, open_source

signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that a script puts in the background ignores it
source = open_source("shapes:100", image_size=16)
batches = loader(source, range(100), 4, seed=0, num_workers=2)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
for batch in {rest}:
    pass
"""


@pytest.mark.parametrize("ends_by", ["itself", "Ctrl-C"])
def test_no_worker_outlives_the_program(ends_by):
    rest = "itertools.islice(batches, 3)" if ends_by == "itself" else "batches"
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(rest=rest)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    if ends_by == "Ctrl-C":
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = program.communicate(timeout=PATIENCE)
    assert program.returncode == (0 if ends_by == "itself" else -signal.SIGINT)
    assert "Process-" not in errors  # no traceback of a worker
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
