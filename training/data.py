"""Image-caption data: `open_source` gives a map-style source, `split_by_key` a held-out part, `loader` batches.

    "shapes" | folder | metadata.jsonl | shards -> open_source -> Source -> split_by_key -> loader -> Batch, Batch, ...

A source answers `source[i]` at any time in any process, so that order, workers and resuming are matters of the loader.
Images are uint8 RGB (h, w, 3), all of one size, which is a multiple of the model's step; sizes are (height, width).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from training.cache import About, is_cache
from training.images import BadImage, ImageData, Size, fit, fit_size, read_image, read_size
from training.loader import Batch, loader, one_pass
from training.sources import DataError, Entry, Index

__all__ = ["Batch", "DataError", "FileSource", "Sample", "ShapesSource", "Source"]
__all__ += ["loader", "one_pass", "open_source", "split_by_key"]

NUM_SHAPES = 100_000
"""How many samples "shapes" has when no number is given."""

_PROBED = 100  # images whose headers are looked at to find the most common size


@dataclass(frozen=True)
class Sample:
    """One image uint8 RGB (h, w, 3) with its caption; or, with `error` set to the reason, none (image is None)."""

    key: str
    image: np.ndarray | None
    caption: str
    error: str | None = None


@runtime_checkable
class Source(Protocol):
    """A map-style data set; `skipped` names what could not be indexed: (name, reason)."""

    image_size: Size
    keys: list[str]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def caption(self, i: int) -> str:
        """The caption without the image; "" where it is missing."""


def open_source(
    spec: str,
    image_size: int | Size | None = None,
    step: int = 1,
    num_samples: int | None = None,
    seed: int = 0,
    need_captions: bool = True,
) -> Source:
    """Open a data set: "shapes" or "shapes:20000" (the procedural world), a folder of images, shards, or a cache.

    Shards are one file, a folder (also one level down) or a glob. `image_size` is a side or (height, width), fitted to
    multiples of `step`; None takes the most common size in the data (64 for shapes). `num_samples` limits files to the
    first so many, and is the size of "shapes", which `seed` seeds. Unless captions are needed, a missing one is "".
    Raises `DataError` where there are no images, no captions, or `spec` or a size makes no sense.
    """
    if num_samples is not None and num_samples < 1:
        raise DataError(f"num_samples must be at least 1, not {num_samples}")
    size = _checked_size(image_size)
    if spec == "shapes" or spec.startswith("shapes:"):
        count = _count_in(spec) or num_samples or NUM_SHAPES
        return ShapesSource(count, fit_size(*(size or (64, 64)), step), seed)
    if is_cache(spec):
        from training.cached import CachedSource

        return CachedSource(spec, size, step, num_samples)
    return FileSource(Index(spec, need_captions), size, step, num_samples)


def is_shapes(spec: str) -> bool:
    """Whether the data is the drawn world, or a cache of it."""
    return (About.read(Path(spec)).source if is_cache(spec) else spec).partition(":")[0] == "shapes"


class FileSource:
    """Images in files or shards. A sample that cannot be used (no caption, bad image) comes with its `error` set."""

    def __init__(self, index: Index, size: Size | None = None, step: int = 1, num_samples: int | None = None) -> None:
        self.skipped = index.skipped
        self._index, self._entries = index, index.entries[:num_samples]
        self.keys = [entry.key for entry in self._entries]
        self.image_size = fit_size(*(size or self._common_size()), step)

    def __len__(self) -> int:
        return len(self._entries)

    def caption(self, i: int) -> str:
        """The caption without the image; "" where it is missing."""
        return self._entries[i].caption or ""

    def __getitem__(self, i: int) -> Sample:
        entry = self._entries[i]
        if entry.caption is None and self._index.need_captions:
            return Sample(entry.key, None, "", "missing caption")
        try:
            image = fit(read_image(_bytes_of(entry), at_least=self.image_size), self.image_size)
        except (BadImage, OSError) as error:
            return Sample(entry.key, None, self.caption(i), str(error))
        return Sample(entry.key, image, self.caption(i))

    def _common_size(self) -> Size:
        """The size that most of up to 100 images have, evenly spread over the data; of equals the first."""
        sizes: Counter[Size] = Counter()
        reason = ""
        for i in np.linspace(0, len(self) - 1, min(_PROBED, len(self))).astype(int):
            try:
                sizes[read_size(_bytes_of(self._entries[i]))] += 1
            except (BadImage, OSError) as error:
                reason = reason or f"{self.keys[i]}: {error}"
        if not sizes:
            raise DataError(f"no image can be read, of {len(self)} images found; one of them is {reason}")
        return sizes.most_common(1)[0][0]


class ShapesSource:
    """The training split of `ShapesWorld` as a source of `num_samples` samples, a pure function of the seed."""

    def __init__(self, num_samples: int, image_size: Size = (64, 64), seed: int = 0) -> None:
        from training.shapes import ShapesWorld

        self._world = ShapesWorld(image_size=image_size, seed=seed, split="train")
        self.image_size = image_size
        self.keys = [f"shapes-{i:08d}" for i in range(num_samples)]
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.keys)

    def caption(self, i: int) -> str:
        """The caption without the image."""
        return self._world.caption(range(len(self))[i])

    def __getitem__(self, i: int) -> Sample:
        image, caption, _ = self._world[range(len(self))[i]]
        return Sample(self.keys[i], image, caption)


def split_by_key(source: Source, held_out_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training indices, held-out indices), both ascending: held out is what has SHA-256(key) / 2^256 < the fraction.

    Whether a sample is held out depends on its key alone, not on what else is in the data set. What follows "#" in a
    key (further captions of one image) does not count: all captions of an image fall to one side. With few samples
    either side can be empty. Raises `DataError` unless the fraction is in [0, 1].
    """
    if not 0 <= held_out_fraction <= 1:
        raise DataError(f"held_out_fraction must be in [0, 1], not {held_out_fraction}")
    held_out = np.array([place_of(key.partition("#")[0]) < held_out_fraction for key in source.keys], dtype=bool)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def place_of(text: str) -> float:
    """Where the SHA-256 of a text falls in [0, 1)."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # exact in float64, and below 1


def _bytes_of(entry: Entry) -> ImageData:
    if entry.size is None:
        return entry.path
    with open(entry.path, "rb") as file:  # opened anew each time: nothing to share between processes
        file.seek(entry.offset)
        return file.read(entry.size)


def _checked_size(image_size: int | Size | None) -> Size | None:
    if image_size is None:
        return None
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(side, int) and side >= 1 for side in sides)
    ):
        raise DataError(f"image_size must be a side or (height, width) in pixels, not {image_size!r}")
    return sides[0], sides[1]


def _count_in(spec: str) -> int | None:
    """The number in "shapes:20000", None for "shapes"."""
    _, colon, text = spec.partition(":")
    if not colon:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise DataError(f"{spec!r}: expected 'shapes' or 'shapes:N' with a number of samples, such as 'shapes:20000'")
    return int(text)
