"""Data that comes one row after another: a Hugging Face dataset as a stream, "hf-stream:NAME" (as in `hub.py`).

There is no random access, so the rows are shuffled as they come: the dataset's files by (seed, epoch), and the rows of
each block of `buffer` by (seed, epoch, block). The row at a position is thus a function of (seed, position). Resuming
reads from the start of the epoch, without decoding; all epochs have one length, which a run knows after the first.
A batch is the rows at consecutive positions, or, with buckets that are not mixed, what `stream_batches.py` makes of
them. Each process reads the whole stream and decodes its own rows, in worker processes if there are any.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mmdit.weights_io import write_aside
from training.ahead import ahead
from training.buckets import Sizing
from training.data import Data, Sample, Source, SourceOptions, place_of_key, read_sample
from training.errors import DataError, one_line
from training.hub import image_in, load
from training.image_batches import ImageBatch, make_batch, make_row, rng_for
from training.images import BadImage, Size, fit_size, read_size
from training.order import Layout
from training.remote import Patience
from training.rows import caption_columns, captions_in_row, image_column, key_column
from training.share import WHOLE, Share
from training.stream_batches import bucketfuls
from training.workers import run

STREAM = "hf-stream:"
PLAIN = SourceOptions()
AHEAD = 2  # batches of rows that are read ahead
BAD_BATCHES = 10  # batches in a row without a good sample that end a run
TEXTS = 20_000  # rows, at most, whose captions a tokenizer is trained on
PROBED = 100  # rows whose images are measured to find the most common size
_Batch: TypeAlias = "list[tuple[Size, Row]]"


class Row(NamedTuple):
    """A row with its image file. key: the image's hash where the dataset has no column of keys; size: (height, width),
    where it is asked for and the header can be read.
    """

    key: str
    captions: tuple[str, ...]
    shares: tuple[float, ...]
    image: bytes
    size: Size | None = None


class StreamSource(Data):
    """The rows of a stream that the filters take, epoch after epoch. layout: all sizes that images may be fitted to;
    version: a digest of the stream's files and the filters ("" where its files are not known).

    Raises `DataError` where it cannot be loaded, or its first rows show no image.
    """

    def __init__(
        self,
        spec: str,
        size: Size | None = None,
        step: int = 1,
        num_samples: int | None = None,
        options: SourceOptions = PLAIN,
        buffer: int = 1000,
    ) -> None:
        options.check_size(size)
        self.spec, self.num_samples, self.options, self.buffer = spec, num_samples, options, buffer
        data, files = load(spec.removeprefix(STREAM), streaming=True)
        wishes = replace(options.wanted, cache=None, patience=Patience())
        self.version, self._wishes = _digest(f"{files} {wishes}") if files else "", wishes
        names = data.column_names or list(next(self._taken(data), ()))
        self.data = data.take(num_samples) if num_samples else data  # before shuffling: the same rows in every epoch
        self.column, self.key_column = image_column(names, spec), key_column(names)
        self._names = [*caption_columns(names, options.wanted.captions), self.column]
        self.keys: Sequence[str] = [spec]  # its rows' own keys are not known
        self.skipped: list[tuple[str, str]] = []
        self.image_size = fit_size(*(size or self._common_size()), step)
        self._sizing = Sizing(self.image_size, step, options.buckets, options.max_ratio)
        self.layout = Layout(tuple(self._sizing.sizes), mixed=options.mixes)

    def size_of(self, row: Row) -> Size:
        """The size that a row's image is fitted to; a bad image counts as one of `image_size`."""
        return self._sizing(row.size)

    def some_captions(self) -> Iterator[str]:
        return (text for row in itertools.islice(self.rows(0, None), TEXTS) for text in row.captions)

    def rows(self, epoch: int, seed: int | None) -> Iterator[Row]:
        """The rows of an epoch that the filters take, as they come; files are shuffled by the seed, if there is one."""
        data = self.data
        if seed is not None:
            data = data.shuffle(seed=seed, buffer_size=1)
            data.set_epoch(epoch)
        wanted = self.options.wanted
        for values in self._taken(data):
            texts, shares = wanted.fitting(captions_in_row({n: values.get(n) for n in self._names}, wanted.captions))
            image = self._image(values[self.column])
            size = self._measured(image) if wanted.measures and texts else None
            if texts and not (size and wanted.refuses(size)):
                named = values.get(self.key_column) if self.key_column else None
                key = hashlib.blake2b(image, digest_size=12).hexdigest() if named is None else str(named)
                yield Row(key, texts, shares, image, size)

    def _taken(self, data: Any) -> Iterator[dict[str, Any]]:
        """Rows as dictionaries; what a reader or a server raises becomes `DataError`."""
        rows = iter(data)
        while True:
            try:
                values = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(f"{self.spec}: {one_line(error)}") from error
            yield values

    # --- the length of an epoch ---

    def epoch_rows(self, held_out: float) -> int | None:
        """The number of training rows in an epoch, where this run has seen a whole one."""
        try:
            found = json.loads(self._note(held_out).read_text())
        except (OSError, ValueError, TypeError):
            return None
        return found if isinstance(found, int) and found > 0 else None

    def note_epoch_rows(self, held_out: float, count: int) -> None:
        """Keep the number beside the run's indexes. Where it cannot be written, resuming takes longer."""
        if self.options.wanted.cache is not None and count != self.epoch_rows(held_out):
            with suppress(OSError):
                write_aside(self._note(held_out), lambda aside: aside.write_text(json.dumps(count)))

    def _note(self, held_out: float) -> Path:
        name = _digest(f"{self.spec} {self.version} {self.num_samples} {self._wishes} {held_out}")
        return (self.options.wanted.cache or Path(os.devnull)) / f"stream-{name}.json"

    # --- a row ---

    def _image(self, value: Any) -> bytes:
        """The image file in a cell; b"" where its file is missing, so that the row is skipped as a bad one."""
        try:
            return image_in(value)
        except FileNotFoundError:
            return b""
        except OSError as error:  # a failure of the server, not a bad row
            raise DataError(f"{self.spec}: {error}") from error

    @staticmethod
    def _measured(image: bytes) -> Size | None:
        """(height, width) from the header; None for a bad image, which decoding will name."""
        with suppress(BadImage):
            return read_size(image)
        return None

    def _common_size(self) -> Size:
        rows = itertools.islice(self.rows(0, None), PROBED)
        sizes = Counter(size for row in rows if (size := row.size or self._measured(row.image)))
        if not sizes:
            raise DataError(f"no image can be read in the first {PROBED} rows of {self.spec} that have a caption")
        return sizes.most_common(1)[0][0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


class HeldOut(Source):
    """The first `most` held-out rows of a stream, in memory, as a source, with the stream's buckets or own sizes."""

    def __init__(self, stream: StreamSource, fraction: float, most: int) -> None:
        looked = int(2 * most / fraction) if fraction else 0  # rows that are read in search of them
        rows = itertools.islice(stream.rows(0, None), looked)
        self.rows = list(itertools.islice((row for row in rows if place_of_key(row.key) < fraction), most))
        self.stream, self.image_size, self.skipped = stream, stream.image_size, stream.skipped
        self.keys: Sequence[str] = [row.key for row in self.rows]
        self.layout = Layout((self.image_size,))
        if stream.options.buckets and self.rows:
            found, bucket = np.unique([stream.size_of(row) for row in self.rows], axis=0, return_inverse=True)
            self.layout = Layout(tuple((int(h), int(w)) for h, w in found), bucket.ravel(), mixed=stream.layout.mixed)

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, i: int) -> str:
        return self.rows[i].captions[0]

    def __getitem__(self, i: int) -> Sample:
        row, size = self.rows[i], self.layout.sizes[self.layout.bucket_of(i)]
        return read_sample(row.key, row.captions, row.shares, row.image, size, self.stream.options, None)


