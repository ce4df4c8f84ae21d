"""Editing a picture: image-to-image (Meng et al. 2022), or inpainting of the part under a mask.

Shape letters: B batch, H W image sides; images float in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit.pictures import as_shown

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Edit:
    """A picture to edit, or one for each prompt.

    strength in (0, 1]: the fraction of the steps to take; 1 ignores the picture. mask: a picture of the same size, or
    one for each, white where the picture is redrawn and black where it is kept, to the bit. Pictures of any mode are
    taken as a viewer shows them: upright, transparency over white. Raises ValueError for anything but pictures.
    """

    image: Image | Sequence[Image]
    strength: float = 0.6
    mask: Image | Sequence[Image] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strength, Real) or not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength!r}, expected a number in (0, 1]; 1 forgets the picture")
        for name in ("image",) if self.mask is None else ("image", "mask"):
            given = getattr(self, name)
            many = isinstance(given, list | tuple)
            object.__setattr__(self, name, [as_shown(one) for one in given] if many else as_shown(given))
        sizes = {(image.height, image.width) for image in _listed(self.image)}
        if len(sizes) != 1:
            raise ValueError(f"the pictures to edit are of sizes {sorted(sizes)}, expected all of one size")
        wrong = {(mask.height, mask.width) for mask in _listed(self.mask)} - sizes
        if wrong:
            (own, *_), (other, *_) = sizes, wrong
            raise ValueError(
                f"the mask is {other[0]} x {other[1]}, the picture {own[0]} x {own[1]}: give them one size"
            )

    def fitting(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size of the pictures; ValueError if another one is asked for."""
        first = _listed(self.image)[0]
        own = first.height, first.width
        wanted = own[0] if height is None else height, own[1] if width is None else width
        if wanted != own:
            raise ValueError(
                f"{wanted[0]} x {wanted[1]} is asked for and the picture to edit is {own[0]} x {own[1]}: resize it"
            )
        return own

    def part(self, rows: slice, count: int) -> Edit:
        """The edit of the prompts `rows`, of `count` in all."""
        masks = None if self.mask is None else _each("masks", self.mask, count)[rows]
        return replace(self, image=_each("pictures", self.image, count)[rows], mask=masks)

    def images(self, count: int) -> Tensor:
        """The pictures of `count` prompts, (B, 3, H, W) in [-1, 1]."""
        pixels = [np.asarray(image) for image in _each("pictures", self.image, count)]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def redrawn(self, count: int) -> Tensor | None:
        """Where each of `count` pictures is redrawn, (B, 1, H, W) in [0, 1]; None for everywhere."""
        if self.mask is None:
            return None
        pixels = [np.asarray(mask.convert("L")) for mask in _each("masks", self.mask, count)]
        return torch.from_numpy(np.stack(pixels))[:, None].float() / 255

    def composited(self, pictures: Sequence[Image]) -> list[Image]:
        """The drawn pictures, with the original ones where the mask is black."""
        from PIL import Image

        olds, masks = (_each("pictures", images, len(pictures)) for images in (self.image, self.mask or []))
        return [
            Image.composite(new, old, mask.convert("L")) for new, old, mask in zip(pictures, olds, masks, strict=True)
        ]


def known_latents(redrawn: Tensor, factor: int) -> Tensor:
    """Mask (B, 1, h, w) of the latent pixels to keep: those that cover no redrawn pixel of (B, 1, H, W)."""
    return 1 - F.max_pool2d(redrawn, factor)


def _listed(images: Image | Sequence[Image] | None) -> list[Image]:
    if images is None:
        return []
    return list(images) if isinstance(images, Sequence) else [images]


def _each(what: str, images: Image | Sequence[Image], count: int) -> list[Image]:
    listed = _listed(images)
    if len(listed) not in (1, count):
        raise ValueError(f"{len(listed)} {what} for {count} prompts: give one for all, or one per prompt")
    return listed * count if len(listed) == 1 else listed
