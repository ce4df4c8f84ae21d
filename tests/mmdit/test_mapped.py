"""Tensors mapped from a file: its numbers bit for bit, never written back; and files that hold none."""

import pytest
import torch
from safetensors.torch import save_file

from mmdit.mapped import PICKLES, read_metadata, read_weights
from mmdit.weights_io import save_weights


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_tensors_go_there_and_back_bit_for_bit(tmp_path, dtype):
    """Also those whose bytes begin in the middle of a page, that have no dimension, or no element."""
    state = {"a.weight": (torch.randn(3, 4) * 3).to(dtype).T, "b": torch.zeros((), dtype=dtype)}
    state |= {"c": torch.zeros(0, 2, dtype=dtype), "d": torch.arange(5000).to(dtype), "e": torch.ones(7).to(dtype)}
    save_weights(state, tmp_path / "x.safetensors", {"format": "pt", "note": "x"})
    again = read_weights(tmp_path / "x.safetensors")
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].dtype == dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].float(), tensor.float())
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "note": "x"}


def test_tensors_of_mixed_types_and_odd_lengths_are_told_apart(tmp_path):
    state = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.full((5,), 2.5), "c": torch.ones(1, dtype=torch.bool)}
    save_file(state, tmp_path / "x.safetensors")
    again = read_weights(tmp_path / "x.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert read_metadata(tmp_path / "x.safetensors") == {}


def test_what_is_written_to_a_tensor_stays_out_of_the_file_and_of_other_readers(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights({"a": torch.zeros(2000)}, path)
    before = path.read_bytes()
    first, second = read_weights(path)["a"], read_weights(path)["a"]
    first.add_(1)
    assert first.sum() == 2000 and second.sum() == 0 and path.read_bytes() == before


def test_a_file_that_is_replaced_leaves_its_tensors_as_they_were(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights({"a": torch.zeros(2000)}, path)
    tensor = read_weights(path)["a"]
    save_weights({"a": torch.ones(10)}, path)
    assert tensor.shape == (2000,) and not tensor.any()
    path.unlink()
    assert not tensor.any()


def test_released_tensors_are_read_again(tmp_path):
    state = {"a": torch.arange(5000), "b": torch.arange(300.0)}
    save_weights(state, tmp_path / "x.safetensors")
    weights = read_weights(tmp_path / "x.safetensors")
    for _ in range(2):
        assert all(torch.equal(weights[name], state[name]) for name in state)
        weights.release()


def test_files_that_are_cut_short_or_corrupt_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights at .*x.safetensors"):
        read_weights(path)
    save_weights({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    header = whole.replace(b"[0,400]", b"[0,300]")
    for content in (b"", b"{", b"\xff" * 64, whole[:-1], whole[:20], whole + b"0", header, b"\x80\x02}q\x00." * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors is no readable safetensors file") as error:
            read_weights(path)
        assert "\n" not in str(error.value)


def test_a_git_lfs_pointer_is_told_as_such(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4321\n")
    with pytest.raises(ValueError, match="x.safetensors is a Git LFS pointer .* `git lfs pull`"):
        read_weights(path)


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused_unopened(tmp_path, suffix):
    with pytest.raises(ValueError, match=f"x{suffix} is a pickle, which can run any program"):
        read_weights(tmp_path / f"x{suffix}")  # there is none, and none is looked for


def test_numbers_of_an_unknown_type_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, dtype=torch.complex64)}, path)
    with pytest.raises(ValueError, match="a in .*x.safetensors is of type C64"):
        read_weights(path)
