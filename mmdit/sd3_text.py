"""SD3's three text encoders as one conditioner: CLIP-L, OpenCLIP bigG and T5 (arXiv 2403.03206, section 4).

    context = [ CLIP-L | bigG | 0 ] (B, 77, D) then T5 (B, T, D), along the tokens;   pooled = [ CLIP-L | bigG ]

with the CLIPs' penultimate hidden states, zero-padded to T5's width D, and both projected pooled vectors. T5 and the
trunk attend to padding tokens, as in SD3. An encoder that is left out gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mmdit.features import Encoded, Features, FrozenText, TextShape, joined, left_out
from mmdit.text import Condition, Tokens
from mmdit.text_encoders import TextEncoder, fingerprint, open_hub
from mmdit.weights_io import read_json

ENCODERS = ("clip_l", "clip_g", "t5")
FOLDERS = {
    name: (f"text_encoder{end}", f"tokenizer{end}") for name, end in zip(ENCODERS, ("", "_2", "_3"), strict=True)
}
"""The subfolders of each encoder and its tokenizer in a diffusers pipeline."""
CLIP_TOKENS = 77


class SD3Text(FrozenText):
    """Three frozen encoders, any of them None, as one conditioner.

    context_dim: T5's width, and pooled_dim: the sum of both CLIPs', 4096 and 2048 in SD3; they are arguments because an
    encoder may be left out. max_length: T5's tokens, 77, 256 or 512 in SD3.

    dropped: what replaces a dropped caption in training and in the unconditional half of guidance: "zeros", as if the
    encoder were left out (a model trained so, with each dropped at 46.4 % as in SD3, works without any of them); or
    "empty", the empty caption, which is diffusers' unconditional prompt.
    """

    num_encoders = 3

    def __init__(
        self,
        encoders: Sequence[TextEncoder | None],
        context_dim: int,
        pooled_dim: int,
        max_length: int = 256,
        dropped: Literal["zeros", "empty"] = "zeros",
        source: Path | None = None,
    ) -> None:
        super().__init__()
        if dropped not in ("zeros", "empty"):
            raise ValueError(f"dropped is {dropped!r}, expected 'zeros' or 'empty'")
        for name, encoder in zip(ENCODERS, encoders, strict=True):
            self.add_module(name, encoder)
        self.context_dim, self.pooled_dim, self.max_length = context_dim, pooled_dim, max_length
        self.dropped, self.source = dropped, source
        self._check()

    @property
    def encoders(self) -> list[TextEncoder | None]:
        """CLIP-L, bigG and T5."""
        return [cast(TextEncoder | None, getattr(self, name)) for name in ENCODERS]

    def _check(self) -> None:
        *clips, t5 = self.encoders
        if t5 is not None and t5.context_dim != self.context_dim:
            raise ValueError(
                f"T5's states are {t5.context_dim} wide, the context {self.context_dim}: they are not of one model"
            )
        pooled = sum(clip.pooled_dim for clip in clips if clip)
        if pooled > self.pooled_dim or (all(clips) and pooled != self.pooled_dim):
            raise ValueError(
                f"the CLIPs' pooled vectors are {pooled} wide, expected {self.pooled_dim}: they are not of one model"
            )
        if sum(self._widths()) > self.context_dim:
            raise ValueError(f"the CLIPs' states are {self._widths()} wide, more than the context, {self.context_dim}")

    def _widths(self) -> list[int]:
        """Widths of both CLIPs' states; for one that is left out, the rest of the pooled vector's width."""
        clips = self.encoders[:2]
        lacking = self.pooled_dim - sum(clip.pooled_dim for clip in clips if clip)
        return [clip.context_dim if clip else lacking for clip in clips] if any(clips) else [0, 0]

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens`, on the CPU: those of each encoder, concatenated."""
        parts = [encoder.tokenize(captions) for encoder in self.encoders if encoder is not None]
        if not parts:
            none = torch.zeros(len(captions), 0, dtype=torch.int64)
            return Tokens(none, none.bool())
        return Tokens(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))

    @torch.no_grad()
    def forward(self, tokens: Tokens, drop: Tensor | None = None) -> Condition:
        """Tokens to a `Condition` in float32 without a mask; an encoder's caption is dropped where `drop` (B, 3) is
        True.
        """
        if drop is not None and self.dropped == "empty":
            tokens = self._with_empty(tokens, drop)
        known, parts = iter(self.features(tokens)), []
        for i, (encoder, shape) in enumerate(zip(self.encoders, self.shape.encoders, strict=True)):
            part = left_out(shape, tokens.ids) if encoder is None else next(known)
            if drop is not None and self.dropped == "zeros":
                part = part.dropped(drop[:, i : i + 1], None)
            parts.append(part)
        return joined(parts, self.context_dim)

    @torch.no_grad()
    def features(self, tokens: Tokens) -> Features:
        """The features of the encoders that are present, without T5's pooled vector, which SD3 does not use."""
        parts = zip(self.encoders, self._ids(tokens), strict=True)
        encoded = [Encoded(*encoder.encode(ids, None)) for encoder, ids in parts if encoder is not None]
        if self.encoders[2] is not None:
            encoded[-1] = encoded[-1]._replace(pooled=encoded[-1].pooled[:, :0])
        return Features(encoded)

    @property
    def shape(self) -> TextShape:
        """The shapes of the features of all three; for one that is left out, of the zeros in its place."""
        clips, t5 = self.encoders[:2], self.encoders[2]
        lacking = self.pooled_dim - sum(clip.pooled_dim for clip in clips if clip)
        shapes = []
        for i, (clip, width) in enumerate(zip(clips, self._widths(), strict=True)):
            pooled = clip.pooled_dim if clip else lacking if clips[1 - i] else lacking * (1 - i)
            shapes.append((CLIP_TOKENS, width, pooled))
        there = (clips[0] is not None, clips[1] is not None, t5 is not None)
        return TextShape((*shapes, (self.max_length, self.context_dim, 0)), there, self.context_dim)

    def _ids(self, tokens: Tokens) -> Sequence[Tensor]:
        """The ids for each encoder; none for one that is left out."""
        return tokens.ids.split([encoder.max_length if encoder else 0 for encoder in self.encoders], dim=1)

    def _with_empty(self, tokens: Tokens, drop: Tensor) -> Tokens:
        """The tokens, with those of the empty caption where an encoder's caption is dropped."""
        parts = zip(self.encoders, self._ids(tokens), drop.split(1, dim=1), strict=True)
        ids = [
            ids if encoder is None else encoder.dropped(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), one).ids
            for encoder, ids, one in parts
        ]
        return Tokens(torch.cat(ids, dim=1), tokens.mask)

    def about(self) -> dict[str, Any]:
        if self.source is None:
            raise ValueError("these text encoders came from no folder: save the pipeline in the layout 'diffusers'")
        return {
            "encoder": str(self.source),
            "max_length": self.max_length,
            "dropped": self.dropped,
            "without": [name for name in ENCODERS if getattr(self, name) is None],
            "sha256": fingerprint(self.source),
        }

    def save_parts(self, folder: str | Path) -> None:
        """Write encoders and tokenizers as in a diffusers pipeline. Raises ValueError for an encoder of open_clip."""
        for name, encoder in zip(ENCODERS, self.encoders, strict=True):
            if encoder is None:
                continue
            if not hasattr(encoder.network, "save_pretrained"):
                raise ValueError(f"{name} is of open_clip, which diffusers does not read: open it by transformers")
            for part, what in zip(FOLDERS[name], (encoder.network, encoder.tokenizer), strict=True):  # type: ignore[attr-defined]
                what.save_pretrained(Path(folder) / part)


