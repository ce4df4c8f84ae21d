"""Keys and values of what has been read, so that writing on computes new tokens alone.

A `Cache` has a row for every document that is written. Some rows read more of their documents at a time: a `Reading`
lends the trunk what these rows hold, and `keep` adds what was read, if it is finished. An image that is being denoised
is read again and again and kept once, when it is done, at t = 0: its keys are those of the finished latent.

Shape letters: R rows, r rows of one reading, H heads, L tokens kept, n new tokens of a row, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit.attention import Packed, attention
from mmdit.sequences import Layout

NOTHING = -1  # a row that holds nothing, for a document without what was before


@dataclass(frozen=True)
class Continued:
    """A mask for one block: new tokens see what their row holds and each other; `mask` says which, None for all.

    keys, values (R, H, L + n, d): the block's, of all rows of the cache, with room for the new ones at the end; which
    stays as it is where they are `passing`.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None
    packed: Packed
    mask: Tensor | None
    passing: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (1, H, S, d) of the new tokens to (1, S, H*d)."""
        k, v = (self._written(kept, self.packed.apart(x)) for kept, x in ((self.keys, k), (self.values, v)))
        return self.packed.together(attention(self.packed.apart(q), k, v, self.mask))

    def _written(self, kept: Tensor, new: Tensor) -> Tensor:
        """The rows' keys or values, with the new ones at the end."""
        start = kept.shape[2] - new.shape[2]
        if self.rows is None:
            kept[:, :, start:] = new
            return kept
        if self.passing:
            return torch.cat([kept[self.rows, :, :start], new], dim=2)
        kept[self.rows, :, start:] = new
        return kept[self.rows]


class Cache:
    """What R documents hold: of each block keys and values (R, H, room, d), of which the first L are kept, which of
    these are a row's own, valid (R, L), and the steps of its text.

    The room doubles when it is full, so that a token costs no copy of all that was read.
    """

    def __init__(self, num_rows: int, depth: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = [like.new_zeros(num_rows, num_heads, 0, head_dim) for _ in range(depth)]
        self.values = [x.clone() for x in self.keys]
        self.valid = torch.zeros(num_rows, 0, dtype=torch.bool, device=like.device)
        self.steps = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
        self.last: Reading | None = None

    def reading(self, rows: Sequence[int]) -> Reading:
        """To read on with document k of a batch as row `rows[k]`; `NOTHING` has no row, and cannot be kept."""
        return Reading(self, torch.tensor(rows, device=self.valid.device))

    def room(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each block, the first `length` places of them."""
        short = length - self.keys[0].shape[2]
        if short > 0:
            more = (0, 0, 0, max(short, self.keys[0].shape[2]))
            self.keys, self.values = ([F.pad(x, more) for x in held] for held in (self.keys, self.values))
        return [(k[:, :, :length], v[:, :, :length]) for k, v in zip(self.keys, self.values, strict=True)]


@dataclass
class Reading:
    """Some rows of a cache lent to one pass of the trunk, which writes into the room behind what is kept."""

    cache: Cache
    rows: Tensor
    layout: Layout | None = None

    @property
    def steps(self) -> Tensor:
        """Steps of the text behind each document, (r,)."""
        return self.cache.steps[self.rows].masked_fill(self.rows < 0, 0)

    @property
    def lengths(self) -> Tensor:
        """Tokens behind each document, patches counted, (r,)."""
        return self._held.sum(1)

    @property
    def _held(self) -> Tensor:
        """Which of the cache's places are of each row, (r, L)."""
        return self.cache.valid[self.rows] & (self.rows >= 0)[:, None]

    def attending(self, packed: Packed, layout: Layout) -> list[Continued]:
        """The mask of each block."""
        cache, new, held = self.cache, packed.mask.shape[-1], self._held
        self.layout, cache.last = layout, self
        mask = torch.cat([held[:, None, None, :].expand(-1, 1, new, -1), packed.mask], dim=-1)
        seen = None if mask.all() else mask
        whole = torch.equal(self.rows, torch.arange(len(cache.valid), device=self.rows.device))
        rows = None if whole else self.rows
        passing = bool((self.rows < 0).any())
        return [Continued(*block, rows, packed, seen, passing) for block in cache.room(mask.shape[-1])]

    def keep(self) -> None:
        """Add what was read to the rows. The rest of the cache gets places that no one sees.

        Raises ValueError where nothing was read, or something else after it: the room behind is that of the last pass.
        """
        cache, layout = self.cache, self.layout
        if layout is None or cache.last is not self:
            raise ValueError("this reading is not the cache's last pass: keep what was read before reading on")
        assert (self.rows >= 0).all()
        real = layout.rows >= 0  # (r, n)
        valid = cache.valid.new_zeros(len(cache.valid), real.shape[1])
        valid[self.rows] = real
        cache.valid, cache.last = torch.cat([cache.valid, valid], dim=1), None
        ends = torch.zeros_like(self.rows)
        ends.scatter_reduce_(0, layout.document, layout.coordinates[:, 0].long() + 1, "amax")
        cache.steps[self.rows] = ends
