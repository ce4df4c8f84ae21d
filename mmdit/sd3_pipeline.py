"""Reading and writing diffusers' folders of an SD3 pipeline (StableDiffusion3Pipeline).

Read: transformer, AutoencoderKL, up to three text encoders with their tokenizers, and the scheduler's shift. With the
default options, a picture is the same as diffusers' for the same noise.

Written: the parts that diffusers knows. A learnt text encoder, or the folder of a frozen one other than SD3's, an
autoencoder other than AutoencoderKL, and a size that is not square are written beside them for `TextToImage.load`.
StableDiffusion3Pipeline then runs with `diffusers_inputs(pipe, prompts)`, the prompts encoded by our text encoder, and
gives latents for our autoencoder.

Shape letters: B batch, H heads, N image tokens, L text tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit.autoencoder import Autoencoder, KLAutoencoder, PixelSpace, open_autoencoder
from mmdit.files import load, save
from mmdit.model import MMDiT
from mmdit.pipeline_files import load_text
from mmdit.sampling import DIFFUSERS, is_number
from mmdit.sd3_text import ENCODERS, FOLDERS, SD3Text, names, open_sd3_text
from mmdit.text import LearnedText
from mmdit.text_encoders import TextEncoder
from mmdit.text_to_image import CaptionedMMDiT, TextToImage, as_captions, as_negatives
from mmdit.weights_io import read_json, write_all_aside, write_json

Text = LearnedText | TextEncoder | SD3Text
PIPELINE, SCHEDULER = "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"
TRAIN_TIMESTEPS = 1000
DEFAULTS = "mmdit.json"
"""The file for settings that diffusers does not have: a size that is not square, and no autoencoder."""
SAMPLING = {"solver": "euler", "num_steps": 28, "guidance": 7.0, "grid": DIFFUSERS}
_MODELS = ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizer", "T5TokenizerFast")
_OTHER_TIMES = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def read_sd3(folder: Path, dtype: torch.dtype = torch.float32, without: Sequence[str] = ()) -> TextToImage:
    """The pipeline in a folder, on the CPU. Raises ValueError for another pipeline or scheduler, and if a part is
    missing or cannot be read.
    """
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != PIPELINE:
        raise ValueError(f"{folder} holds {kind or 'no known pipeline'}, expected a {PIPELINE}")
    shift = _shift(folder / "scheduler" / "scheduler_config.json")
    transformer = load_mmdit(folder / "transformer", dtype)
    pipe = assembled(transformer, _text(folder, index, dtype, without), _autoencoder(folder, index), shift, folder)
    if (folder / DEFAULTS).is_file():
        pipe.size = _size(folder / DEFAULTS, pipe.step)
    return pipe


def load_mmdit(path: Path, dtype: torch.dtype) -> MMDiT:
    """The MMDiT at a path. Raises ValueError for a `Transfusion`."""
    transformer = load(path, dtype)
    if not isinstance(transformer, MMDiT):
        raise ValueError(f"{path} holds a {type(transformer).__name__}, expected an MMDiT")
    return transformer


def assembled(transformer: MMDiT, text: Text, autoencoder: Autoencoder, shift: float, where: Path) -> TextToImage:
    """A pipeline that samples as diffusers' does. Raises ValueError if its parts, found at `where`, are not of one
    model.
    """
    config = transformer.config
    widths = (text.context_dim, text.pooled_dim), (config.context_dim, config.pooled_dim)
    if widths[0] != widths[1]:
        raise ValueError(
            f"the text encoders of {where} give widths {widths[0]}, the transformer takes {widths[1]}: they are not of "
            "one model"
        )
    if autoencoder.channels != config.in_channels:
        raise ValueError(
            f"the autoencoder of {where} has latents of {autoencoder.channels} channels, the transformer takes "
            f"{config.in_channels}: they are not of one model"
        )
    side = config.sample_size // config.patch_size * config.patch_size * autoencoder.factor
    return TextToImage(CaptionedMMDiT(transformer, text).eval(), autoencoder, (side, side), shift, SAMPLING)


def _size(path: Path, step: int) -> tuple[int, int]:
    """The default size that `write_sd3` wrote."""
    about = read_json(path)
    sides = about.get("size") if isinstance(about, dict) else None
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(f'{path} has no "size" of two numbers, height and width in pixels')
    if any(n % step for n in sides):
        raise ValueError(f"{path} says a size of {sides[0]} x {sides[1]}, but both sides must be multiples of {step}")
    return sides[0], sides[1]


def _text(folder: Path, index: dict[str, Any], dtype: torch.dtype, without: Sequence[str]) -> Text:
    frozen = any(names(index, network, unsaid=False) for network, _ in FOLDERS.values())
    if frozen or not (folder / "text" / "config.json").exists():
        return open_sd3_text(folder, dtype=dtype, dropped="empty", without=without)
    if without:
        raise ValueError(f"{folder} has a text encoder of its own: nothing can be left out")
    return load_text(folder / "text")


def _autoencoder(folder: Path, index: dict[str, Any]) -> Autoencoder:
    """The autoencoder that the index and `DEFAULTS` declare; a folder written twice may hold an older one too."""
    if names(index, "vae") and (folder / "vae" / "config.json").exists():
        return open_autoencoder(folder / "vae")
    about = read_json(folder / DEFAULTS) if (folder / DEFAULTS).is_file() else {}
    pixels = isinstance(about, dict) and about.get("autoencoder") == "none"
    if not pixels and (folder / "autoencoder" / "config.json").exists():
        return open_autoencoder(folder / "autoencoder")
    return PixelSpace()


def _shift(path: Path) -> float:
    """The scheduler's shift. Raises ValueError for a scheduler whose times differ from the grid `DIFFUSERS`."""
    config = read_json(path)
    config = config if isinstance(config, dict) else {}
    kind = config.get("_class_name")
    other = [name for name in _OTHER_TIMES if config.get(name)]
    if kind != SCHEDULER or other:
        raise ValueError(
            f"{path} is of {kind or 'no known scheduler'}{' with ' if other else ''}{', '.join(other)}, "
            f"expected a {SCHEDULER} with a shift alone"
        )
    if (steps := config.get("num_train_timesteps", TRAIN_TIMESTEPS)) != TRAIN_TIMESTEPS:
        raise ValueError(
            f"{path} says num_train_timesteps of {steps!r}, expected {TRAIN_TIMESTEPS}, by which the transformer's "
            "times are multiplied"
        )
    shift = config.get("shift", 1.0)
    if not is_number(shift) or shift <= 0:
        raise ValueError(f"{path} says a shift of {shift!r}, expected a number above 0")
    return float(shift)


