"""Training from a cache: a source of samples whose images are not opened, and the feed of what is known of them.

Shape letters: B batch, C channels, h w latent sides, L text tokens, D width of a text state.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.autoencoder import Autoencoder
from mmdit.features import Encoded, Features, KnownText, TextShape
from mmdit.text_encoders import fingerprint, load_encoder, open_text_encoder
from mmdit.weights_io import read_json
from training.cache import Cache, CacheError, Known, same_text
from training.data import Sample, Source
from training.feed import Conditioner, LatentFeed, NothingUsable, Skipped, drawn
from training.images import Size, fit_size
from training.loader import Order
from training.objectives import Batch

AHEAD = 2  # batches read before they are asked for


class CachedSource:
    """The samples of a cache, in the order of the data that it was made of; it has no images."""

    def __init__(
        self, folder: str | Path, image_size: Size | None = None, step: int = 1, num_samples: int | None = None
    ) -> None:
        """Raises CacheError where the cache is not whole, or of images of another size than is asked for."""
        self.cache = Cache(folder)
        self.image_size = self.cache.about.size
        height, width = self.image_size
        if image_size is not None and fit_size(*image_size, step) != self.image_size:
            raise CacheError(f"{folder} has images of {height} x {width}: leave out data.image_size, or make another")
        if height % step or width % step:
            raise CacheError(f"{folder} has images of {height} x {width}, the model needs multiples of {step}")
        self.samples = self.cache.samples[:num_samples]
        self.keys = [sample.key for sample in self.samples]
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def caption(self, i: int) -> str:
        """The caption; "" where it is missing."""
        return self.samples[i].captions[0]

    def __getitem__(self, i: int) -> Sample:
        """Raises CacheError: there are no images."""
        raise CacheError(f"{self.cache.folder} is a cache of latents, not of images: name the images instead")

    def check(self, autoencoder: Autoencoder) -> None:
        """Raises CacheError for another autoencoder than the cache was made with."""
        if autoencoder.fingerprint() != self.cache.about.autoencoder:
            raise CacheError(
                f"{self.cache.folder} was made with another autoencoder: name that one, or make another cache"
            )

    def text(self, encoder: str, max_length: int, written: Path | None) -> KnownText:
        """The conditioner of the frozen encoders in a folder, or of those that a run has `written` about.

        Their weights are not read, but for their digest. Raises CacheError for others than the cache was made with.
        """
        known, shape = self.cache.about.text, self.cache.about.text_shape
        if known is None or shape is None or self.cache.empty is None:
            raise CacheError(f"{self.cache.folder} has no text features: make a cache with text.encoder={encoder}")
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
            raise CacheError(f"{self.cache.folder} was made with another text encoder: it differs in {what}")
        empty = features([self.cache.empty.read(0).text[0]], shape)
        return KnownText(about, shape, empty, open_it)


def features(captions: Sequence[Sequence[tuple[Tensor, Tensor]]], shape: TextShape) -> Features:
    """The features of captions that are known, padded with zeros to the encoders' length.

    An encoder by itself says which tokens are real; to the three of SD3 padding is text.
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
    """What is known of samples, read where it lies: nothing is encoded, and little stays in memory.

    With `KnownText` a batch has the features of its captions, with any other conditioner their tokens.
    """

    def __init__(
        self,
        source: CachedSource,
        indices: np.ndarray,
        autoencoder: Autoencoder,
        text: Conditioner,
        device: torch.device,
        skipped: Skipped,
        sampled: bool = False,
    ) -> None:
        """Raises CacheError for another autoencoder, NothingUsable where all samples are bad."""
        source.check(autoencoder)
        self.source, self.autoencoder, self.conditioner = source, autoencoder, text
        self.device, self.sampled = device, sampled
        bad = [source.samples[i] for i in indices if source.samples[i].error is not None]
        for sample in bad:
            skipped(sample.key, str(sample.error))
        self.rows = [int(i) for i in indices if source.samples[i].error is None]
        if not self.rows:
            first = f"; one of them is {bad[0].key}: {bad[0].error}" if bad else ""
            raise NothingUsable(f"none of the {len(indices)} samples can be used{first}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def captions(self) -> list[str]:
        """Of all samples."""
        return [self.source.caption(i) for i in self.rows]

    def at(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """The samples at some rows as a batch; where latents are sampled they are drawn with the generator, if any."""
        return self._batch(self._read(rows), generator)

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on, the next ones read meanwhile."""
        order, pending = Order(len(self), seed), deque[Future]()
        with ThreadPoolExecutor(1) as reader:
            for step in itertools.count(start_step):
                while len(pending) <= AHEAD:
                    first = (step + len(pending)) * batch_size
                    rows = [order[position] for position in range(first, first + batch_size)]
                    pending.append(reader.submit(self._read, rows))
                yield self._batch(pending.popleft().result(), drawn(self.sampled, seed, step))

    def _read(self, rows: Sequence[int]) -> tuple[Tensor, Any]:
        """Statistics (B, S, h, w) and text, as they lie in the cache."""
        indices = [self.rows[row] for row in rows]
        known: list[Known] = [self.source.cache.read(i) for i in indices]
        statistics = torch.stack([one.statistics for one in known])
        if isinstance(self.conditioner, KnownText):
            return statistics, features([one.text[0] for one in known], self.conditioner.shape)
        return statistics, self.conditioner.tokenize([self.source.caption(i) for i in indices])

    def _batch(self, read: tuple[Tensor, Any], generator: torch.Generator | None) -> Batch:
        statistics, text = read
        generator = generator if self.sampled else None
        latents = self.autoencoder.latents_of(statistics.to(self.device).float(), generator)
        return Batch(latents, text.to(self.device))


def latent_feed(
    source: Source,
    indices: np.ndarray,
    autoencoder: Autoencoder,
    text: Conditioner,
    device: torch.device,
    num_workers: int,
    skipped: Skipped,
    **options: Any,
) -> LatentFeed | CachedFeed:
    """A feed whose samples can be asked for by row: from the cache, or else encoded now."""
    if isinstance(source, CachedSource):
        return CachedFeed(source, indices, autoencoder, text, device, skipped)
    return LatentFeed(source, indices, autoencoder, text, device, num_workers, skipped, **options)
