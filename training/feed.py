"""From images to what the objective takes: numbered batches of scaled latents and tokens.

`ImageFeed` reads and encodes each batch as it comes; `LatentFeed` encodes every image once and keeps the latents in
memory; `cached.CachedFeed` reads them from a cache. `WithText` adds documents of text to any of them. Batch number
`step` always is a pure function of (seed, step).

Shape letters: B batch, C channels, h w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, groupby, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmdit.autoencoder import Autoencoder
from mmdit.features import KnownText
from mmdit.sd3_text import SD3Text
from mmdit.text import LearnedText
from mmdit.text_and_images import Words
from mmdit.text_encoders import TextEncoder
from training.captions import choose
from training.corpus import Pieces
from training.data import DataError, ImageBatch, Source, loader, one_pass
from training.image_batches import by_shape, rng_for
from training.objectives import Batch
from training.order import Layout, Plan
from training.own_data import captions_at
from training.seeds import generator_for
from training.share import WHOLE, Share
from training.stream import StreamSource, stream_loader

ENCODE_BATCH = 64  # images encoded at a time when latents are cached
CPU_BLOCK = 8  # images that a CPU encodes at a time; 1 where sizes are mixed, since most come once in a batch
Conditioner = LearnedText | Words | TextEncoder | SD3Text | KnownText


@dataclass(frozen=True)
class Encoding:
    """How samples become latents and tokens: the models for it, their device, and the worker processes that read
    images.

    skipped: called with (key, reason) for every sample that cannot be used. sampled: draw latents from the
    autoencoder's posterior, instead of taking its mode.
    """

    autoencoder: Autoencoder
    text: Conditioner
    device: torch.device
    num_workers: int = 0
    skipped: Callable[[str, str], None] = lambda key, reason: None
    sampled: bool = False


class NothingUsable(DataError):
    """Not one of the samples asked for can be read."""


class Feed(Protocol):
    """Batches to train on."""

    def batches(self, batch_size: int, seed: int, start_step: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on, of each the rows of this share."""
        ...

    @property
    def num_ordered(self) -> int:
        """The number of samples in the training order, which depends on it; 0 for a stream."""
        ...


class RowFeed(Feed, Protocol):
    """A feed whose samples can be asked for by row, as validation does."""

    layout: Layout
    """How rows fall into buckets."""

    @property
    def captions(self) -> list[str]:
        """The first caption of each row."""
        ...

    def __len__(self) -> int: ...

    def at(self, rows: Sequence[int]) -> Batch:
        """The samples at some rows, of one bucket unless sizes are mixed, with their first captions and the mode of
        their latents.
        """
        ...


