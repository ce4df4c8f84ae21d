"""From images to what the objective takes: batches of scaled latents and tokens, number after number.

Two feeds answer the same calls. `ImageFeed` reads and encodes each batch as it comes; `LatentFeed` has encoded every
image once and keeps the latents in memory. `WithText` adds documents of text to either. In all, batch number `step` is
a pure function of (seed, step).

Shape letters: B batch, C channels, h w latent sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.autoencoder import Autoencoder
from mmdit.features import KnownText
from mmdit.sd3_text import SD3Text
from mmdit.text import LearnedText
from mmdit.text_and_images import Words
from mmdit.text_encoders import TextEncoder
from training.corpus import Pieces
from training.data import DataError, Source, loader, one_pass
from training.loader import Order
from training.objectives import Batch
from training.seeds import generator_for

ENCODE_BATCH = 64  # images encoded at a time when latents are cached
CPU_BLOCK = 8  # and of these, at a time on a CPU
POSTERIOR = (0, 1)  # counters of the draws from an autoencoder's posterior, after (seed, step)
Conditioner = LearnedText | Words | TextEncoder | SD3Text | KnownText
Skipped = Callable[[str, str], None]  # told (key, reason) of every sample that cannot be used


class NothingUsable(DataError):
    """Not one of the samples asked for can be read."""


def to_signed(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def statistics_of(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """What the autoencoder says of uint8 images (B, 3, H, W): (B, S, h, w), on the device.

    On a CPU in blocks of one size, the last one filled up: sums are taken in one order then, and an image's numbers do
    not depend on how many come with it.
    """
    if device.type != "cpu":
        return autoencoder.statistics(to_signed(images.to(device)))
    filled = torch.cat([images, images[-1:].expand(-len(images) % CPU_BLOCK, -1, -1, -1)])
    return torch.cat([autoencoder.statistics(to_signed(part)) for part in filled.split(CPU_BLOCK)])[: len(images)]


def drawn(sampled: bool, seed: int, step: int) -> torch.Generator | None:
    """What a batch's latents are drawn with: a function of (seed, step); None for the mode."""
    return generator_for(seed, step, *POSTERIOR) if sampled else None


class ImageFeed:
    """Images are read, by worker processes if there are any, and encoded when their batch comes."""

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        autoencoder: Autoencoder,
        text: Conditioner,
        device: torch.device,
        num_workers: int,
        skipped: Skipped,
        sampled: bool = False,
    ) -> None:
        self.source, self.indices, self.autoencoder, self.text = source, indices, autoencoder, text
        self.device, self.num_workers, self.skipped = device, num_workers, skipped
        self.sampled = sampled

    @torch.no_grad()
    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on."""
        reader = loader(self.source, self.indices, batch_size, seed, start_step, self.num_workers)
        try:
            for step, batch in enumerate(reader, start=start_step):
                for key, reason in batch.skipped:
                    self.skipped(key, reason)
                statistics = statistics_of(self.autoencoder, batch.images, self.device)
                latents = self.autoencoder.latents_of(statistics, drawn(self.sampled, seed, step))
                yield Batch(latents, self.text.tokenize(batch.captions).to(self.device))
        finally:
            reader.close()  # type: ignore[attr-defined]


class LatentFeed:
    """Every image is read and encoded once, now; its latent (float32) stays in memory, or where latents are sampled
    what they are drawn from.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        autoencoder: Autoencoder,
        text: Conditioner,
        device: torch.device,
        num_workers: int,
        skipped: Skipped,
        progress: Callable[[int, int], None] = lambda done, total: None,
        sampled: bool = False,
    ) -> None:
        self.device, self.autoencoder, self.sampled = device, autoencoder, sampled
        self.captions: list[str] = []
        parts, reasons = [], []
        done = 0
        for batch in one_pass(source, indices, ENCODE_BATCH, num_workers):
            reasons += batch.skipped[:1]
            for key, reason in batch.skipped:
                skipped(key, reason)
            if len(batch.captions):
                statistics = statistics_of(autoencoder, batch.images, device)
                parts.append((statistics if sampled else autoencoder.latents_of(statistics)).cpu())
                self.captions += batch.captions
            done += len(batch.captions) + len(batch.skipped)
            progress(done, len(indices))
        if not parts:
            first = f"; one of them is {': '.join(reasons[0])}" if reasons else ""
            raise NothingUsable(f"none of the {len(indices)} samples can be used{first}")
        self.latents = torch.cat(parts)
        self.tokens = text.tokenize(self.captions)

    def __len__(self) -> int:
        return len(self.captions)

    def at(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """The samples at some rows as a batch; where latents are sampled they are drawn with the generator, if any."""
        index = torch.tensor(rows)
        latents = self.latents[index]
        if self.sampled:
            latents = self.autoencoder.latents_of(latents.to(self.device), generator)
        return Batch(latents, type(self.tokens)(*(part[index] for part in self.tokens))).to(self.device)

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on."""
        order = Order(len(self), seed)
        for step in itertools.count(start_step):
            rows = [order[position] for position in range(step * batch_size, (step + 1) * batch_size)]
            yield self.at(rows, drawn(self.sampled, seed, step))


class WithText:
    """A feed of pictures in which `num_documents` of each batch are text alone."""

    def __init__(self, feed: Any, text: Pieces, num_documents: int) -> None:
        """feed: any of pictures alone."""
        self.feed, self.text, self.num_documents = feed, text, num_documents

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on; batch_size counts pictures and documents."""
        pictures = self.feed.batches(batch_size - self.num_documents, seed, start_step)
        try:
            for batch, text in zip(pictures, self.text.batches(self.num_documents, seed, start_step), strict=True):
                yield batch._replace(text=text)
        finally:
            pictures.close()
