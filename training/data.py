"""Image-caption data: `open_source` gives a map-style source, `split_by_key` a held-out part, `loader` batches.

    "shapes" | folder | metadata.jsonl | shards | Parquet | URL | hf:NAME | a mix of these | python:MODULE:CLASS
        -> open_source -> Source -> split_by_key -> loader -> ImageBatch, ImageBatch, ...

A source gives any sample at any time in any process; the order of samples, workers and resuming are up to the loader.
Images are uint8 RGB (h, w, 3), all of one size, or of the size of their bucket; sizes are (height, width), multiples of
the `step` that the model needs.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from training.buckets import assign, bucket_sizes, merge_small, own_sizes
from training.cache import About
from training.cache_files import is_cache
from training.captions import Captions, Weights, choose, items_in, parse_weights
from training.errors import DataError
from training.image_batches import ImageBatch, loader, one_pass
from training.images import BadImage, ImageData, Size, fit_size, read_fitted, read_size
from training.order import Layout
from training.own import is_own
from training.own_data import captions_at, open_own, sample_at
from training.remote import RemoteError
from training.sources import Index
from training.table import Entry, Keys
from training.wanted import Wanted

__all__ = ["DataError", "FileSource", "ImageBatch", "Sample", "ShapesSource", "Source", "SourceOptions"]
__all__ += ["loader", "one_pass", "open_source", "split_by_key"]

NUM_SHAPES = 100_000
"""How many samples "shapes" has when no number is given."""

TEXTS = 1_000_000
"""Samples, at most, whose captions a tokenizer is trained on."""

_PROBED = 100  # images whose headers are looked at to find the most common size


@dataclass(frozen=True)
class Sample:
    """One image uint8 RGB (h, w, 3) with its caption. Where it cannot be used, image is None and `error` says why.

    original: (height, width) of the upright file; crop: (top, left) of the crop in the scaled image, in pixels;
    flipped: whether it was mirrored.
    """

    key: str
    image: np.ndarray | None
    caption: str
    error: str | None = None
    original: Size | None = None
    crop: Size = (0, 0)
    flipped: bool = False


class Data(ABC):
    """What is known of a data set before any sample is read: a `Source`, or a stream (`stream.StreamSource`)."""

    image_size: Size
    """(height, width) in pixels that images are fitted to; with buckets, the size whose area they keep to."""
    keys: Sequence[str]
    """A unique name for each sample, in order."""
    skipped: list[tuple[str, str]]
    """(name, reason) of each file or row that could not be indexed."""
    left_out: Sequence[tuple[str, int, str]] = ()
    """(reason, number of samples, key of the first one) for each filter that left samples out."""
    garbled: Sequence[tuple[int, str]] = ()
    """(number of samples, key of the first one) whose captions are not valid UTF-8."""
    version: str = ""
    """A digest of the data's files where `keys` do not identify the samples, as in a stream."""

    @cached_property
    def layout(self) -> Layout:
        """How samples fall into buckets, parts and blocks; by default one size, and neither parts nor blocks."""
        return Layout((self.image_size,))

    @abstractmethod
    def some_captions(self) -> Iterator[str]:
        """Captions to train a tokenizer on: all, or a part of very many."""


class Source(Data):
    """A map-style data set: `source[i]` is sample i, in any process and in any order.

    A subclass sets `image_size`, `keys` and `skipped`; the rest has defaults that fit a plain data set.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Sample:
        """Sample i with its first caption and a central crop."""

    @abstractmethod
    def caption(self, i: int) -> str:
        """The first caption of sample i, read without its image; "" where it has none."""

    def captions(self, i: int) -> Captions:
        """All captions of sample i, and the weights by which one is drawn (none: equal weights)."""
        return (self.caption(i),), ()

    def some_captions(self) -> Iterator[str]:
        for i in range(0, len(self), -(-len(self) // TEXTS)):
            yield from captions_at(self, i)[0]

    def draw(self, i: int, rng: Callable[[], np.random.Generator]) -> Sample:
        """Sample i with its caption, crop and flip drawn at random, by default the caption alone; rng makes the
        generator, if one is needed.
        """
        sample, several = self[i], type(self).captions is not Source.captions
        texts, weights = captions_at(self, i) if several else ((), ())
        if len(texts) < 2 or sample.error is not None:
            return sample
        return replace(sample, caption=texts[choose(len(texts), weights, rng().random())])

    def raw(self, i: int) -> bytes:
        """Bytes that identify image i: its file's, or its pixels where it has no file; b"" where it is bad."""
        image = sample_at(self, i).image
        return b"" if image is None else np.asarray(image).tobytes()

    @property
    def is_remote(self) -> bool:
        """Whether reading a sample is mostly waiting for a server."""
        return False


