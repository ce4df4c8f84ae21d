"""Mixed precision: matrix products in bf16 or fp16, all that accumulates in fp32.

Weights, gradients as the optimiser sees them, its state and the average are fp32 (Micikevicius et al. 2018, arXiv
1710.03740: a weight plus an update a thousand times smaller is that weight again in fp16). torch.autocast computes
matrix products in half precision and norms, softmax and the loss in fp32; what autocast does not cover is kept in fp32
by its own code: the sinusoids of time, QK-norm, and the error of the velocity.

fp16 has 5 bits of exponent: gradients below 6e-8 vanish. The loss is scaled up before the backward pass and the
gradient scaled down after it; a step whose scaled gradient overflows is skipped, and the scale halved.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from training.sharding import local

FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
GROW_EVERY = 2000  # good steps in a row after which a scale twice as large is tried


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Matrix products in `precision` within."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@dataclass
class LossScaler:
    """The factor on the loss, a power of two; fixed at 1 except for fp16. good: finite steps since it last changed."""

    scale: float = 1.0
    good: int = 0
    grow_every: int = GROW_EVERY

    @classmethod
    def for_precision(cls, precision: torch.dtype) -> LossScaler:
        """A scaler for fp16; for any other type one that leaves the loss as it is."""
        return cls(FIRST_SCALE) if precision == torch.float16 else cls(grow_every=0)

    @property
    def enabled(self) -> bool:
        """Whether the loss is scaled."""
        return self.grow_every > 0

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, finite: bool) -> bool:
        """Adapt the scale after a step. Returns whether the scale, not the batch, is blamed for a gradient that is not
        finite.
        """
        if not self.enabled:
            return False
        if not finite:
            blamed = self.scale > 1
            self.scale, self.good = max(1.0, self.scale / 2), 0
            return blamed
        self.good += 1
        if self.good >= self.grow_every:
            self.scale, self.good = max(self.scale, min(LARGEST_SCALE, self.scale * 2)), 0
        return False
