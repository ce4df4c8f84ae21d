"""Configs of the models, as documented dataclasses, and presets.

Published sizes: Esser et al. 2024 (SD3, arXiv 2403.03206) and the SD3.5 model cards. Width is `num_heads * head_dim`;
SD3 scales a model by its depth d alone: d blocks, d heads of 64.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal


@dataclass(frozen=True)
class MMDiTConfig:
    """Everything that determines the tensors and the computation of an `MMDiT`."""

    in_channels: int = 16
    """Channels of the latent (or 3 for pixels)."""
    patch_size: int = 2
    """Side of the square patch that becomes one token, in latent pixels."""
    depth: int = 24
    """Number of joint blocks."""
    num_heads: int = 24
    """Attention heads; the width is num_heads * head_dim."""
    head_dim: int = 64
    """Width of one head."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, relative to the model's width."""
    context_dim: int = 4096
    """Width of the text tokens given to the model."""
    pooled_dim: int = 2048
    """Width of the pooled text vector, which is added to the time embedding."""
    qk_norm: Literal["rms_norm"] | None = None
    """RMS-normalise queries and keys per head, with a learnt scale (SD3.5; needed for long bf16 training)."""
    dual_attention_layers: tuple[int, ...] = ()
    """Blocks whose image stream has a self-attention besides the joint one (SD3.5-medium: 0 to 12)."""
    positions: Literal["sincos", "rope", "both"] = "sincos"
    """Image positions: SD3's table added to the patches, 2-D rotary embedding of queries and keys, or both."""
    sample_size: int = 128
    """Side of the latents in training, in latent pixels; it sets the spacing of the position table."""
    pos_embed_max_size: int = 192
    """Side of the position table, in tokens: the largest height or width that can be sampled."""

    def __post_init__(self) -> None:
        check_numbers(
            self, ("in_channels", "patch_size", "depth", "num_heads", "head_dim", "context_dim", "pooled_dim")
        )
        layers = self.dual_attention_layers
        if not isinstance(layers, list | tuple) or not all(type(i) is int for i in layers):
            raise ValueError(f"dual_attention_layers is {layers!r}, expected a list of blocks, counted from 0")
        object.__setattr__(self, "dual_attention_layers", tuple(layers))  # TOML and JSON have lists only
        _check_mlp(self)
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}, expected None or 'rms_norm'")
        if self.positions not in ("sincos", "rope", "both"):
            raise ValueError(f"positions is {self.positions!r}, expected 'sincos', 'rope' or 'both'")
        if self.positions != "sincos" and self.head_dim % 4:
            raise ValueError(f"head_dim is {self.head_dim}, 2-D rotary positions need a multiple of 4")
        if self.positions != "rope" and self.width % 4:
            raise ValueError(f"the width {self.width} is no multiple of 4, which sin-cos positions need")
        if self.sample_size < self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is smaller than one patch ({self.patch_size})")
        if self.pos_embed_max_size < self.sample_size // self.patch_size:
            raise ValueError(
                f"pos_embed_max_size {self.pos_embed_max_size} is smaller than sample_size / patch_size "
                f"= {self.sample_size // self.patch_size} tokens"
            )
        wrong = [i for i in self.dual_attention_layers if not 0 <= i < self.depth]
        if wrong:
            raise ValueError(f"dual_attention_layers names blocks {wrong}, but there are blocks 0 to {self.depth - 1}")

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of Llama's block that SD3's does not have (`mmdit/llama.py`); width and heads are the trunk's."""

    hidden: int
    """Hidden width of the MLP."""
    num_kv_heads: int
    """Heads of keys and values, each shared by a group of the heads of queries."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    eps: float = 1e-5
    """Added to the mean square in the norms."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: tuple[float, float, float, float] | None = None
    """Llama 3.1's longer context: factor, low_freq_factor, high_freq_factor and original_max_position_embeddings."""

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON has lists only
        check_numbers(self, ("hidden", "num_kv_heads"))
        if self.eps < 0 or self.rope_theta <= 0:
            raise ValueError(f"{self}: expected positive numbers")


