"""Autoencoders: images <-> scaled latents, the space in which the models work.

Three kinds share the interface `Autoencoder` of latents.py: `PatchAutoencoder` (ours: quick to train on your images,
also on a CPU), `KLAutoencoder` (any AutoencoderKL of diffusers: SD3's, Flux's, SD's, your own) and `PixelSpace` (no
autoencoder: latents are pixels).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdit.kl_autoencoder import SCALES, KLAutoencoder
from mmdit.latents import Autoencoder, PixelSpace
from mmdit.mapped import PICKLES
from mmdit.patch_autoencoder import SHIPPED, PatchAutoencoder, PatchAutoencoderConfig
from mmdit.weights_io import read_json

__all__ = [
    "SHIPPED",
    "Autoencoder",
    "KLAutoencoder",
    "PatchAutoencoder",
    "PatchAutoencoderConfig",
    "PixelSpace",
    "open_autoencoder",
]

_KINDS: dict[str, Any] = {"PatchAutoencoder": PatchAutoencoder, "AutoencoderKL": KLAutoencoder}


def open_autoencoder(spec: str | Path) -> Autoencoder:
    """The autoencoder that `spec` names: "none" (pixels), "shapes" (the weights in the package), a folder or a file.

    A folder is one written by `save` or `mmdit autoencoder train`, a diffusers AutoencoderKL, or a pipeline that has
    one in `vae`. A file is a .safetensors of an AutoencoderKL or of a whole model that contains one; if nothing in it
    tells how latents are scaled, put the model's name before it, as in "flux:ae.safetensors" (sd3, flux, sd, sdxl).
    Raises ValueError for anything else.
    """
    if str(spec) == "none":
        return PixelSpace()
    kind, _, file = str(spec).partition(":")
    if kind in SCALES and file:
        return KLAutoencoder.load(file, kind)
    folder = SHIPPED if str(spec) == "shapes" else Path(spec)
    if folder.is_file() or folder.suffix in PICKLES:
        return KLAutoencoder.load(folder)
    if not folder.is_dir():
        raise ValueError(f'autoencoder not found: {folder} (give "none", "shapes", a folder or a file)')
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no config.json in {folder}: not an autoencoder folder as `mmdit autoencoder train` writes it"
        )
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(
            f"{folder / 'config.json'} describes {name or 'no known model'}, expected one of {', '.join(_KINDS)}"
        )
    return _KINDS[name].load(folder)
