"""The block of Llama (Touvron et al. 2023, arXiv 2302.13971) as a stream beside SD3's: RMSNorm, SwiGLU, no biases, keys
and values shared by groups of heads; Qwen2 (arXiv 2407.10671) adds biases to queries, keys and values.

A stream without time conditioning may have this form, so that the text stream can be exactly a pretrained language
model.

Shape letters: B batch, S tokens, D width, H heads, K heads of keys and values, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.config import LlamaConfig
from mmdit.embeddings import rotate


class LlamaStream(nn.Module):
    """A stream of a `JointBlock` in Llama's form, in place of `blocks.Stream`; it takes no modulation."""

    pre_only = False

    def __init__(self, dim: int, num_heads: int, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = [num_heads, config.num_kv_heads, config.num_kv_heads]
        self.norm1, self.norm2 = (nn.RMSNorm(dim, eps=config.eps) for _ in range(2))
        self.qkv = nn.Linear(dim, sum(self.heads) * dim // num_heads, bias=config.qkv_bias)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, config.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(config.hidden, dim, bias=False)

    def modulation(self, _: object) -> tuple[Tensor, ...]:
        """No modulation."""
        return ()

    def pre_attention(
        self, x: Tensor, mods: tuple[Tensor, ...], rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) to q, k, v, each (B, H, S, d): keys and values are repeated for each head of their group."""
        heads = rearrange(self.qkv(self.norm1(x)), "b s (h d) -> b h s d", h=sum(self.heads))
        q, k, v = heads.split(self.heads, dim=1)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        k, v = (kv.repeat_interleave(self.heads[0] // self.heads[1], dim=1) for kv in (k, v))
        return q, k, v

    def post_attention(
        self, x: Tensor, attended: Tensor, mods: tuple[Tensor, ...], rotary: Any, mask: object = None
    ) -> Tensor:
        """The residual branches, given the joint attention's output `attended` (B, S, D)."""
        y = x + self.out(attended)
        z = self.norm2(y)
        return y + self.down(F.silu(self.gate(z)) * self.up(z))


def rotary_llama(coordinates: Tensor, head_dim: int, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Rotary angles of text and patches: coordinates (S, 3), step of the text, row, column, to cos and sin (S, d / 2).

    All channel pairs rotate with the step, as in Llama. Of every three pairs, one has the patch's row added to the step
    and one its column (the axes of Qwen2-VL, arXiv 2409.12191, section 2.1, but interleaved); text has row and column
    0, and so exactly the positions that the language model was trained with.
    """
    pairs = torch.arange(head_dim // 2, device=coordinates.device)
    omega = _frequencies(pairs, config)
    step, row, column = coordinates.float().unbind(1)
    at = torch.stack([step, step + row, step + column], dim=1)[:, pairs % 3]
    angle = at * omega
    return angle.cos(), angle.sin()


def _frequencies(pairs: Tensor, config: LlamaConfig) -> Tensor:
    """theta^(-k / (d/2)); Llama 3.1's scaling (arXiv 2407.21783) divides low frequencies by a factor."""
    omega = config.rope_theta ** (-pairs.float() / len(pairs))
    if config.rope_scaling is None:
        return omega
    factor, low, high, length = config.rope_scaling
    turns = length * omega / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return omega * (kept + (1 - kept) / factor)
