"""The MMDiT of SD3 and SD3.5, its text encoder and autoencoder adapters, and the text-to-image pipeline.

    import mmdit
    model = mmdit.MMDiT(mmdit.preset("small"))
    pipe = mmdit.TextToImage.load("runs/demo")

Names are imported when first used; diffusers and transformers only when a part of theirs is asked for.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "mmdit.attention": ("attention_backend", "attention_backends"),
    "mmdit.config": ("MMDiTConfig", "TransfusionConfig", "preset", "preset_names"),
    "mmdit.model": ("MMDiT",),
    "mmdit.sequences": ("MixedBatch", "pack"),
    "mmdit.transfusion": ("Transfusion",),
    "mmdit.text": ("TextConfig", "LearnedText", "Tokenizer"),
    "mmdit.autoencoder": ("Autoencoder", "PixelSpace", "open_autoencoder"),
    "mmdit.edit": ("Edit",),
    "mmdit.sampling": ("Sampling",),
    "mmdit.text_encoders": ("open_text_encoder",),
    "mmdit.text_to_image": ("CaptionedMMDiT", "TextToImage"),
    "mmdit.files": ("load", "save"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmdit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