def to_signed(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float in [-1, 1], contiguous."""
    return images.contiguous().float() / 127.5 - 1


@torch.no_grad()
def statistics_of(autoencoder: Autoencoder, images: Tensor, device: torch.device, mixed: bool = False) -> Tensor:
    """`Autoencoder.statistics` (B, S, h, w) of uint8 images (B, 3, H, W), on the device.

    On a CPU, images are encoded in blocks of a fixed length, the last one filled up, because kernels add up in another
    order for another batch size: an image's latent then does not depend on the images around it. mixed: whether batches
    hold several sizes.
    """
    if device.type != "cpu":
        return autoencoder.statistics(to_signed(images.to(device)))
    block = 1 if mixed else CPU_BLOCK
    filled = torch.cat([images, images[-1:].expand(-len(images) % block, -1, -1, -1)])
    return torch.cat([autoencoder.statistics(to_signed(part)) for part in filled.split(block)])[: len(images)]


def latents_from(
    autoencoder: Autoencoder,
    statistics: Tensor | Sequence[Tensor],
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor | list[Tensor]:
    """Scaled latents from statistics (B, S, h, w) or a list of (S, h, w), in the same form. generators: one for each
    image, to sample its latent with; None takes the mode.
    """
    if isinstance(statistics, Tensor):
        return autoencoder.latents_of(statistics.to(device).float(), generators)
    out: list[Tensor] = list(statistics)
    for rows, some in by_shape(statistics):
        own = None if generators is None else [generators[row] for row in rows]
        for row, latent in zip(rows, autoencoder.latents_of(some.to(device).float(), own), strict=True):
            out[row] = latent
    return out


def latent_generators(sampled: bool, seed: int, step: int, rows: Sequence[int]) -> list[torch.Generator] | None:
    """The generators for the latents of some rows of a batch, functions of (seed, step, row); None for the mode."""
    return [generator_for(seed, step, row, 1) for row in rows] if sampled else None


class _Encoded:
    """The images of `read(batch_size, seed, start_step, num_workers, share)`, encoded batch by batch."""

    def __init__(
        self, read: Callable[..., Generator[ImageBatch, None, None]], num_ordered: int, encoding: Encoding
    ) -> None:
        self.read, self.num_ordered, self.encoding = read, num_ordered, encoding

    @torch.no_grad()
    def batches(self, batch_size: int, seed: int, start_step: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on, of each the rows of this share."""
        encoding = self.encoding
        reader = self.read(batch_size, seed, start_step, encoding.num_workers, share)
        try:
            for step, batch in enumerate(reader, start=start_step):
                for key, reason in batch.skipped:
                    encoding.skipped(key, reason)
                generators = latent_generators(encoding.sampled, seed, step, share.rows(batch_size))
                latents = latents_from(encoding.autoencoder, self._statistics(batch), generators, encoding.device)
                yield Batch(latents, encoding.text.tokenize(batch.captions).to(encoding.device))
        finally:
            reader.close()

    def _statistics(self, batch: ImageBatch) -> Tensor | list[Tensor]:
        """The statistics of a batch's images; where they have several sizes, a list."""
        autoencoder, device = self.encoding.autoencoder, self.encoding.device
        if batch.sizes is None:
            return statistics_of(autoencoder, batch.images, device)
        found: dict[int, Tensor] = {}
        for rows, images in batch.by_size():
            found |= zip(rows, statistics_of(autoencoder, images, device, mixed=True), strict=True)
        return [found[row] for row in range(len(found))]


class ImageFeed(_Encoded):
    """Reads images, in worker processes if there are any, and encodes them batch by batch."""

    def __init__(self, source: Source, indices: np.ndarray, encoding: Encoding) -> None:
        super().__init__(partial(loader, source, indices), len(indices), encoding)


class StreamFeed(_Encoded):
    """The rows of a stream that are not held out, read and encoded as they come."""

    def __init__(self, stream: StreamSource, held_out: float, encoding: Encoding) -> None:
        super().__init__(partial(stream_loader, stream, held_out), 0, encoding)


class LatentFeed:
    """Reads and encodes every image once, when it is made, and keeps the latents (float32) in memory, by bucket; where
    latents are sampled, the statistics.

    Rows are in the order of `indices`, or bucket after bucket where buckets are not mixed. Of a sample's captions each
    batch draws one, as `ImageFeed` does; `captions` are the first ones.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        encoding: Encoding,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.encoding, layout = encoding, source.layout
        captions: list[str] = []
        kept: list[int] = []
        reasons: list[tuple[str, str]] = []
        parts: dict[int, list[Tensor]] = {}
        done = 0
        for batch in one_pass(source, indices, ENCODE_BATCH, encoding.num_workers):
            reasons += batch.skipped[:1]
            for key, reason in batch.skipped:
                encoding.skipped(key, reason)
            if len(batch.captions):
                found = statistics_of(encoding.autoencoder, batch.images, encoding.device, layout.mixed)
                found = (found if encoding.sampled else encoding.autoencoder.latents_of(found)).cpu()
                parts.setdefault(layout.bucket_of(batch.indices[0]), []).append(found)
                captions += batch.captions
                kept += batch.indices
            done += len(batch.captions) + len(batch.skipped)
            progress(done, len(indices))
        if not parts:
            first = f"; one of them is {': '.join(reasons[0])}" if reasons else ""
            raise NothingUsable(f"none of the {len(indices)} samples can be used{first}")
        self.latents = {bucket: torch.cat(some) for bucket, some in parts.items()}
        places = np.concatenate([np.arange(len(some)) for some in self.latents.values()])
        order = np.argsort(kept) if layout.mixed else np.arange(len(kept))
        self._places = places[order]  # of each row: its place in the latents of its bucket
        kept = [kept[k] for k in order]
        self.captions = [captions[k] for k in order]
        self.layout = layout.of(np.array(kept))
        self._alternatives = _Alternatives(source, kept, self.captions)
        self.tokens = encoding.text.tokenize(self._alternatives.captions)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def num_ordered(self) -> int:
        return len(self)

    def at(
        self,
        rows: Sequence[int],
        draws: Sequence[float] | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Batch:
        """The samples at some rows as a batch; they are of one bucket, unless buckets are mixed. draws in [0, 1) choose
        among each sample's captions (None: the first); generators sample each latent, where latents are sampled.
        """
        latents: Tensor | list[Tensor]
        places = self._places[list(rows)]
        if self.layout.mixed:
            latents = [self.latents[self.layout.bucket_of(row)][k] for row, k in zip(rows, places, strict=True)]
        else:
            latents = self.latents[self.layout.bucket_of(rows[0])][torch.from_numpy(places)]
        if self.encoding.sampled:
            latents = latents_from(self.encoding.autoencoder, latents, generators, self.encoding.device)
        words = torch.tensor(self._alternatives.at(rows, draws))
        return Batch(latents, type(self.tokens)(*(part[words] for part in self.tokens))).to(self.encoding.device)

    def batches(self, batch_size: int, seed: int, start_step: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on, of each the rows of this share."""
        plan, rows = Plan(len(self), self.layout, batch_size, seed), share.rows(batch_size)
        for step in count(start_step):
            _, places = plan.places(step, rows)
            draws = [rng_for(seed, step, row).random() for row in rows] if self._alternatives.several else None
            generators = latent_generators(self.encoding.sampled, seed, step, rows)
            yield self.at([int(pool[place]) for pool, place in places], draws, generators)


class _Alternatives:
    """All captions of some samples as one list, and where the captions of each sample are in it."""

    def __init__(self, source: Source, indices: Sequence[int], first: list[str]) -> None:
        self.captions = first
        several = type(source).captions is not Source.captions  # by default a sample has but the one it came with
        found = [captions_at(source, i) for i in indices] if several else []
        self.several = any(len(texts) > 1 for texts, _ in found)
        if self.several:
            self._found = [(len(texts), shares) for texts, shares in found]
            self._firsts = list(accumulate([0, *(max(1, len(texts)) for texts, _ in found)]))
            self.captions = [text for texts, _ in found for text in texts or ("",)]

    def at(self, rows: Sequence[int], draws: Sequence[float] | None) -> list[int]:
        """The place of a caption for each row: the one that its draw chooses, or the first."""
        if not self.several:
            return list(rows)
        if draws is None:
            return [self._firsts[row] for row in rows]
        return [self._firsts[row] + choose(*self._found[row], u) for row, u in zip(rows, draws, strict=True)]


def chunks_of(feed: RowFeed, size: int) -> Iterator[range]:
    """All rows of a feed in order, up to `size` at a time, and of one bucket at a time unless buckets are mixed."""
    groups, bucket = [len(feed)], feed.layout.bucket
    if bucket is not None and not feed.layout.mixed:
        groups = [len(list(some)) for _, some in groupby(bucket.tolist())]
    for first, last in pairwise(accumulate([0, *groups])):
        yield from (range(row, min(row + size, last)) for row in range(first, last, size))


class WithText:
    """A feed of pictures with `num_documents` documents of text alone added to each batch."""

    def __init__(self, feed: Feed, text: Pieces, num_documents: int) -> None:
        self.feed, self.text, self.num_documents = feed, text, num_documents

    @property
    def num_ordered(self) -> int:
        return self.feed.num_ordered

    def batches(self, batch_size: int, seed: int, start_step: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Endless shuffled batches from number `start_step` on; batch_size counts pictures and documents."""
        pictures = self.feed.batches(batch_size - self.num_documents, seed, start_step, share)
        documents = self.text.batches(self.num_documents, seed, start_step, share)
        try:
            for batch, text in zip(pictures, documents, strict=True):
                yield batch._replace(text=text)
        finally:
            pictures.close()  # type: ignore[attr-defined]