def open_sd3_text(
    folder: str | Path,
    max_length: int = 256,
    dtype: torch.dtype = torch.float32,
    dropped: Literal["zeros", "empty"] = "zeros",
    without: Sequence[str] = (),
) -> SD3Text:
    """The encoders of a diffusers SD3 pipeline folder, on the CPU, except those that the pipeline does not have or that
    `without` names ("clip_l", "clip_g", "t5"). Raises ValueError for other names, and for an encoder that is missing or
    cannot be read.
    """
    folder = Path(folder).expanduser().resolve()
    check_names(without)
    index = read_index(folder)
    _check_there(folder, index, without)
    encoders: list[TextEncoder | None] = []
    for name in ENCODERS:
        network, tokenizer = (folder / part for part in FOLDERS[name])
        present = name not in without and names(index, network.name) and (network / "config.json").is_file()
        tokens = max_length if name == "t5" else CLIP_TOKENS
        encoders.append(open_hub(network, tokenizer, tokens, dtype) if present else None)
    context_dim, pooled_dim = _dims(folder, encoders)
    return SD3Text(encoders, context_dim, pooled_dim, max_length, dropped, folder)


def check_names(without: Sequence[str]) -> None:
    """Raises ValueError for unknown names of encoders to leave out."""
    if unknown := sorted({*([without] if isinstance(without, str) else without)} - {*ENCODERS}):
        raise ValueError(f"without names {', '.join(unknown)}, expected a list of some of {', '.join(ENCODERS)}")


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's model_index.json; empty if there is none."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    return index if isinstance(index, dict) else {}


def names(index: Mapping[str, Any], part: str, unsaid: bool = True) -> bool:
    """Whether a model_index.json declares a part, whatever is in its folder; unsaid: the answer if it does not mention
    the part.
    """
    return index[part] not in (None, [None, None]) if part in index else unsaid


def _check_there(folder: Path, index: Mapping[str, Any], without: Sequence[str]) -> None:
    """Raises ValueError for an encoder that model_index.json declares and the folder does not hold."""
    named = [name for name in ENCODERS if name not in without and names(index, FOLDERS[name][0], unsaid=False)]
    missing = [name for name in named if not (folder / FOLDERS[name][0] / "config.json").is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {FOLDERS[missing[0]][0]}, which its model_index.json names: fetch it, or leave it out "
            f"(without={missing}, or null there)"
        )


def _dims(folder: Path, encoders: Sequence[TextEncoder | None]) -> tuple[int, int]:
    """Widths of context and pooled vector: from the config of the transformer beside the encoders, else from these."""
    config = folder / "transformer" / "config.json"
    about = read_json(config) if config.is_file() else {}
    if "joint_attention_dim" in about and "pooled_projection_dim" in about:
        return about["joint_attention_dim"], about["pooled_projection_dim"]
    clip_l, clip_g, t5 = encoders
    return (t5.context_dim if t5 else 4096), (clip_l.pooled_dim + clip_g.pooled_dim if clip_l and clip_g else 2048)