@dataclass(frozen=True)
class SourceOptions:
    """How images are fitted to their size, and which samples are taken.

    buckets: instead of one size, several of about the area of image_size, with aspect ratios up to max_ratio; a bucket
    of fewer than min_bucket samples is merged into the nearest. "own": each image's own size, up to that area. mixed: a
    batch may hold several of these sizes. crop: the centre, or a random place. flip: mirror half of the images.
    """

    buckets: bool | Literal["own"] = False
    max_ratio: float = 2.0
    min_bucket: int = 1
    mixed: bool = False
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    wanted: Wanted = field(default_factory=Wanted)

    def __post_init__(self) -> None:
        if self.buckets and not self.wanted.measures:  # an image's size decides its bucket
            object.__setattr__(self, "wanted", replace(self.wanted, sizes=True))

    def check_size(self, size: Size | None) -> None:
        """Raises `DataError` where images keep their own size, and no image_size limits their area."""
        if size is None and self.buckets == "own":
            raise DataError('data.buckets is "own": say by data.image_size above which area images are scaled down')

    @property
    def mixes(self) -> bool:
        """Whether a batch holds images of several sizes."""
        return self.mixed and bool(self.buckets)

    @property
    def is_plain(self) -> bool:
        """Whether these are the defaults: images of one size, central crops, first captions, no filters."""
        same = Wanted(cache=self.wanted.cache, patience=self.wanted.patience)
        return not self.buckets and self.crop == "center" and not self.flip and self.wanted == same


def open_source(
    spec: str,
    image_size: int | Size | None = None,
    step: int = 1,
    num_samples: int | None = None,
    seed: int = 0,
    need_captions: bool = True,
    options: SourceOptions = SourceOptions(),
) -> Source:
    """Open a data set: "shapes" or "shapes:20000" (the procedural world), images in files, shards or rows, a mix, a
    cache of these, or a subclass of `Source`, "python:MODULE:CLASS".

    Shards and Parquet files are one file, a folder (shards also one level down), a glob or a URL. "a=0.7,b=0.3" mixes
    data sets by weight. `image_size` is a side or (height, width), fitted to multiples of `step`; None takes the most
    common size in the data (64 for shapes). `num_samples` limits each data set to the first so many, and is the size of
    "shapes", which `seed` seeds. Unless captions are needed, a missing one is "". Raises `DataError` where there are no
    images, no captions, or `spec` or a size makes no sense.
    """
    if num_samples is not None and num_samples < 1:
        raise DataError(f"num_samples must be at least 1, not {num_samples}")
    if not spec:  # Path("") is the current folder
        raise DataError("no data is named: give --data (or data.source) a folder of images with captions, shards, ...")
    size, mix = checked_size(image_size), _mix_in(spec)
    if is_own(spec) and len(mix) == 1:
        if not options.is_plain:
            raise DataError(f"{spec} gives its samples as they are: no buckets, crops, flips, captions, filters")
        return open_own(spec, size and fit_size(*size, step), step, num_samples)
    if any(name.partition(":")[0] == "shapes" for name, _ in mix):
        if len(mix) > 1:
            raise DataError(f"{spec}: shapes cannot be mixed with files")
        if not options.is_plain:
            raise DataError(
                "shapes are drawn at one size, with one caption: no buckets, crops, flips, captions, filters"
            )
        count = _count_in(spec) or num_samples or NUM_SHAPES
        return ShapesSource(count, fit_size(*(size or (64, 64)), step), seed)
    if is_cache(spec):
        from training.cached import CachedSource

        return CachedSource(spec, size, step, num_samples, options.mixed, options.wanted.patience)
    for name, _ in mix:
        _check_alone(name)
    indexes = [Index(name, need_captions, options.wanted) for name, _ in mix]
    return FileSource(indexes, size, step, num_samples, options, [weight for _, weight in mix])


def _check_alone(name: str) -> None:
    """Raises `DataError` for what cannot be read as a list of images: a stream, or a cache in a mix."""
    if name.startswith("hf-stream:"):
        raise DataError(f"{name} is a stream, which training alone reads, and by itself: take hf:NAME, or files")
    if is_cache(name):
        raise DataError(f"{name} is a cache, which is trained on by itself: mix the data, and cache the mix")
    if is_own(name):
        raise DataError(f"{name} is trained on by itself: mix the data in that class")


