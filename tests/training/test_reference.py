"""Kept features of a reference: made once, and never those of other pictures, sizes or networks."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdit.mapped import read_metadata
from tests.training.tiny_networks import save_pictures
from training.data import DataError, ShapesSource, open_source
from training.image_networks import ImageNetwork
from training.reference import cache_folder, content, reference_features


class Mean(ImageNetwork):
    """The mean colour, and how many pictures it has looked at."""

    num_features = 3

    def __init__(self, digest: str = "mean") -> None:
        super().__init__(torch.nn.Linear(1, 1), "mean colour", digest)
        self.seen = 0

    def look(self, images):
        self.seen += len(images)
        return images.float().mean((2, 3))


@pytest.fixture
def folder(tmp_path):
    return save_pictures(tmp_path / "pictures", 5)


def features(folder, cache, network=None, size=24, indices=None, log=lambda text: None):
    """(the features, how many pictures were looked at)."""
    network = network or Mean()
    before, source = network.seen, open_source(str(folder), size, need_captions=False)
    indices = np.arange(len(source)) if indices is None else np.array(indices)
    return reference_features(source, indices, network, cache, 2, log=log), network.seen - before


def test_features_are_those_of_the_pictures_in_order_and_made_once(folder, tmp_path):
    log = []
    first, seen = features(folder, tmp_path / "cache", log=log.append)
    expected = [np.asarray(Image.open(path)).reshape(-1, 3).mean(0) for path in sorted(folder.glob("*.png"))]
    np.testing.assert_allclose(first, np.stack(expected), rtol=1e-5)
    assert seen == 5 and len(log) == 1 and "looks at 5 pictures" in log[0]
    again, seen = features(folder, tmp_path / "cache", log=log.append)
    assert seen == 0 and torch.equal(first, again) and len(log) == 1


def test_whatever_differs_is_looked_at_anew(folder, tmp_path):
    """Another network, size, choice or order of pictures; a picture that was replaced under its old name and date."""
    cache = tmp_path / "cache"
    features(folder, cache)
    assert features(folder, cache, Mean("other"))[1] == 5
    assert features(folder, cache, size=16)[1] == 5
    assert features(folder, cache, indices=[0, 1])[1] == 2
    assert features(folder, cache, indices=[1, 0])[1] == 2
    path = folder / "002.png"
    import os

    before = path.stat()
    Image.new("RGB", (24, 24), "red").save(path)
    os.utime(path, (before.st_atime, before.st_mtime))
    found, seen = features(folder, cache)
    assert seen == 5 and found[2].tolist() == [255, 0, 0]
    assert len(list(cache.iterdir())) == 6


def test_captions_do_not_count(folder, tmp_path):
    features(folder, tmp_path / "cache")
    (folder / "003.txt").unlink()
    assert features(folder, tmp_path / "cache")[1] == 0


def test_a_file_that_is_not_what_it_should_be_is_made_anew(folder, tmp_path):
    cache = tmp_path / "cache"
    right, _ = features(folder, cache)
    [path] = cache.iterdir()
    good, state, about = path.read_bytes(), load_file(path), read_metadata(path)
    changed = {"features": state["features"] + 1}
    spoilt = [
        lambda: path.write_bytes(good[: len(good) // 2]),  # cut
        lambda: path.write_bytes(good[:-4] + b"\0\0\0\1"),  # a flipped byte
        lambda: save_file(changed, path, about),  # other numbers
        lambda: save_file(state, path, about | {"key": "{}"}),  # of another key, under this name
        lambda: save_file(state, path),
        lambda: path.write_bytes(b""),
    ]
    for spoil in spoilt:
        spoil()
        found, seen = features(folder, cache)
        assert seen == 5 and torch.equal(found, right)
    assert features(folder, cache)[1] == 0


def test_a_picture_that_cannot_be_read_is_left_out_until_it_can(folder, tmp_path):
    good = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(b"no picture")
    log = []
    found, seen = features(folder, tmp_path / "cache", log=log.append)
    assert len(found) == seen == 4 and "1 pictures cannot be read and are left out; one is 001: not an image" in log[1]
    again, seen = features(folder, tmp_path / "cache")
    assert seen == 0 and torch.equal(again, found)
    (folder / "001.png").write_bytes(good)
    assert features(folder, tmp_path / "cache")[1] == 5
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the reference's 5 pictures can be read"):
        features(folder, tmp_path / "cache")


def test_drawn_pictures_count_by_their_pixels():
    one, same, other = (ShapesSource(4, (32, 32), seed) for seed in (0, 0, 1))
    indices = np.arange(4)
    assert content(one, indices) == content(same, indices) != content(other, indices)


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "mmdit" / "references"
    assert cache_folder("here").name == "here"
