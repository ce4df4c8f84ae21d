"""Streamed data sets: epochs, order and split of rows as they come, resuming, bad rows, and what is refused."""

import itertools
import json
import os
import shutil
from collections import Counter

import pytest
import torch

import training
from tests.training.pictures import noisy, parquet_of, picture
from training.config import ConfigError, load_config
from training.data import DataError, SourceOptions, open_source, split_by_key
from training.hub import load
from training.run import RunFolder
from training.setup import open_run_source
from training.share import Share
from training.stream import HeldOut, StreamSource, shuffled, stream_loader
from training.wanted import Wanted


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """A folder of three Parquet files with 50 pictures, which `datasets` streams."""
    datasets = pytest.importorskip("datasets")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # at the end of each pass
    folder = tmp_path_factory.mktemp("many")
    for number, (first, last) in enumerate(((0, 23), (23, 24), (24, 50))):
        parquet_of(folder / f"{number}.parquet", range(first, last))
    return f"hf-stream:{folder}"


def test_a_stream_shows_each_sample_once_an_epoch(many):
    stream = StreamSource(many, buffer=8)
    assert stream.image_size == (8, 12)
    held_out = {row.key for row in HeldOut(stream, 0.2, 100).rows}
    rows = list(itertools.islice(shuffled(stream, 0.2, seed=1), 3 * (50 - len(held_out))))
    size = 50 - len(held_out)
    assert 3 < len(held_out) < 20 and not held_out & {row.key for row in rows}
    epochs = [[row.key for row in rows[e * size : e * size + size]] for e in range(3)]
    assert all(len(set(epoch)) == size for epoch in epochs) and epochs[0] != epochs[1]


def test_files_of_a_stream_come_in_another_order_each_epoch_and_rows_in_each_block(many):
    stream = StreamSource(many, buffer=10)
    plain = [[row.key for row in stream.rows(epoch, 3)] for epoch in range(4)]
    assert len({keys[0] for keys in plain}) > 1 and sorted(plain[0]) == sorted(plain[1])
    drawn = [row.key for row in itertools.islice(shuffled(stream, 0.0, 3), 20)]
    first, second = ([plain[0][k:].index(key) for key in drawn[k : k + 10]] for k in (0, 10))
    assert sorted(first) == sorted(second) == [*range(10)] and first != second


@pytest.mark.parametrize("buffer", [1, 7, 50, 1000])
def test_a_stream_goes_on_from_any_position(many, buffer):
    stream = StreamSource(many, buffer=buffer)
    whole = [row.key for row in itertools.islice(shuffled(stream, 0.1, 3), 120)]
    for start in (1, min(buffer, 90), 44, 45, 46, 51, 99):
        again = [row.key for row in itertools.islice(shuffled(stream, 0.1, 3, start), 5)]
        assert again == whole[start : start + 5], start


def read_epochs(stream, monkeypatch) -> list[int]:
    """The epochs whose rows are read from now on."""
    found, rows = [], stream.rows
    monkeypatch.setattr(stream, "rows", lambda epoch, seed: found.append(epoch) or rows(epoch, seed))
    return found


