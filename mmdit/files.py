"""A trunk from disk and to disk: our own folder, and a diffusers folder.

A folder holds `config.json` and the weights: ours is told from diffusers' `SD3Transformer2DModel` by its config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.formats import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers
from mmdit.model import MMDiT
from mmdit.transfusion import Transfusion
from mmdit.weights_io import (
    assign_weights,
    load_weights,
    read_config,
    read_json,
    read_weights,
    save_weights,
    write_json,
)

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def find(path: str | Path) -> Path:
    """Where a trunk's config.json is: in a run folder, or in this one. Raises FileNotFoundError where there is none."""
    root = Path(path)
    for folder in (root / "pipeline" / "transformer", root / "transformer", root):
        if (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(f"{root} holds no model: expected a run folder, or a folder with config.json")


def load(path: str | Path) -> MMDiT | Transfusion:
    """The trunk in a run folder, in a folder that `save` wrote, or in a diffusers transformer folder, on the CPU.

    Raises FileNotFoundError where there is none, ValueError where the weights do not fit the config.
    """
    folder = find(path)
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("_class_name") == "SD3Transformer2DModel":
        shape = config_from_diffusers(config)
        model = MMDiT(shape)
        assign_weights(model, from_diffusers(read_weights(folder / DIFFUSERS_WEIGHTS), shape), str(folder))
        return model
    own: MMDiT | Transfusion
    if isinstance(config, dict) and "vocab_size" in config:
        own = Transfusion(read_config(TransfusionConfig, folder / "config.json"))
    else:
        own = MMDiT(read_config(MMDiTConfig, folder / "config.json"))
    load_weights(own, folder / "model.safetensors")
    return own


def save(model: MMDiT | Transfusion, path: str | Path, layout: Literal["mmdit", "diffusers"] = "mmdit") -> None:
    """Write a trunk into a folder, in our layout or as diffusers' `SD3Transformer2DModel.from_pretrained` reads it."""
    folder = Path(path)
    if layout == "mmdit":
        write_json(folder / "config.json", model.config.to_dict())
        save_weights(model.state_dict(), folder / "model.safetensors")
    elif layout == "diffusers":
        if not isinstance(model, MMDiT):
            raise ValueError("diffusers has no model of text and images: save it in the layout 'mmdit'")
        write_json(
            folder / "config.json", {"_class_name": "SD3Transformer2DModel", **config_to_diffusers(model.config)}
        )
        save_weights(to_diffusers(model.state_dict(), model.config), folder / DIFFUSERS_WEIGHTS, {"format": "pt"})
    else:
        raise ValueError(f"layout is {layout!r}, expected 'mmdit' or 'diffusers'")
