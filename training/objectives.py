"""What a model learns: one interface, `objective(model, batch, generator) -> Loss`.

Flow matching (Lipman et al. 2022; SD3, arXiv 2403.03206, section 2): x_t = (1 - t) x_0 + t eps, the network predicts
the velocity v = eps - x_0, the loss is the mean square error, and t is drawn from a density that says where to learn
most.

Shape letters: B batch, C channels, h w latent sides, L text tokens, E text encoders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdit.text import Tokens
from samplers import RectifiedFlow
from training.time_density import TimeDensity


class Batch(NamedTuple):
    """Scaled latents (B, C, h, w) of the images and the tokens (B, L) of their captions."""

    latents: Tensor
    tokens: Tokens

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.latents.to(device), self.tokens.to(device))


class Loss(NamedTuple):
    """`total` is what is minimised, `parts` what is written down: scalars by name."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class FlowMatching:
    """The rectified-flow objective. A caption is dropped with `caption_dropout`, for each sample and each encoder
    alone.
    """

    density: TimeDensity
    caption_dropout: float = 0.1
    stratified: bool = True
    schedule: RectifiedFlow = field(default_factory=RectifiedFlow)

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, t: Tensor | float | None = None
    ) -> Loss:
        """Loss of `model(x_t, t, tokens, drop)` on a batch.

        Draws, in this order, from `generator` (on the CPU, so that every device sees the same): times, noise, dropped
        captions. A given `t` (validation) replaces the drawn times, and then no caption is dropped.
        """
        x_0, device = batch.latents, batch.latents.device
        fixed = t is not None
        if t is None:
            t = self.density.sample(len(x_0), generator, stratified=self.stratified)
        t = torch.as_tensor(t, dtype=x_0.dtype).expand(len(x_0)).to(device)
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(device)
        encoders: int = model.conditioner.num_encoders  # type: ignore[union-attr, assignment]
        drop = torch.rand(len(x_0), encoders, generator=generator).to(device) < (0 if fixed else self.caption_dropout)
        v = model(self.schedule.mix(x_0, eps, t), t, batch.tokens, drop)
        loss = (v.float() - self.schedule.velocity(x_0, eps, t)).square().mean()
        return Loss(loss, {"loss": loss.detach()})
