"""From images to what the objective takes: batches of scaled latents and tokens, number after number.

Two feeds answer the same calls. `ImageFeed` reads and encodes each batch as it comes; `LatentFeed` has encoded every
image once and keeps the latents in memory. `WithText` adds documents of text to either. In all, batch number `step` is
a pure function of (seed, step).

Shape letters: B batch, C channels, h w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmdit.autoencoder import Autoencoder
from mmdit.sd3_text import SD3Text
from mmdit.text import LearnedText
from mmdit.text_and_images import Words
from mmdit.text_encoders import TextEncoder
from training.corpus import Pieces
from training.data import DataError, Source, loader, one_pass
from training.order import Order
from training.objectives import Batch

ENCODE_BATCH = 64  # images encoded at a time when latents are cached
Conditioner = LearnedText | Words | TextEncoder | SD3Text
Skipped = Callable[[str, str], None]  # told (key, reason) of every sample that cannot be used


class NothingUsable(DataError):
    """Not one of the samples asked for can be read."""


def to_signed(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float in [-1, 1]."""
    return images.float() / 127.5 - 1


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
    ) -> None:
        self.source, self.indices, self.autoencoder, self.text = source, indices, autoencoder, text
        self.device, self.num_workers, self.skipped = device, num_workers, skipped

    @torch.no_grad()
    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on."""
        reader = loader(self.source, self.indices, batch_size, seed, start_step, self.num_workers)
        try:
            for batch in reader:
                for key, reason in batch.skipped:
                    self.skipped(key, reason)
                latents = self.autoencoder.encode(to_signed(batch.images.to(self.device)))
                yield Batch(latents, self.text.tokenize(batch.captions).to(self.device))
        finally:
            reader.close()  # type: ignore[attr-defined]


class LatentFeed:
    """Every image is read and encoded once, now; its latent (float32) stays in memory."""

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
    ) -> None:
        self.device = device
        self.captions: list[str] = []
        parts, reasons = [], []
        done = 0
        for batch in one_pass(source, indices, ENCODE_BATCH, num_workers):
            reasons += batch.skipped[:1]
            for key, reason in batch.skipped:
                skipped(key, reason)
            if len(batch.captions):
                with torch.no_grad():
                    parts.append(autoencoder.encode(to_signed(batch.images.to(device))).cpu())
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

    def at(self, rows: Sequence[int]) -> Batch:
        """The samples at some rows as a batch."""
        index = torch.tensor(rows)
        return Batch(self.latents[index], type(self.tokens)(*(part[index] for part in self.tokens))).to(self.device)

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on."""
        order, first = Order(len(self), seed), start_step * batch_size
        while True:
            yield self.at([order[position] for position in range(first, first + batch_size)])
            first += batch_size


class WithText:
    """A feed of pictures in which `num_documents` of each batch are text alone."""

    def __init__(self, feed: ImageFeed | LatentFeed, text: Pieces, num_documents: int) -> None:
        self.feed, self.text, self.num_documents = feed, text, num_documents

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on; batch_size counts pictures and documents."""
        pictures = self.feed.batches(batch_size - self.num_documents, seed, start_step)
        try:
            for batch, text in zip(pictures, self.text.batches(self.num_documents, seed, start_step), strict=True):
                yield batch._replace(text=text)
        finally:
            pictures.close()  # type: ignore[attr-defined]