def epoch_from(stream: StreamSource, held_out: float, seed: int, epoch: int, start: int) -> Generator[Row, None, int]:
    """The shuffled training rows of an epoch, from number `start` on; returns how many the whole epoch has."""
    count = 0
    rows = (row for row in stream.rows(epoch, seed) if place_of_key(row.key) >= held_out)
    for block in itertools.count():
        some = list(itertools.islice(rows, stream.buffer))
        if start < len(some):
            order = np.random.default_rng([seed, epoch, block, 1]).permutation(len(some))
            yield from (some[i] for i in order[start:])
        count, start = count + len(some), max(0, start - len(some))
        if len(some) < stream.buffer:
            break
    if not count:
        raise DataError(f"no samples to train on in {stream.spec}: all are held out, left out or without a caption")
    stream.note_epoch_rows(held_out, count)
    return count


def shuffled(stream: StreamSource, held_out: float, seed: int, start: int = 0) -> Iterator[Row]:
    """The shuffled training rows of all epochs, without end, from position `start` on."""
    known = stream.epoch_rows(held_out)
    epoch, start = divmod(start, known) if known else (0, start)
    while True:
        count = yield from epoch_from(stream, held_out, seed, epoch, start)
        passed, start = divmod(max(0, start - count), count)
        epoch += 1 + passed


