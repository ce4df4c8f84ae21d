"""Text conditioning without downloads: a tokenizer trained on the captions (or any from disk), and a small transformer
trained together with the model.

A *conditioner* turns captions into the trunk's inputs: `context`, `pooled` and the mask of real tokens. This one is
learnt; frozen encoders (text_encoders.py) have the same `tokenize`, `forward`, `num_encoders`, `context_dim`,
`pooled_dim`, `save_config` and `weights_writers`.

Shape letters: B batch, L tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.attention import attention
from mmdit.blocks import EPS, MLP
from mmdit.config import check_numbers
from mmdit.embeddings import rotate
from mmdit.weights_io import load_built, read_config, read_json, weights_writer, write_aside, write_json

PAD, EOS = "<pad>", "<eos>"
IMAGE = ("<image>", "</image>")  # around an image, in vocabularies of text and images
SIZE = "<size {}>"  # a number of rows or columns of patches


class Tokens(NamedTuple):
    """Tokenized captions: `ids` (B, L) int64 and `mask` (B, L) boolean, True where a token is real."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))

    def trimmed(self) -> Tokens:
        """Cut to the longest caption."""
        longest = int(self.mask.sum(1).max())
        return Tokens(self.ids[:, :longest], self.mask[:, :longest])

    def split(self, size: int) -> list[Tokens]:
        """Split into batches of `size` captions."""
        return list(map(Tokens, self.ids.split(size), self.mask.split(size)))


class Condition(NamedTuple):
    """The trunk's inputs: `context` (B, L, D), `pooled` (B, P), `mask` (B, L) boolean, or None if all are real."""

    context: Tensor
    pooled: Tensor
    mask: Tensor | None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Condition:
        mask = None if self.mask is None else self.mask.to(device)
        return Condition(self.context.to(device, dtype), self.pooled.to(device, dtype), mask)

    def rows(self, rows: slice) -> Condition:
        """Some rows of the batch."""
        return Condition(self.context[rows], self.pooled[rows], None if self.mask is None else self.mask[rows])


class Tokenizer:
    """Text to ids, with an end token, padded to a fixed length.

    `train` makes one (byte-level BPE, which can encode any text), `adopt` takes any of Hugging Face. special: the ids
    of padding, the end, and the two tokens around an image, None if there are no such tokens; sizes: the ids of the
    tokens for 1, 2, ... rows or columns of patches.
    """

    def __init__(self, backend: Any, max_length: int, pad: str = PAD, eos: str = EOS) -> None:
        self.backend, self.max_length, self.names = backend, max_length, (pad, eos)
        self.pad, self.eos = backend.token_to_id(pad), backend.token_to_id(eos)
        if self.pad is None or self.eos is None or self.pad == self.eos:
            raise ValueError(
                f"the tokenizer has no {pad} or {eos} token, or they are one; make one with Tokenizer.train or adopt"
            )
        begin, end = map(backend.token_to_id, IMAGE)
        self.special: tuple[int, int, int | None, int | None] = (self.pad, self.eos, begin, end)
        self.sizes = _sizes(backend)
        self.vocab_size = 1 + max(backend.get_vocab().values())  # ids can have gaps
        backend.encode_special_tokens = True  # "<pad>" written in a caption is plain text

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, max_length: int, images: bool = False, sizes: int = 0
    ) -> Tokenizer:
        """A tokenizer whose merges are learnt from `captions`; vocab_size >= 258 (256 bytes and two special tokens).

        images: add the two special tokens around images, for a `Transfusion`; sizes: add this many special tokens for
        numbers of rows and columns of patches.
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
        _check_list(captions)
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

    @classmethod
    def adopt(cls, folder: str | Path, max_length: int, images: bool = False, sizes: int = 0) -> Tokenizer:
        """The tokenizer in a Hugging Face folder: tokenizer.json, and the files that name its special tokens, if any.

        It keeps its own padding and end tokens; ours are added if it names none, or if its padding is its end token.
        images: make `<image>` and `</image>` special tokens, added if they are missing; sizes: likewise this many size
        tokens. Raises ValueError for a folder that holds no tokenizer.
        """
        from tokenizers import AddedToken

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} is no tokenizer's folder: it has no tokenizer.json, which save_pretrained of a fast "
                "tokenizer writes"
            )
        backend, (pad, eos) = _backend(path), _names(path.parent)
        pad = PAD if pad == eos else pad
        names = (pad, eos, *(IMAGE if images else ()), *map(SIZE.format, range(1, sizes + 1)))
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, max_length, pad, eos)

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Captions to ids (B, max_length); one that is too long is truncated, with its end token kept."""
        ids = torch.full((len(captions), self.max_length), self.pad, dtype=torch.int64, device="cpu")
        for row, found in zip(ids, self.encode(captions), strict=True):
            tokens = [*found[: self.max_length - 1], self.eos]
            row[: len(tokens)] = torch.tensor(tokens, device="cpu")
        return Tokens(ids, ids != self.pad)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, of any length, without an end token or any other of `special` and `sizes`.

        Raises ValueError for text that an adopted tokenizer cannot encode, if it has no token for unknown text.
        """
        _check_list(texts)
        readable = [*map(_encodable, texts)]
        try:
            found = self.backend.encode_batch(readable, add_special_tokens=False)
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"the tokenizer cannot read a text: {error}") from error
        reserved = {*self.special, *self.sizes}
        return [[i for i in encoding.ids if i not in reserved] for encoding in found]

    def decode(self, ids: Sequence[int] | Tensor, before: Sequence[int] | Tensor = ()) -> str:
        """The text of one row of ids, without special tokens, and without spaces at its ends.

        before: the ids of a text that this one continues. The two texts, joined as they are, then are that of all ids.
        """
        first, rest = ([int(i) for i in row] for row in (before, ids))
        whole = self.backend.decode(first + rest, skip_special_tokens=True)
        return whole[len(self.backend.decode(first, skip_special_tokens=True)) :] if first else whole.strip()

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, and beside it the config that names its special tokens, as for transformers."""
        write_aside(Path(path), lambda aside: self.backend.save(str(aside)))
        pad, eos = self.names
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": eos}
        write_json(Path(path).with_name("tokenizer_config.json"), about)

    @classmethod
    def load(cls, path: str | Path, max_length: int) -> Tokenizer:
        """A tokenizer that `save` wrote, from its `tokenizer.json`. Raises ValueError for any other file."""
        return cls(_backend(Path(path)), max_length, *_names(Path(path).parent))


