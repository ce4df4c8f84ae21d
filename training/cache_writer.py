"""Writing a cache (`training/cache.py`), in worker processes and in parts; it can be stopped and resumed at any moment.

    source -> [worker processes: read, fit, digest] -> [autoencoder, text encoders] -> chunks -> shards

A chunk is `BATCH` samples, kept as a small shard in a hidden folder of the shard that it will be part of, so that a
kill loses at most one chunk's work. A shard depends on the data alone: it has the same bytes whatever the number of
parts, workers and restarts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdit.autoencoder import open_autoencoder
from mmdit.features import Features
from mmdit.memory import keeping_memory
from mmdit.text_encoders import open_text_encoder
from training.cache import (
    DTYPES,
    FIT,
    OPTIONS,
    About,
    Cache,
    Known,
    Shard,
    as_tensors,
    is_there,
    merged,
    shard_name,
    write_shard,
)
from training.cache_files import CacheError, is_cache
from training.cache_samples import CachedSample, content_of
from training.cached import CachedKeys
from training.config import DataConfig, TrainConfig, TrainingConfig
from training.data import Source, is_shapes
from training.devices import pick_device
from training.feed import statistics_of
from training.image_batches import by_shape
from training.interrupts import Interrupts
from training.own import is_own
from training.own_data import captions_at, sample_at
from training.progress import Progress
from training.remote import is_url, read_each
from training.setup import fingerprint, open_run_source, smallest_bucket, tell_flaws
from training.stream import STREAM
from training.workers import run

BATCH = 64  # samples in a chunk
NAMED = 10  # most bad samples that are named


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is written."""

    dtype: str = "fp16"
    """Type of the latents: "fp16", "bf16" or "fp32"."""
    text_dtype: str = "fp16"
    """Type of the text features."""
    shard_mb: float = 256
    """Largest size of a shard, in 10^6 bytes; a shard has at least one chunk."""
    part: tuple[int, int] = (0, 1)
    """(i, n): write only every n-th shard from the i-th on; other processes write the others."""

    def __post_init__(self) -> None:
        for name in ("dtype", "text_dtype"):
            if getattr(self, name) not in DTYPES:
                raise CacheError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(DTYPES)}")
        i, n = self.part
        if not 0 <= i < n:
            raise CacheError(f"the part is {i}/{n}, expected 0/{max(n, 1)} to {max(n, 1) - 1}/{max(n, 1)}")
        if not self.shard_mb > 0:
            raise CacheError(f"shard_mb is {self.shard_mb:g}, expected a number above 0")


class Written(NamedTuple):
    """What a call wrote: number of samples, bad ones among them, seconds; the number of shards that are still missing,
    of this part and of all; and of all shards of the cache.
    """

    samples: int
    bad: int
    seconds: float
    missing_here: int
    missing: int
    shards: int


def write_cache(
    config: TrainConfig, folder: str | Path, options: CacheOptions | None = None, log: Callable[[str], None] = print
) -> Written:
    """Write the cache of a config's data, autoencoder and frozen text encoder, or what a folder still lacks of it.

    On an interrupt (Ctrl-C, SIGTERM) it completes the current chunk and returns. Raises CacheError where the folder
    holds something else, or a cache of other data, encoders or options, or another process writes the same part.
    """
    if is_url(str(folder)):
        raise CacheError(f"{folder}: a cache is written to a disk; copy it to the server once it is whole")
    with Interrupts() as interrupts:
        writer = _Writer(config, Path(folder), options or CacheOptions(), log)
        try:
            return writer.run(interrupts)
        except FileNotFoundError as error:
            if not (error.filename and Path(error.filename).is_relative_to(folder)):
                raise
            raise CacheError(
                f"files in {folder} went while they were written: does another `mmdit cache` write the same part? "
                "All is kept; go on with the same command, once"
            ) from error


