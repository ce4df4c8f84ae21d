"""Which samples of a data set to take: filters by image size and caption length, and the fields of captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.captions import MAX_CAPTION, Captions, Weights
from training.images import Size
from training.remote import Patience


@dataclass(frozen=True)
class Wanted:
    """Which samples to take, and how to read them; others are left out of the index, and counted.

    captions: (field, weight) of the captions to draw from; none: the first caption that is found. sizes: read the size
    of each image, as the filters by size do too. min_side: pixels of the shorter side. max_aspect: longer side over
    shorter. min_caption, max_caption: characters of a caption; of several captions the others are dropped. 0 is no
    limit. patience: how long to wait for a server. cache: folder in which an index that is slow to make is kept.
    """

    captions: Weights = ()
    sizes: bool = False
    min_side: int = 0
    max_aspect: float = 0.0
    min_caption: int = 0
    max_caption: int = 0
    patience: Patience = Patience()
    cache: Path | None = None

    @property
    def measures(self) -> bool:
        """Whether the size of each image is read."""
        return self.sizes or self.min_side > 0 or self.max_aspect > 0

    def fitting(self, captions: Captions) -> Captions:
        """The captions of an allowed length, with their weights."""
        texts, shares = captions
        most = self.max_caption or MAX_CAPTION
        fit = [i for i, text in enumerate(texts) if self.min_caption <= len(text) <= most]
        if len(fit) == len(texts):
            return captions
        return tuple(texts[i] for i in fit), tuple(shares[i] for i in fit) if shares else ()

    def refuses(self, size: Size) -> str | None:
        """Why an image of that size is left out; None where it is taken."""
        short, long = min(size), max(size)
        if short < self.min_side:
            return f"a side below {self.min_side} pixels"
        if self.max_aspect and long > self.max_aspect * short:
            return f"sides that are more than {self.max_aspect:g} to 1"
        return None


ANY = Wanted()
"""Every sample."""
