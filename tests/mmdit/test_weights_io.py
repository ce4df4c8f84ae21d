"""Files that are whole or absent, and weights that fit or are refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmdit.weights_io import (
    assign_weights,
    load_weights,
    read_json,
    read_weights,
    save_weights,
    write_aside,
    write_json,
)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_json_goes_there_and_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "new" / "folder" / "x.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_go_there_and_back_bit_for_bit(tmp_path, dtype):
    state = {"a.weight": (torch.randn(3, 4) * 3).to(dtype).T, "b": torch.zeros((), dtype=dtype)}
    save_weights(state, tmp_path / "x.safetensors", {"format": "pt"})
    again = read_weights(tmp_path / "x.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) and again[k].dtype == dtype for k in state)


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


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    (tmp_path / "plain").touch()
    save_weights({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    write_json(tmp_path / "x.json", 1)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*x.safetensors"):
        read_weights(tmp_path / "x.safetensors")
    for content in (b"", b"{", b"\xff" * 64):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors is no readable safetensors file"):
            read_weights(tmp_path / "x.safetensors")
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
