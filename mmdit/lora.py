"""LoRA fine-tuning (Hu et al. 2021, arXiv 2106.09685) by peft, in the file format of diffusers' SD3 pipeline.

    W + (alpha / rank) B A        A (rank, in), B (out, rank); B starts at zero

Only A and B are trained. Queries, keys and values are one matrix here and three in diffusers. Ours has one A, which is
written three times; three of theirs become one of three times the rank, with a block-diagonal B: the same function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.blocks import Modulation
from mmdit.layouts import DIFFUSERS
from mmdit.mapped import read_metadata, read_weights
from mmdit.model import MMDiT
from mmdit.weights_io import weights_writer, whole, write_aside

TARGETS = {"attention": "qkv|out", "all": "qkv|out|fc1|fc2"}
Pairs = dict[str, tuple[Tensor, Tensor]]


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, targets: Literal["attention", "all"] = "attention"
) -> None:
    """Add adapters to the linear layers of a trunk's blocks, and freeze everything else.

    alpha None: the rank, a scale of 1. Raises ValueError for a rank below 1, and if peft is not installed.
    """
    if type(rank) is not int or rank < 1 or targets not in TARGETS:
        raise ValueError(f"rank is {rank!r} and targets {targets!r}: expected at least 1, and one of {tuple(TARGETS)}")
    if alpha is not None and not (type(alpha) in (int, float) and 0 < alpha < float("inf")):
        raise ValueError(f"alpha is {alpha!r}, expected a number above 0")
    _inject(model, rf"blocks\.\d+\..*\.({TARGETS[targets]})", rank, alpha or rank, {})


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, and their names."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def draw_adapters(model: nn.Module) -> None:
    """Draw adapters that have no values yet, as `add_lora` draws them, with the same random numbers."""
    for _, layer in lora_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part["default"].reset_parameters()  # as their constructor does
        layer.reset_lora_parameters("default", True)


def lora_pairs(model: nn.Module) -> Pairs:
    """A and B of each adapted layer, on the CPU, with the scale multiplied into B. Of a sharded model all processes
    have to ask for them.
    """
    return {
        name: (
            whole(layer.lora_A["default"].weight).detach().cpu(),
            layer.scaling["default"] * whole(layer.lora_B["default"].weight).detach().cpu(),
        )
        for name, layer in lora_layers(model)
    }


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, by the names that it would have without them."""
    return {name.replace(".base_layer.", "."): x for name, x in model.state_dict().items() if ".lora_" not in name}


def merging(pairs: Pairs) -> Callable[[str, Tensor], Tensor]:
    """A function that adds the adapter of the layer that has one to a tensor on the CPU, given its name."""

    def merged(name: str, x: Tensor) -> Tensor:
        pair = pairs.get(name.removesuffix(".weight"))
        return x if pair is None else x + (pair[1] @ pair[0]).to(x)

    return merged


def merge_lora(model: nn.Module) -> None:
    """Merge the adapters into the weights, and remove them."""
    for name, layer in list(lora_layers(model)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for module in model.modules():
        module.__dict__.pop("peft_config", None)  # else peft warns of several adapters when the next one comes
    model.requires_grad_(True)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it would be after `merge_lora`, to be written; the model is not changed. Merged weights are on
    the CPU, for the model's device may have no room for them.
    """
    pairs = lora_pairs(model)
    merged, adapted = merging(pairs), {f"{name}.weight" for name in pairs}
    return {name: merged(name, x.cpu()) if name in adapted else x for name, x in base_state(model).items()}


def save_lora(model: MMDiT, path: str | Path) -> None:
    """Write the adapters as one safetensors file in diffusers' layout. Raises ValueError if there are none."""
    pairs = lora_pairs(model)
    if not pairs:
        raise ValueError("the model has no adapters: add_lora first")
    write_aside(Path(path), lora_writer(model, pairs))


def lora_writer(model: MMDiT, pairs: Pairs) -> Callable[[Path], object]:
    """For `write_all_aside`: what writes the adapters `lora_pairs` as `save_lora` does."""
    names, out = dict(_names(model)), {}
    for name, (a, b) in pairs.items():
        for key, part in zip(names[name], b.chunk(len(names[name])), strict=True):
            out[f"transformer.{key}.lora_A.weight"] = a.clone()
            out[f"transformer.{key}.lora_B.weight"] = part
    return weights_writer(out, {"format": "pt"})


def load_lora(model: MMDiT, path: str | Path) -> None:
    """Add the adapters of a file in diffusers' layout to a trunk, and freeze everything else.

    Raises ValueError, and leaves the model as it was, if a layer or a shape is not the trunk's.
    """
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already: merge_lora first")
    pairs = _fused(_read(Path(path)), model, str(path))
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    pattern = "|".join(name.replace(".", r"\.") for name in pairs)
    _inject(model, f"({pattern})", max(ranks.values()), max(ranks.values()), ranks)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            a, b = pairs[name]
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)


