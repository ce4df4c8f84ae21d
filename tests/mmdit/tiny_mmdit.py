"""A small MMDiT of random weights, and inputs for it.

Weights are drawn wide (std 0.2): a fresh model predicts 0, and a modulation that is 0 hides whatever it gates.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT

TINY = MMDiTConfig(
    in_channels=4,
    depth=3,
    num_heads=2,
    head_dim=16,
    context_dim=24,
    pooled_dim=20,
    sample_size=16,
    pos_embed_max_size=12,
)


def alive(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """A model whose every parameter matters."""
    model, generator = MMDiT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def inputs(config: MMDiTConfig, batch: int = 3, height: int = 10, width: int = 16, tokens: int = 7, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, config.in_channels, height, width, generator=g),
        torch.rand(batch, generator=g),
        torch.randn(batch, tokens, config.context_dim, generator=g),
        torch.randn(batch, config.pooled_dim, generator=g),
    )


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference, over the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


VARIANTS = {
    "sd3": TINY,
    "qk-norm": replace(TINY, qk_norm="rms_norm"),
    "dual attention": replace(TINY, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "dual attention in all blocks, no qk-norm": replace(TINY, dual_attention_layers=(0, 1, 2)),
    "one block": replace(TINY, depth=1, qk_norm="rms_norm"),
}


def in_one_call(monkeypatch) -> None:
    """Packed samples take torch's variable-length kernel, as on CUDA; here it is a mask, which the compiler sees."""

    def attend(q, k, v, q_ends, k_ends, most_queries, most_keys, window_size):
        of_q, of_k = (
            torch.bucketize(torch.arange(len(x)), ends[1:], right=True) for x, ends in ((q, q_ends), (k, k_ends))
        )
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, of_q[:, None] == of_k).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    monkeypatch.setattr("mmdit.attention.in_one_call", lambda *_: True)