def is_mix(spec: str) -> bool:
    """Whether several data sets are named, with weights."""
    return len(_mix_in(spec)) > 1


def is_shapes(spec: str) -> bool:
    """Whether the data is the drawn world, or a cache of it."""
    return (About.read(spec).source if is_cache(spec) else spec).partition(":")[0] == "shapes"


class FileSource(Source):
    """Images in files, shards or rows. A sample that cannot be used (no caption, bad image) comes with its `error` set.

    Several indexes are read as one, mixed by `weights`. Raises `DataError` where no size is given and none can be read
    from the images.
    """

    def __init__(
        self,
        index: Index | Sequence[Index],
        size: Size | None = None,
        step: int = 1,
        num_samples: int | None = None,
        options: SourceOptions = SourceOptions(),
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self._indexes = [index] if isinstance(index, Index) else list(index)
        self.skipped = [row for one in self._indexes for row in one.skipped]
        self.left_out = [(reason, *about) for one in self._indexes for reason, about in one.left_out.items()]
        self.garbled = [one.garbled for one in self._indexes if one.garbled[0]]
        self._tables = [one.entries[:num_samples] for one in self._indexes]
        self._ends = np.cumsum([len(table) for table in self._tables])
        self.keys: Sequence[str] = Keys(self._tables)
        self.options = options
        options.check_size(size)
        self.image_size = fit_size(*(size or self._common_size()), step)
        self.layout = self._layout(step, tuple(weights))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _entry(self, i: int) -> tuple[Index, Entry]:
        i = range(len(self))[i]
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._indexes[part], self._tables[part][i - int(self._ends[part])]

    def caption(self, i: int) -> str:
        return self._entry(i)[1].caption or ""

    def captions(self, i: int) -> Captions:
        entry = self._entry(i)[1]
        return entry.captions, entry.shares

    def __getitem__(self, i: int) -> Sample:
        return self._read(i, None)

    def draw(self, i: int, rng: Callable[[], np.random.Generator]) -> Sample:
        """Sample i with one of its captions, cropped and flipped as the options say; the caption is drawn first."""
        return self._read(i, rng)

    @property
    def is_remote(self) -> bool:
        return any(index.is_remote for index in self._indexes)

    def _read(self, i: int, rng: Callable[[], np.random.Generator] | None) -> Sample:
        index, entry = self._entry(i)
        size = self.layout.sizes[self.layout.bucket_of(i)]
        if not entry.captions and index.need_captions:
            return Sample(entry.key, None, "", "missing caption")
        try:
            data = index.read(entry)
        except RemoteError as error:  # a failure of the server, not a bad sample
            raise DataError(str(error)) from error
        except OSError as error:
            return Sample(entry.key, None, entry.caption or "", (error.strerror or str(error)).lower())
        return read_sample(entry.key, entry.captions, entry.shares, data, size, self.options, rng)

    def _layout(self, step: int, weights: tuple[float, ...]) -> Layout:
        part = block = bucket = None
        if len(self._tables) > 1:
            part = np.repeat(np.arange(len(self._tables), dtype=np.int16), [len(table) for table in self._tables])
        if any("block" in table.columns for table in self._tables):
            none = [np.full(len(table), -1, dtype=np.int32) for table in self._tables]
            block = np.concatenate([t.columns.get("block", x) for t, x in zip(self._tables, none, strict=True)])
        sizes: tuple[Size, ...] = (self.image_size,)
        if self.options.buckets:
            sizes, bucket = self._buckets(step)
        return Layout(sizes, bucket, part, weights, block, self.options.mixes)

    def _buckets(self, step: int) -> tuple[tuple[Size, ...], np.ndarray]:
        """(sizes of the buckets that are not empty, the bucket of each image)."""
        if not all("height" in table.columns for table in self._tables):
            raise DataError("buckets need the images' sizes: index them with Wanted(sizes=True)")
        columns = [np.concatenate([table.columns[name] for table in self._tables]) for name in ("height", "width")]
        if self.options.buckets == "own":
            height, width = self.image_size
            sizes, numbers = own_sizes(columns[0], columns[1], height * width, step, self.options.max_ratio)
            return tuple(sizes), numbers
        all_sizes = bucket_sizes(*self.image_size, step, self.options.max_ratio)
        bucket = merge_small(assign(columns[0], columns[1], all_sizes), all_sizes, self.options.min_bucket)
        used, numbers = np.unique(bucket, return_inverse=True)
        return tuple(all_sizes[b] for b in used), numbers.astype(np.int16)

    def raw(self, i: int) -> bytes:
        index, entry = self._entry(i)
        try:
            data = index.read(entry)
            return data if isinstance(data, bytes) else Path(data).read_bytes()
        except (OSError, RemoteError):
            return b""

    def _common_size(self) -> Size:
        """The most common size among up to 100 images, evenly spread over the data; of several the first."""
        sizes: Counter[Size] = Counter()
        reason = ""
        for i in np.linspace(0, len(self) - 1, min(_PROBED, len(self))).astype(int):
            index, entry = self._entry(int(i))
            try:
                sizes[entry.image_size or read_size(index.read(entry))] += 1
            except RemoteError as error:
                raise DataError(str(error)) from error
            except (BadImage, OSError) as error:
                reason = reason or f"{entry.key}: {error}"
        if not sizes:
            raise DataError(f"no image can be read, of {len(self)} images found; one of them is {reason}")
        return sizes.most_common(1)[0][0]


def read_sample(
    key: str,
    captions: tuple[str, ...],
    shares: tuple[float, ...],
    data: ImageData,
    size: Size,
    options: SourceOptions,
    rng: Callable[[], np.random.Generator] | None,
) -> Sample:
    """A sample of size (h, w) from its image file and captions; its `error` is set where the image is bad.

    rng makes the generator that draws a caption, then the crop, then the flip; it is called only where one of these is
    random. Without it the sample has its first caption and a central crop.
    """
    caption, place, flip = captions[0] if captions else "", (0.5, 0.5), False
    if rng is not None and (len(captions) > 1 or options.crop == "random" or options.flip):
        u, down, right, mirror = rng().random(4)
        caption = captions[choose(len(captions), shares, u)] if captions else ""
        place = (down, right) if options.crop == "random" else place
        flip = options.flip and mirror < 0.5
    try:
        found = read_fitted(data, size, place, bool(flip))
    except BadImage as error:
        return Sample(key, None, caption, str(error))
    return Sample(key, found.image, caption, None, found.original, found.crop, found.flipped)


class ShapesSource(Source):
    """The training split of `ShapesWorld` as a source of `num_samples` samples, a pure function of the seed."""

    def __init__(self, num_samples: int, image_size: Size = (64, 64), seed: int = 0) -> None:
        from training.shapes import ShapesWorld

        self._world = ShapesWorld(image_size=image_size, seed=seed, split="train")
        self.image_size = image_size
        self.keys: Sequence[str] = [f"shapes-{i:08d}" for i in range(num_samples)]
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.keys)

    def caption(self, i: int) -> str:
        return self._world.caption(range(len(self))[i])

    def __getitem__(self, i: int) -> Sample:
        image, caption, _ = self._world[range(len(self))[i]]
        return Sample(self.keys[i], image, caption)


