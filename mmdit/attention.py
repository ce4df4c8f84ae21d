"""The one place where attention is computed.

Shape letters: B batch, H heads, S queries, T keys, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 256  # tokens up to which a CPU learns quicker with the formula: torch's fused backward is several times slower


@dataclass(frozen=True)
class Packed:
    """A mask over packed tokens: the documents in one row of S tokens are attended side by side, each alone.

    rows (n, L) int64: the tokens of each document, any token where it has fewer than L; mask (n, 1, L, L): True where
    one may see the other; places (S,): where in n * L each token stands. ordered: token s stands at place s, so that
    nothing has to be moved.
    """

    rows: Tensor
    mask: Tensor
    places: Tensor
    ordered: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (1, H, S, d) to (1, S, H*d)."""
        return self.together(attention(self.apart(q), self.apart(k), self.apart(v), self.mask))

    def apart(self, x: Tensor) -> Tensor:
        """Tokens in one row (1, H, S, d) as documents side by side, (n, H, L, d)."""
        if self.ordered:
            return x[0].unflatten(1, self.rows.shape).transpose(0, 1)
        return x[0][:, self.rows].transpose(0, 1)

    def together(self, heads: Tensor) -> Tensor:
        """(n, L, H*d) as one row again, (1, S, H*d)."""
        together = heads.flatten(0, 1)
        return (together if self.ordered else together[self.places])[None]


class Mask(Protocol):
    """What computes an attention in its own way; `Packed` is one, and a part of a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads side by side again: q (B, H, S, d), k and v (B, H, T, d) to (B, S, H*d).

    `mask` is boolean, broadcastable to (B, H, S, T), True where a query may see a key; None lets all see all.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        return mask.attend(q, k, v)
    if q.device.type == "cpu" and max(q.shape[-2], k.shape[-2]) <= SHORT and torch.is_grad_enabled():
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        heads = scores.softmax(-1).to(v.dtype) @ v
    else:
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return heads.transpose(1, 2).flatten(2)


def key_mask(num_img: int, context_mask: Tensor | None) -> Tensor | None:
    """Mask (B, 1, 1, N + L) of the keys that exist: every image token, and the text tokens of `context_mask` (B, L)."""
    if context_mask is None:
        return None
    img = torch.ones(context_mask.shape[0], num_img, dtype=torch.bool, device=context_mask.device)
    return torch.cat([img, context_mask.bool()], dim=1)[:, None, None, :]
