"""Data sets on disk in every layout, their captions and sizes, bad images among them; the held-out split."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.training.pictures import (
    COLOURS,
    EXPECTED,
    Memory,
    contents,
    make_layout,
    png,
    sample_files,
    write_folder,
    write_shard,
)
from training.captions import MAX_CAPTION
from training.config import load_config
from training.data import DataError, Sample, ShapesSource, Source, SourceOptions, open_source, split_by_key
from training.shapes import ShapesWorld
from training.sources import Wanted

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
    write_folder(photos, {"a.png": png(), "a.txt": b"a", "IMG_1.HEIC": b"heic", "IMG_1.txt": b"b", "b.NEF": b"raw"})
    [(reason, count, key)] = open_source(str(photos)).left_out
    assert (reason, count, key) == ("a format that is not read (convert these to .jpg or .png)", 2, "IMG_1")
    (photos / "a.png").unlink()
    with pytest.raises(DataError, match=r"2 are of others, such as IMG_1.HEIC; convert these to .jpg or .png"):
        open_source(str(photos))


def test_links_to_files_that_are_gone_are_named_like_other_missing_files(tmp_path):
    write_folder(tmp_path, {"a.png": png(), "a.txt": b"a", "b.png": png(), "c.txt": b"c"})
    for name in ("b.txt", "c.png"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "gone")
    source = open_source(str(tmp_path))
    assert source.keys == ["a", "b", "c"]
    assert [source[i].error for i in range(3)] == [None, "missing caption", "no such file or directory"]
    assert [(Path(name).name, reason) for name, reason in source.skipped] == [
        ("b.txt", "caption not readable: No such file or directory")
    ]
    write_shard(tmp_path / "shards" / "0.tar", sample_files())
    (tmp_path / "shards" / "1.tar").symlink_to(tmp_path / "gone")
    [(name, reason)] = open_source(str(tmp_path / "shards")).skipped
    assert name == "1.tar" and "No such file or directory" in reason


def test_a_table_without_file_names_is_answered_with_its_columns(tmp_path):
    write_folder(tmp_path, {"a.png": png(), "metadata.csv": b"file_name;text\na.png;a star\n"})
    with pytest.raises(DataError, match="csv:2: not a row with a file_name; its columns are 'file_name;text'"):
        open_source(str(tmp_path))


def test_num_samples_and_pickle(tmp_path):
    source = open_source(make_layout(".tar.gz", tmp_path), num_samples=3)
    assert len(source) == 3 == len(source.keys)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)  # as spawned workers get it


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


# --- split --------------------------------------------------------------------------------------------------------


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