def _names(model: MMDiT) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of each of our layers, and of diffusers' layers for it."""
    for name, place in DIFFUSERS.places(model.config):
        if name.endswith(".weight"):
            yield name.removesuffix(".weight"), tuple(theirs.removesuffix(".weight") for theirs in place.names)


def _inject(model: nn.Module, target: str, rank: int, alpha: float, ranks: Mapping[str, int]) -> None:
    if find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install 'mmdit[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already: merge_lora first")
    per_layer = {f"^{name}$": value for name, value in ranks.items()}
    scale: Any = alpha  # peft declares an int, but any number works
    config = LoraConfig(
        r=rank, lora_alpha=scale, target_modules=target, rank_pattern=dict(per_layer), alpha_pattern=dict(per_layer)
    )
    inject_adapter_in_model(config, model)


def _read(path: Path) -> Pairs:
    """A and B by diffusers' name of the layer, with the file's scale multiplied into B."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in read_weights(path).items()}
    pairs, scale = Pairs(), _scale(path)
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        if f"{layer}.lora_B.weight" not in state:
            raise ValueError(f"{path} has lora_A but no lora_B of {layer}")
        a, b = state.pop(name), state.pop(f"{layer}.lora_B.weight")
        if a.ndim != 2 or b.ndim != 2 or not len(a):
            raise ValueError(f"{path} has no matrices of {layer}: {tuple(a.shape)} and {tuple(b.shape)}")
        alpha = state.pop(f"{layer}.alpha", None)
        pairs[layer] = a, b * (scale if alpha is None else alpha / len(a))
    if state or not pairs:
        found = f"{len(state)} tensors are no LoRA: {', '.join(sorted(state)[:3])}" if state else "it has no lora_A"
        raise ValueError(f"{path} is no LoRA file in diffusers' layout: {found}")
    return pairs


def _scale(path: Path) -> float:
    """alpha / rank from the file's metadata, as diffusers writes it; 1 without."""
    metadata = read_metadata(path).get("lora_adapter_metadata", "{}")
    try:
        found = {name.removeprefix("transformer."): value for name, value in json.loads(metadata).items()}
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata of its adapters that is no table: {error}") from error
    if found.get("rank_pattern") or found.get("alpha_pattern") or found.get("use_dora") or found.get("use_rslora"):
        raise ValueError(f"{path} has ranks or scales by layer, DoRA or rank-stabilised scales, which are not read")
    if not {"r", "lora_alpha"} <= found.keys():
        return 1.0
    rank, alpha = found["r"], found["lora_alpha"]
    if any(type(value) not in (int, float) or not 0 < value < float("inf") for value in (rank, alpha)):
        raise ValueError(f"{path} says r = {rank!r} and lora_alpha = {alpha!r}, expected numbers above 0")
    return float(alpha / rank)


def _fused(theirs: Pairs, model: MMDiT, source: str) -> Pairs:
    """Adapters for our layers, with fused q, k and v. Raises ValueError for layers and shapes that the model lacks."""
    pairs: Pairs = {}
    layers = dict(model.named_modules())
    for ours, parts in _names(model):
        if not any(part in theirs for part in parts):
            continue
        layer = layers.get(ours)
        if not isinstance(layer, nn.Linear):
            break
        if isinstance(layer, Modulation):
            raise ValueError(
                f"{source} adapts {parts[0]}, a modulation, which takes no adapter here: add it to the weights with "
                "diffusers (fuse_lora), and load those"
            )
        out = layer.out_features // len(parts)
        empty = (torch.zeros(0, layer.in_features), torch.zeros(out, 0))
        found = [theirs.pop(part, empty) for part in parts]
        if any(a.shape[1] != layer.in_features or b.shape[0] != out or len(a) != b.shape[1] for a, b in found):
            shapes = ", ".join(f"{tuple(a.shape)} {tuple(b.shape)}" for a, b in found)
            raise ValueError(f"{source} does not fit the model: {ours} is {tuple(layer.weight.shape)}, there {shapes}")
        pairs[ours] = torch.cat([a for a, _ in found]), torch.block_diag(*(b for _, b in found))
    if theirs:
        raise ValueError(f"{source} does not fit the model, which has no {', '.join(sorted(theirs)[:3])}")
    return pairs
