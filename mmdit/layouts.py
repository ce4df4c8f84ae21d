"""State dicts of an MMDiT in other layouts: diffusers' `SD3Transformer2DModel`, and the original one of SD3 and SD3.5
(github.com/Stability-AI/sd3-ref, sd3.5).

Our state dict differs from diffusers' in three ways: names; queries, keys and values are one fused matrix here; the
last modulations are (shift, scale) here, and (scale, shift) there. From the original layout it differs in names only.
In both, the patch embedding is a convolution with the patch as kernel and stride, here a linear layer on the patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.config import MMDiTConfig


class Place(NamedTuple):
    """The other layout's form of one of our tensors: split along its rows into tensors of these names, and, if swapped,
    with its halves exchanged.
    """

    names: tuple[str, ...]
    swapped: bool


@dataclass(frozen=True)
class Layout:
    """The names of layers: those outside the blocks, and those of a block's image and text stream. A tuple: q, k, v."""

    title: str
    pos_embed: str
    once: Mapping[str, str]
    block: str
    img: Mapping[str, str | tuple[str, ...]]
    txt: Mapping[str, str | tuple[str, ...]]
    swapped: bool
    """Whether the last modulations are (scale, shift)."""

    def places(self, config: MMDiTConfig) -> Iterator[tuple[str, Place]]:
        """Every tensor's name here and its place there, including tensors that this config does not have."""
        yield "pos_embed", Place((self.pos_embed,), False)
        layers: list[tuple[str, str | tuple[str, ...]]] = list(self.once.items())
        for i in range(config.depth):
            for stream, table in (("img", self.img), ("txt", self.txt)):
                for ours, names in table.items():
                    names = (names,) if isinstance(names, str) else names
                    layers.append((f"blocks.{i}.{stream}.{ours}", tuple(f"{self.block}.{i}.{name}" for name in names)))
        last = ("modulation_out", f"blocks.{config.depth - 1}.txt.modulation")
        for ours, names in layers:
            names = (names,) if isinstance(names, str) else names
            for leaf in ("weight", "bias"):
                place = Place(tuple(f"{name}.{leaf}" for name in names), self.swapped and ours in last)
                yield f"{ours}.{leaf}", place

    def take(self, state: dict[str, Tensor], config: MMDiTConfig) -> Iterator[tuple[str, Tensor]]:
        """Convert tensors to our layout, one by one. They are removed from `state`, which bounds the memory.

        A tensor that is missing there is missing here.
        """
        for ours, (names, swapped) in self.places(config):
            if not all(name in state for name in names):
                continue
            parts = [state.pop(name) for name in names]
            if swapped:
                parts = list(parts[0].chunk(2)[::-1])
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            yield ours, tensor.flatten(1) if ours == "patch_in.weight" else tensor

    def to_ours(self, state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
        """Our state dict from theirs. Raises ValueError for an unknown tensor; one that is missing there is missing
        here.
        """
        known = {name for _, place in self.places(config) for name in place.names}
        if unknown := sorted(state.keys() - known):
            raise ValueError(f"{len(unknown)} tensors are not those of {self.title}: {', '.join(unknown[:4])}")
        return dict(self.take(dict(state), config))

    def from_ours(self, state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
        """Their state dict from ours; the inverse of `to_ours`, bit for bit. Raises ValueError for rotary positions."""
        if config.positions != "sincos":
            raise ValueError(f"{self.title} knows sincos positions only, this model has {config.positions}")
        out: dict[str, Tensor] = {}
        for ours, (names, swapped) in self.places(config):
            if ours not in state:
                continue
            tensor = state[ours]
            if swapped:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if ours == "patch_in.weight":
                tensor = tensor.unflatten(1, (config.in_channels, config.patch_size, config.patch_size))
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                out[name] = part.contiguous()
        return out


DIFFUSERS = Layout(
    title="diffusers' SD3Transformer2DModel",
    pos_embed="pos_embed.pos_embed",
    once={
        "patch_in": "pos_embed.proj",
        "context_in": "context_embedder",
        "time_in.fc1": "time_text_embed.timestep_embedder.linear_1",
        "time_in.fc2": "time_text_embed.timestep_embedder.linear_2",
        "pooled_in.fc1": "time_text_embed.text_embedder.linear_1",
        "pooled_in.fc2": "time_text_embed.text_embedder.linear_2",
        "modulation_out": "norm_out.linear",
        "patch_out": "proj_out",
    },
    block="transformer_blocks",
    img={
        "modulation": "norm1.linear",
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.q_norm": "attn.norm_q",
        "attn.k_norm": "attn.norm_k",
        "attn.out": "attn.to_out.0",
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2.q_norm": "attn2.norm_q",
        "attn2.k_norm": "attn2.norm_k",
        "attn2.out": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    txt={
        "modulation": "norm1_context.linear",
        "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.q_norm": "attn.norm_added_q",
        "attn.k_norm": "attn.norm_added_k",
        "attn.out": "attn.to_add_out",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
    swapped=True,
)

_SD3_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "attn.qkv": "attn.qkv",
    "attn.q_norm": "attn.ln_q",
    "attn.k_norm": "attn.ln_k",
    "attn.out": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SD3_DUAL = {f"attn2{ours[4:]}": f"attn2{name[4:]}" for ours, name in _SD3_BLOCK.items() if ours.startswith("attn.")}

SD3 = Layout(
    title="the original layout of SD3",
    pos_embed="pos_embed",
    once={
        "patch_in": "x_embedder.proj",
        "context_in": "context_embedder",
        "time_in.fc1": "t_embedder.mlp.0",
        "time_in.fc2": "t_embedder.mlp.2",
        "pooled_in.fc1": "y_embedder.mlp.0",
        "pooled_in.fc2": "y_embedder.mlp.2",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "patch_out": "final_layer.linear",
    },
    block="joint_blocks",
    img={ours: f"x_block.{name}" for ours, name in (_SD3_BLOCK | _SD3_DUAL).items()},
    txt={ours: f"context_block.{name}" for ours, name in _SD3_BLOCK.items()},
    swapped=False,
)
