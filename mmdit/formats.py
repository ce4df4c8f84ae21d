"""Weights in the formats of others: diffusers' `SD3Transformer2DModel` to ours and back.

Our state dict differs from diffusers' in three ways: names; queries, keys and values are one fused matrix here; the
last modulations are (shift, scale) here, as in Stability's layout, and (scale, shift) there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdit.config import MMDiTConfig

_CONFIG_KEYS = (
    "in_channels",
    "patch_size",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "sample_size",
    "pos_embed_max_size",
)
_TOP = {
    "patch_in": "pos_embed.proj",
    "context_in": "context_embedder",
    "time_in.fc1": "time_text_embed.timestep_embedder.linear_1",
    "time_in.fc2": "time_text_embed.timestep_embedder.linear_2",
    "pooled_in.fc1": "time_text_embed.text_embedder.linear_1",
    "pooled_in.fc2": "time_text_embed.text_embedder.linear_2",
    "modulation_out": "norm_out.linear",
    "patch_out": "proj_out",
}
_IMG = {
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
}
_TXT = {
    "modulation": "norm1_context.linear",
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.q_norm": "attn.norm_added_q",
    "attn.k_norm": "attn.norm_added_k",
    "attn.out": "attn.to_add_out",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}


def layer_names(config: MMDiTConfig) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Every layer's name here and in diffusers; layers that the config does not have are among them."""
    yield from _TOP.items()
    for i in range(config.depth):
        for stream, table in (("img", _IMG), ("txt", _TXT)):
            for ours, theirs in table.items():
                theirs = (theirs,) if isinstance(theirs, str) else theirs
                full = tuple(f"transformer_blocks.{i}.{name}" for name in theirs)
                yield f"blocks.{i}.{stream}.{ours}", full if len(full) > 1 else full[0]


def _swapped(name: str, config: MMDiTConfig) -> bool:
    return name in ("modulation_out", f"blocks.{config.depth - 1}.txt.modulation")


def _swap(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


def from_diffusers(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """Our state dict from that of a `SD3Transformer2DModel` of the same config.

    A tensor that is missing there is missing here, and `assign_weights` says so; ValueError for one that is not known.
    """
    out: dict[str, Tensor] = {}
    known = {"pos_embed.pos_embed"}
    if "pos_embed.pos_embed" in state:
        out["pos_embed"] = state["pos_embed.pos_embed"]
    for ours, theirs in layer_names(config):
        for leaf in ("weight", "bias"):
            parts = [f"{name}.{leaf}" for name in ([theirs] if isinstance(theirs, str) else theirs)]
            known.update(parts)
            if not all(part in state for part in parts):
                continue
            tensor = torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
            if tensor.ndim == 4:  # a convolution with one step a patch is a linear layer on the patch
                tensor = tensor.flatten(1)
            out[f"{ours}.{leaf}"] = _swap(tensor) if _swapped(ours, config) else tensor
    if unknown := sorted(state.keys() - known):
        raise ValueError(
            f"{len(unknown)} tensors are not those of this SD3Transformer2DModel: {', '.join(unknown[:4])}"
        )
    return out


def to_diffusers(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The state dict of a `SD3Transformer2DModel` from ours; the inverse of `from_diffusers`, bit for bit."""
    if config.positions != "sincos":
        raise ValueError(
            f"diffusers' SD3Transformer2DModel knows sincos positions only, this model has {config.positions}"
        )
    out = {"pos_embed.pos_embed": state["pos_embed"]}
    for ours, theirs in layer_names(config):
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" not in state:
                continue
            tensor = state[f"{ours}.{leaf}"]
            if _swapped(ours, config):
                tensor = _swap(tensor)
            if ours == "patch_in" and leaf == "weight":
                tensor = tensor.unflatten(1, (config.in_channels, config.patch_size, config.patch_size))
            names = (theirs,) if isinstance(theirs, str) else theirs
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                out[f"{name}.{leaf}"] = part.contiguous()
    return out


def config_from_diffusers(config: Mapping[str, Any]) -> MMDiTConfig:
    """Our config from the `config.json` of a `SD3Transformer2DModel`. Raises ValueError where a key is missing."""
    missing = [key for key in _CONFIG_KEYS if key not in config]
    if missing:
        raise ValueError(f"the config of the SD3Transformer2DModel lacks {', '.join(missing)}")
    return MMDiTConfig(
        in_channels=config["in_channels"],
        patch_size=config["patch_size"],
        depth=config["num_layers"],
        num_heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        context_dim=config["joint_attention_dim"],
        pooled_dim=config["pooled_projection_dim"],
        qk_norm=config.get("qk_norm"),
        dual_attention_layers=tuple(config.get("dual_attention_layers") or ()),
        sample_size=config["sample_size"],
        pos_embed_max_size=config["pos_embed_max_size"],
    )


def config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """Arguments of `SD3Transformer2DModel` for our config. Raises ValueError for what diffusers cannot express."""
    if config.positions != "sincos" or config.mlp_ratio != 4:
        raise ValueError(
            f"diffusers' SD3Transformer2DModel has sincos positions and mlp_ratio 4; this model has {config.positions} "
            f"and {config.mlp_ratio}"
        )
    return dict(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim,
        out_channels=config.in_channels,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_layers,
        qk_norm=config.qk_norm,
    )