def _sizes(backend: Any) -> range:
    """The ids of the size tokens in a vocabulary, which follow each other."""
    first = backend.token_to_id(SIZE.format(1))
    if first is None:
        return range(0)
    last = first
    while backend.token_to_id(SIZE.format(last - first + 2)) == last + 1:
        last += 1
    return range(first, last + 1)


def _backend(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the backend raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error


def _names(folder: Path) -> tuple[str, str]:
    """The names of the padding and end tokens from the files beside a tokenizer; by default ours."""
    found = {"pad_token": PAD, "eos_token": EOS}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        about = read_json(path) if path.is_file() else {}
        if not isinstance(about, dict):
            raise ValueError(f"{path} is no table of names: it does not belong to a tokenizer")
        for name in found:
            token = about.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                found[name] = token
    return found["pad_token"], found["eos_token"]


def _check_list(captions: Iterable[str]) -> None:
    if isinstance(captions, str):
        raise ValueError("got one string, expected a list of captions: [caption]")


def _encodable(caption: str) -> str:
    """Replace lone surrogates, which JSON allows and UTF-8 does not, by "?". Raises ValueError for a non-string."""
    if not isinstance(caption, str):
        raise ValueError(f"a caption is a {type(caption).__name__}, expected a string")
    return caption.encode("utf-8", "replace").decode("utf-8")


MAX_LENGTH = 2**16
"""Most tokens of a caption: every batch holds an empty caption of that length."""


@dataclass(frozen=True)
class TextConfig:
    """Shape of the learned text encoder."""

    vocab_size: int = 4096
    """Entries of the embedding table."""
    max_length: int = 64
    """Tokens per caption, including the end token; longer captions are truncated."""
    width: int = 256
    """Width of a token, and of the pooled vector."""
    depth: int = 2
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        check_numbers(self, ("vocab_size", "width", "num_heads"))
        if not 2 <= self.max_length <= MAX_LENGTH:
            raise ValueError(
                f"max_length is {self.max_length}, expected at least 2, one token and the end, and at most {MAX_LENGTH}"
            )
        if self.depth < 0:
            raise ValueError(f"depth is {self.depth}, expected 0 or more")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of twice num_heads ({self.num_heads})")

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
        """Normal embeddings of deviation 0.02 (GPT-2), Xavier matrices, zero biases."""
        nn.init.normal_(self.embed.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedText:
        super()._apply(fn, recurse)
        self.empty = self.tokenizer([""]).ids.to(self.embed.weight.device)  # `to_empty` would leave it uninitialised
        return self

    @property
    def context_dim(self) -> int:
        """Width of a token."""
        return self.config.width

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector."""
        return self.config.width

    def save_config(self, folder: str | Path) -> None:
        """Write config and tokenizer."""
        write_json(Path(folder) / "config.json", self.config.to_dict())
        self.tokenizer.save(Path(folder) / "tokenizer.json")

    def weights_writers(self, folder: Path) -> dict[Path, Callable[[Path], object]]:
        """For `write_all_aside`: what writes the weights beside them."""
        return {folder / "model.safetensors": weights_writer(self.state_dict())}

    @classmethod
    def load(cls, folder: str | Path) -> LearnedText:
        """The text encoder in a folder with both. Raises ValueError if its files do not fit together."""
        config = read_config(TextConfig, Path(folder) / "config.json")
        build = partial(cls, config, Tokenizer.load(Path(folder) / "tokenizer.json", config.max_length))
        return load_built(build, config.depth, Path(folder) / "model.safetensors")

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens`, on the CPU."""
        return self.tokenizer(captions)

    def forward(self, tokens: Tokens, drop: Tensor | None = None) -> Condition:
        """Tokens to a `Condition`; the caption is replaced by the empty one where `drop` (B, num_encoders) is True."""
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
