"""MMDiT: the multimodal diffusion transformer of SD3 and SD3.5 (Esser et al. 2024, arXiv 2403.03206).

Two streams, image patches and text tokens, with their own weights and one attention over both; time and pooled text
modulate every block. Given noised latents x_t it predicts the velocity v = eps - x_0.

Shape letters: B batch, C channels, h w latent sides, N image tokens, L text tokens, D width.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.attention import key_mask
from mmdit.blocks import JointBlock, Modulation, Stream, init_linear, modulate
from mmdit.config import MMDiTConfig
from mmdit.embeddings import (
    TimeEmbedding,
    VectorEmbedding,
    crop_positions,
    extended_positions,
    patchify,
    position_table,
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
            table = position_table(dim, config.pos_embed_max_size, max(1, config.sample_size // config.patch_size))
            self.pos_embed: Tensor
            self.register_buffer("pos_embed", table)
        self.init_weights()

    def _block(self, i: int) -> JointBlock:
        c = self.config
        shape = (c.width, c.num_heads, c.mlp_ratio, c.qk_norm)
        img = Stream(*shape, dual=i in c.dual_attention_layers)
        return JointBlock({"img": img, "txt": Stream(*shape, pre_only=i == c.depth - 1)})

    def init_weights(self) -> None:
        """DiT's (see `init_linear`), with a zero way out, and time and text small, so that modulations start gently."""
        init_linear(self)
        for embedding in (self.time_in, self.pooled_in):
            nn.init.normal_(embedding.fc1.weight, std=0.02)
            nn.init.normal_(embedding.fc2.weight, std=0.02)
        nn.init.zeros_(self.patch_out.weight)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        context_mask: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """Velocity at x_t (B, C, h, w), shaped like it.

        t (B,) in [0, 1], 0 = data; context (B, L, context_dim) text tokens; pooled (B, pooled_dim) text vector;
        context_mask (B, L) boolean, True where a text token is real (None: all are); skip_layers: blocks, from 0, that
        are passed over, for guidance by a weaker model. Raises ValueError for shapes that do not fit.
        """
        self._check(x_t, t, context, pooled, context_mask)
        p, (height, width) = self.config.patch_size, x_t.shape[-2:]
        rows, columns = height // p, width // p
        img = self.patch_in(patchify(x_t, p))
        rotaries = None
        if self.config.positions != "rope":
            table = extended_positions(self.pos_embed, max(rows, columns), self.config.sample_size // p)
            img = img + crop_positions(table, rows, columns).to(img.dtype)
        if self.config.positions != "sincos":
            rotaries = [rotary_2d(rows, columns, self.config.head_dim, x_t.device), None]
        txt = self.context_in(context)
        silu_c = F.silu(self.time_in(t) + self.pooled_in(pooled))
        mask = key_mask(rows * columns, context_mask)
        streams = [img, txt]
        for i, block in enumerate(self.blocks):
            if i in skip_layers:
                continue
            streams = block(streams, silu_c, mask, rotaries)
        shift, scale = self.modulation_out(silu_c)
        return unpatchify(self.patch_out(modulate(streams[0], shift, scale)), p, height, width)

    def _check(self, x_t: Tensor, t: Tensor, context: Tensor, pooled: Tensor, context_mask: Tensor | None) -> None:
        c, batch = self.config, x_t.shape[0]
        if x_t.ndim != 4 or x_t.shape[1] != c.in_channels:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected (B, {c.in_channels}, h, w)")
        if x_t.shape[2] % c.patch_size or x_t.shape[3] % c.patch_size:
            raise ValueError(
                f"x_t is {x_t.shape[2]} x {x_t.shape[3]}, both sides must divide by the patch ({c.patch_size})"
            )
        if t.shape != (batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}, expected ({batch},): one time in [0, 1] a sample")
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != c.context_dim:
            raise ValueError(f"context has shape {tuple(context.shape)}, expected ({batch}, L, {c.context_dim})")
        if pooled.shape != (batch, c.pooled_dim):
            raise ValueError(f"pooled has shape {tuple(pooled.shape)}, expected ({batch}, {c.pooled_dim})")
        if context_mask is not None and context_mask.shape != context.shape[:2]:
            raise ValueError(f"context_mask has shape {tuple(context_mask.shape)}, expected {tuple(context.shape[:2])}")

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_in.weight.device
