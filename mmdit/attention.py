"""The one place where attention is computed.

Shape letters: B batch, H heads, S queries, T keys, d head width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads side by side again: q (B, H, S, d), k and v (B, H, T, d) to (B, S, H*d).

    `mask` is boolean, broadcastable to (B, H, S, T), True where a query may see a key; None lets all see all.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def key_mask(num_img: int, context_mask: Tensor | None) -> Tensor | None:
    """Mask (B, 1, 1, N + L) of the keys that exist: every image token, and the text tokens of `context_mask` (B, L)."""
    if context_mask is None:
        return None
    img = torch.ones(context_mask.shape[0], num_img, dtype=torch.bool, device=context_mask.device)
    return torch.cat([img, context_mask.bool()], dim=1)[:, None, None, :]
