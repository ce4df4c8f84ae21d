"""Pipelines from one file in SD3's original layout: the trunk, and perhaps an autoencoder and text encoders beside it.

Such a file holds only tensors. The configs follow from their shapes: of the trunk and the autoencoder in
`mmdit/files.py` and `mmdit/kl_autoencoder.py`, of CLIP-L, OpenCLIP bigG and T5 here. No file holds tokenizers: they
come from a folder, and so does an encoder that the file lacks.

CLIP-L's projection is the identity, whatever the file holds: SD3 uses its pooled state unprojected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.autoencoder import Autoencoder, open_autoencoder
from mmdit.files import read_part
from mmdit.sd3_pipeline import assembled, load_mmdit
from mmdit.sd3_text import ENCODERS, FOLDERS, SD3Text, check_names
from mmdit.text_encoders import (
    CLIPText,
    HiddenStates,
    HubEncoder,
    first_line,
    from_transformers,
    open_hub,
    read_tokenizer,
)
from mmdit.text_to_image import TextToImage

SHIFT = 3.0
"""The time shift of SD3 and SD3.5, which no tensor records."""
_PARTS = {"clip_l": "text_encoders.clip_l.", "clip_g": "text_encoders.clip_g.", "t5": "text_encoders.t5xxl."}
_NOT_OURS = ("logit_scale", "spiece_model")
_HEAD = 64
_HOW = "give text=FOLDER, a diffusers SD3 pipeline's folder or name on the hub"


def read_sd3_file(
    path: Path,
    dtype: torch.dtype = torch.float32,
    without: Sequence[str] = (),
    text: str | Path | None = None,
    autoencoder: str | Path | None = None,
) -> TextToImage:
    """The pipeline in a file, on the CPU; see `TextToImage.load`.

    Raises ValueError if a part is neither in the file nor given, cannot be read, or is of another model.
    """
    check_names(without)
    transformer = load_mmdit(path, dtype)
    parts = {name: read_part(path, prefix) for name, prefix in _PARTS.items() if name not in without}
    folder = (
        None if text is None else local_folder(text, [name for name, found in parts.items() if not found], [*parts])
    )
    encoders = [_encoder(name, parts[name], folder, dtype, path) if name in parts else None for name in ENCODERS]
    shape = transformer.config
    conditioner = SD3Text(encoders, shape.context_dim, shape.pooled_dim, dropped="empty")
    return assembled(transformer, conditioner, _autoencoder(path, autoencoder), SHIFT, path)


def local_folder(text: str | Path, encoders: Sequence[str], tokenizers: Sequence[str]) -> Path:
    """A local folder, or else the named encoders and tokenizers downloaded from the hub's repository `text`."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    parts = [FOLDERS[name][0] for name in encoders] + [FOLDERS[name][1] for name in tokenizers]
    try:
        return Path(snapshot_download(str(text), allow_patterns=[f"{part}/*" for part in parts]))
    except Exception as error:
        raise ValueError(f"text={text} is neither a folder nor read from the hub: {first_line(error)}") from error


def _autoencoder(path: Path, given: str | Path | None) -> Autoencoder:
    if given is not None:
        return open_autoencoder(given)
    if not read_part(path, "first_stage_model.") and not read_part(path, "vae."):
        raise ValueError(f"{path} holds no autoencoder: give autoencoder=FOLDER, or autoencoder=sd3:FILE")
    return open_autoencoder(path)


def _encoder(
    name: str, tensors: Mapping[str, Tensor], folder: Path | None, dtype: torch.dtype, path: Path
) -> HubEncoder:
    """One text encoder with its tokenizer. If either is missing, the ValueError says what to give."""
    model, vocabulary = FOLDERS[name]
    if not tensors and (folder is None or not (folder / model / "config.json").is_file()):
        where = "" if folder is None else f", and {folder} has no {model}"
        raise ValueError(f"{path} does not hold the text encoder {name}{where}: {_HOW}, or without=[{name!r}]")
    if folder is None or not (folder / vocabulary).is_dir():
        where = "no file holds one" if folder is None else f"{folder} has no {vocabulary}"
        raise ValueError(
            f"the text encoder {name} of {path} needs its tokenizer, {where}: {_HOW}, or without=[{name!r}]"
        )
    if not tensors:
        return open_hub(folder / model, folder / vocabulary, None, dtype)
    try:
        return _from_tensors(name, tensors, read_tokenizer(folder / vocabulary), dtype)
    except ValueError as error:
        raise ValueError(f"the text encoder {name} of {path}: {error}") from error


def _from_tensors(name: str, tensors: Mapping[str, Tensor], tokenizer: Any, dtype: torch.dtype) -> HubEncoder:
    """An encoder built from its tensors, whose shapes give its config."""
    import transformers

    state = {key.removeprefix("transformer."): x for key, x in tensors.items() if key not in _NOT_OURS}
    state.pop("text_model.embeddings.position_ids", None)  # 0, 1, 2, ..., a buffer in older files
    if name == "t5":
        state.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
        config = transformers.T5Config(**t5_shape(state))
        _check_vocabulary(tokenizer, config.vocab_size)
        return HiddenStates(from_transformers(transformers.T5EncoderModel, state, config, dtype), tokenizer, 256)
    if name == "clip_l":
        state["text_projection.weight"] = torch.eye(_shape(state, _WORDS)[1])
    shape = clip_shape(state, "quick_gelu" if name == "clip_l" else "gelu")
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = transformers.CLIPTextConfig(**shape, **ends, pad_token_id=tokenizer.pad_token_id)
    _check_vocabulary(tokenizer, config.vocab_size)
    return CLIPText(from_transformers(transformers.CLIPTextModelWithProjection, state, config, dtype), tokenizer)


def _check_vocabulary(tokenizer: Any, size: int) -> None:
    if len(tokenizer) > size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the encoder {size}: they are not of one model")


_WORDS, _PLACES = "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"


def clip_shape(tensors: Mapping[str, Tensor], act: str) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig. The head width, which no shape shows, is 64, as in CLIP-L and bigG."""
    vocab, width = _shape(tensors, _WORDS)
    if width % _HEAD:
        raise ValueError(f"the width {width} is no multiple of the head width {_HEAD}: not a CLIP of SD3's kind")
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_attention_heads": width // _HEAD,
        "max_position_embeddings": _shape(tensors, _PLACES)[0],
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
        "intermediate_size": _shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "projection_dim": _shape(tensors, "text_projection.weight")[0],
        "hidden_act": act,
    }


def t5_shape(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of transformers' T5Config, for T5 1.1 (gated) or the original T5."""
    vocab, width = _shape(tensors, "shared.weight")
    first = "encoder.block.0.layer."
    buckets, heads = _shape(tensors, f"{first}0.SelfAttention.relative_attention_bias.weight")
    gated = f"{first}1.DenseReluDense.wi_0.weight" in tensors
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": _shape(tensors, f"{first}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": _shape(tensors, f"{first}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0],
        "num_layers": _count(tensors, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors or tensors[name].ndim != 2:
        raise ValueError(f"its shape cannot be told: no matrix {name}")
    rows, columns = tensors[name].shape
    return rows, columns


def _count(tensors: Mapping[str, Tensor], before: str) -> int:
    return len({name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)})
