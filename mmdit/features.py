"""Features of captions by frozen text encoders, kept per encoder, so that they can be cached and read many times.

`TextEncoder.features` and `SD3Text.features` compute them; `KnownText` replaces the encoders where features are cached,
and opens the encoders only for other captions.

Shape letters: B batch, L tokens, D width of a state, P width of the pooled vector, E encoders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.text import Condition, Tokens
from mmdit.weights_io import write_json

if TYPE_CHECKING:
    from mmdit.sd3_text import SD3Text
    from mmdit.text_encoders import TextEncoder


class Encoded(NamedTuple):
    """One encoder's features of captions: `states` (B, L, D), `pooled` (B, P), and `mask` (B, L) boolean, True where a
    token is real; None if the trunk attends to padding too.
    """

    states: Tensor
    pooled: Tensor
    mask: Tensor | None = None

    def dropped(self, drop: Tensor, empty: Encoded | None) -> Encoded:
        """The features with those of `empty` (one row), or zeros if it is None, where `drop` (B, 1) is True."""
        if empty is None:
            return Encoded(self.states.masked_fill(drop[..., None], 0), self.pooled.masked_fill(drop, 0), self.mask)
        mask = None if self.mask is None else torch.where(drop, empty.mask, self.mask)  # type: ignore[arg-type]
        states = torch.where(drop[..., None], empty.states, self.states)
        return Encoded(states, torch.where(drop, empty.pooled, self.pooled), mask)


class Features(tuple[Encoded, ...]):
    """The features of a batch of captions, one `Encoded` for each encoder that is present."""

    def to(self, device: torch.device | str) -> Features:
        return self._each(lambda x: x.to(device))

    def split(self, size: int) -> list[Features]:
        """Split into batches of `size` captions."""
        count = len(self[0].pooled) if self else 0
        return [self._each(lambda x, i=i: x[i : i + size]) for i in range(0, count, size)]  # type: ignore[misc]

    @property
    def mask(self) -> Tensor:
        """Which tokens are real, (B, L), of all encoders concatenated. Raises ValueError without any encoder."""
        if not self:
            raise ValueError("these are features of no encoder: a caption has no tokens; leave one encoder in")
        return torch.cat(
            [x.states.new_ones(x.states.shape[:2], dtype=torch.bool) if x.mask is None else x.mask for x in self], dim=1
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Features:
        return Features(Encoded(*(None if x is None else change(x) for x in part)) for part in self)  # type: ignore[arg-type]


class TextShape(NamedTuple):
    """The shape of a conditioner's features: (L, D, P) for each encoder, and which encoders are present."""

    encoders: tuple[tuple[int, int, int], ...]
    there: tuple[bool, ...]
    context_dim: int

    @classmethod
    def read(cls, about: Sequence[Any]) -> TextShape:
        """From its JSON form."""
        encoders, there, context_dim = about
        return cls(tuple((int(a), int(b), int(c)) for a, b, c in encoders), tuple(map(bool, there)), int(context_dim))

    @property
    def present(self) -> list[tuple[int, int, int]]:
        """Shapes of the encoders that are present."""
        return [shape for shape, there in zip(self.encoders, self.there, strict=True) if there]


def left_out(shape: tuple[int, int, int], like: Tensor) -> Encoded:
    """Zeros in place of the features of an encoder that is left out, of shape (L, D, P), a row for each of `like`'s."""
    length, width, pooled = shape
    states = torch.zeros(len(like), length, width, device=like.device)
    return Encoded(states, torch.zeros(len(like), pooled, device=like.device))


def joined(parts: Sequence[Encoded], context_dim: int) -> Condition:
    """The trunk's inputs in float32: one encoder's features, or those of SD3's three combined (`sd3_text.py`)."""
    if len(parts) == 1:
        [(states, pooled, mask)] = parts
        return Condition(states.float(), pooled.float(), mask)
    clip_l, clip_g, t5 = parts
    clip = torch.cat([clip_l.states, clip_g.states], dim=2).float()
    context = torch.cat([F.pad(clip, (0, context_dim - clip.shape[2])), t5.states.float()], dim=1)
    return Condition(context, torch.cat([clip_l.pooled, clip_g.pooled], dim=1).float(), None)


class FrozenText(nn.Module, ABC):
    """The base of frozen conditioners: a saved pipeline records their source and fingerprint, not their weights."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Source and fingerprint. Raises ValueError for encoders that were not loaded from a folder."""

    def save_config(self, folder: str | Path) -> None:
        """Write source and fingerprint, for `load_encoder`; the weights stay where they are."""
        write_json(Path(folder) / "config.json", self.about())

    def weights_writers(self, folder: Path) -> dict[Path, Callable[[Path], object]]:
        """None: frozen weights stay where they are."""
        return {}


class KnownText(FrozenText):
    """The conditioner of frozen encoders with cached features: takes `Features`, or `Tokens` as the encoders do.

    about: the encoders' `about()`; shape: of their features; empty: the features of the empty caption. `open_encoder`
    loads the encoders when captions first come; they stay on the CPU, and are moved to the device only while they work.
    As with the encoders, nothing here is learnt, saved or copied.
    """

    def __init__(
        self,
        about: dict[str, Any],
        shape: TextShape,
        empty: Features,
        open_encoder: Callable[[], TextEncoder | SD3Text],
    ) -> None:
        super().__init__()
        self._about, self.shape, self.empty = about, shape, empty
        self._open, self._opened = open_encoder, ()  # in a tuple, hidden from parameters() and state_dict()

    def __deepcopy__(self, memo: object) -> KnownText:
        return self

    @property
    def num_encoders(self) -> int:
        """E: each encoder's caption is dropped independently."""
        return len(self.shape.encoders)

    @property
    def context_dim(self) -> int:
        """Width of a text token."""
        return self.shape.context_dim

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector."""
        return sum(pooled for _, _, pooled in self.shape.encoders)

    @property
    def encoder(self) -> Any:
        """The encoders, opened at first use."""
        if not self._opened:
            self._opened = (self._open(),)  # type: ignore[assignment]
        return self._opened[0]  # type: ignore[misc]

    def about(self) -> dict[str, Any]:
        return dict(self._about)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens`, on the CPU; opens the encoders."""
        return self.encoder.tokenize(captions)

    @torch.no_grad()
    def forward(self, text: Features | Tokens, drop: Tensor | None = None) -> Condition:
        """Features, or tokens, to a `Condition` in float32; drop (B, E): True where an encoder's caption is dropped."""
        if isinstance(text, Tokens):
            encoder = self.encoder.to(text.ids.device)
            try:
                return encoder(text, drop)
            finally:
                encoder.to("cpu")
        like = text[0].pooled
        self.empty = self.empty.to(like.device)
        known, empties = iter(text), iter(self.empty)
        parts = []
        for i, (shape, there) in enumerate(zip(self.shape.encoders, self.shape.there, strict=True)):
            part, empty = (next(known), next(empties)) if there else (left_out(shape, like), None)
            if drop is not None and there:
                part = part.dropped(drop[:, i : i + 1], None if self._about.get("dropped") == "zeros" else empty)
            parts.append(part)
        return joined(parts, self.context_dim)
