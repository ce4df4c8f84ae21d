"""Which samples of a data set are wanted: filters by size and by length of the caption, and the fields of captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.captions import MAX_CAPTION, Captions, Weights
from training.images import Size
from training.remote import Patience


@dataclass(frozen=True)
class Wanted:
    """What is asked of a data set's samples; one that does not fit is left out of the index, and counted.

    captions: fields to choose among, by weight. sizes: each image's size is read, as it is for a filter by size.
    min_side: pixels of the shorter side. max_aspect: longer side over shorter. min_caption, max_caption: characters of
    a caption; of several captions those that do not fit are left out. 0: any.
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
        """Whether sizes are read."""
        return self.sizes or self.min_side > 0 or self.max_aspect > 0

    def fitting(self, captions: Captions) -> Captions:
        """The captions of an allowed length, with their shares."""
        texts, shares = captions
        most = self.max_caption or MAX_CAPTION
        fit = [i for i, text in enumerate(texts) if self.min_caption <= len(text) <= most]
        if len(fit) == len(texts):
            return captions
        return tuple(texts[i] for i in fit), tuple(shares[i] for i in fit) if shares else ()

    def refuses(self, size: Size) -> str | None:
        """Why an image of that size is left out, if it is."""
        short, long = min(size), max(size)
        if short < self.min_side:
            return f"a side below {self.min_side} pixels"
        if self.max_aspect and long > self.max_aspect * short:
            return f"sides that are more than {self.max_aspect:g} to 1"
        return None


ANY = Wanted()
"""Every sample."""
