"""Text without downloads: a tokenizer trained on the captions, and a small transformer trained together with the model.

A *conditioner* turns captions into what the trunk takes: `context`, `pooled` and the mask of real tokens. This one
learns; frozen encoders have the same three methods (`tokenize`, `forward`, `num_encoders`).

Shape letters: B batch, L tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.attention import attention
from mmdit.blocks import EPS, MLP
from mmdit.embeddings import rotate
from mmdit.weights_io import write_aside

PAD, EOS = "<pad>", "<eos>"
IMAGE = ("<image>", "</image>")  # around an image, in vocabularies of text and images: ids 2 and 3


SIZE = "<size {}>"  # so many rows or columns of patches


class Tokens(NamedTuple):
    """Captions as numbers: `ids` (B, L) int64 and `mask` (B, L) boolean, True where a token is real."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))


class Condition(NamedTuple):
    """What the trunk takes: `context` (B, L, D), `pooled` (B, P), `mask` (B, L) boolean."""

    context: Tensor
    pooled: Tensor
    mask: Tensor


class Tokenizer:
    """Byte-level BPE (any text can be written, nothing is unknown), ended by one token, padded to a fixed length."""

    def __init__(self, backend: Any, max_length: int) -> None:
        self.backend = backend
        self.max_length = max_length
        self.pad, self.eos = backend.token_to_id(PAD), backend.token_to_id(EOS)
        if self.pad is None or self.eos is None:
            raise ValueError(f"the tokenizer has no {PAD} or {EOS} token; train one with Tokenizer.train")
        backend.encode_special_tokens = True  # "<pad>" written in a caption is text like any other

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, max_length: int, images: bool = False, sizes: int = 0
    ) -> Tokenizer:
        """A tokenizer whose merges are learnt from `captions`; vocab_size >= 258 (256 bytes and two special tokens).

        images: two more special tokens stand around images, for a `Transfusion`; sizes: so many more say how many rows
        and columns of patches an image has.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

        special = [PAD, EOS, *(IMAGE if images else ()), *map(SIZE.format, range(1, sizes + 1))]
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"vocab_size is {vocab_size}, expected at least {256 + len(special)}: 256 bytes and the special tokens"
            )
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2: one token and the end")
        backend = Backend(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(map(_encodable, captions), trainer)
        return cls(backend, max_length)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Captions to ids (B, max_length); one that is too long is cut, and keeps its end token."""
        ids = torch.full((len(captions), self.max_length), self.pad, dtype=torch.int64)
        for row, encoding in zip(ids, self.backend.encode_batch([_encodable(c) for c in captions]), strict=True):
            tokens = [*encoding.ids[: self.max_length - 1], self.eos]
            row[: len(tokens)] = torch.tensor(tokens)
        return Tokens(ids, ids != self.pad)

    @property
    def special(self) -> tuple[int, int, int | None, int | None]:
        """Ids of padding, the end, and the two tokens around an image, None where there are none such."""
        begin, end = map(self.backend.token_to_id, IMAGE)
        return self.pad, self.eos, begin, end

    @property
    def sizes(self) -> range:
        """Ids of the tokens for sizes 1, 2, ... of images."""
        first = self.backend.token_to_id(SIZE.format(1))
        if first is None:
            return range(0)
        last = first
        while self.backend.token_to_id(SIZE.format(last - first + 2)) == last + 1:
            last += 1
        return range(first, last + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        write_aside(Path(path), lambda aside: self.backend.save(str(aside)))

    @classmethod
    def load(cls, path: str | Path, max_length: int) -> Tokenizer:
        """A tokenizer from its `tokenizer.json`. Raises ValueError where that is no such file."""
        from tokenizers import Tokenizer as Backend

        try:
            return cls(Backend.from_file(str(path)), max_length)
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error


def _encodable(caption: str) -> str:
    """Half a surrogate pair, as JSON can hold, has no UTF-8: it becomes "?"."""
    return caption.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class TextConfig:
    """Shape of the learned text encoder."""

    vocab_size: int = 4096
    """Entries of the embedding table."""
    max_length: int = 64
    """Tokens a caption, the end token counted; longer captions are cut."""
    width: int = 256
    """Width of a token, and of the pooled vector."""
    depth: int = 2
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "width", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a whole number of at least 1")
        if self.depth < 0:
            raise ValueError(f"depth is {self.depth}, expected 0 or more")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} must divide by twice num_heads ({self.num_heads})")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TextLayer(nn.Module):
    """A pre-norm transformer layer over text: rotary self-attention, then an MLP of four times the width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        x = x + self.out(attention(rotate(q, rotary), rotate(k, rotary), v, mask))
        return x + self.mlp(self.norm2(x))


class LearnedText(nn.Module):
    """The conditioner that is trained with the model: captions to per-token states and their mean."""

    num_encoders = 1

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder only {config.vocab_size}: "
                "they are not of one model"
            )
        self.config, self.tokenizer = config, tokenizer
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(TextLayer(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.empty: Tensor
        self.register_buffer("empty", tokenizer([""]).ids, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Small embeddings (GPT-2's 0.02), Xavier matrices, zero biases."""
        nn.init.normal_(self.embed.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens`, on the CPU."""
        return self.tokenizer(captions)

    def forward(self, tokens: Tokens, drop: Tensor | None = None) -> Condition:
        """Tokens to a `Condition`; where `drop` (B, num_encoders) is True the caption counts as empty."""
        ids, mask = tokens
        if drop is not None:
            empty = self.empty[:, : ids.shape[1]]
            ids = torch.where(drop[:, :1], empty, ids)
            mask = torch.where(drop[:, :1], empty != self.tokenizer.pad, mask)
        x = self.embed(ids)
        angle = torch.arange(ids.shape[1], device=x.device)[:, None] * self._frequencies(x.device)
        rotary = angle.cos(), angle.sin()
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :], rotary)
        x = self.norm(x)
        real = mask[..., None].to(x.dtype)
        return Condition(x, (x * real).sum(1) / real.sum(1), mask)

    def _frequencies(self, device: torch.device) -> Tensor:
        half = self.config.width // self.config.num_heads // 2
        return 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