@dataclass(frozen=True)
class TransfusionConfig:
    """Everything that determines the tensors and the computation of a `Transfusion`.

    Three settings of one trunk: `weights="shared", time="added"` is the paper's (arXiv 2408.11039),
    `weights="separate", time="added"` a mixture of transformers like BAGEL (arXiv 2505.14683),
    `weights="separate", time="all"` with `attention="full"` and `positions="sincos"` SD3's block.
    """

    vocab_size: int = 4096
    """Entries of the embedding table and of the language model's head."""
    in_channels: int = 16
    """Channels of the latent (or 3 for pixels)."""
    patch_size: int = 2
    """Side of the square patch that becomes one token, in latent pixels."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; the width is num_heads * head_dim."""
    head_dim: int = 64
    """Width of one head."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, relative to the model's width."""
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    """RMS-normalise queries and keys per head, with a learnt scale."""
    weights: Literal["shared", "separate"] = "shared"
    """One set of weights for all tokens, or one for text and one for patches, with attention over both."""
    time: Literal["added", "image", "all"] = "added"
    """Where an image's time enters: added to its patches, as adaLN of its patches, or as adaLN of all tokens of its
    document, which must then have exactly one image (SD3)."""
    attention: Literal["transfusion", "causal", "full"] = "transfusion"
    """The mask within a document: causal except between patches of one image, causal throughout, or none (full)."""
    positions: Literal["rope", "sincos", "both"] = "both"
    """Rotary by text step, row and column; SD3's table, added to the patches only; or both (as in BAGEL)."""
    sample_size: int = 32
    """Side of the latents in training, in latent pixels; it sets the spacing of SD3's table."""
    pos_embed_max_size: int = 64
    """Side of that table, in tokens: the largest height or width of an image."""
    codec: Literal["linear", "unet"] = "linear"
    """How patches become tokens and tokens velocities: a matrix each, or the two halves of a U-Net."""
    codec_width: int = 64
    """Channels of the U-Net at the latent's own size, doubled whenever the sides are halved."""
    llama: LlamaConfig | None = None
    """Use Llama's block of this shape instead of SD3's in the streams without time modulation; mlp_ratio and qk_norm
    then have no effect there, and rotary positions are Llama's."""
    max_tokens: int = 4096
    """Most tokens of one document, including patches."""
    pad: int = 0
    """Id of the padding token, which is never generated."""
    eos: int = 1
    """Id of the token that ends a document."""
    boi: int = 2
    """Id of the token before an image."""
    eoi: int = 3
    """Id of the token after an image."""
    size_tokens: int = 0
    """Number of size tokens: two of them before each BOI state the image's rows and columns of patches, at most this
    many, so that the model can choose the size; 0: none."""
    first_size: int = 4
    """Id of the size token for one row or column."""

    def __post_init__(self) -> None:
        shape = ("in_channels", "patch_size", "depth", "num_heads", "head_dim", "sample_size", "pos_embed_max_size")
        check_numbers(self, ("max_tokens", "vocab_size", *shape))
        _check_mlp(self)
        if not 0 <= self.size_tokens < self.vocab_size:
            raise ValueError(
                f"size_tokens is {self.size_tokens}, expected 0 to {self.vocab_size - 1}, below vocab_size"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")
        if self.vocab_size < 5:
            raise ValueError(f"vocab_size is {self.vocab_size}: four tokens are special, so at least 5")
        special = [self.eos, *self.reserved]
        if len(set(special)) < len(special) or not all(0 <= i < self.vocab_size for i in special):
            raise ValueError(
                f"pad {self.pad}, eos {self.eos}, boi {self.boi}, eoi {self.eoi} and sizes {self.sizes}: expected "
                f"tokens of the vocabulary of {self.vocab_size}, no two the same"
            )
        if self.llama is not None:
            self._check_llama()
        elif self.positions != "sincos" and self.head_dim % 8:
            raise ValueError(f"head_dim is {self.head_dim}, rotary positions of text and image need a multiple of 8")
        if self.positions != "rope" and self.width % 4:
            raise ValueError(f"the width {self.width} is no multiple of 4, which sin-cos positions need")
        if self.codec == "unet" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"patch_size is {self.patch_size}, a U-Net halves to patches of 2, 4, 8, ...")
        if self.positions != "rope" and self.size_tokens > self.pos_embed_max_size:
            raise ValueError(
                f"size_tokens is {self.size_tokens}, but the table of positions has {self.pos_embed_max_size} rows "
                "and columns (pos_embed_max_size): the model could choose an image that has no places"
            )
        if self.codec_width < 4 or self.codec_width % 4 or (self.codec_width > 128 and self.codec_width % 32):
            raise ValueError(f"codec_width is {self.codec_width}, expected a multiple of 4, above 128 of 32")

    def _check_llama(self) -> None:
        if not isinstance(self.llama, LlamaConfig):  # from JSON
            try:
                object.__setattr__(self, "llama", LlamaConfig(**self.llama))  # type: ignore[arg-type]
            except TypeError as error:
                raise ValueError(f"llama is {self.llama!r}, no config of Llama's block: {error}") from error
        assert self.llama is not None
        if self.time == "all" or (self.time == "image" and self.weights == "shared"):
            raise ValueError(
                f'weights = "{self.weights}" with time = "{self.time}" modulates all streams, and llama is for those '
                'that nothing modulates: take weights = "separate" or time = "added"'
            )
        if self.num_heads % self.llama.num_kv_heads or self.head_dim % 2 or self.positions == "sincos":
            raise ValueError(
                'llama needs positions = "rope" or "both", an even head_dim and num_heads that llama.num_kv_heads '
                f"divides, not {self.positions!r}, {self.head_dim}, {self.num_heads} and {self.llama.num_kv_heads}"
            )

    @property
    def width(self) -> int:
        """Width of every token."""
        return self.num_heads * self.head_dim

    @property
    def sizes(self) -> range:
        """Ids of the size tokens for 1, 2, ... rows or columns."""
        return range(self.first_size, self.first_size + self.size_tokens)

    @property
    def opening(self) -> Sequence[int]:
        """Ids with which an image can begin."""
        return self.sizes or (self.boi,)

    @property
    def reserved(self) -> tuple[int, ...]:
        """Ids that are not text; the end token counts as text."""
        return self.pad, self.boi, self.eoi, *self.sizes

    def image_tokens(self, size: tuple[int, int]) -> int:
        """The number of tokens that an image of latent size (h, w) takes, including those around it."""
        return size[0] * size[1] // self.patch_size**2 + (4 if self.size_tokens else 2)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, for JSON."""
        return asdict(self)


