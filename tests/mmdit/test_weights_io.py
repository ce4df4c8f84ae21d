"""Files that are whole or absent, and weights that fit or are refused by name."""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmdit.mapped import DTYPES
from mmdit.weights_io import (
    assign_weights,
    check_dtype,
    json_writer,
    load_weights,
    read_json,
    read_weights,
    save_weights,
    write_all_aside,
    write_aside,
    write_folder_aside,
    write_json,
)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_json_goes_there_and_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "new" / "folder" / "x.json"
    write_json(path, value)
    assert read_json(path) == value


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "x.json", 1)

    def half(path):
        path.write_text("2")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        write_aside(tmp_path / "x.json", half)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert read_json(tmp_path / "x.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_two_may_write_a_file_at_once(tmp_path):
    """As processes of one number do on several machines that share a folder."""

    def beside_another(aside):
        aside.write_text("one")
        write_aside(tmp_path / "x", lambda aside: aside.write_text("other"))

    write_aside(tmp_path / "x", beside_another)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "one"


def test_of_several_files_all_are_moved_or_none(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("no room")

    new, old = tmp_path / "new" / "folder", tmp_path / "old"
    write_json(old / "a.json", 1)
    for folder in (new, old):
        with pytest.raises(OSError, match="no room"):
            write_all_aside({folder / "a.json": json_writer(2), folder / "b.safetensors": fail})
    assert not (tmp_path / "new").exists()
    assert [path.name for path in old.iterdir()] == ["a.json"] and read_json(old / "a.json") == 1
    write_all_aside({old / "a.json": json_writer(2), new / "b.json": json_writer(3)})
    assert read_json(old / "a.json") == 2 and read_json(new / "b.json") == 3


def test_a_folder_is_moved_as_a_whole_or_not_at_all(tmp_path):
    def write(folder, fail):
        write_json(folder / "config.json", 2)
        save_weights({"a": torch.ones(2)}, folder / "deep" / "x.safetensors")
        if fail:
            raise OSError("no room")

    new, old = tmp_path / "new" / "folder", tmp_path / "old"
    write_json(old / "config.json", 1)
    write_json(old / "other.json", 1)
    for folder in (new, old):
        with pytest.raises(OSError, match="no room"):
            write_folder_aside(folder, lambda aside: write(aside, True))
    assert not (tmp_path / "new").exists() and read_json(old / "config.json") == 1
    assert {path.name for path in old.rglob("*")} == {"config.json", "other.json"}
    for folder in (new, old):
        write_folder_aside(folder, lambda aside: write(aside, False))
        assert read_json(folder / "config.json") == 2 and (folder / "deep" / "x.safetensors").is_file()
        assert {path.name for path in folder.iterdir()} - {"other.json"} == {"config.json", "deep"}
    assert read_json(old / "other.json") == 1 and [path.name for path in new.parent.iterdir()] == ["folder"]


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    """A full disk, say, of which the system tells without a name."""

    def full(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmdit.weights_io.whole", full)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}: .*No space left"):
        save_weights({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IsADirectoryError, match="x.json is a folder"):
        write_json(tmp_path / "x.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=4).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from([*DTYPES.values()]), SHAPES), max_size=8), st.booleans())
def test_a_file_is_that_of_the_library_byte_for_byte(tmp_path_factory, tensors, about):
    folder, metadata = tmp_path_factory.mktemp("files"), {"format": 'a "name"'} if about else None
    state = {name: torch.randn(shape).mul(3).to(kind) for name, (kind, shape) in tensors.items()}
    save_weights(state, folder / "ours", metadata)
    safetensors.torch.save_file(state, folder / "theirs", metadata)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_views_and_tied_weights_are_written_as_they_are_seen(tmp_path):
    x = nn.Parameter(torch.arange(6.0).view(2, 3))
    save_weights({"a": x, "b": x, "c": x.T, "d": x[1:]}, tmp_path / "x")
    found = read_weights(tmp_path / "x")
    assert torch.equal(found["a"], x) and torch.equal(found["b"], x)
    assert torch.equal(found["c"], x.T) and torch.equal(found["d"], x[1:])
    with pytest.raises(ValueError, match="a is of type torch.complex64, expected one of torch.int64, "):
        save_weights({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x")


@pytest.mark.parametrize("wrong", [torch.int8, torch.float8_e4m3fn, torch.bool, "bfloat16"])
def test_types_in_which_nothing_is_computed_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a floating type of torch"):
        check_dtype(wrong)


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    (tmp_path / "plain").touch()
    save_weights({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    write_json(tmp_path / "x.json", 1)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_json_that_is_none_is_named(tmp_path):
    for content in (b"", b"{", b"\xff" * 64):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match="x.json is not JSON"):
            read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_weights_that_fit_are_copied(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    save_weights(source.state_dict(), tmp_path / "x.safetensors")
    load_weights(target, tmp_path / "x.safetensors")
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_weights_that_do_not_fit_are_named_and_nothing_is_changed():
    target = nn.Linear(3, 2)
    before = target.weight.clone()
    state = {"weight": torch.ones(2, 4), "gain": torch.ones(2)}
    with pytest.raises(ValueError) as error:
        assign_weights(target, state, "here")
    assert str(error.value) == (
        "the weights of here do not fit the model: 1 missing: bias; 1 extra: gain; "
        "1 of another shape: weight (2, 4) for (2, 3)"
    )
    assert torch.equal(target.weight, before)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, '{"a": "\\ud800', "\0"])
def test_json_that_is_none_or_a_bomb_names_its_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not JSON"):
        read_json(tmp_path / "config.json")


def test_tied_weights_are_written_under_each_name(tmp_path):
    table = torch.randn(5, 3)
    save_weights({"embed": table, "head": table}, tmp_path / "x.safetensors")
    found = read_weights(tmp_path / "x.safetensors")
    assert torch.equal(found["embed"], table) and torch.equal(found["head"], table)
