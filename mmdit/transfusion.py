"""Transfusion: one transformer that reads and writes text and images (Zhou et al. 2024, arXiv 2408.11039).

Text is learnt by next-token prediction and images by the velocity of a rectified flow, in one sequence and one trunk:
the MMDiT's blocks, with the mask of `sequences.py`. Every image has a time of its own, 0 if it is clean; text is not
modulated by it.

Shape letters: T text tokens, I images, N patches of all images, S = N + T, D width, V vocabulary, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.attention import Mask, current_backend
from mmdit.blocks import EPS, JointBlock, Modulation, PerToken, Stream, init_linear, modulate, unviewed
from mmdit.cache import Cache, Reading
from mmdit.codecs import CODECS, Skips
from mmdit.config import TransfusionConfig
from mmdit.embeddings import TimeEmbedding, crop_positions, init_positions, rotary_mixed
from mmdit.llama import LlamaStream, rotary_llama
from mmdit.sequences import Layout, MixedBatch, Part, pack


class Document(NamedTuple):
    """The output for one document: `logits` (n, V), row k for what follows its k-th text token, BOI and EOI included;
    `v`, a velocity (C, h, w) for each of its images."""

    logits: Tensor
    v: list[Tensor]


@dataclass(frozen=True)
class MixedOutput:
    """The output for a batch: states (T, D), the text's hidden states before `head`, and v, a velocity (C, h, w) for
    each image.

    The logits of all tokens are the largest tensor of a step; `head(states[rows])` gives those of some tokens.
    """

    states: Tensor
    v: tuple[Tensor, ...]
    batch: MixedBatch
    head: nn.Linear

    @property
    def logits(self) -> Tensor:
        """(T, V): row k predicts what follows text token k."""
        return self.head(self.states)

    def per_document(self) -> list[Document]:
        """The output of each document, in order."""
        counts = torch.bincount(self.batch.document).tolist()
        images = self.batch.document[self.batch.opened].tolist()
        return [
            Document(logits, [v for v, of in zip(self.v, images, strict=True) if of == d])
            for d, logits in enumerate(self.logits.split(counts))
        ]


class Transfusion(nn.Module):
    """The trunk over packed documents: `model(batch, t)` is a `MixedOutput`; `model.generate` continues documents."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.width
        self.embed = nn.Embedding(config.vocab_size, dim)
        patch_in, patch_out = CODECS[config.codec]
        self.patch_in = patch_in(config)
        self.time_in = TimeEmbedding(dim)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(dim, eps=EPS) if config.llama is None else nn.RMSNorm(dim, eps=config.llama.eps)
        self.modulation_out = Modulation(dim, 2)
        self.patch_out = patch_out(config)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        if config.positions != "rope":
            self.pos_embed: Tensor
            self.register_buffer("pos_embed", torch.empty(1, config.pos_embed_max_size**2, dim))
        self.init_weights()

    def _block(self) -> JointBlock:
        c = self.config

        def stream(modulated: bool) -> nn.Module:
            if c.llama is not None and not modulated:
                return LlamaStream(c.width, c.num_heads, c.llama)
            return Stream(c.width, c.num_heads, c.mlp_ratio, c.qk_norm, modulated=modulated)

        if c.weights == "shared":
            return JointBlock({"all": stream(c.time != "added")})
        return JointBlock({"img": stream(c.time != "added"), "txt": stream(c.time == "all")})

    def init_weights(self) -> None:
        """As in `MMDiT`, with token embeddings and head small too."""
        init_linear(self)
        for weight in (self.time_in.fc1.weight, self.time_in.fc2.weight, self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        self.patch_out.init_weights()
        init_positions(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of times and of a solver's states: at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def pack(self, documents: Sequence[Sequence[Part]]) -> MixedBatch:
        """Documents of ids and latents as one batch (`sequences.pack`), with this model's tokens around images."""
        return pack(documents, self.config.boi, self.config.eoi, self.config.sizes, self.config.patch_size)

    def cache(self, num_rows: int) -> Cache:
        """An empty cache for `num_rows` documents."""
        c = self.config
        return Cache(num_rows, c.depth, c.num_heads, c.head_dim, self.head.weight)

    def forward(self, batch: MixedBatch, t: Tensor | None = None, past: Reading | None = None) -> MixedOutput:
        """Text states and velocities of documents whose latents are x_t.

        t (I,) in [0, 1], 0 = clean: one time per image, in reading order; None: all are clean. past: the cached context
        that the documents continue (see cache.py). Raises ValueError for another number of times, tokens beyond the
        vocabulary, other channels, and sides the patch does not divide.
        """
        self._check(batch, t)
        c, images = self.config, len(batch.latents)
        layout = batch.layout(c.patch_size, None if past is None else past.steps)
        span = layout.span[: layout.num_patches]
        # bfloat16 keeps three digits of 1000 t, too few for the sinusoids.
        t = torch.zeros(images, device=batch.ids.device) if t is None else t.to(self.state_dtype)
        time = self.time_in(t)
        groups = _groups(batch)
        img, skips = self._embed_images(batch, groups, F.silu(time))
        if c.positions != "rope" and images:
            img = img + torch.cat([crop_positions(self.pos_embed, *shape)[0] for shape in layout.shapes]).to(img.dtype)
        if c.time == "added":
            img = img + time[span]
        txt = self.embed(batch.ids)
        conditions = self._conditions(batch, span, F.silu(time))
        rotary = self._rotary(layout.coordinates) if c.positions != "sincos" else None
        self._check_length(layout, past)
        cut = layout.num_patches  # patches come before text
        if c.weights == "shared":
            streams, rotaries = [torch.cat([img, txt])[None]], [rotary]
        else:
            streams = [img[None], txt[None]]
            rotaries = [None, None] if rotary is None else [(rotary[0][:cut], rotary[1][:cut]),
                                                            (rotary[0][cut:], rotary[1][cut:])]  # fmt: skip
        streams = unviewed(streams)
        for block, mask in zip(self.blocks, self._masks(layout, past), strict=True):
            streams = block(streams, conditions, mask, rotaries)
        x = torch.cat([stream[0] for stream in streams])
        patches = modulate(x[None, :cut], *self.modulation_out(PerToken(F.silu(time), span)))[0]
        v = self._velocities(patches, batch, groups, F.silu(time), skips)
        return MixedOutput(self.norm_out(x[cut:]), v, batch, self.head)

    def generate(self, prompts: Sequence[Sequence[Tensor]], **options: Any) -> list[Any]:
        """Continue prompts with text and images: see `generate.generate`."""
        from mmdit.generate import generate

        return generate(self, prompts, **options)

    def _masks(self, layout: Layout, past: Reading | None) -> Sequence[Mask]:
        """The attention mask of each block."""
        rule = self.config.attention
        if past is not None:
            return past.attending(layout.attending(rule), layout)
        mask = layout.blocks(rule) if current_backend() == "flex" else layout.attending(rule)
        return [mask] * self.config.depth

    def _conditions(self, batch: MixedBatch, span: Tensor, silu_c: Tensor) -> list[PerToken | None]:
        """The conditioning of each stream's tokens; in a modulated stream, text without a time takes a row of zeros."""
        c = self.config
        if c.time == "added":
            return [None] * (1 if c.weights == "shared" else 2)
        if c.time == "all":
            text = batch.document  # each document has one image, of the same index
        else:
            silu_c = torch.cat([silu_c, silu_c.new_zeros(1, silu_c.shape[1])])
            text = torch.full_like(batch.ids, len(silu_c) - 1)
        if c.weights == "shared":
            return [PerToken(silu_c, torch.cat([span, text]))]
        return [PerToken(silu_c, span), PerToken(silu_c, text) if c.time == "all" else None]

    def _rotary(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.llama is not None:
            return rotary_llama(coordinates, self.config.head_dim, self.config.llama)
        return rotary_mixed(coordinates, self.config.head_dim)

    def _embed_images(self, batch: MixedBatch, groups: list[list[int]], silu_c: Tensor) -> tuple[Tensor, list[Skips]]:
        """Tokens (N, D) of all images in order, and the skip connections of each group of one size."""
        if not groups:
            return silu_c.new_zeros(0, self.config.width), []
        pairs = [
            self.patch_in(
                torch.stack([batch.latents[i] for i in group]).to(self.dtype), _rows_of(silu_c, group, groups)
            )
            for group in groups
        ]
        return torch.cat(_in_order([x for x, _ in pairs], groups)), [skips for _, skips in pairs]

    def _velocities(
        self, x: Tensor, batch: MixedBatch, groups: list[list[int]], silu_c: Tensor, skips: list[Skips]
    ) -> tuple[Tensor, ...]:
        """A velocity (C, h, w) for each image, from the patches' last states (N, D)."""
        states = x.split([latent[0].numel() // self.config.patch_size**2 for latent in batch.latents])
        v = []
        for group, own in zip(groups, skips, strict=True):
            height, width = batch.latents[group[0]].shape[1:]
            tokens = torch.stack([states[i] for i in group])
            v.append(self.patch_out(tokens, (height, width), _rows_of(silu_c, group, groups), own))
        return tuple(_in_order(v, groups))

    def _check_length(self, layout: Layout, past: Reading | None) -> None:
        lengths = torch.bincount(layout.document)
        longest = int((lengths if past is None else lengths + past.lengths).max())
        if longest > self.config.max_tokens:
            raise ValueError(
                f"a document of {longest} tokens, including patches, is longer than the model's limit of "
                f"{self.config.max_tokens} (max_tokens): cut it"
            )

    def _check(self, batch: MixedBatch, t: Tensor | None) -> None:
        c = self.config
        if not isinstance(batch, MixedBatch):
            raise ValueError(f"the batch is a {type(batch).__name__}, expected documents packed by model.pack")
        if t is not None and (not isinstance(t, Tensor) or t.shape != (len(batch.latents),)):
            found = f"has shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"is a {type(t).__name__}"
            raise ValueError(f"t {found}, expected a tensor ({len(batch.latents)},): one time per image")
        lowest, highest = (int(end) for end in batch.ids.aminmax())
        if lowest < 0 or highest >= c.vocab_size:
            raise ValueError(
                f"token {lowest if lowest < 0 else highest} is beyond the vocabulary of {c.vocab_size}: "
                "the tokenizer is of another model"
            )
        if (batch.boi, batch.eoi) != (c.boi, c.eoi):
            raise ValueError(
                f"images stand between tokens {batch.boi} and {batch.eoi}, this model's are {c.boi} and {c.eoi}: "
                "pack with model.pack"
            )
        if batch.latents and batch.latents[0].shape[0] != c.in_channels:
            raise ValueError(f"images have {batch.latents[0].shape[0]} channels, expected {c.in_channels}")
        if c.time == "all" and batch.document[batch.opened].tolist() != list(range(batch.num_documents)):
            raise ValueError('with time = "all" every document has one image')


def _groups(batch: MixedBatch) -> list[list[int]]:
    """The indices of images, grouped by their size."""
    groups: dict[torch.Size, list[int]] = {}
    for i, latent in enumerate(batch.latents):
        groups.setdefault(latent.shape, []).append(i)
    return list(groups.values())


def _rows_of(x: Tensor, group: list[int], groups: list[list[int]]) -> Tensor:
    """The group's rows of x (I, ...)."""
    return x if len(groups) == 1 else x[group]


def _in_order(parts: list[Tensor], groups: list[list[int]]) -> list[Tensor]:
    """The inverse of the grouping: one row per image, in order, from a tensor per group."""
    rows = {i: row for part, group in zip(parts, groups, strict=True) for i, row in zip(group, part, strict=True)}
    return [rows[i] for i in range(len(rows))]
