"""The MMDiT block of SD3 (arXiv 2403.03206, figure 2b): one set of weights per stream, one attention over all streams.

Every stream is modulated by the conditioning vector c (adaLN: shift, scale and gate of each residual branch).
SD3.5-medium adds a second attention of the image stream over itself; the last block's text stream only offers keys
and values ("pre-only"), and asks nothing.

Shape letters: B batch, N image tokens, L text tokens, S any stream's tokens, D width, H heads, d head width = D / H.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.attention import Mask, Pairs, attention
from mmdit.embeddings import rotate
from mmdit.linear import Linear, linear_gelu

EPS = 1e-6  # of every normalisation in SD3


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift: x (B, S, D), shift and scale (B, 1 or S, D), or (D,)."""
    if shift.ndim == 1:
        return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def _added(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch."""
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


class PerToken(NamedTuple):
    """Conditioning of packed tokens: token s takes row `rows[s]` of `silu_c`, (n, D); rows (S,) int64."""

    silu_c: Tensor
    rows: Tensor


class Modulation(Linear):
    """silu(c), (B, D), (B, S, D) or `PerToken`, to `num` modulations, each (B, 1 or S, D), in one matrix product."""

    def __init__(self, dim: int, num: int) -> None:
        super().__init__(dim, num * dim)
        self.num = num

    def forward(self, silu_c: Tensor | PerToken) -> tuple[Tensor, ...]:  # type: ignore[override]
        if isinstance(silu_c, PerToken):
            each = super().forward(silu_c.silu_c)
            wide = torch.promote_types(each.dtype, torch.float32)  # in which the gradients of a sample's tokens add up
            out = each.to(wide).index_select(0, silu_c.rows).to(each.dtype)[None]
        else:
            out = super().forward(silu_c)
        return (out if out.ndim == 3 else out[:, None]).chunk(self.num, dim=-1)


class Unmodulated(nn.Module):
    """In the place of a `Modulation` where no time reaches: learnt shifts and scales of two norms, and open gates."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.zeros(2, dim)) for _ in range(2))

    def forward(self, _: object) -> tuple[Tensor | None, ...]:
        return self.shift[0], self.scale[0], None, self.shift[1], self.scale[1], None


def init_linear(model: nn.Module) -> None:
    """DiT's start: Xavier for every matrix, zero for biases and modulations, so that a new block is the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.weight)


class QKV(nn.Module):
    """Queries, keys and values of one stream, RMS-normalised per head where asked; and the way out of the heads."""

    def __init__(self, dim: int, num_heads: int, qk_norm: str | None, out: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // num_heads, eps=EPS) if qk_norm else None for _ in range(2))
        self.out = Linear(dim, dim) if out else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) to q, k, v, each (B, H, S, d)."""
        q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.num_heads)
        if self.q_norm is not None and self.k_norm is not None:
            # In the weights' type: under autocast they stay fp32, and a mixed norm has no fused kernel.
            q, k = (norm(x.to(norm.weight.dtype)).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, x))


class Stream(nn.Module):
    """What one stream owns in one block: its modulations, its projections into and out of the joint attention, its MLP.

    dual: a second attention of the stream over itself. pre_only: the stream is read by the others and ends here.
    modulated: adaLN; without it plain norms and residuals.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: str | None,
        dual: bool = False,
        pre_only: bool = False,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.modulation = Modulation(dim, 2 if pre_only else 9 if dual else 6) if modulated else Unmodulated(dim)
        self.attn = QKV(dim, num_heads, qk_norm, out=not pre_only)
        self.attn2 = QKV(dim, num_heads, qk_norm) if dual else None
        self.mlp = None if pre_only else MLP(dim, int(dim * mlp_ratio))

    def read(
        self, x: Tensor, mods: tuple[Tensor, ...], rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for the joint attention, each (B, H, S, d)."""
        return self.attn(modulate(x, mods[0], mods[1]), rotary)

    def attend(
        self,
        x: Tensor,
        heads: Tensor,
        mods: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor] | None,
        mask: Mask | None = None,
    ) -> Tensor:
        """The residual branches of a block, given what the joint attention brought this stream: `heads` (B, S, D).

        mask: who sees whom in the second attention, where samples stand in one row.
        """
        assert self.attn.out is not None and self.mlp is not None
        _, _, gate, shift_mlp, scale_mlp, gate_mlp, *second = mods
        y = _added(x, self.attn.out(heads), gate)
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            q, k, v = self.attn2(modulate(x, shift2, scale2), rotary)
            own = attention(q, k, v, mask)
            y = _added(y, self.attn2.out(own), gate2)  # type: ignore[misc]
        return _added(y, self.mlp(modulate(y, shift_mlp, scale_mlp)), gate_mlp)


def _own(mask: Tensor | Mask | None) -> Mask | None:
    return mask.without_text() if isinstance(mask, Pairs) else None


class JointBlock(nn.Module):
    """Streams by name, attending to one another in one attention over all their tokens, in the order given.

    No `nn.ModuleDict`: older torch (2.11, say) refuses to shard what is one, even where it has a `forward`.
    """

    def __init__(self, streams: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, stream in streams.items():
            self.add_module(name, stream)

    def forward(
        self,
        xs: Sequence[Tensor],
        silu_c: Tensor | Sequence[Tensor | PerToken | None],
        mask: Tensor | Mask | None = None,
        rotaries: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    ) -> list[Tensor]:
        """One tensor (B, S_i, D) a stream in and out; a pre-only stream is not among those that come out.

        silu_c: silu of the conditioning, (B, D), or one for each stream. mask: boolean, broadcastable to (B, H, sum S,
        sum S), True = may see; or what attends to one row, in which the streams' tokens stand sample after sample.
        rotaries: one rotary embedding or None a stream.
        """
        streams: list[Stream] = list(self.children())  # type: ignore[arg-type]
        rotaries = rotaries or [None] * len(streams)
        conditions = [silu_c] * len(streams) if isinstance(silu_c, Tensor) else silu_c
        mods = [stream.modulation(c) for stream, c in zip(streams, conditions, strict=True)]
        qkv: list[tuple[Tensor, ...]] = [
            s.read(x, m, r) for s, x, m, r in zip(streams, xs, mods, rotaries, strict=True)
        ]
        # A stream that ends here asks nothing: of its queries there are none.
        qkv = [(q[:, :, :0] if s.pre_only else q, k, v) for s, (q, k, v) in zip(streams, qkv, strict=True)]
        one_row = not (mask is None or isinstance(mask, Tensor))
        if isinstance(mask, Tensor) and mask.shape[-2] > 1:
            rows = mask.split([x.shape[1] for x in xs], dim=-2)
            mask = torch.cat([own for own, s in zip(rows, streams, strict=True) if not s.pre_only], dim=-2)
        if one_row:
            qkv = [tuple(rearrange(part, "b h s d -> 1 h (b s) d") for part in parts) for parts in qkv]
        q, k, v = qkv[0] if len(qkv) == 1 else (torch.cat(parts, dim=2) for parts in zip(*qkv, strict=True))
        heads = attention(q, k, v, mask).split([parts[0].shape[2] for parts in qkv], dim=1)
        return [
            s.attend(x, h.view(x.shape) if one_row else h, m, r, _own(mask) if len(x) == 1 else None)
            for s, x, h, m, r in zip(streams, xs, heads, mods, rotaries, strict=True)
            if not s.pre_only
        ]
