"""The KV cache of a `Transfusion`, with which generation computes new tokens alone.

A `Cache` has a row for every document being generated. A `Reading` is one forward pass of the trunk over new tokens of
some rows, which attend to what these rows hold; `keep` then adds the new tokens to the cache. An image that is being
denoised takes many passes and is kept once, after a last pass at t = 0: the cache holds keys of the finished latent.

Shape letters: R rows, r rows of one reading, H heads, L cached tokens, n new tokens of a row, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit.attention import Packed, any_shape, attention
from mmdit.sequences import Layout

NO_ROW = -1  # in place of a row: the document has no cached context and is not kept


@dataclass(frozen=True)
class CachedAttention:
    """The attention mask of one block: new tokens attend to the cached tokens of their row and to each other.

    keys, values (R, H, L + n, d): the block's, of all rows of the cache, with space for the new ones at the end.
    rows (r,): those of this reading, None for all, in order. mask: boolean (r, 1, n, L + n), None where all are seen.
    passing: leave the cache as it is, as for documents without a row.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None
    packed: Packed
    mask: Tensor | None
    passing: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (1, H, S, d) of the new tokens to (1, S, H*d)."""
        k, v = (self._append(kept, self.packed.unpack(x)) for kept, x in ((self.keys, k), (self.values, v)))
        with any_shape(q.device):
            return self.packed.pack(attention(self.packed.unpack(q), k, v, self.mask))

    def _append(self, kept: Tensor, new: Tensor) -> Tensor:
        """The keys or values of this reading's rows, the new ones at the end; also written to the cache."""
        start = kept.shape[2] - new.shape[2]
        if self.rows is None:
            kept[:, :, start:] = new
            return kept
        if self.passing:
            return torch.cat([kept[self.rows, :, :start], new], dim=2)
        kept[self.rows, :, start:] = new
        return kept[self.rows]


class Cache:
    """The cache of R documents: keys and values (R, H, capacity, d) of each block, of which the first L are in use;
    valid (R, L), which of these belong to a row; steps (R,), the number of text steps so far (see sequences.py).

    The capacity doubles when it is exhausted, so that appending a token seldom copies the cache.
    """

    def __init__(self, num_rows: int, depth: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = [like.new_zeros(num_rows, num_heads, 0, head_dim) for _ in range(depth)]
        self.values = [x.clone() for x in self.keys]
        self.valid = torch.zeros(num_rows, 0, dtype=torch.bool, device=like.device)
        self.steps = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
        self.last: Reading | None = None

    def reading(self, rows: Sequence[int]) -> Reading:
        """A forward pass in which document k of the batch continues row `rows[k]`; `NO_ROW` for no context."""
        return Reading(self, torch.tensor(rows, device=self.valid.device))

    def reserve(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """The first `length` keys and values of each block, after growing the capacity if need be."""
        short = length - self.keys[0].shape[2]
        if short > 0:
            more = (0, 0, 0, max(short, self.keys[0].shape[2]))
            self.keys, self.values = ([F.pad(x, more) for x in cached] for cached in (self.keys, self.values))
        return [(k[:, :, :length], v[:, :, :length]) for k, v in zip(self.keys, self.values, strict=True)]


@dataclass
class Reading:
    """One forward pass over some rows of a cache, which writes its keys and values behind those in use."""

    cache: Cache
    rows: Tensor
    layout: Layout | None = None

    @property
    def steps(self) -> Tensor:
        """Text steps before each document, (r,)."""
        return self.cache.steps[self.rows].masked_fill(self.rows < 0, 0)

    @property
    def lengths(self) -> Tensor:
        """Cached tokens of each document, patches included, (r,)."""
        return self._valid.sum(1)

    @property
    def _valid(self) -> Tensor:
        """Which of the cached tokens belong to each row, (r, L)."""
        return self.cache.valid[self.rows] & (self.rows >= 0)[:, None]

    def attending(self, packed: Packed, layout: Layout) -> list[CachedAttention]:
        """The attention mask of each block."""
        cache, new, valid = self.cache, packed.mask.shape[-1], self._valid
        self.layout, cache.last = layout, self
        mask = torch.cat([valid[:, None, None, :].expand(-1, 1, new, -1), packed.mask], dim=-1)
        partial = None if mask.all() else mask
        whole = torch.equal(self.rows, torch.arange(len(cache.valid), device=self.rows.device))
        rows = None if whole else self.rows
        passing = bool((self.rows < 0).any())
        return [CachedAttention(*block, rows, packed, partial, passing) for block in cache.reserve(mask.shape[-1])]

    def keep(self) -> None:
        """Add the new tokens to their rows; other rows get as many invalid ones, which are masked out.

        Raises ValueError unless this was the cache's last forward pass: a later one overwrites its keys and values.
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
