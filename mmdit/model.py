"""MMDiT: the multimodal diffusion transformer of SD3 and SD3.5 (Esser et al. 2024, arXiv 2403.03206).

Two streams, image patches and text tokens, with their own weights and one attention over both; time and pooled text
modulate every block. Given noised latents x_t it predicts the velocity v = eps - x_0.

Shape letters: B batch, C channels, h w latent sides, N image tokens, L text tokens, D width.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.attention import Pairs, key_mask
from mmdit.blocks import JointBlock, Modulation, PerToken, Stream, init_linear, modulate, unviewed
from mmdit.config import MMDiTConfig
from mmdit.embeddings import (
    TimeEmbedding,
    VectorEmbedding,
    crop_positions,
    extended_positions,
    init_positions,
    patch_grid,
    patchify,
    rotary_2d,
    unpatchify,
)


class MMDiT(nn.Module):
    """The trunk: `model(x_t, t, context, pooled)` is the velocity of the rectified flow."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.width, config.in_channels * config.patch_size**2
        self.patch_in = nn.Linear(patch, dim)
        self.context_in = nn.Linear(config.context_dim, dim)
        self.time_in = TimeEmbedding(dim)
        self.pooled_in = VectorEmbedding(config.pooled_dim, dim)
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.depth))
        self.modulation_out = Modulation(dim, 2)
        self.patch_out = nn.Linear(dim, patch)
        if config.positions != "rope":
            self.pos_embed: Tensor
            self.register_buffer("pos_embed", torch.empty(1, config.pos_embed_max_size**2, dim))
        self.init_weights()

    def _block(self, i: int) -> JointBlock:
        c = self.config
        shape = (c.width, c.num_heads, c.mlp_ratio, c.qk_norm)
        img = Stream(*shape, dual=i in c.dual_attention_layers)
        return JointBlock({"img": img, "txt": Stream(*shape, pre_only=i == c.depth - 1)})

    def init_weights(self) -> None:
        """DiT's (see `init_linear`), with a zero output layer and small weights in the embeddings of time and text; and
        SD3's positions.
        """
        init_linear(self)
        for embedding in (self.time_in, self.pooled_in):
            nn.init.normal_(embedding.fc1.weight, std=0.02)
            nn.init.normal_(embedding.fc2.weight, std=0.02)
        nn.init.zeros_(self.patch_out.weight)
        init_positions(self)

    def forward(
        self,
        x_t: Tensor | Sequence[Tensor],
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        context_mask: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Any:
        """Velocity at x_t (B, C, h, w), shaped like it.

        t (B,) in [0, 1], 0 = data; context (B, L, context_dim) text tokens; pooled (B, pooled_dim) text vector;
        context_mask (B, L) boolean, True where a text token is real (None: all are); skip_layers: blocks, from 0, to
        leave out, for skip-layer guidance. x_t may be a list of B latents (C, h, w) of any sizes: all tokens are then
        packed in one row without padding, and a list is returned, with the same numbers as one by one. Raises
        ValueError for shapes that do not fit.
        """
        self._check(x_t, t, context, pooled, context_mask)
        self.check_layers(skip_layers)
        context_mask = None if context_mask is None else context_mask.bool()
        silu_c = F.silu(self.time_in(t) + self.pooled_in(pooled))
        if not isinstance(x_t, Tensor):
            mask = (
                None if context_mask is None or context_mask.is_meta else context_mask
            )  # a meta tensor has no values: take all as real
            return self._packed(list(x_t), silu_c, context, mask, skip_layers)
        (img, rotary), mask = self._embed(x_t), key_mask(self._num_tokens(x_t), context_mask)
        img = self._run_blocks([img, self.context_in(context)], [silu_c] * 2, mask, [rotary, None], skip_layers)
        return unpatchify(self._patches_out(img, silu_c), self.config.patch_size, *x_t.shape[-2:])

    def _packed(
        self, latents: list[Tensor], silu_c: Tensor, context: Tensor, real: Tensor | None, skip_layers: Collection[int]
    ) -> list[Tensor]:
        """`forward` without padding: text is packed into one row, and so are images unless all have one size."""
        counts = [self._num_tokens(x) for x in latents]
        lengths = [context.shape[1]] * len(latents) if real is None else real.sum(1).tolist()
        txt = self.context_in(context.flatten(0, 1) if real is None else context[real])[None]
        one_size = len({x.shape for x in latents}) == 1
        if one_size:
            img, rotary = self._embed(torch.stack(latents))
        else:
            img, rotary = self._embed_row(latents)
        img_c: Any = silu_c if one_size else _per_token(silu_c, counts)
        conditions = [img_c, _per_token(silu_c, lengths)]
        mask = Pairs(tuple(counts), tuple(lengths), txt.device)
        img = self._run_blocks([img, txt], conditions, mask, [rotary, None], skip_layers)
        patches, p = self._patches_out(img, img_c), self.config.patch_size
        if one_size:
            return list(unpatchify(patches, p, *latents[0].shape[-2:]))
        parts = zip(patches.split(counts, dim=1), latents, strict=True)
        return [unpatchify(part, p, *latent.shape[-2:])[0] for part, latent in parts]

    def _num_tokens(self, x_t: Tensor) -> int:
        return x_t.shape[-2] * x_t.shape[-1] // self.config.patch_size**2

    def _embed(self, x_t: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Latents of one size to tokens (B, N, D) with positions added, and the rotary embedding, if there is one."""
        img = self.patch_in(patchify(x_t, self.config.patch_size))
        table, rotary = self._positions(x_t)
        return img if table is None else img + table.to(img.dtype), rotary

    def _embed_row(self, latents: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The same for latents of several sizes, packed in one row (1, S, D)."""
        img = self.patch_in(torch.cat([patchify(x[None], self.config.patch_size) for x in latents], dim=1))
        positions = {x.shape: self._positions(x) for x in latents}  # computed once per size
        tables, rotaries = zip(*(positions[x.shape] for x in latents), strict=True)
        img = img if tables[0] is None else img + torch.cat(tables, dim=1).to(img.dtype)
        if rotaries[0] is None:
            return img, None
        return img, (torch.cat([cos for cos, _ in rotaries]), torch.cat([sin for _, sin in rotaries]))

    def _positions(self, x_t: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Sin-cos positions (1, N, D) and rotary embedding for the size of x_t; None for what the model has not."""
        kind, p = self.config.positions, self.config.patch_size
        rows, columns = x_t.shape[-2] // p, x_t.shape[-1] // p
        table = None
        if kind != "rope":
            whole = extended_positions(self.pos_embed, max(rows, columns), self.config.sample_size // p)
            table = crop_positions(whole, rows, columns)
        return table, None if kind == "sincos" else rotary_2d(rows, columns, self.config.head_dim, x_t.device)

    def _run_blocks(
        self, streams: list[Tensor], conditions: list[Any], mask: Any, rotaries: list[Any], skip: Collection[int]
    ) -> Tensor:
        """The image stream after all blocks."""
        streams = unviewed(streams)
        for i, block in enumerate(self.blocks):
            if i not in skip:
                streams = block(streams, conditions, mask, rotaries)
        return streams[0]

    def _patches_out(self, img: Tensor, silu_c: Tensor | PerToken) -> Tensor:
        """The image stream (B, N, D) to patches of the velocity (B, N, p*p*C)."""
        return self.patch_out(modulate(img, *self.modulation_out(silu_c)))

    def _check(
        self, x_t: Tensor | Sequence[Tensor], t: Tensor, context: Tensor, pooled: Tensor, context_mask: Tensor | None
    ) -> None:
        named: dict[str, Any] = {"t": t, "context": context, "pooled": pooled}
        named |= {f"x_t[{i}]": x for i, x in enumerate(x_t)} if isinstance(x_t, list | tuple) else {"x_t": x_t}
        if context_mask is not None:
            named["context_mask"] = context_mask
        if wrong := [f"{name} is a {type(x).__name__}" for name, x in named.items() if not isinstance(x, Tensor)]:
            raise ValueError(f"{wrong[0]}, expected a tensor")
        c, batch, dense = self.config, len(x_t), isinstance(x_t, Tensor)
        for x in [x_t] if isinstance(x_t, Tensor) else x_t:
            if x.ndim != (4 if dense else 3) or x.shape[-3] != c.in_channels:
                form = f"({'B, ' if dense else ''}{c.in_channels}, h, w)"
                raise ValueError(f"x_t has shape {tuple(x.shape)}, expected {form}")
            patch_grid("x_t", x.shape[-2:], c.patch_size)
        if not batch:
            raise ValueError("x_t holds no image")
        if t.shape != (batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}, expected ({batch},): one time in [0, 1] per sample")
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != c.context_dim:
            raise ValueError(f"context has shape {tuple(context.shape)}, expected ({batch}, L, {c.context_dim})")
        if pooled.shape != (batch, c.pooled_dim):
            raise ValueError(f"pooled has shape {tuple(pooled.shape)}, expected ({batch}, {c.pooled_dim})")
        if context_mask is not None and context_mask.shape != context.shape[:2]:
            raise ValueError(f"context_mask has shape {tuple(context_mask.shape)}, expected {tuple(context.shape[:2])}")

    def check_layers(self, skip_layers: Collection[int]) -> None:
        """Raises ValueError for layers to skip that do not exist."""
        if unknown := [i for i in skip_layers if not 0 <= i < self.config.depth]:
            raise ValueError(f"skip_layers names blocks {unknown}, but there are blocks 0 to {self.config.depth - 1}")

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_in.weight.device


def _per_token(silu_c: Tensor, counts: list[int]) -> PerToken:
    """Conditioning (B, D) for tokens packed in one row, `counts` of each sample."""
    numbers, repeats = torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu")
    rows = torch.repeat_interleave(numbers, repeats)
    return PerToken(silu_c, rows.to(silu_c.device))
