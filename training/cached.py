"""Training from a cache: a source whose images need not be opened, and a feed of their latents and text features.

Shape letters: B batch, C channels, h w latent sides, L text tokens, D width of a text state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import compress, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.autoencoder import Autoencoder
from mmdit.features import Encoded, Features, KnownText, TextShape
from mmdit.text_encoders import fingerprint, load_encoder, open_text_encoder
from mmdit.weights_io import read_json
from training.ahead import ahead
from training.cache import Cache, Known, same_text
from training.cache_files import CacheError
from training.cache_samples import AllSamples, CachedSample
from training.captions import Captions, choose
from training.config import DataConfig
from training.data import TEXTS, Sample, Source
from training.feed import Encoding, LatentFeed, NothingUsable, RowFeed, latent_generators, latents_from
from training.image_batches import rng_for
from training.images import Size, fit_size
from training.objectives import Batch
from training.order import Layout, Plan
from training.remote import PATIENT, Patience, read_each
from training.share import WHOLE, Share
from training.table import Lazy

AHEAD = 2  # batches that are read ahead
READS = 64  # samples that are read from a server at the same time


class CachedSource(Source):
    """The samples of a cache, in the order of the data that it was made from; it has no images."""

    def __init__(
        self,
        spec: str | Path,
        image_size: Size | None = None,
        step: int = 1,
        num_samples: int | None = None,
        mixed: bool = False,
        patience: Patience = PATIENT,
    ) -> None:
        """mixed: whether a batch may hold several sizes. Raises CacheError where the cache is not whole, or its images
        have other sizes than the model needs or the config asks for.
        """
        self.cache = Cache(spec, patience)
        about = self.cache.about
        self.image_size = about.size
        if wrong := [size for size in about.sizes if size[0] % step or size[1] % step]:
            size = " x ".join(map(str, wrong[0]))
            raise CacheError(
                f"{spec} has images of {size}, the model needs multiples of {step}: it was made for {about.step}"
                + (f', with autoencoder = "{about.autoencoder_name}"' if about.autoencoder_name else "")
            )
        if image_size is not None and fit_size(*image_size, step) != self.image_size:
            size = " x ".join(map(str, self.image_size))
            raise CacheError(f"{spec} has images of {size}: leave out data.image_size, or make another cache")
        if about.options["buckets"] == "own" and not mixed:
            raise CacheError(f"{spec} has images in sizes of their own: set training.packing=true")
        self.mixed = mixed and bool(about.options["buckets"])
        columns = self.cache.samples.columns()
        self.numbers = _first_of_each(columns["part"], num_samples)  # in the cache
        self.columns = columns[self.numbers]
        self.keys: Sequence[str] = CachedKeys(self.cache.samples, self.numbers)
        self.skipped: list[tuple[str, str]] = []
        self.layout = self._layout()

    def _layout(self) -> Layout:
        """The layout of the data that the cache was made from."""
        about, (bucket, part, block) = self.cache.about, (self.columns[name] for name in ("bucket", "part", "block"))
        return Layout(
            about.sizes,
            bucket if about.options["buckets"] else None,
            part if len(about.weights) > 1 else None,
            about.weights,
            block if block.max(initial=-1) >= 0 else None,
            self.mixed,
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def is_remote(self) -> bool:
        return self.cache.is_remote

    def sample(self, i: int) -> CachedSample:
        """What the cache lists of sample i."""
        return self.cache.samples[int(self.numbers[i])]

    def read(self, i: int) -> Known:
        """The latents and text features of sample i. Raises CacheError where they have changed."""
        return self.cache.read(int(self.numbers[i]))

    def caption(self, i: int) -> str:
        captions = self.sample(i).captions
        return captions[0] if captions else ""

    def captions(self, i: int) -> Captions:
        sample = self.sample(i)
        return tuple(sample.captions), tuple(sample.shares)

    def some_captions(self) -> Iterator[str]:
        taken = compress(self.cache.samples, _taken(self.numbers))
        for sample in islice(taken, 0, None, -(-len(self) // TEXTS)):
            yield from sample.captions

    def check_data(self, data: DataConfig) -> None:
        """Raises CacheError where a config asks for other samples or captions than the cache has. Settings that are at
        their default ask for nothing.
        """
        if data.crop != "center" or data.flip:
            raise CacheError(f"{self.cache.spec} has one crop of each image: leave out data.crop and data.flip")
        for name, value in self.cache.about.options.items():
            asked = getattr(data, name)
            if asked not in (value, getattr(DataConfig(), name)):
                raise CacheError(f"{self.cache.spec} was made with data.{name} = {value}, not {asked}: leave it out")

    def __getitem__(self, i: int) -> Sample:
        """Raises CacheError: there are no images."""
        raise CacheError(f"{self.cache.spec} is a cache of latents, not of images: name the images instead")

    def check(self, autoencoder: Autoencoder) -> None:
        """Raises CacheError for another autoencoder than the cache was made with."""
        if autoencoder.fingerprint() != self.cache.about.autoencoder:
            raise CacheError(
                f"{self.cache.spec} was made with another {self.cache.about.its_autoencoder}: name that one, or make "
                "another cache"
            )

    def text(self, encoder: str, max_length: int, written: Path | None) -> KnownText:
        """The conditioner that gives the cached features of frozen encoders: of those in a folder, or in a resumed run
        of those that its own folder `written` describes.

        The encoders are not loaded; a digest of their weights is computed. Raises CacheError where the cache was made
        with others.
        """
        known, shape = self.cache.about.text, self.cache.about.text_shape
        if known is None or shape is None or self.cache.empty is None:
            raise CacheError(f"{self.cache.spec} has no text features: make a cache with text.encoder={encoder}")
        if written is not None:
            about, open_it = read_json(written / "config.json"), partial(load_encoder, written)
        else:
            if not Path(encoder).expanduser().is_dir():
                raise CacheError(f"no text encoder in {encoder}: the cache has its features, but prompts need itself")
            folder = Path(encoder).expanduser().resolve()
            about = known | {"encoder": str(folder), "max_length": max_length, "sha256": fingerprint(folder)}
            open_it = partial(open_text_encoder, folder, max_length)
        new = same_text(about) or {}
        if other := [name for name, value in (same_text(known) or {}).items() if new.get(name) != value]:
            what = ", ".join("weights" if name == "sha256" else name for name in other)
            raise CacheError(f"{self.cache.spec} was made with another text encoder: it differs in {what}")
        empty = features([self.cache.empty.read(0).text[0]], shape)
        return KnownText(about, shape, empty, open_it)


class CachedKeys(Lazy[str]):
    """The keys of the samples with some numbers, which ascend."""

    def __init__(self, samples: AllSamples, numbers: np.ndarray) -> None:
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, i: int) -> str:
        return self.samples[int(self.numbers[i])].key

    def __iter__(self) -> Iterator[str]:
        return compress(self.samples.keys(), _taken(self.numbers))


def _taken(numbers: np.ndarray) -> np.ndarray:
    """Whether each of 0, 1, 2, ... is one of the numbers."""
    taken = np.zeros(numbers.max(initial=-1) + 1, dtype=bool)
    taken[numbers] = True
    return taken


def _first_of_each(part: np.ndarray, count: int | None) -> np.ndarray:
    """The numbers of the first `count` samples of each data set, ascending. part (n,): the data set of each."""
    if count is None:
        return np.arange(len(part))
    return np.sort(np.concatenate([np.flatnonzero(part == one)[:count] for one in np.unique(part)]))


def features(captions: Sequence[Sequence[tuple[Tensor, Tensor]]], shape: TextShape) -> Features:
    """The features of captions from the cached (states, pooled) of each encoder, padded with zeros to its length.

    One encoder comes with a mask of its real tokens; SD3's three have none, since SD3 attends to padding too.
    """
    parts = []
    for i, (length, width, _) in enumerate(shape.present):
        states = captions[0][i][0].new_zeros(len(captions), length, width)
        for row, caption in zip(states, captions, strict=True):
            row[: len(caption[i][0])] = caption[i][0]
        real = torch.tensor([[len(caption[i][0])] for caption in captions])
        mask = torch.arange(length) < real if len(shape.encoders) == 1 else None
        parts.append(Encoded(states, torch.stack([caption[i][1] for caption in captions]), mask))
    return Features(parts)


class CachedFeed:
    """Reads latents and text features from the cache: nothing is encoded, and little stays in memory.

    With `KnownText` a batch has the features of its captions, with any other conditioner their tokens.
    """

    def __init__(self, source: CachedSource, indices: np.ndarray, encoding: Encoding) -> None:
        """Raises CacheError for another autoencoder, NothingUsable where all samples are bad."""
        source.check(encoding.autoencoder)
        self.source, self.encoding = source, encoding
        is_good = source.columns["good"][indices]
        bad = [source.sample(i) for i in indices[~is_good].tolist()]
        for sample in bad:
            encoding.skipped(sample.key, str(sample.error))
        self.rows = np.asarray(indices[is_good], dtype=np.int64)
        if source.layout.bucket is not None and not source.mixed:  # bucket after bucket
            self.rows = self.rows[source.layout.bucket[self.rows].argsort(kind="stable")]
        self.layout = source.layout.of(self.rows)
        if not len(self.rows):
            first = f"; one of them is {bad[0].key}: {bad[0].error}" if bad else ""
            raise NothingUsable(f"none of the {len(indices)} samples can be used{first}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_ordered(self) -> int:
        return len(self)

    @property
    def captions(self) -> list[str]:
        """The first caption of each sample."""
        return [self.source.caption(i) for i in self.rows.tolist()]

    def at(self, rows: Sequence[int]) -> Batch:
        """The samples at some rows, of one bucket unless they are mixed, as a batch: with their first captions, and
        where latents are sampled, the mode of these.
        """
        return self._batch(self._read(rows, None), None)

    def batches(self, batch_size: int, seed: int, start_step: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on, of each this share's rows; a thread reads ahead."""
        plan, rows = Plan(len(self), self.layout, batch_size, seed), share.rows(batch_size)

        def reads() -> Iterator[tuple[Tensor | list[Tensor], Any]]:
            for step in count(start_step):
                _, places = plan.places(step, rows)
                draws = [rng_for(seed, step, row).random() for row in rows]
                yield self._read([int(pool[place]) for pool, place in places], draws)

        for step, read in enumerate(ahead(reads(), AHEAD), start=start_step):
            yield self._batch(read, latent_generators(self.encoding.sampled, seed, step, rows))

    def _read(self, rows: Sequence[int], draws: Sequence[float] | None) -> tuple[Tensor | list[Tensor], Any]:
        """(statistics (B, S, h, w), or a list of (S, h, w) where sizes are mixed; features or tokens of captions)."""
        indices = self.rows[list(rows)].tolist()
        known = list(read_each(self.source.read, indices, self.source.is_remote, READS))
        chosen = [0] * len(rows) if draws is None else list(map(self._chosen, indices, draws))
        statistics: Any = [one.statistics for one in known]
        statistics = statistics if self.layout.mixed else torch.stack(statistics)
        conditioner = self.encoding.text
        if isinstance(conditioner, KnownText):
            texts = [one.text[k] for one, k in zip(known, chosen, strict=True)]
            return statistics, features(texts, conditioner.shape)
        captions = [self.source.sample(i).captions[k] for i, k in zip(indices, chosen, strict=True)]
        return statistics, conditioner.tokenize(captions)

    def _chosen(self, i: int, u: float) -> int:
        """The number of the caption of sample i that is drawn, by u in [0, 1)."""
        if self.source.columns["captions"][i] < 2:  # without reading it
            return 0
        texts, shares = self.source.captions(i)
        return choose(len(texts), shares, u)

    def _batch(self, read: tuple[Any, Any], generators: Sequence[torch.Generator] | None) -> Batch:
        (statistics, text), encoding = read, self.encoding
        latents = latents_from(encoding.autoencoder, statistics, generators, encoding.device)
        return Batch(latents, text.to(encoding.device))


def latent_feed(source: Source, indices: np.ndarray, encoding: Encoding) -> RowFeed:
    """A feed whose samples can be asked for by row: read from the cache, or encoded now."""
    if isinstance(source, CachedSource):
        return CachedFeed(source, indices, encoding)
    return LatentFeed(source, indices, encoding)
