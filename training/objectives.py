"""What a model learns: one interface, `objective(model, batch, generator) -> Loss`.

Flow matching (Lipman et al. 2022; SD3, arXiv 2403.03206, section 2): x_t = (1 - t) x_0 + t eps, the network predicts
the velocity v = eps - x_0, the loss is the mean squared error, and t is drawn from a density over [0, 1].

Text and images (Transfusion, Zhou et al. 2024, arXiv 2408.11039, section 3.3): the cross entropy of the next token,
plus the same loss for each image.

Shape letters: B batch, C channels, h w latent sides, L text tokens, E text encoders; T tokens and I images of a packed
batch, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmdit.features import Features
from mmdit.sequences import MixedBatch, pack
from mmdit.text import Tokens
from samplers import RectifiedFlow, Schedule, randn, resolution_shift, shift_time
from training.config import TrainConfig
from training.own import is_own, load_class
from training.share import WHOLE, Share
from training.time_density import TimeDensity, make_time_density

T = TypeVar("T")
Draws = torch.Generator | Sequence[int]
"""The randomness of a loss: a generator, or where only noise is drawn, a seed for each image's noise."""


class Batch(NamedTuple):
    """Captioned images, and perhaps documents of text alone.

    latents: scaled, (B, C, h, w), or a list of (C, h, w) where sizes differ. tokens: of the captions, (B, L), or cached
    features of frozen encoders. text: tokens of the documents, (D, P).
    """

    latents: Tensor | list[Tensor]
    tokens: Tokens | Features
    text: Tokens | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        latents = self.latents
        moved = latents.to(device) if isinstance(latents, Tensor) else [x.to(device) for x in latents]
        return Batch(moved, self.tokens.to(device), self.text and self.text.to(device))

    def split(self, parts: int) -> list[Batch]:
        """Equal parts of the batch, each with its share of images and of documents."""
        size = len(self.latents) // parts
        text = self.text.split(len(self.text.ids) // parts) if self.text else [None] * parts
        latents = [self.latents[part * size : (part + 1) * size] for part in range(parts)]
        return list(map(Batch, latents, self.tokens.split(size), text))


class Loss(NamedTuple):
    """`total` is minimised; `parts` are scalars to log, by name; `errors` (I,) are the losses of the single images, and
    `t` (I,) their times.
    """

    total: Tensor
    parts: dict[str, Tensor]
    t: Tensor | None = None
    errors: Tensor | None = None


def seeds_for(num: int, generator: torch.Generator) -> list[int]:
    """A seed for each of `num` samples; with a larger `num` the first ones stay the same."""
    return torch.randint(2**63 - 1, (num,), generator=generator).tolist()


def noise_for(num: int, like: Sequence[Tensor], draws: Draws, share: Share) -> list[Tensor]:
    """Noise for this share's samples, shaped like the given tensors, each from its own seed, so that no process draws
    noise for another. num: samples of all processes.
    """
    seeds = share.of(seeds_for(num, draws)) if isinstance(draws, torch.Generator) else draws
    noise = [randn(x.shape, torch.Generator().manual_seed(s), x.dtype) for x, s in zip(like, seeds, strict=True)]
    if not noise or like[0].device.type == "cpu":
        return noise
    row = _in_row(noise).to(like[0].device)  # one copy: the host waits for the device at each
    return [part.view(x.shape) for part, x in zip(row.split([x.numel() for x in noise]), noise, strict=True)]


@dataclass(frozen=True)
class FlowMatching:
    """The rectified-flow objective: the mean over images of their mean squared errors.

    Captions are dropped with probability `caption_dropout`, independently for each sample and each text encoder. In a
    batch of several sizes the time of each image is shifted for its size, as in sampling. share: this process's piece
    of each batch; random numbers are drawn for the whole batch.
    """

    density: TimeDensity
    caption_dropout: float = 0.1
    stratified: bool = True
    schedule: RectifiedFlow = field(default_factory=RectifiedFlow)
    share: Share = WHOLE

    def prepared(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Batch, None]:
        """The batch as it is, and no counts, since every sample has the same weight (see `TextAndImages.prepared`)."""
        return batch, None

    def __call__(self, model: nn.Module, batch: Batch, generator: Draws, t: Tensor | float | None = None) -> Loss:
        """Loss of `model(x_t, t, tokens, drop)` on a batch; drop is boolean (B, E), with E = 1 for a model without a
        `conditioner`.

        Draws from `generator`, which is on the CPU so that every device sees the same, in this order: times, noise,
        dropped captions. With a given `t` (validation) only noise is drawn, for which seeds may be given instead; no
        caption is dropped.
        """
        x_0, device = list(batch.latents), batch.latents[0].device
        fixed, num = t is not None, len(x_0) * self.share.world
        if t is None:
            t = self.share.of(self.density.sample(num, generator, stratified=self.stratified))  # type: ignore[arg-type]
            t = t if isinstance(batch.latents, Tensor) else _shifted_by_size(t, x_0, model)
        t = torch.as_tensor(t, dtype=torch.promote_types(x_0[0].dtype, torch.float32)).expand(len(x_0)).to(device)
        eps = noise_for(num, x_0, generator, self.share)
        encoders = _num_encoders(model)
        chance = torch.ones(num, encoders) if fixed else torch.rand(num, encoders, generator=generator)  # type: ignore[arg-type]
        errors = self._errors(model, batch, eps, t, self.share.of(chance < self.caption_dropout).to(device))
        loss = errors.mean()
        return Loss(loss, {"loss": loss.detach()}, t, errors.detach())

    def elementwise_loss(self, v: Tensor, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The loss of each element of the network's velocity v, before means are taken: its squared error.

        v, x_0, eps and the loss are (B, C, h, w), t is (B,); or where sizes differ all are in one row, (N,).
        """
        return (v.float() - self.schedule.velocity(x_0, eps, t)).square()

    def _errors(self, model: nn.Module, batch: Batch, eps: list[Tensor], t: Tensor, drop: Tensor) -> Tensor:
        """The mean loss of each image (B,); images of several sizes are computed as one tensor."""
        x_0 = batch.latents
        if isinstance(x_0, Tensor):
            noise = torch.stack(eps)
            v = model(self.schedule.mix(x_0, noise, t), t, batch.tokens, drop)
            return _checked(self.elementwise_loss(v, x_0, noise, t), x_0).flatten(1).mean(1)
        counts = [x.numel() for x in x_0]
        row, noise = _in_row(x_0), _in_row(eps)
        times = torch.repeat_interleave(t, torch.tensor(counts).to(t.device), output_size=len(row))
        x_t = self.schedule.mix(row, noise, times).split(counts)
        v = model([part.view(x.shape) for part, x in zip(x_t, x_0, strict=True)], t, batch.tokens, drop)
        losses = _checked(self.elementwise_loss(_in_row(v), row, noise, times), row)
        return torch.stack([part.mean() for part in losses.split(counts)])


def _checked(losses: Tensor, x_0: Tensor) -> Tensor:
    """The losses of the elements of x_0. Raises ValueError unless they have its shape."""
    if not isinstance(losses, Tensor) or losses.shape != x_0.shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(f"elementwise_loss gave {found}, expected a loss for each element, {tuple(x_0.shape)}")
    return losses


def _num_encoders(model: nn.Module) -> int:
    """The number of text encoders of a model, also of one within DistributedDataParallel; 1 without a conditioner."""
    conditioner = getattr(getattr(model, "module", model), "conditioner", None)
    return 1 if conditioner is None else conditioner.num_encoders


def _in_row(xs: Sequence[Tensor]) -> Tensor:
    """Some tensors, flattened and concatenated."""
    return torch.cat([x.flatten() for x in xs])


def _shifted_by_size(t: Tensor, latents: Sequence[Tensor], model: Any) -> Tensor:
    """Times (B,) shifted by each latent's size relative to the model's, as in sampling (SD3, section 5.3.2)."""
    trained = model.transformer.config.sample_size**2
    shifts = [resolution_shift(x.shape[1] * x.shape[2], trained) for x in latents]
    return torch.tensor([shift_time(s, shift) for s, shift in zip(t.tolist(), shifts, strict=True)], dtype=t.dtype)


@dataclass(frozen=True)
class TextAndImages:
    """L_LM + image_weight L_image: the mean loss over predicted tokens, and the mean over images.

    The image loss is flow matching, or with `schedule=samplers.Cosine(), prediction="noise"` the paper's diffusion
    loss. An image that opens a document, with text after it, is there to be described, so its time is scaled by
    `image_first_cap` (0.5 in the paper, table 8). z_loss is the weight of log^2 Z, which keeps logits from drifting
    (Chameleon, arXiv 2405.09818).
    """

    density: TimeDensity
    image_weight: float = 5.0
    image_first_cap: float = 0.5
    z_loss: float = 0.0
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    schedule: Schedule = field(default_factory=RectifiedFlow)
    prediction: Literal["velocity", "noise"] = "velocity"
    stratified: bool = True
    share: Share = WHOLE

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "noise"):
            raise ValueError(f"prediction is {self.prediction!r}, expected 'velocity' or 'noise'")
        if not 0 < self.image_first_cap <= 1 or self.image_weight < 0 or self.z_loss < 0:
            raise ValueError("expected 0 < image_first_cap <= 1, and image_weight and z_loss of at least 0")
        if not 0 <= self.caption_first <= 1 or not 0 <= self.caption_dropout <= 1:
            raise ValueError("expected caption_first and caption_dropout in [0, 1]")

    def prepared(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[MixedBatch, Tensor]:
        """(the batch as documents, float32 (2,): the number of predicted tokens and of images).

        A caption comes before its image with probability `caption_first`, and is then dropped with probability
        `caption_dropout`; otherwise it comes after the image.
        """
        first, dropped = self._orders(len(batch.latents), generator)
        mixed = documents(batch, first, dropped, model.pack)  # type: ignore[arg-type]
        return mixed, torch.tensor([len(mixed.predicting), len(mixed.latents)], dtype=torch.float32)

    def __call__(
        self,
        model: nn.Module,
        batch: MixedBatch | Batch,
        generator: Draws,
        t: Tensor | float | None = None,
        counts: Tensor | None = None,
    ) -> Loss:
        """Loss of `model(batch, t)` on clean documents; parts "text" (nats per token) and "image" (mean squared error).

        Captioned images become documents first (see `prepared`). Draws from `generator`, on the CPU, in this order: the
        documents' forms, times, noise image by image. With a given `t` (validation) only noise is drawn, for which
        seeds may be given instead; all captions come first.

        counts (2,): numbers of tokens and images to divide the sums by, instead of the batch's own. Where a large batch
        is computed in pieces, these are the means over the pieces: the mean of the pieces' losses then is its loss.
        """
        if isinstance(batch, Batch):
            batch = self.prepared(model, batch, generator)[0] if t is None else documents(batch, pack=model.pack)  # type: ignore[arg-type]
        images, device = len(batch.latents), batch.ids.device
        num_tokens, num_images = (len(batch.predicting), images) if counts is None else counts.tolist()
        num = images * self.share.world
        if t is None:
            t = self.share.of(self.density.sample(num, generator, stratified=self.stratified))  # type: ignore[arg-type]
            t = torch.where(opens_text(batch).cpu(), t * self.image_first_cap, t)
        t = torch.as_tensor(t, dtype=torch.float32).expand(images).to(device)
        noise = noise_for(num, batch.latents, generator, self.share)
        noised = [self.schedule.mix(x, e, s) for x, e, s in zip(batch.latents, noise, t, strict=True)]
        out = model(batch.with_latents(noised), t)
        text = next_token_loss(out.states, out.head, batch, self.z_loss, num_tokens=num_tokens)
        each_image = zip(out.v, batch.latents, noise, t, strict=True)
        errors = [_checked(self.elementwise_loss(*image), image[1]).mean() for image in each_image]
        each = torch.stack(errors) if errors else text.new_zeros(0)
        image = each.sum() / num_images if errors else text.new_zeros(())
        parts = {"text": text.detach(), "image": image.detach()}
        return Loss(text + self.image_weight * image, parts, t, each.detach())

    def elementwise_loss(self, v: Tensor, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The loss of each element of what the network says of one image (C, h, w) at time t (): its squared error."""
        target = eps if self.prediction == "noise" else self.schedule.velocity(x_0, eps, t)
        return (v.float() - target).square()

    def _orders(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(which samples have their image first, which have no caption), boolean (B,)."""
        image_first, dropped = torch.rand(2, num * self.share.world, generator=generator) < torch.tensor(
            [[1 - self.caption_first], [self.caption_dropout]]
        )
        return self.share.of(image_first), self.share.of(dropped & ~image_first)


def documents(
    batch: Batch,
    image_first: Tensor | None = None,
    dropped: Tensor | None = None,
    pack: Callable[[list[list[Tensor]]], MixedBatch] = pack,
) -> MixedBatch:
    """Captioned images as documents with the end token at their end; then the documents of text alone.

    A document is caption and image, or where `image_first` (B,) image and caption. Where `dropped` (B,) it is the image
    alone, without the end token, from which the model would learn that an image in front has no caption. pack: the
    model's own method, which knows its special tokens.
    """
    out: list[list[Tensor]] = []
    first, without = (x.tolist() if x is not None else [False] * len(batch.latents) for x in (image_first, dropped))
    for latent, words, image, alone in zip(batch.latents, _texts(batch.tokens), first, without, strict=True):
        if alone:
            out.append([latent])
        else:
            out.append([latent, words] if image else [words[:-1], latent, words[-1:]])
    out += [[words] for words in _texts(batch.text)] if batch.text else []
    return pack(out)


def _texts(tokens: Any) -> Sequence[Tensor]:
    """The real tokens of each text; all are taken together, since on a GPU each look at a mask waits for it."""
    return tokens.ids[tokens.mask].split(tokens.mask.sum(1).tolist())


def opens_text(batch: MixedBatch) -> Tensor:
    """Which images (I,) open a document and have text after them; the end token alone is not text."""
    counts = torch.bincount(batch.document)
    first = (counts.cumsum(0) - counts)[batch.document[batch.opened]]  # the first position of each image's document
    lead = batch.lead  # number of tokens for an image's size
    return (batch.opened == first + lead) & (counts[batch.document[batch.opened]] > 3 + lead)


def next_token_loss(
    states: Tensor,
    head: nn.Linear,
    batch: MixedBatch,
    z_loss: float = 0.0,
    chunk: int = 1024,
    num_tokens: float | None = None,
) -> Tensor:
    """Mean cross entropy of the next token, in nats, over `batch.predicting`; 0 where there is none.

    states (T, D). num_tokens: what the sum is divided by; None is the number of predicted tokens. Logits are computed
    for `chunk` tokens at a time, and recomputed in the backward pass: with a large vocabulary all of them together
    would be the largest tensor of the step.
    """
    rows = batch.predicting
    total = states.new_zeros((), dtype=torch.float32)
    if not len(rows):  # the head still needs a gradient: other processes may have text, and all reduce the same ones
        return total + 0 * (states.sum() + head(states[:1]).sum())

    def part(x: Tensor, targets: Tensor) -> Tensor:
        logits = head(x).float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss + z_loss * logits.logsumexp(-1).square().sum() if z_loss else loss

    for some in rows.split(chunk):
        x, targets = states[some], batch.ids[some + 1]
        total = total + (part(x, targets) if len(rows) <= chunk else checkpoint(part, x, targets, use_reentrant=False))
    return total / (len(rows) if num_tokens is None else num_tokens)


def make_objective(config: TrainConfig, share: Share = WHOLE) -> FlowMatching | TextAndImages:
    """The objective of a run, or the subclass that objective.name says (`own.load_class`). share: this process's piece
    of each batch. Raises ConfigError where there is no such subclass.
    """
    o, mixed = config.objective, config.transfusion
    density = make_time_density(o.time_density, o.m, o.s, o.shift)
    shared: dict[str, Any] = {"caption_dropout": o.caption_dropout, "stratified": o.stratified, "share": share}
    if not mixed.enabled:
        return _objective_class(o.name, FlowMatching)(density, **shared)
    names = ("image_weight", "image_first_cap", "z_loss", "caption_first")
    own = {name: getattr(mixed, name) for name in names}
    return _objective_class(o.name, TextAndImages)(density, **shared, **own)


def _objective_class(name: str, base: type[T]) -> type[T]:
    return load_class(name, base, "objective.name") if is_own(name) else base
