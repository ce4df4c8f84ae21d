"""Pipelines on disk: our own folder, one for diffusers' StableDiffusion3Pipeline, or a file in SD3's original layout.

Ours holds `pipeline.json` (the default options), `transformer/`, `text/` and `autoencoder/`, each with its config and
safetensors; a run folder holds one in `pipeline/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from mmdit.autoencoder import PixelSpace, open_autoencoder
from mmdit.files import load
from mmdit.mapped import PICKLES
from mmdit.model import MMDiT
from mmdit.sampling import is_number
from mmdit.text import LearnedText
from mmdit.weights_io import (
    check_dtype,
    gather_in_order,
    read_config,
    read_json,
    weights_writer,
    write_all_aside,
    write_folder_aside,
    write_json,
)

if TYPE_CHECKING:
    from mmdit.sd3_text import SD3Text
    from mmdit.text_encoders import TextEncoder
    from mmdit.text_to_image import TextToImage

T = TypeVar("T", bound=nn.Module)


def save_pipeline(pipe: TextToImage, folder: Path, layout: Literal["mmdit", "diffusers"]) -> None:
    """See `TextToImage.save`."""
    if layout == "diffusers":
        from mmdit.sd3_pipeline import write_sd3

        if (folder / "pipeline.json").exists():  # which `load` would find first
            raise ValueError(f"{folder} holds a pipeline in the layout 'mmdit': save this one in another folder")
        return write_folder_aside(folder, lambda aside: write_sd3(pipe, aside))
    if layout != "mmdit":
        raise ValueError(f"layout is {layout!r}, expected 'mmdit' or 'diffusers'")
    write_folder_aside(folder, lambda aside: _write_own(pipe, aside))


def _write_own(pipe: TextToImage, folder: Path) -> None:
    write_json(folder / "transformer" / "config.json", pipe.model.transformer.config.to_dict())
    pipe.model.conditioner.save_config(folder / "text")
    pipe.autoencoder.save(folder / "autoencoder")
    save_defaults(pipe, folder)
    save_pipeline_weights(pipe, folder)


def save_defaults(pipe: TextToImage, folder: Path) -> None:
    """See `TextToImage.save_defaults`."""
    write_json(
        folder / "pipeline.json",
        {
            "format": pipe.format,
            "size": list(pipe.size),
            "shift": pipe.shift,
            "sampling": pipe.sampling,
            "autoencoder": "none" if isinstance(pipe.autoencoder, PixelSpace) else "autoencoder",
        },
    )


def save_pipeline_weights(pipe: TextToImage, folder: Path) -> None:
    """Write the weights of trunk and text encoder, with LoRA adapters merged, and beside these the adapters alone.

    Those that are there are replaced when all are written: a trunk and a text encoder of two steps are no model.
    """
    from mmdit.lora import base_state, lora_pairs, lora_writer, merging

    trunk, at = pipe.model.transformer, folder / "transformer"
    pairs = lora_pairs(trunk)
    writes = {at / "model.safetensors": weights_writer(base_state(trunk), None, merging(pairs))}
    if pairs:
        writes[at / "lora.safetensors"] = lora_writer(trunk, pairs)
    write_all_aside(writes | pipe.model.conditioner.weights_writers(folder / "text"))


def gather_pipeline_weights(pipe: TextToImage) -> None:
    """Take part in gathering a sharded pipeline's weights, which another process writes (`save_pipeline_weights`)."""
    from mmdit.lora import base_state, lora_pairs

    lora_pairs(pipe.model.transformer)
    gather_in_order(base_state(pipe.model.transformer))
    gather_in_order(pipe.model.conditioner.state_dict())


