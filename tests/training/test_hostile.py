"""Files made to do harm, and damaged ones: refused in one line, and nothing outside their folder is touched."""

import gzip
import tarfile
from pathlib import Path

import pytest

from benchmarks.fuzz_models import MODELS
from benchmarks.fuzz_readers import READERS, hostile, inputs, outcome, png_bomb, tar, watched
from tests.training.pictures import picture
from training.config import ConfigError, load_config
from training.data import DataError, open_source
from training.images import BadImage, read_image


@pytest.mark.parametrize("reader", READERS)
def test_hostile_files_are_refused_or_read_harmlessly(reader, tmp_path):
    found = {i: outcome(reader, data, tmp_path) for i, data in enumerate(hostile(reader))}
    assert {i: result for i, result in found.items() if result not in ("accepted", "refused")} == {}


@pytest.mark.parametrize("reader", [name for name in READERS if name != "Parquet"])  # a decoder of others may die
def test_damaged_files_are_refused_or_read(reader, tmp_path):
    first, count = len(hostile(reader)), 6 if reader in MODELS else 40
    found = {
        i: outcome(reader, data, tmp_path) for i, data in enumerate(inputs(reader, first + count, 1)) if i >= first
    }
    assert {i: result for i, result in found.items() if result not in ("accepted", "refused")} == {}


def test_the_watch_sees_what_is_touched_outside(tmp_path):
    (tmp_path / "in").mkdir()
    with watched(tmp_path / "in") as touched:
        (tmp_path / "in" / "own").write_text("x")
        (tmp_path / "out").write_text("x")
    assert touched == [f"open {tmp_path.resolve() / 'out'}"]


def test_members_are_never_written_by_their_names(tmp_path):
    """Names that lead outside are keys, and their images are read in place."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar([("../../up.png", picture(3)), ("../../up.txt", b"up")]))
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(tmp_path / "in"))
    assert source[0].caption == "up" and source[0].image[0, 0, 0] == 3
    assert sorted(tmp_path.rglob("*")) == before and not Path(tmp_path.parent / "up.png").exists()


def test_a_name_that_asks_for_all_memory_is_not_read(tmp_path):
    """8 GB that are compressed to little could be unpacked for it."""
    member = tarfile.TarInfo("name")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))
    with pytest.raises(DataError, match="0.tar.gz: cut off or corrupt: a header asks for 8589934592 bytes"):
        open_source(str(tmp_path))


def test_rows_that_lead_out_of_the_folder_are_skipped(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(1))
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.png").write_bytes(picture(2))
    names = ["good.png", "../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"]
    (data / "metadata.csv").write_text("file_name,text\n" + "\n".join(f"{name},t" for name in names))
    source = open_source(str(data))
    assert source.keys == ["good"] and len(source.skipped) == 3
    assert {reason for _, reason in source.skipped} == {"its file_name leads out of the folder"}


def test_a_picture_of_ten_thousand_million_pixels_is_refused_by_its_header():
    with pytest.raises(BadImage, match="too large"):
        read_image(png_bomb(100_000))


def test_a_config_that_takes_forever_to_parse_is_refused(tmp_path):
    path = tmp_path / "my.toml"
    for bomb in (b"a." * 50_000 + b"b = 1", b"a = " + b"[" * 100_000, b"a = " + b"9" * 20_000, b"#" * 2_000_000):
        path.write_bytes(bomb)
        with pytest.raises(ConfigError, match="is no valid TOML"):
            load_config(str(path), [])