class _Writer:
    """The state of one `write_cache` call."""

    def __init__(self, config: TrainConfig, folder: Path, options: CacheOptions, log: Callable[[str], None]) -> None:
        if folder.exists() and not is_cache(folder) and (not folder.is_dir() or _others(folder)):
            raise CacheError(f"{folder} exists and is no cache: name a new folder with --out")
        self.folder, self.options, self.log, self.bad, self.named = folder, options, log, 0, 0
        self.workers, self.device = config.data.num_workers, pick_device(config.training.device)
        self.autoencoder = open_autoencoder(config.autoencoder).to(self.device)
        self.source = _source(config, self.autoencoder.factor)
        tell_flaws(self.source, log, self._skipped)
        self.text = None
        if config.text.encoder != "learned":
            self.text = open_text_encoder(config.text.encoder, config.text.max_length).to(self.device)
        self.empty = self._empty()
        self.about = self._about(config)

    def _empty(self) -> Known:
        """The text features of the empty caption, without an image."""
        text = self._texts([""]) if self.text is not None else []
        empty = Known(torch.empty(0, 0, 0, dtype=DTYPES[self.options.dtype]), text)
        _check_finite("the empty caption", empty, self.options)
        return empty

    def _about(self, config: TrainConfig) -> About:
        height, width = self.source.image_size
        latent = statistics_of(self.autoencoder, torch.zeros(1, 3, height, width, dtype=torch.uint8), self.device)
        size = latent.numel() * DTYPES[self.options.dtype].itemsize
        size += sum(x.numel() * x.element_size() for pair in (self.empty.text or [[]])[0] for x in pair)
        if self.text is not None:  # as large as they can be
            per_token = DTYPES[self.options.text_dtype].itemsize
            size += sum(length * width * per_token for length, width, _ in self.text.shape.present)
        about = About(
            autoencoder=self.autoencoder.fingerprint(),
            autoencoder_name=config.autoencoder,
            text=None if self.text is None else self.text.about(),
            text_shape=None if self.text is None else self.text.shape,
            size=(height, width),
            sizes=self.source.layout.sizes,
            fit=FIT,
            options={name: getattr(config.data, name) for name in OPTIONS},
            weights=self.source.layout.weights,
            dtype=self.options.dtype,
            text_dtype=self.options.text_dtype,
            source=config.data.source,
            step=self.autoencoder.factor * config.model.patch_size,
            min_bucket=smallest_bucket(config),
            num_samples=config.data.num_samples,
            seed=config.seed if is_shapes(config.data.source) else None,
            samples=len(self.source),
            keys=fingerprint(self.source),
            shard_samples=BATCH * max(1, int(self.options.shard_mb * 1e6 / size) // BATCH),
        )
        if is_cache(self.folder):
            old = About.read(self.folder)
            if other := old.differences(about):
                raise CacheError(f"{self.folder} was made with another {', '.join(other)}: name another folder")
            return old
        return about

    # --- the chunks that are missing ---

    def run(self, interrupts: Interrupts) -> Written:
        """Write all shards of the part that are missing."""
        if not is_cache(self.folder):
            self.about.write(self.folder)
        if self.text is not None and not (self.folder / "empty.json").is_file():
            write_shard(self.folder / "empty", [CachedSample("", "", [""])], as_tensors([self.empty], self.empty))
        i, n = self.options.part
        shards = range(i, self.about.num_shards, n)
        jobs = [job for shard in shards for job in self._jobs(shard)]
        total, left = sum(len(self.about.places(k)) for k in shards), sum(len(job.places) for job in jobs)
        start, done = time.perf_counter(), 0
        read_job: Any = partial(_read, self.source)
        reads: Any = run(read_job, [job.places for job in jobs], self.workers)
        shown = Progress("caching", total, total - left)
        with interrupts.deferred(), keeping_memory(self.device), shown as progress, closing(reads):
            for job, read in zip(jobs, reads, strict=True):
                known = self._known(read)
                write_shard(self._chunk(job.shard, job.chunk), read.samples, as_tensors(known, self.empty))
                self._merge(job.shard)
                done += len(job.places)
                progress.show(total - left + done)
                if interrupts.caught:
                    break
        missing = [k for k in range(self.about.num_shards) if not is_there(self.folder, k)]
        for rest in self.folder.glob(".*.part") if not missing else ():
            rest.unlink(missing_ok=True)
        here = [k for k in missing if k in shards]
        counts = (len(here), len(missing), self.about.num_shards)
        return Written(done, self.bad, time.perf_counter() - start, *counts)

    def _jobs(self, shard: int) -> list[_Job]:
        """The chunks that a shard lacks; removes half-written files of an earlier call."""
        for rest in self.folder.glob(f".{shard_name(shard)}.*.part"):
            rest.unlink()
        if is_there(self.folder, shard):
            shutil.rmtree(self._chunk(shard, 0).parent, ignore_errors=True)
            return []
        jobs = [_Job(shard, c, places) for c, places in enumerate(self._chunks(shard))]
        lacking = [job for job in jobs if not _is_whole(self._chunk(shard, job.chunk))]
        if not lacking:
            self._merge(shard)
        return lacking

    def _chunks(self, shard: int) -> list[range]:
        places = self.about.places(shard)
        return [places[first : first + BATCH] for first in range(0, len(places), BATCH)]

    def _chunk(self, shard: int, chunk: int) -> Path:
        return self.folder / f".{shard_name(shard)}" / f"{chunk:05d}"

    def _merge(self, shard: int) -> None:
        """Join the chunks of a shard into it, if all are there."""
        stems = [self._chunk(shard, c) for c in range(len(self._chunks(shard)))]
        if all(stem.with_name(stem.name + ".json").is_file() for stem in stems):
            write_shard(self.folder / shard_name(shard), *merged([Shard(stem) for stem in stems]))
            shutil.rmtree(stems[0].parent)

    # --- encoding ---

    def _known(self, read: _Read) -> list[Known]:
        """The statistics and text features of the good samples of a chunk, in order."""
        good = [sample for sample in read.samples if sample.error is None]
        for sample in read.samples:
            if sample.error is not None:
                self.bad += 1
                self._skipped(sample.key, sample.error)
        statistics: dict[int, Tensor] = {}
        for rows, images in read.images:
            found = statistics_of(self.autoencoder, images, self.device, self.source.layout.mixed)
            found = found.to(DTYPES[self.options.dtype]).cpu()
            statistics |= dict(zip(rows, found, strict=True))
        texts = iter(self._texts([caption for sample in good for caption in sample.captions]) if self.text else [])
        known = [
            Known(statistics[row], [next(texts) for _ in sample.captions] if self.text else [])
            for row, sample in enumerate(good)
        ]
        for sample, one in zip(good, known, strict=True):
            _check_finite(sample.key, one, self.options)
        return known

    def _texts(self, captions: Sequence[str]) -> list[list[tuple[Tensor, Tensor]]]:
        """For each caption and each encoder, the states of its real tokens and the pooled vector."""
        assert self.text is not None
        if not captions:
            return []
        features: Features = self.text.features(self.text.tokenize(captions).to(self.device))
        out: list[list[tuple[Tensor, Tensor]]] = [[] for _ in captions]
        for states, pooled, mask in features:
            states, pooled = (x.to(DTYPES[self.options.text_dtype]).cpu() for x in (states, pooled))
            lengths = [states.shape[1]] * len(captions) if mask is None else mask.sum(1).tolist()
            assert mask is None or all(bool(row[:n].all()) for row, n in zip(mask, lengths, strict=True))
            for pairs, row, n, vector in zip(out, states, lengths, pooled, strict=True):
                pairs.append((row[:n], vector))
        return out

    def _skipped(self, key: str, reason: str) -> None:
        self.named += 1
        if self.named <= NAMED:
            self.log(f"skipped: {key}: {reason}" + " (no more are named)" * (self.named == NAMED))


class _Job(NamedTuple):
    """A chunk to be written, and the numbers of its samples."""

    shard: int
    chunk: int
    places: range


class _Read(NamedTuple):
    """The samples of a chunk, and for each image size ([place among the good samples], images uint8 (B, 3, h, w))."""

    samples: list[CachedSample]
    images: list[tuple[list[int], Tensor]]


def _read(source: Source, places: range) -> _Read:
    """What a worker does: read and fit the images of a chunk, and compute their digests."""
    found = list(read_each(partial(_one, source), places, source.is_remote))
    images = by_shape([torch.from_numpy(np.array(image)) for _, image in found if image is not None])
    return _Read([sample for sample, _ in found], [(rows, x.permute(0, 3, 1, 2).contiguous()) for rows, x in images])


def _others(folder: Path) -> list[Path]:
    """The files in a folder, except what a killed `write_cache` leaves before cache.json is there."""
    return [path for path in folder.iterdir() if not (path.name.startswith(".cache.json.") and path.suffix == ".part")]


def _one(source: Source, i: int) -> tuple[CachedSample, np.ndarray | None]:
    """(the sample as the cache names it, its image or None)."""
    one, layout = sample_at(source, i), source.layout
    texts, shares = captions_at(source, i)
    sample = CachedSample(
        key=source.keys[i],
        content="" if one.image is None else content_of(one.image, texts),
        captions=list(texts),
        error=one.error,
        shares=list(shares),
        bucket=layout.bucket_of(i),
        part=0 if layout.part is None else int(layout.part[i]),
        block=-1 if layout.block is None else int(layout.block[i]),
    )
    return sample, one.image


def _is_whole(chunk: Path) -> bool:
    """Whether a chunk exists and is as it was written."""
    try:
        return not Shard(chunk).problems()
    except CacheError:
        return False


def _check_finite(name: str, known: Known, options: CacheOptions) -> None:
    numbers = [(known.statistics, "--dtype"), *((x, "--text-dtype") for one in known.text for p in one for x in p)]
    for x, option in numbers:
        if not bool(x.isfinite().all()):
            dtype = options.dtype if option == "--dtype" else options.text_dtype
            raise CacheError(f"{name}: a number is not finite in {dtype}: use {option} fp32")


def _source(config: TrainConfig, factor: int) -> Source:
    """The config's data. Raises CacheError for what cannot be cached."""
    data = config.data
    if is_cache(data.source):
        raise CacheError(f"{data.source} is a cache already, which has no images")
    if data.source.startswith(STREAM):
        raise CacheError(f"{data.source} is a stream, whose samples have no numbers: cache hf:NAME, or files")
    if data.crop != "center" or data.flip:
        raise CacheError('a cache has one crop of each image: set data.crop="center" and data.flip=false')
    source = open_run_source(config, factor * config.model.patch_size)
    assert isinstance(source, Source)
    if is_own(data.source) and type(source).draw is not Source.draw:
        raise CacheError(f"a cache has one picture of each sample, and {data.source} draws them: cache a class without")
    return source


def changed(cache: Cache, config: TrainConfig, progress: Callable[[int], object] = lambda done: None) -> list[str]:
    """One line for each sample whose fitted image or captions in a config's data differ from the cache's.

    progress: called with the number of samples compared. Raises DataError where the data cannot be read, or has other
    keys.
    """
    source = open_run_source(config, cache.about.step)
    if not isinstance(source, Source):
        raise CacheError(f"{config.data.source} is a stream, whose samples have no numbers: name hf:NAME, or files")
    if source.keys != (keys := CachedKeys(cache.samples, np.arange(len(cache.samples)))):
        now, before = list(source.keys), list(keys)
        came, gone = dict.fromkeys(now).keys() - before, dict.fromkeys(before).keys() - now
        named = [f"{len(keys)} {word}, such as {min(keys)}" for word, keys in (("new", came), ("gone", gone)) if keys]
        what = "; ".join(named) or "in another order"
        raise CacheError(f"{config.data.source} has other samples than {cache.spec} was made of: {what}")
    found = []
    for i, known in enumerate(cache.samples):
        if _one(source, i)[0].content != known.content:
            found.append(
                f"{known.key}: picture or caption has changed in {config.data.source} since {cache.spec} was made"
            )
        progress(i + 1)
    return found


def data_of(cache: Cache, source: str) -> TrainConfig:
    """A config that reads `source` as the data of the cache was read."""
    about = cache.about
    data = DataConfig(source=source, image_size=about.size, num_samples=about.num_samples, **about.options)
    training = TrainingConfig(batch_size=about.min_bucket, packing=data.buckets == "own")
    return TrainConfig(seed=about.seed or 0, data=data, training=training)