def load_pipeline(
    path: Path,
    dtype: torch.dtype | None = None,
    without: Sequence[str] = (),
    text: str | Path | None = None,
    autoencoder: str | Path | None = None,
) -> TextToImage:
    """The pipeline at `path`, on the CPU; see `TextToImage.load`."""
    check_dtype(dtype)
    if path.is_file() or path.suffix in (".safetensors", *PICKLES):
        from mmdit.sd3_file import read_sd3_file

        return read_sd3_file(path, dtype or torch.float32, without, text, autoencoder)
    if text is not None or autoencoder is not None:
        raise ValueError(f"{path} is a folder, which has its own parts: text and autoencoder go with a single file")
    folder = path / "pipeline" if (path / "pipeline" / "pipeline.json").exists() else path
    if not (folder / "pipeline.json").exists() and (folder / "model_index.json").exists():
        from mmdit.sd3_pipeline import read_sd3

        return read_sd3(folder, dtype or torch.float32, without)
    if without:
        raise ValueError(f"{path} does not have the three text encoders of SD3: nothing can be left out")
    return _load_own(path, folder, dtype or torch.float32)


def _load_own(root: Path, folder: Path, dtype: torch.dtype) -> TextToImage:
    if not (folder / "pipeline.json").exists():
        raise FileNotFoundError(
            f"{root} holds no trained model: expected a run folder of `mmdit train`, a diffusers SD3 pipeline, or a "
            ".safetensors file in the original SD3 layout"
        )
    about = _defaults(folder / "pipeline.json")
    kind = _kind(about.get("format"))
    model = kind.load_model(folder, dtype)
    spec = about["autoencoder"]
    autoencoder = open_autoencoder("none" if spec == "none" else str(folder / spec))
    return kind(model.eval(), autoencoder, about["size"], about["shift"], about["sampling"])


def _defaults(path: Path) -> dict[str, Any]:
    """The defaults that `save_defaults` wrote. Raises ValueError naming a key that is missing or of the wrong type."""
    about: dict[str, Any] = read_config(dict, path)
    missing = [key for key in ("size", "shift", "sampling", "autoencoder") if key not in about]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    size, shift = about["size"], about["shift"]
    expected = {
        "size": ("two numbers of pixels", isinstance(size, list) and [type(n) for n in size] == [int, int]),
        "shift": ("a number above 0", is_number(shift) and shift > 0),
        "sampling": ("a table", isinstance(about["sampling"], dict)),
        "autoencoder": ('"none" or "autoencoder"', about["autoencoder"] in ("none", "autoencoder")),
    }
    for name, (what, right) in expected.items():
        if not right:
            raise ValueError(f"{path} says {name} = {about[name]!r}, expected {what}")
    return about


def _kind(name: Any) -> type[TextToImage]:
    """The pipeline class of a "format"."""
    from mmdit.text_and_images import TransfusionPipeline
    from mmdit.text_to_image import TextToImage

    return TransfusionPipeline if name == TransfusionPipeline.format else TextToImage


def load_captioned(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The trunk, in that type, and the text encoder in our own folder."""
    from mmdit.text_to_image import CaptionedMMDiT

    return CaptionedMMDiT(load_trunk(folder, MMDiT, dtype), load_text(folder / "text"))


def load_text(folder: Path) -> LearnedText | TextEncoder | SD3Text:
    """The text encoder in a folder of `save_pipeline`."""
    about = read_json(folder / "config.json")
    if isinstance(about, dict) and "encoder" in about:
        from mmdit.text_encoders import load_encoder

        return load_encoder(folder)
    return LearnedText.load(folder)


def load_trunk(folder: Path, kind: type[T], dtype: torch.dtype) -> T:
    """The trunk in our own folder, in that type, read into memory. Raises ValueError if it is of another class."""
    trunk = load(folder / "transformer", dtype)
    if not isinstance(trunk, kind):
        raise ValueError(
            f"{folder / 'transformer'} holds a {type(trunk).__name__}, and its pipeline.json wants a {kind.__name__}"
        )
    for tensor in (*trunk.parameters(), *trunk.buffers()):
        tensor.data = tensor.data.clone()  # no longer mapped: a training run replaces its files while they are used
    return trunk
