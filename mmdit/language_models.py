"""Language models in Hugging Face's format that a `Transfusion` can represent exactly, and their tensors by our names.

GPT-NeoX (Black et al. 2022, arXiv 2204.06745) if it has the form of our block: sequential residuals, the tanh form of
GELU, and rotary positions in half of each head's channels. Its queries, keys and values are interleaved head by head,
and its rotary channels are the first half of a head, where our pairs span the whole head.

Llama, Mistral without a sliding window, and Qwen2 as streams of `llama.py`.

Shape letters: V vocabulary, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.blocks import EPS
from mmdit.config import LlamaConfig
from mmdit.files import read_folder
from mmdit.weights_io import read_json

Fields = Mapping[str, Any]
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
IGNORED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers in older files


class LanguageModel(NamedTuple):
    """A model on disk: its kind; `needs`, the config fields that a trunk must have for it; `ends`, its embedding, head
    (V, D) and final norm by our names; and the tensors of each block by their names inside a stream.
    """

    kind: str
    needs: dict[str, Any]
    ends: dict[str, Tensor]
    blocks: list[dict[str, Tensor]]


class _Family(NamedTuple):
    allowed: dict[str, tuple[Any, tuple[Any, ...]]]  # of each config field its default, and the supported values
    needs: Callable[[Fields], dict[str, Any]]  # `LanguageModel.needs` from a supported config
    ends: dict[str, str]
    prefix: str
    block: Callable[[dict[str, Tensor], Fields], dict[str, Tensor]]


def read_language_model(folder: Path) -> LanguageModel:
    """The model in a folder that `save_pretrained` wrote.

    Raises ValueError naming config fields that our blocks cannot represent, and tensors that are missing or unknown.
    """
    family, config = _supported(folder)
    state = dict(read_folder(folder, "model"))
    ends = {ours: state.pop(theirs) for ours, theirs in family.ends.items() if theirs in state}
    if "head.weight" not in ends and config.get("tie_word_embeddings", True):
        ends["head.weight"] = ends.get("embed.weight", torch.empty(0))
    layers: list[dict[str, Tensor]] = [{} for _ in range(config["num_hidden_layers"])]
    for name in list(state):
        number, _, rest = name.removeprefix(family.prefix).partition(".")
        if name.endswith(IGNORED):
            del state[name]
        elif name.startswith(family.prefix) and number.isdigit() and int(number) < len(layers):
            layers[int(number)][rest] = state.pop(name)
    try:
        blocks = [family.block(layer, config) for layer in layers]
    except KeyError as error:
        raise ValueError(f"{folder} lacks the tensor {error.args[0]} of a layer: the files are not whole") from error
    unknown = [*state, *(name for layer in layers for name in layer)]
    if unknown or len(ends) < len(family.ends):
        missing = [theirs for ours, theirs in family.ends.items() if ours not in ends]
        raise ValueError(
            f"{folder} holds no complete {config['model_type']}: missing {missing[:4]}, unknown {unknown[:4]}"
        )
    return LanguageModel(config["model_type"], family.needs(config), ends, blocks)


def language_needs(folder: Path) -> dict[str, Any]:
    """The config fields that a trunk must have for the model in a folder; raises as `read_language_model` does."""
    family, config = _supported(folder)
    return family.needs(config)


def _supported(folder: Path) -> tuple[_Family, dict[str, Any]]:
    config = _normal(read_json(folder / "config.json"))
    if config.get("model_type") not in _FAMILIES:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r}; language models that can be started from are "
            f"{', '.join(_FAMILIES)}"
        )
    if missing := [key for key in _SIZES if key not in config]:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}: the file is not whole")
    family = _FAMILIES[config["model_type"]]
    values = {key: config.get(key, default) for key, (default, _) in family.allowed.items()}
    wrong = [
        f"{key} is {values[key]!r}, supported: {' or '.join(map(repr, allowed))}"
        for key, (_, allowed) in family.allowed.items()
        if values[key] not in allowed
    ]
    if wrong:
        raise ValueError(f"{folder} cannot be held exactly, so it is not taken: {'; '.join(wrong)}")
    return family, config


def _normal(config: Any) -> dict[str, Any]:
    """The config with its rotary fields under the same names for every version of transformers."""
    if not isinstance(config, dict):
        return {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {
        "rope_theta": rope.get("rope_theta", config.get("rotary_emb_base")),
        "rotary_pct": rope.get("partial_rotary_factor", config.get("partial_rotary_factor")),
        "rope_type": rope.get("rope_type", rope.get("type")),
        "rope": rope,
    }
    return {**config, **{name: value for name, value in found.items() if value is not None}}


def _shape(config: Fields) -> dict[str, Any]:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, head_dim):
        raise ValueError(
            f"head_dim is {config['head_dim']}, supported: hidden_size / num_attention_heads = {head_dim}, as a trunk's"
        )
    return {
        "vocab_size": config["vocab_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "head_dim": head_dim,
        "positions": "rope",
    }


# --- GPT-NeoX -----------------------------------------------------------------------------------------------------


def _neox_needs(config: Fields) -> dict[str, Any]:
    return {
        **_shape(config),
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "qk_norm": None,
        "llama": None,
    }


def _neox_block(layer: dict[str, Tensor], config: Fields) -> dict[str, Tensor]:
    heads = config["num_attention_heads"]
    out = {
        "modulation.shift": torch.stack([layer.pop(f"{norm}.bias") for norm in _NEOX_NORMS]),
        "modulation.scale": torch.stack([layer.pop(f"{norm}.weight") for norm in _NEOX_NORMS]) - 1,
    }
    for leaf in ("weight", "bias"):
        fused = layer.pop(f"attention.query_key_value.{leaf}").unflatten(0, (heads, 3, -1))
        q, k, v = fused.unbind(1)  # each (H, d, ...)
        out[f"attn.qkv.{leaf}"] = torch.cat([_paired(q), _paired(k), v]).flatten(0, 1)
        for ours, theirs in _NEOX_LINEAR.items():
            out[f"{ours}.{leaf}"] = layer.pop(f"{theirs}.{leaf}")
    return out


def _paired(x: Tensor) -> Tensor:
    """Reorder the channels of heads (H, d, ...): rotary pairs (i, i + d/4) of the first half become (i, i + d/2)."""
    a, b, c, e = x.chunk(4, dim=1)
    return torch.cat([a, c, b, e], dim=1)


_NEOX_NORMS = ("input_layernorm", "post_attention_layernorm")
_NEOX_LINEAR = {"attn.out": "attention.dense", "mlp.fc1": "mlp.dense_h_to_4h", "mlp.fc2": "mlp.dense_4h_to_h"}


# --- Llama, Mistral, Qwen2 ----------------------------------------------------------------------------------------


def _llama_needs(config: Fields) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    llama = LlamaConfig(
        hidden=config["intermediate_size"],
        num_kv_heads=config.get("num_key_value_heads") or heads,
        qkv_bias=config["model_type"] == "qwen2",
        eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=config.get("rope_theta", 10_000.0),
        rope_scaling=tuple(config["rope"][key] for key in _LLAMA3) if config.get("rope_type") == "llama3" else None,
    )
    return {**_shape(config), "llama": llama}


def _llama_block(layer: dict[str, Tensor], config: Fields) -> dict[str, Tensor]:
    out = {ours: layer.pop(theirs) for ours, theirs in _LLAMA_LAYER.items()}
    for leaf in ("weight", "bias") if config["model_type"] == "qwen2" else ("weight",):
        out[f"qkv.{leaf}"] = torch.cat([layer.pop(f"self_attn.{part}_proj.{leaf}") for part in "qkv"])
    return out


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LLAMA_LAYER = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "out.weight": "self_attn.o_proj.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
}
_LLAMA = _Family(
    allowed={
        "hidden_act": ("silu", ("silu", "swish")),
        "attention_bias": (False, (False,)),
        "mlp_bias": (False, (False,)),
        "rotary_pct": (1.0, (1.0,)),
        "rope_type": ("default", ("default", "llama3")),
    },
    needs=_llama_needs,
    ends={
        "embed.weight": "model.embed_tokens.weight",
        "norm_out.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    prefix="model.layers.",
    block=_llama_block,
)
_FAMILIES = {
    "gpt_neox": _Family(
        allowed={
            "use_parallel_residual": (True, (False,)),
            "attention_bias": (True, (True,)),
            "hidden_act": ("gelu", TANH_GELU),
            "layer_norm_eps": (1e-5, (EPS,)),
            "rotary_pct": (0.25, (0.5,)),
            "rope_theta": (10_000, (10_000,)),
            "rope_type": ("default", ("default",)),
        },
        needs=_neox_needs,
        ends={
            "embed.weight": "gpt_neox.embed_in.weight",
            "norm_out.weight": "gpt_neox.final_layer_norm.weight",
            "norm_out.bias": "gpt_neox.final_layer_norm.bias",
            "head.weight": "embed_out.weight",
        },
        prefix="gpt_neox.layers.",
        block=_neox_block,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA._replace(allowed=_LLAMA.allowed | {"sliding_window": (4096, (None,))}),
    "qwen2": _LLAMA._replace(allowed=_LLAMA.allowed | {"use_sliding_window": (False, (False,))}),
}