def write_sd3(pipe: TextToImage, folder: Path) -> None:
    """Write a pipeline for StableDiffusion3Pipeline, and parts that it does not have beside it for `TextToImage.load`.

    Its times are those of `grid="diffusers"` with the pipeline's shift. Raises ValueError for a model that diffusers
    does not have: with rotary positions, another mlp_ratio, or a `Transfusion`.
    """
    text = pipe.model.conditioner
    save(pipe.model.transformer, folder / "transformer", "diffusers")
    about: dict[str, Any] = {"_class_name": PIPELINE, "transformer": ["diffusers", "SD3Transformer2DModel"]}
    if isinstance(text, SD3Text):
        text.save_parts(folder)
        present = [encoder is not None for encoder in text.encoders]
    else:
        text.save_config(folder / "text")
        write_all_aside(text.weights_writers(folder / "text"))
        present = [False] * len(ENCODERS)
    for end, has, model, tokenizer in zip(("", "_2", "_3"), present, _MODELS, _TOKENIZERS, strict=True):
        about[f"text_encoder{end}"] = ["transformers", model] if has else [None, None]
        about[f"tokenizer{end}"] = ["transformers", tokenizer] if has else [None, None]
    kl = isinstance(pipe.autoencoder, KLAutoencoder)
    about["vae"] = ["diffusers", "AutoencoderKL"] if kl else [None, None]
    pipe.autoencoder.save(folder / ("vae" if kl else "autoencoder"))
    about["scheduler"] = ["diffusers", SCHEDULER]
    times = {"_class_name": SCHEDULER, "num_train_timesteps": TRAIN_TIMESTEPS, "shift": pipe.shift}
    write_json(folder / "scheduler" / "scheduler_config.json", times)
    pixels = {"autoencoder": "none"} if isinstance(pipe.autoencoder, PixelSpace) else {}
    write_json(folder / DEFAULTS, {"size": list(pipe.size)} | pixels)
    write_json(folder / "model_index.json", about)


