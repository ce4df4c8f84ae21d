"""Parquet files and Hugging Face datasets: the same samples as in a folder, at any row; mixes; what is refused."""

import builtins
import itertools
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.training.pictures import members, parquet_of, picture, shards_of, tar_of
from training.data import DataError, SourceOptions, loader, open_source, split_by_key
from training.parquet import ParquetRows
from training.remote import Patience
from training.stream import StreamSource
from training.wanted import Wanted


def colours(source) -> list[tuple[int, str]]:
    """(number in the colour, caption) of each sample."""
    samples = [source[i] for i in range(len(source))]
    assert [s.error for s in samples] == [None] * len(samples)
    return [(int(s.image[0, 0, 0]) + 256 * int(s.image[0, 0, 1]), s.caption) for s in samples]


EXPECTED = [(i, f"picture {i}") for i in range(10)]


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_holds_the_same_samples(tmp_path, struct):
    parquet_of(tmp_path / "a.parquet", range(6), struct=struct)
    parquet_of(tmp_path / "b.parquet", range(6, 10), struct=struct)
    for spec in (tmp_path, tmp_path / "*.parquet"):
        source = open_source(str(spec))
        assert colours(source) == EXPECTED and source.keys[7] == "b-00000001" and source.image_size == (8, 12)
        assert colours(pickle.loads(pickle.dumps(source))) == EXPECTED
    assert source.layout.block.tolist() == [0] * 4 + [1] * 2 + [2] * 4


def test_row_groups_are_read_once_each_while_they_are_kept(tmp_path, monkeypatch):
    """In the shuffled order an epoch reads each row group once."""
    source = open_source(str(parquet_of(tmp_path / "a.parquet", range(160), rows_per_group=5)))
    opened = []
    plain = ParquetRows._open
    monkeypatch.setattr(ParquetRows, "_open", lambda self, file: opened.append(file) or plain(self, file))
    keys = [key for batch in itertools.islice(loader(source, range(160), 4, 0), 40) for key in batch.keys]
    assert sorted(keys) == sorted(source.keys) and keys != sorted(keys)
    assert 24 <= len(opened) <= 32  # some are there from finding the common size


def test_threads_read_a_row_group_of_a_server_once(tmp_path, monkeypatch):
    """Those of a batch: of more row groups at the same time than are kept, and several of one."""
    files = pytest.importorskip("fsspec").filesystem("memory")
    files.pipe("/rows/a.parquet", parquet_of(tmp_path / "a.parquet", range(48), rows_per_group=4).read_bytes())
    source = open_source("memory://rows/a.parquet", 8)
    read, plain = [], ParquetRows._open

    def slow(self, file):
        read.append(file)
        time.sleep(0.02)
        return plain(self, file)

    monkeypatch.setattr(ParquetRows, "_open", slow)
    batches = loader(source, range(48), 48, 0)
    assert sorted(next(batches).keys) == sorted(source.keys)
    assert len(read) <= 24  # of 12, some of which come again at the end of a window
    at_once = threading.Barrier(12)  # other row groups are read meanwhile, more than are kept
    monkeypatch.setattr(ParquetRows, "_open", lambda self, file: (at_once.wait(60), plain(self, file))[1])
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(pickle.loads(pickle.dumps(source)).__getitem__, range(0, 48, 4)))
    assert [(sample.caption, sample.error) for sample in found] == [(f"picture {i}", None) for i in range(0, 48, 4)]


def test_parquet_files_of_the_same_name_in_two_folders_are_both_read(tmp_path):
    pytest.importorskip("pyarrow")
    for name, numbers in (("a", range(2)), ("b", range(2, 4))):
        (tmp_path / name).mkdir()
        parquet_of(tmp_path / name / "0.parquet", numbers, rows_per_group=1)
    source = open_source(str(tmp_path))
    assert colours(source) == EXPECTED[:4] and len({*source.keys}) == 4
    again = open_source(str(tmp_path), options=SourceOptions(wanted=Wanted(cache=tmp_path / "index")))
    assert colours(again) == colours(open_source(str(tmp_path), options=again.options)) == EXPECTED[:4]


def test_parquet_columns(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", range(4), __key__=["k0", "k1", "k2", "k3"], other=["x", None, "yy", "z"])
    wanted = Wanted(captions=(("text", 1.0), ("other", 3.0)), sizes=True)
    source = open_source(str(path), options=SourceOptions(wanted=wanted))
    assert source.keys == ["k0", "k1", "k2", "k3"]
    assert source.captions(0) == (("picture 0", "x"), (1.0, 3.0)) and source.captions(1) == (("picture 1",), (1.0,))
    assert source._entry(2)[1].image_size == (8, 12)


def test_a_corrupt_parquet_file_is_named(tmp_path):
    parquet_of(tmp_path / "a.parquet", range(4))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-30])
    (tmp_path / "c.parquet").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert len(source) == 4 and [name for name, _ in source.skipped] == ["b.parquet", "c.parquet"]
    (tmp_path / "a.parquet").write_bytes(whole[:40] + bytes(60) + whole[100:])
    source = open_source(str(tmp_path), image_size=8)
    assert {source[i].error is None for i in range(4)} == {False}


