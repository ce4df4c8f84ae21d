"""The MMDiT block of SD3 (arXiv 2403.03206, figure 2b): one set of weights per stream, one attention over all streams.

Every stream is modulated by the conditioning vector c (adaLN: shift, scale and gate of each residual branch).
SD3.5-medium adds a self-attention of the image stream (dual attention); the last block's text stream only gives keys
and values to the joint attention ("pre-only"), since nothing reads it afterwards.

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

EPS = 1e-6  # of every norm in SD3


def allow_graphs(most: int = 64) -> None:
    """Let torch compile up to `most` graphs of one function, as all blocks share one: beyond torch's 8 they would run
    uncompiled.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(most, torch._dynamo.config.recompile_limit)


def unviewed(xs: list[Tensor]) -> list[Tensor]:
    """The streams for the first block, as later ones have them: none is a view. Of a view torch's compiler also guards
    the shape of what is viewed, so that it would compile the first block apart from the others.
    """
    if torch.compiler.is_compiling():  # the whole model
        return xs
    return [x.clone() if x._is_view() else x for x in xs]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift: x (B, S, D), shift and scale (B, 1 or S, D), or (D,)."""
    if shift.ndim == 1:
        # Weights that FSDP gathers in half precision are narrower than x, which torch's norm on a CPU does not take.
        wide = torch.promote_types(x.dtype, shift.dtype)
        return F.layer_norm(x, x.shape[-1:], 1 + scale.to(wide), shift.to(wide), EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch; None is a gate of 1."""
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


class PerToken(NamedTuple):
    """Conditioning of S packed tokens: token s is modulated by row `rows[s]` of `silu_c` (n, D); rows (S,) int64."""

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
            wide = torch.promote_types(each.dtype, torch.float32)  # the gradients of a sample's tokens are summed in it
            out = each.to(wide).index_select(0, silu_c.rows).to(each.dtype)[None]
        else:
            out = super().forward(silu_c)
        return (out if out.ndim == 3 else out[:, None]).chunk(self.num, dim=-1)


class Unmodulated(nn.Module):
    """Stands in for `Modulation` in a stream without conditioning: learnt shift and scale of both norms, no gates."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.empty(2, dim)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as plain norms."""
        nn.init.zeros_(self.shift)
        nn.init.zeros_(self.scale)

    def forward(self, _: object) -> tuple[Tensor | None, ...]:
        return self.shift[0], self.scale[0], None, self.shift[1], self.scale[1], None


def init_linear(model: nn.Module) -> None:
    """DiT's initialisation: Xavier for matrices, zero for biases and modulations; a new block is the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.weight)


class QKV(nn.Module):
    """The projections of one stream into an attention (with RMS-normalised queries and keys if asked) and out of it."""

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
            # In the dtype of the weights, which under autocast stay fp32: torch has no fused norm of mixed dtypes.
            q, k = (norm(x.to(norm.weight.dtype)).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, x))


class Stream(nn.Module):
    """The weights of one stream in one block: modulation, projections into and out of the joint attention, MLP.

    dual: add a self-attention of the stream. pre_only: only give keys and values to the other streams, as the last
    block's text does. modulated: adaLN; without it plain norms and residuals.
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

    def pre_attention(
        self, x: Tensor, mods: tuple[Tensor, ...], rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for the joint attention, each (B, H, S, d)."""
        return self.attn(modulate(x, mods[0], mods[1]), rotary)

    def post_attention(
        self,
        x: Tensor,
        attended: Tensor,
        mods: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor] | None,
        mask: Mask | None = None,
    ) -> Tensor:
        """The rest of the block, given the joint attention's output for this stream, `attended` (B, S, D): the residual
        branches of attention and MLP.

        mask: of the stream's own second attention, where samples are packed in one row.
        """
        assert self.attn.out is not None and self.mlp is not None
        _, _, gate, shift_mlp, scale_mlp, gate_mlp, *second = mods
        y = _gated_residual(x, self.attn.out(attended), gate)
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            q, k, v = self.attn2(modulate(x, shift2, scale2), rotary)
            y = _gated_residual(y, self.attn2.out(attention(q, k, v, mask)), gate2)  # type: ignore[misc]
        return _gated_residual(y, self.mlp(modulate(y, shift_mlp, scale_mlp)), gate_mlp)


def _image_mask(mask: Tensor | Mask | None) -> Mask | None:
    """The mask of the image stream's self-attention, where samples are packed in one row."""
    return mask.without_text() if isinstance(mask, Pairs) else None


class JointBlock(nn.Module):
    """Streams by name, with one joint attention over all their tokens, concatenated in the order given.

    Not an `nn.ModuleDict`, which FSDP in older torch (such as 2.11) refuses to shard even if it has a `forward`.
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
        """Takes and gives one tensor (B, S_i, D) per stream; a pre-only stream has no output.

        silu_c: silu of the conditioning, (B, D), or one for each stream. mask: boolean, broadcastable to (B, H, sum S,
        sum S), True where a query may see a key; or a `Mask`, for which samples are packed in one row, stream by
        stream. rotaries: for each stream a rotary embedding or None.
        """
        streams: list[Stream] = list(self.children())  # type: ignore[arg-type]
        rotaries = rotaries or [None] * len(streams)
        conditions = [silu_c] * len(streams) if isinstance(silu_c, Tensor) else silu_c
        mods = [stream.modulation(c) for stream, c in zip(streams, conditions, strict=True)]
        qkv: list[tuple[Tensor, ...]] = [
            s.pre_attention(x, m, r) for s, x, m, r in zip(streams, xs, mods, rotaries, strict=True)
        ]
        # A pre-only stream has no queries.
        qkv = [(q[:, :, :0] if s.pre_only else q, k, v) for s, (q, k, v) in zip(streams, qkv, strict=True)]
        one_row = not (mask is None or isinstance(mask, Tensor))
        if isinstance(mask, Tensor) and mask.shape[-2] > 1:
            parts_of = mask.split([x.shape[1] for x in xs], dim=-2)
            mask = torch.cat([part for part, s in zip(parts_of, streams, strict=True) if not s.pre_only], dim=-2)
        if one_row:
            qkv = [tuple(rearrange(part, "b h s d -> 1 h (b s) d") for part in parts) for parts in qkv]
        q, k, v = qkv[0] if len(qkv) == 1 else (torch.cat(parts, dim=2) for parts in zip(*qkv, strict=True))
        attended = attention(q, k, v, mask).split([parts[0].shape[2] for parts in qkv], dim=1)
        return [
            s.post_attention(x, y.view(x.shape) if one_row else y, m, r, _image_mask(mask) if len(x) == 1 else None)
            for s, x, y, m, r in zip(streams, xs, attended, mods, rotaries, strict=True)
            if not s.pre_only
        ]