@pytest.mark.parametrize("held_out", [0.1, 0.3])
def test_resuming_a_stream_reads_no_epoch_in_between(many, held_out, tmp_path, monkeypatch):
    """Without a note of how long an epoch is one has to be read, with one none but that in which the run stopped."""
    options = SourceOptions(wanted=Wanted(cache=tmp_path / "index"))
    known = StreamSource(many, buffer=7, options=options)
    whole = [row.key for row in itertools.islice(shuffled(known, held_out, 3), 300)]
    size = known.epoch_rows(held_out)
    assert size == len({*whole}) and known.epoch_rows(held_out + 0.1) is None
    for stream, first in ((StreamSource(many, buffer=7), [0]), (StreamSource(many, buffer=7, options=options), [])):
        for start in (size, 3 * size - 1, 5 * size + 9):
            epochs = read_epochs(stream, monkeypatch)
            again = [row.key for row in itertools.islice(shuffled(stream, held_out, 3, start), 1)]
            assert again == [whole[start]] and epochs == [*first, start // size], start
    (note,) = (tmp_path / "index").iterdir()
    note.write_text("{")  # damaged: as if there were none
    assert next(shuffled(stream, held_out, 3, 2 * size)).key == whole[2 * size] and known.epoch_rows(held_out) == size


def test_the_first_samples_of_a_stream_are_those_of_every_epoch(many):
    first = {row.key for row in itertools.islice(StreamSource(many).rows(0, None), 30)}
    rows = [row.key for row in itertools.islice(shuffled(StreamSource(many, num_samples=30, buffer=8), 0.0, 3), 90)]
    assert all({*rows[start : start + 30]} == first for start in (0, 30, 60)) and rows[:30] != rows[30:60]


def test_batches_of_a_stream_depend_on_neither_workers_nor_ranks(many):
    stream = StreamSource(many, buffer=8, options=SourceOptions(crop="random", flip=True), size=(8, 8))
    alone = list(itertools.islice(stream_loader(stream, 0.1, 4, 0), 12))
    for start, num_workers in ((0, 2), (5, 1), (11, 0)):
        batches = stream_loader(stream, 0.1, 4, 0, start, num_workers)
        for one, other in zip(alone[start:], batches, strict=False):
            assert one.keys == other.keys and torch.equal(one.images, other.images)
        batches.close()
    ranks = [stream_loader(stream, 0.1, 4, 0, share=Share(rank, 2)) for rank in range(2)]
    for one in alone[:4]:
        parts = [next(rank) for rank in ranks]
        assert sum((part.keys for part in parts), []) == one.keys
        assert torch.equal(torch.cat([part.images for part in parts]), one.images)


def test_each_sample_of_a_stream_is_cropped_and_mirrored_on_its_own(tmp_path):
    pytest.importorskip("datasets")
    parquet_of(tmp_path / "train.parquet", range(16), image=[noisy(5, (8, 12))] * 16)
    options = SourceOptions(crop="random", flip=True)
    images = next(stream_loader(StreamSource(f"hf-stream:{tmp_path}", (4, 4), options=options), 0.0, 16, 0)).images
    assert len(images.unique(dim=0)) > 2


def test_a_bad_image_of_a_stream_is_named_and_replaced(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": picture(i) if i != 2 else b"no image", "path": None} for i in range(6)]
    table = pyarrow.table({"image": images, "text": [f"picture {i}" if i != 4 else "" for i in range(6)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    stream = StreamSource(f"hf-stream:{tmp_path}", buffer=100)
    batch = next(stream_loader(stream, 0.0, 5, 0))
    assert len(batch.keys) == 5 and len(batch.skipped) == 1 and "not an image" in batch.skipped[0][1]
    assert sorted(Counter(batch.captions).values()) == [1, 1, 1, 2]


def test_a_bad_image_of_a_stream_is_replaced_by_the_same_one_whoever_decodes_it(tmp_path):
    """Four processes with a row each, and two with two: a bad row of one takes the next good one of another."""
    pytest.importorskip("datasets").config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": b"no image" if i % 3 == 1 else noisy(i, (8, 12)), "path": None} for i in range(12)]
    table = pyarrow.table({"image": images, "text": [f"picture {i}" for i in range(12)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    stream = StreamSource(f"hf-stream:{tmp_path}", (8, 8), options=SourceOptions(crop="random"), buffer=100)
    for world, num_workers in ((4, 0), (2, 1)):
        alone = stream_loader(stream, 0.0, 4, 0)
        ranks = [stream_loader(stream, 0.0, 4, 0, 0, num_workers, Share(rank, world)) for rank in range(world)]
        for one in itertools.islice(alone, 6):
            parts = [next(rank) for rank in ranks]
            assert sum((part.keys for part in parts), []) == one.keys
            assert sum((part.skipped for part in parts), []) == one.skipped
            assert torch.equal(torch.cat([part.images for part in parts]), one.images)
        for batches in ranks:
            batches.close()


def with_bad_rows(path, num: int, *bad: int) -> str:
    """A stream of one file, of which some rows hold no image."""
    pytest.importorskip("datasets").config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    images = [{"bytes": b"no image" if i in bad else noisy(i, (8, 8)), "path": None} for i in range(num)]
    table = pyarrow.table({"image": images, "text": [f"picture {i}" for i in range(num)]})
    pyarrow.parquet.write_table(table, path / "a.parquet")
    return f"hf-stream:{path}"


@pytest.mark.parametrize("buckets", [False, True])
def test_a_batch_of_a_stream_without_good_samples_is_replaced_by_the_next_one(tmp_path, buckets):
    """Wherever a run goes on, and in all processes."""
    spec = with_bad_rows(tmp_path / "data", 24, *range(4, 12), 13)
    options = SourceOptions(buckets, flip=True)
    stream = StreamSource(spec, (8, 8), 8, options=options, buffer=1)
    whole = list(itertools.islice(stream_loader(stream, 0.0, 4, 0), 7))
    assert [{*batch.captions} for batch in whole[1:4]] == [{"picture 12", "picture 14", "picture 15"}] * 3
    assert torch.equal(whole[1].images, whole[3].images) and len({*whole[0].captions, *whole[4].captions}) == 8
    told = [[key for key, _ in batch.skipped if "step" in key] for batch in whole]
    assert told[:5] == [[], ["the batch of step 2", "the batch of step 3"], [], [], []]
    assert [len(batch.skipped) for batch in whole[:5]] == [0, 11, 0, 0, 0]
    for start, num_workers in ((1, 0), (2, 1), (3, 0)):
        ranks = [stream_loader(stream, 0.0, 4, 0, start, num_workers, Share(rank, 2)) for rank in range(2)]
        for one in whole[start:]:
            parts = [next(rank) for rank in ranks]
            assert sum((part.keys for part in parts), []) == one.keys
            assert torch.equal(torch.cat([part.images for part in parts]), one.images)
        for batches in ranks:
            batches.close()


def test_a_stream_of_which_ten_batches_in_a_row_are_bad_ends(tmp_path):
    nine, ten = (
        StreamSource(with_bad_rows(tmp_path / f"{num}", 48, *range(4, 4 + 4 * num)), (8, 8), buffer=1)
        for num in (9, 10)
    )
    batches = list(itertools.islice(stream_loader(nine, 0.0, 4, 0), 11))
    assert [batch.captions for batch in batches[1:]] == [[f"picture {i}" for i in range(40, 44)]] * 10
    for num_workers in (0, 1):
        batches = stream_loader(ten, 0.0, 4, 0, 0, num_workers)
        assert next(batches).captions == [f"picture {i}" for i in range(4)]
        with pytest.raises(DataError, match="none of the samples of 10 batches in a row can be used; one of them is"):
            next(batches)


def test_a_run_goes_on_over_bad_rows_of_its_stream(tmp_path):
    spec = with_bad_rows(tmp_path / "data", 24, *range(4, 9))
    changes = [f"data.source={spec}", "data.image_size=[8,16]", "data.held_out=0",
               "data.cache_latents=false", "data.num_samples=none", "data.shuffle_buffer=1", "training.batch_size=4",
               "training.precision=fp32", "training.sample_every=0", "training.checkpoint_every=1"]  # fmt: skip
    runs = []
    for steps in (4, 1):
        own = [f"training.out={tmp_path / str(steps)}", f"training.num_steps={steps}"]
        runs.append(training.train(load_config("pixels-tiny", [*changes, *own])))
    training.resume(runs[1], ["training.num_steps=4"])
    for run in runs:
        line = "the batch of step 2: none of its 4 samples can be used, the next batch stands in for it"
        assert line in (run / "log.txt").read_text()
    one, other = (training.checkpoint.load_latest(run, print)[1]["model"] for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_captions_of_one_image_of_a_stream_fall_to_one_side(tmp_path):
    """What follows "#" in a key does not count, as in other data."""
    pytest.importorskip("datasets").config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    keys = [f"{i // 5:03d}#{i % 5}" for i in range(100)]
    path = parquet_of(tmp_path / "a.parquet", range(100), key=keys)
    stream, files = StreamSource(f"hf-stream:{tmp_path}"), open_source(str(path))
    held_out = {row.key for row in HeldOut(stream, 0.3, 100).rows}
    assert held_out == {files.keys[i] for i in split_by_key(files, 0.3)[1]} and 0 < len(held_out) < 100
    trained = {row.key for row in itertools.islice(shuffled(stream, 0.3, 1), 100 - len(held_out))}
    assert trained == {*keys} - held_out


def test_images_of_a_stream_may_lie_in_files_also_on_a_server(tmp_path, monkeypatch):
    """As `datasets` streams a folder of images: each cell names a file. One that is missing is a bad sample."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows").mkdir()
    paths = [str(tmp_path / "0.png"), (tmp_path / "1.png").as_uri(), str(tmp_path / "none.png"), "memory://no/3.png"]
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    images = [{"bytes": None, "path": path} for path in paths]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": list("abcd")}), tmp_path / "rows" / "a.parquet")
    stream = StreamSource(f"hf-stream:{tmp_path}/rows", buffer=100)
    assert [row.image for row in stream.rows(0, None)] == [picture(0), picture(1), b"", b""]
    batch = next(stream_loader(stream, 0.0, 4, 0))
    assert set(batch.captions) == {"a", "b"} and len(batch.skipped) >= 2

    def fails(*args, **how):
        raise RuntimeError("the server says no")

    monkeypatch.setattr("fsspec.open", fails)
    with pytest.raises(DataError, match="rows: file:.*1.png: the server says no"):
        list(stream.rows(0, None))


def test_a_stream_that_cannot_work_is_refused(many, tmp_path):
    for spec in (many, f"{many}=0.5,{tmp_path}=0.5"):  # of an autoencoder, a reference
        with pytest.raises(DataError, match="is a stream, which training alone reads, and by itself"):
            open_source(spec)
    mix = load_config("pixels-tiny", [f"data.source={many}=0.5,{tmp_path}=0.5", "data.cache_latents=false"])
    with pytest.raises(DataError, match="is a stream, which training alone reads, and by itself"):
        open_run_source(mix, 8)
    with pytest.raises(DataError, match='data.buckets is "own": say by data.image_size'):
        StreamSource(many, options=SourceOptions(buckets="own", mixed=True))
    with pytest.raises(ConfigError, match="set data.cache_latents=false"):
        load_config("pixels-tiny", [f"data.source={many}", "data.cache_latents=true"])
    with pytest.raises(DataError, match="no samples to train on"):
        next(stream_loader(StreamSource(many), 1.0, 4, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "a", \n garbage', ": JSON parse error"), ("\n", "has no column of images")],
    ids=["garbage", "nothing"],
)
def test_a_stream_whose_first_row_cannot_be_read_is_refused(tmp_path, content, message):
    """Of JSON and tables of text the columns are known by the first row."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(DataError, match=f"hf-stream:{tmp_path}.*{message}"):
        StreamSource(f"hf-stream:{tmp_path}")


def test_a_run_on_a_stream_resumes_to_the_bit(many, tmp_path):
    changes = [f"data.source={many}", "data.image_size=[8,16]", "data.held_out=0.2", "data.cache_latents=false",
               "data.num_samples=none", "data.shuffle_buffer=8", "training.batch_size=4", "training.sample_every=0",
               "training.precision=fp32", "training.checkpoint_every=4", "training.keep_checkpoints=9"]  # fmt: skip
    runs = []
    for name, steps in (("whole", 12), ("half", 5)):
        runs.append(training.train(load_config("pixels-tiny", [*changes, f"training.out={tmp_path / name}",
                                                               f"training.num_steps={steps}"])))  # fmt: skip
    training.resume(runs[1], ["training.num_steps=12"])
    one, other = (training.checkpoint.load_latest(run, print)[1]["model"] for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "validation_loss" in RunFolder(runs[0]).metrics()[-1]


def test_a_stream_whose_files_changed_is_said_on_resume(tmp_path):
    """Neither the time of a file nor the folder that all lie in counts, a filter does; and the note of how long an
    epoch was is of the files that were there.
    """
    pytest.importorskip("datasets").config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    (data := tmp_path / "data").mkdir()
    for number in range(2):
        parquet_of(data / f"{number}.parquet", range(10 * number, 10 * number + 10))
    changes = [f"data.source=hf-stream:{data}", "data.image_size=[8,16]", "data.held_out=0", "data.num_samples=none",
               "data.cache_latents=false", "training.batch_size=4", "training.sample_every=0"]  # fmt: skip
    run = training.train(load_config("pixels-tiny", [*changes, f"training.out={tmp_path / 'run'}"]))

    def said(steps: int, *more: str) -> bool:
        (run / "log.txt").unlink()
        training.resume(run, [f"training.num_steps={steps}", *more])
        return "has other files, or another version of them" in (run / "log.txt").read_text()

    os.utime(data / "1.parquet", (1, 1))
    shutil.move(data, tmp_path / "moved")
    moved = f"data.source=hf-stream:{tmp_path / 'moved'}"
    assert not said(7, moved)
    parquet_of(tmp_path / "moved" / "1.parquet", range(10, 23))
    assert said(13) and not said(14) and said(15, "data.min_caption=1") and not said(16)
    assert sorted(json.loads(note.read_text()) for note in (run / "index").iterdir()) == [20, 20, 23, 23]
    (tmp_path / "moved" / "1.parquet").rename(tmp_path / "moved" / "2.parquet")
    with pytest.raises(ValueError, match="was trained with another data.source"):
        training.resume(run, ["training.num_steps=17", f"data.source=hf-stream:{tmp_path / 'moved'}/"])


def test_the_version_of_a_stream_is_what_its_server_says(tmp_path, monkeypatch):
    """Of files on the hub their revision, elsewhere an ETag; of a saved dataset its own fingerprint."""
    datasets = pytest.importorskip("datasets")

    class Files(list):
        origin_metadata = [("me/data", "1234")]

    def version(url: str, *mark: str) -> str:
        files = Files([url])
        files.origin_metadata = [mark]
        rows = datasets.Dataset.from_dict({"image": [b""]}).to_iterable_dataset()
        config = type("Config", (), {"data_files": {"train": files}})
        builder = type("Builder", (), {"config": config, "as_streaming_dataset": lambda self, split: rows})
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, config: builder())
        return load("me/data", streaming=True)[1]

    told = [version("hf://a.parquet", "me/data", "1"), version("hf://a.parquet", "me/data", "2"),
            version("https://a.parquet", "tag"), version("https://a.parquet", "gat")]  # fmt: skip
    saved = datasets.Dataset.from_dict({"image": [b""]})
    saved.save_to_disk(tmp_path)
    assert load(str(tmp_path), streaming=True)[1] == datasets.load_from_disk(tmp_path)._fingerprint
    assert len({*told}) == 4 and "" not in told and told[0] == version("hf://a.parquet", "me/data", "1")