def stream_loader(
    stream: StreamSource,
    held_out: float,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Generator[ImageBatch, None, None]:
    """As `loader`, for a stream: batch number `step` has the rows at positions step * B ... step * B + B - 1; with
    buckets that are not mixed, it is that of `bucketfuls`.

    A bad sample is replaced by the next good one of the batch, in whichever process; a batch without a good sample, by
    the next batch that has one. Raises `DataError` while iterating where the stream breaks, or after `BAD_BATCHES` in a
    row without a good sample.
    """
    in_buckets = stream.options.buckets and not stream.layout.mixed
    batches = (_in_buckets if in_buckets else _in_order)(stream, held_out, batch_size, seed, start_step)
    mine = tuple(share.rows(batch_size))

    def asked() -> Iterator[_Asked]:
        for step, batch in enumerate(batches, start=start_step):
            yield _Asked(step, mine, batch)

    make = partial(_decoded, stream.options, seed)
    return _standing_in(run(make, ahead(asked(), AHEAD), num_workers))


def _in_order(stream: StreamSource, held_out: float, batch_size: int, seed: int, start_step: int) -> Iterator[_Batch]:
    rows = shuffled(stream, held_out, seed, start_step * batch_size)
    while True:
        yield [(stream.size_of(row), row) for row in itertools.islice(rows, batch_size)]


def _in_buckets(stream: StreamSource, held_out: float, batch_size: int, seed: int, start_step: int) -> Iterator[_Batch]:
    epoch, known = partial(epoch_from, stream, held_out, seed), stream.epoch_rows(held_out)
    for size, rows in bucketfuls(epoch, stream.size_of, batch_size, seed, start_step, known):
        yield [(size, row) for row in rows]


def _standing_in(batches: Generator[ImageBatch | _Bad, None, None]) -> Generator[ImageBatch, None, None]:
    """The batches, each bad one replaced by the next good one, so that their numbers stay the same."""
    bad: list[_Bad] = []
    try:
        for batch in batches:
            if isinstance(batch, ImageBatch):
                skipped = [row for one in bad for row in one.skipped]
                yield replace(batch, skipped=skipped + batch.skipped)
                yield from itertools.repeat(replace(batch, skipped=[]), len(bad))
                bad = []
                continue
            bad.append(batch)
            if len(bad) == BAD_BATCHES:
                raise DataError(f"none of the samples of {len(bad)} batches in a row can be used; {batch.example}")
    finally:
        batches.close()


class _Bad(NamedTuple):
    """A batch without a good sample: this process's bad ones, and an example for the error message."""

    skipped: list[tuple[str, str]]
    example: str


@dataclass(frozen=True)
class _Asked:
    """What a worker decodes: the rows `mine` of batch number `step`. It gets the whole batch, to replace bad rows."""

    step: int
    mine: tuple[int, ...]
    batch: _Batch


def _decoded(options: SourceOptions, seed: int, asked: _Asked) -> ImageBatch | _Bad:
    @cache
    def sample(number: int) -> Sample:
        size, row = asked.batch[number]
        rng = partial(rng_for, seed, asked.step, number)
        return read_sample(row.key, row.captions, row.shares, row.image, size, options, rng)

    def good(first: int) -> Sample | None:
        places = (*range(first, len(asked.batch)), *range(first))
        return next((sample(number) for number in places if sample(number).error is None), None)

    numbered = [(-1, found) for number in asked.mine if (found := good(number)) is not None]
    skipped = [(bad.key, bad.error) for bad in map(sample, asked.mine) if bad.error is not None]
    if not numbered:
        said = f"none of its {len(asked.batch)} samples can be used, the next batch stands in for it"
        bad = sample(0)
        return _Bad([*skipped, (f"the batch of step {asked.step + 1}", said)], f"one of them is {bad.key}: {bad.error}")
    if options.mixes:
        return make_row(numbered, skipped)
    return make_batch(asked.batch[0][0], len(numbered), numbered, skipped)