def split_by_key(source: Source, held_out_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training indices, held-out indices), both ascending; held out are samples with SHA-256(key) / 2^256 < fraction.

    Whether a sample is held out thus depends on its key alone, not on the rest of the data set. What follows "#" in a
    key (further captions of one image) does not count, so that all captions of an image fall to one side. With few
    samples either side can be empty. Raises `DataError` unless the fraction is in [0, 1].
    """
    if not 0 <= held_out_fraction <= 1:
        raise DataError(f"held_out_fraction must be in [0, 1], not {held_out_fraction}")
    held_out = np.array([place_of_key(key) < held_out_fraction for key in source.keys], dtype=bool)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def place_of(text: str) -> float:
    """The SHA-256 of a text as a number in [0, 1)."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # exact in float64, and below 1


def place_of_key(key: str) -> float:
    """`place_of` a sample's key, without what follows "#"."""
    return place_of(key.partition("#")[0])


def checked_size(image_size: int | Size | None) -> Size | None:
    """(height, width) from a side or a pair. Raises `DataError` for anything else."""
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


def _mix_in(spec: str) -> Weights:
    """The data sets of "a=0.7,b=0.3" with their weights; any other spec is one data set of weight 1."""
    parts = items_in(spec)
    if (
        len(parts) < 2
        or os.path.exists(spec)
        or not all(re.fullmatch(r".+=[0-9.]+(e-?[0-9]+)?", part) for part in parts)
    ):
        return ((spec, 1.0),)
    return parse_weights(spec, "data.source")
