"""Model configs of other formats: diffusers' `config.json`, and the shapes of the tensors in an SD3 file, which has no
config. Names and layout of the tensors are in `mmdit/layouts.py`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmdit.config import MMDiTConfig

_KEYS = {
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "context_dim": "joint_attention_dim",
    "pooled_dim": "pooled_projection_dim",
    "sample_size": "sample_size",
    "pos_embed_max_size": "pos_embed_max_size",
}
"""Fields of our config, and diffusers' names for them."""


def config_from_diffusers(config: Mapping[str, Any]) -> MMDiTConfig:
    """Our config from the `config.json` of a `SD3Transformer2DModel`. Raises ValueError if a key is missing."""
    if missing := [theirs for theirs in _KEYS.values() if theirs not in config]:
        raise ValueError(f"the config of the SD3Transformer2DModel lacks {', '.join(missing)}")
    dual = config.get("dual_attention_layers") or ()
    shape = {ours: config[theirs] for ours, theirs in _KEYS.items()}
    return MMDiTConfig(**shape, qk_norm=config.get("qk_norm"), dual_attention_layers=dual)


def config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """Arguments of `SD3Transformer2DModel` for our config. Raises ValueError for what diffusers cannot express."""
    if config.positions != "sincos" or config.mlp_ratio != 4:
        raise ValueError(
            f"diffusers' SD3Transformer2DModel has sincos positions and mlp_ratio 4; this model has {config.positions} "
            f"and {config.mlp_ratio}"
        )
    return {theirs: getattr(config, ours) for ours, theirs in _KEYS.items()} | {
        "sample_size": config.sample_size // config.patch_size * config.patch_size,  # the size its pipelines draw
        "caption_projection_dim": config.width,
        "out_channels": config.in_channels,
        "dual_attention_layers": config.dual_attention_layers,
        "qk_norm": config.qk_norm,
    }


_PATCH_IN, _TABLE, _CONTEXT_IN = "x_embedder.proj.weight", "pos_embed", "context_embedder.weight"
_POOLED_IN, _MLP, _Q_NORM = "y_embedder.mlp.0.weight", "joint_blocks.0.x_block.mlp.fc1.weight", ".x_block.attn.ln_q."


def config_from_sd3(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> MMDiTConfig:
    """Our config from the shapes of tensors in the original layout, without a prefix in their names.

    Two fields do not show in shapes: head_dim, unless there is QK-norm, and sample_size. They are SD3's 64 and 128,
    unless the file is one of ours, with metadata that states them. Raises ValueError if a tensor that the config is
    read from is missing.
    """
    if missing := [name for name in (_PATCH_IN, _TABLE, _CONTEXT_IN, _POOLED_IN, _MLP) if name not in state]:
        raise ValueError(f"the shape of the model cannot be told: {', '.join(missing)} missing")
    if state[_PATCH_IN].ndim != 4:
        raise ValueError(f"{_PATCH_IN} has shape {tuple(state[_PATCH_IN].shape)}, expected (width, channels, p, p)")
    stated = json.loads(metadata.get("mmdit", "{}"))
    if not isinstance(stated, dict) or any(type(value) is not int or value < 1 for value in stated.values()):
        raise ValueError(f"its metadata say {stated!r} of the model, expected numbers")
    width, channels, patch, _ = state[_PATCH_IN].shape
    side, norms = math.isqrt(state[_TABLE].shape[-2]), [state[name] for name in state if _Q_NORM in name]
    head_dim = norms[0].shape[0] if norms else stated.get("head_dim", 64)
    if width % head_dim:
        raise ValueError(f"the width {width} is no multiple of the head width {head_dim}: not a model of SD3's kind")
    hidden = state[_MLP].shape[0]
    return MMDiTConfig(
        in_channels=channels,
        patch_size=patch,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("joint_blocks.")),
        num_heads=width // head_dim,
        head_dim=head_dim,
        mlp_ratio=hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        context_dim=state[_CONTEXT_IN].shape[1],
        pooled_dim=state[_POOLED_IN].shape[1],
        qk_norm="rms_norm" if norms else None,
        dual_attention_layers=tuple(sorted({int(name.split(".")[1]) for name in state if ".attn2." in name})),
        sample_size=stated.get("sample_size", min(128, side * patch)),
        pos_embed_max_size=side,
    )


def metadata_for_sd3(config: MMDiTConfig) -> dict[str, str]:
    """The metadata of a file of ours, which `config_from_sd3` reads and other programs ignore."""
    stated = {"head_dim": config.head_dim, "sample_size": config.sample_size}
    return {"format": "pt", "mmdit": json.dumps(stated)}