@pytest.mark.parametrize(
    ("missing", "spec", "extra"), [("pyarrow", "a.parquet", "parquet"), ("datasets", "hf:name", "hf")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing, spec, extra):
    (tmp_path / "a.parquet").touch()
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf'pip install "mmdit\[{extra}\]"'):
        open_source(spec if ":" in spec else str(tmp_path / spec))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> str:
    """The ten pictures as `save_to_disk` writes them."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": picture(i), "path": None} for i in range(10)]
    data = datasets.Dataset.from_dict({"image": images, "text": [f"picture {i}" for i in range(10)]})
    folder = tmp_path_factory.mktemp("hub") / "saved"
    data.cast_column("image", datasets.Image()).save_to_disk(str(folder))
    return str(folder)


def test_a_dataset_holds_the_same_samples(on_disk):
    source = open_source(f"hf:{on_disk}")
    assert colours(source) == EXPECTED and source.layout.block is None
    with pytest.raises(DataError, match="no images left of .*: 10 have a side below 9 pixels, such as saved-00000000"):
        open_source(f"hf:{on_disk}", options=SourceOptions(wanted=Wanted(min_side=9)))


@pytest.mark.parametrize("suffix", ["txt", "json"])
@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_the_captions_of_shards_that_are_read_as_a_dataset_are_found(tmp_path, kind, suffix, monkeypatch):
    """`datasets` makes columns "txt" and "json" of the files in a WebDataset shard."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    shards = shards_of(tmp_path / "shards", (4, 6))
    if suffix == "json":
        for number, numbers in enumerate((range(4), range(4, 10))):
            files = {name: data for name, data in members(numbers).items() if name.endswith(".png")}
            files |= {f"{i:05d}.json": json.dumps({"caption": f"picture {i}", "id": i}).encode() for i in numbers}
            (shards / f"{number:03d}.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    spec = f"{kind}:{shards}"
    if kind == "hf":
        assert colours(open_source(spec)) == EXPECTED
    else:
        assert [row.captions for row in StreamSource(spec).rows(0, None)] == [(text,) for _, text in EXPECTED]


def test_workers_read_a_dataset(on_disk):
    source = open_source(f"hf:{on_disk}")
    alone, helped = loader(source, range(10), 4, 0), loader(source, range(10), 4, 0, num_workers=2)
    for _ in range(5):
        one, other = next(alone), next(helped)
        assert one.keys == other.keys and torch.equal(one.images, other.images)
    helped.close()


def test_what_is_no_dataset_is_said(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=f"hf:{tmp_path}/none cannot be loaded: "):
        open_source(f"hf:{tmp_path}/none")
    with pytest.raises(DataError, match="expected a dataset's name"):
        open_source("hf:")


# --- mixes -----------------------------------------------------------------------------------------------------------


def test_a_mix_has_its_weights_and_each_source_its_epochs(tmp_path):
    shards = shards_of(tmp_path / "shards", (12, 8))
    rows = parquet_of(tmp_path / "rows.parquet", range(100, 110))
    source = open_source(f"{shards}=0.75,{rows}=0.25")
    assert len(source) == 30 and len(source.keys) == 30 and source.keys[20] == "rows-00000000"
    assert colours(source) == [(i, f"picture {i}") for i in [*range(20), *range(100, 110)]]
    numbers = [i for batch in itertools.islice(loader(source, range(30), 8, 0), 20) for i in batch.indices]
    first, second = ([i for i in numbers if (i < 20) == side] for side in (True, False))
    assert (len(first), len(second)) == (120, 40)
    assert all(sorted(first[k : k + 20]) == list(range(20)) for k in range(0, 120, 20))
    assert all(sorted(second[k : k + 10]) == list(range(20, 30)) for k in range(0, 40, 10))
    training_part, held_out = split_by_key(source, 0.3)
    some = {i for batch in itertools.islice(loader(source, training_part, 8, 0), 20) for i in batch.indices}
    assert some == set(training_part.tolist()) and len(held_out) > 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [("{0}=0.5,{0}=0", "weights above 0"), ("{0}=0.5,{0}=0.5", "a name comes twice"),
     ("{0}=0.5,shapes=0.5", "shapes cannot be mixed"), ("{0}=1,{0}x=1", "no folder or file")],
)  # fmt: skip
def test_bad_mixes(tmp_path, spec, message):
    shards = shards_of(tmp_path / "shards", (3,))
    with pytest.raises(DataError, match=message):
        open_source(spec.format(shards))


def test_timeouts_and_retries_reach_parquet_rows(tmp_path):
    rows = ParquetRows(Patience(1, 2))
    assert pickle.loads(pickle.dumps(rows)).patience == Patience(1, 2)
