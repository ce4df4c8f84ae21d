"""Keys and values of what has been read, so that writing on computes new tokens alone.

A `Cache` has a row for every document that is written. Some rows read more of their documents at a time: a `Reading`
lends the trunk what these rows hold, and `keep` adds what was read, if it is finished. An image that is being denoised
is read again and again and kept once, when it is done, at t = 0: its keys are those of the finished latent.

Shape letters: R rows, r rows of one reading, H heads, L tokens kept, n new tokens of a row, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdit.attention import Packed, attention
from mmdit.sequences import Layout

NOTHING = -1  # a row that holds nothing, for a document without what was before


@dataclass
class Continued:
    """A mask for one block: new tokens see what their row holds and each other as `packed` says; new keys stay here."""

    keys: Tensor
    values: Tensor
    packed: Packed
    mask: Tensor
    new: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (1, H, S, d) of the new tokens to (1, S, H*d)."""
        q, k, v = map(self.packed.apart, (q, k, v))
        self.new = k, v
        k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        return self.packed.together(attention(q, k, v, self.mask))


class Cache:
    """What R documents hold: of each block keys and values (R, H, L, d), which of L are a row's own, and its steps."""

    def __init__(self, num_rows: int, depth: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = [like.new_zeros(num_rows, num_heads, 0, head_dim) for _ in range(depth)]
        self.values = [x.clone() for x in self.keys]
        self.valid = torch.zeros(num_rows, 0, dtype=torch.bool, device=like.device)
        self.steps = torch.zeros(num_rows, dtype=torch.int64, device=like.device)

    def reading(self, rows: Sequence[int]) -> Reading:
        """To read on with document k of a batch as row `rows[k]`; `NOTHING` has no row, and cannot be kept."""
        return Reading(self, torch.tensor(rows, device=self.valid.device))


@dataclass
class Reading:
    """Some rows of a cache lent to one pass of the trunk."""

    cache: Cache
    rows: Tensor
    masks: list[Continued] = field(default_factory=list)
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
        held = self._held
        new = packed.mask.shape[-1]
        mask = torch.cat([held[:, None, None, :].expand(-1, 1, new, -1), packed.mask], dim=-1)
        self.layout = layout
        pairs = zip(self.cache.keys, self.cache.values, strict=True)
        self.masks = [Continued(keys[self.rows], values[self.rows], packed, mask) for keys, values in pairs]
        return self.masks

    def keep(self) -> None:
        """Add what was read to the rows. The rest of the cache gets places that no one sees."""
        cache, layout = self.cache, self.layout
        assert layout is not None and (self.rows >= 0).all()
        real = layout.rows >= 0  # (r, n)
        valid = cache.valid.new_zeros(len(cache.valid), real.shape[1])
        valid[self.rows] = real
        cache.valid = torch.cat([cache.valid, valid], dim=1)
        for held, which in ((cache.keys, 0), (cache.values, 1)):
            for block, mask in enumerate(self.masks):
                assert mask.new is not None
                new = mask.new[which]
                wide = new.new_zeros(len(cache.valid), *new.shape[1:])
                wide[self.rows] = new
                held[block] = torch.cat([held[block], wide], dim=2)
        ends = torch.zeros_like(self.rows)
        ends.scatter_reduce_(0, layout.document, layout.coordinates[:, 0].long() + 1, "amax")
        cache.steps[self.rows] = ends
