"""PIL images of any mode as a model takes them: as a viewer shows them, upright and in 8-bit RGB."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def as_shown(image: Image) -> Image:
    """The image as a viewer shows it: upright, in RGB. Raises ValueError for anything but a Pillow image."""
    from PIL.Image import Image

    if not isinstance(image, Image):
        raise ValueError(f"got a {type(image).__name__} for a picture: open it with PIL.Image.open")
    return as_rgb(upright(image))


def upright(image: Image) -> Image:
    """The image turned as its EXIF orientation says."""
    from PIL import ImageOps

    with suppress(Exception):  # an image with broken EXIF data is still good
        return ImageOps.exif_transpose(image)
    return image


def as_rgb(image: Image) -> Image:
    """Any Pillow mode to RGB: transparency is put over white, 16-bit and float gray are scaled, not clipped."""
    from PIL import Image as pil

    if image.mode.startswith("I") or image.mode == "F":
        gray, clear = np.asarray(image), image.info.get("transparency")
        shown = _gray_8bit(gray)
        if isinstance(clear, int):  # the one value of a 16-bit PNG that is transparent
            shown[gray == clear] = 255
        return pil.fromarray(shown).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray_8bit(gray: np.ndarray) -> np.ndarray:
    """16-bit gray, or 32-bit integer or float gray, scaled (not clipped) to 8 bits.

    The range is taken from the values: integers are 16-bit unless one needs more; floats are in [0, 1], or in [0, 255]
    if one exceeds 1.
    """
    levels = (1, 255) if gray.dtype.kind == "f" else (2**16 - 1, 2**31 - 1)
    gray = np.nan_to_num(gray.astype(np.float32))
    top = levels[0] if gray.max(initial=0) <= levels[0] else levels[1]
    return (gray * (255 / top)).clip(0, 255).round().astype(np.uint8)