def check_numbers(config: Any, counts: Sequence[str]) -> None:
    """Raises ValueError for a numeric field that holds no number, as JSON may, and for `counts` below 1."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in (int, "int") and type(value) is not int:
            raise ValueError(f"{field.name} is {value!r}, expected a whole number")
        if field.type in (float, "float") and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{field.name} is {value!r}, expected a finite number")
        if field.name in counts and value < 1:
            raise ValueError(f"{field.name} is {value}, expected a whole number of at least 1")


def _check_mlp(config: Any) -> None:
    if int(config.width * config.mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio is {config.mlp_ratio}, expected a positive number that leaves the MLPs a width")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "qk_norm": (None, "rms_norm"),
    "weights": ("shared", "separate"),
    "time": ("added", "image", "all"),
    "attention": ("transfusion", "causal", "full"),
    "positions": ("rope", "sincos", "both"),
    "codec": ("linear", "unet"),
}

_TRANSFUSION_PRESETS: dict[str, dict[str, Any]] = {
    "transfusion-tiny": dict(vocab_size=512, depth=4, num_heads=4, patch_size=1, sample_size=8),
    "transfusion-small": dict(vocab_size=8192, depth=12, num_heads=8),
    "transfusion-0.16b": dict(vocab_size=32000, depth=16, num_heads=12),  # the paper's smallest
}
_PRESETS: dict[str, dict[str, Any]] = {
    "sd3-medium": dict(depth=24, num_heads=24),
    "sd3.5-medium": dict(
        depth=24, num_heads=24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), pos_embed_max_size=384
    ),
    "sd3.5-large": dict(depth=38, num_heads=38, qk_norm="rms_norm"),
    "tiny": dict(
        depth=4, num_heads=4, context_dim=256, pooled_dim=256, qk_norm="rms_norm", sample_size=8, pos_embed_max_size=32
    ),
    "small": dict(
        depth=12,
        num_heads=6,
        context_dim=384,
        pooled_dim=384,
        qk_norm="rms_norm",
        sample_size=32,
        pos_embed_max_size=64,
    ),
    "base": dict(
        depth=16,
        num_heads=16,
        context_dim=1024,
        pooled_dim=1024,
        qk_norm="rms_norm",
        sample_size=32,
        pos_embed_max_size=96,
    ),
}


def preset(name: str) -> Any:
    """The config of a published or other ready-made size (see `preset_names`): an `MMDiTConfig`, or for a name that
    begins with "transfusion" a `TransfusionConfig`. Raises ValueError for an unknown name.
    """
    if name in _TRANSFUSION_PRESETS:
        return TransfusionConfig(**_TRANSFUSION_PRESETS[name])
    if name not in _PRESETS:
        near = get_close_matches(str(name), preset_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no preset {name!r}{hint} (there are {', '.join(preset_names())})")
    return MMDiTConfig(**_PRESETS[name])


def preset_names() -> list[str]:
    """Names that `preset` takes."""
    return [*_PRESETS, *_TRANSFUSION_PRESETS]