def absent(folder: str | Path) -> dict[str, None]:
    """The parts that a folder does not have, as arguments: `StableDiffusion3Pipeline.from_pretrained(folder,
    **absent(folder))`.
    """
    index = read_json(Path(folder) / "model_index.json")
    return dict.fromkeys(name for name, value in index.items() if isinstance(value, list) and value[0] is None)


@torch.no_grad()
def diffusers_inputs(
    pipe: TextToImage, prompts: str | Sequence[str], negative_prompts: str | Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Arguments of StableDiffusion3Pipeline for prompts: their embeddings by our text encoder, and height and width of
    the model's own size, which diffusers assumes to be square.

    An encoder that masks padding gives a mask too, which diffusers applies once its transformer has `MaskedAttention`:
    `theirs.transformer.set_attn_processor(MaskedAttention())`. Prompts and errors are those of a pipeline's call.
    """
    prompts = as_captions(prompts)
    both, n = pipe.conditions([*as_negatives(negative_prompts, len(prompts)), *prompts]), len(prompts)
    factor = pipe.autoencoder.factor
    theirs = factor if isinstance(pipe.autoencoder, KLAutoencoder) else 8  # its default without an autoencoder
    inputs: dict[str, Any] = {
        "height": pipe.size[0] // factor * theirs,
        "width": pipe.size[1] // factor * theirs,
        "prompt_embeds": both.context[n:],
        "negative_prompt_embeds": both.context[:n],
        "pooled_prompt_embeds": both.pooled[n:],
        "negative_pooled_prompt_embeds": both.pooled[:n],
    }
    if both.mask is not None:
        inputs["joint_attention_kwargs"] = {"attention_mask": both.mask}
    return inputs


class MaskedAttention:
    """The joint attention of diffusers' SD3 transformer, with a mask (B, L) of real text tokens, which diffusers' does
    not have.

    Without guidance the batch is only the captioned half: then the last rows of the mask are used.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Any:
        """hidden_states (B, N, D), and text (B, L, D) or None for an attention over the image alone."""
        streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
            streams.append((encoder_hidden_states, *added))
        qkv = [self._heads(attn.heads, *stream) for stream in streams]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*qkv, strict=True))
        num_img, mask = hidden_states.shape[1], None
        if encoder_hidden_states is not None and attention_mask is not None:
            mask = F.pad(attention_mask[-len(q) :].to(q.device), (num_img, 0), value=True)[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2).to(q.dtype)
        img = attn.to_out[1](attn.to_out[0](out[:, :num_img]))
        if encoder_hidden_states is None:
            return img
        txt = out[:, num_img:]
        return img, txt if attn.context_pre_only else attn.to_add_out(txt)

    @staticmethod
    def _heads(heads: int, x: Tensor, *layers: Any) -> list[Tensor]:
        to_q, to_k, to_v, norm_q, norm_k = layers
        q, k, v = (layer(x).unflatten(2, (heads, -1)).transpose(1, 2) for layer in (to_q, to_k, to_v))
        return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]
