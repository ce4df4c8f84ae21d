"""Image files of any kind -> uint8 RGB arrays of the model's size.

`read_image` decodes one file. CMYK, palette, 16-bit, transparent (over white) and EXIF-rotated images come out as a
viewer shows them; for what cannot be decoded it raises `BadImage`, which says why. `fit` scales and crops an image to
the model's size.

Shapes: H, W the height and width of the file's image, upright; h, w those of the model; sizes are (height, width).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from mmdit.pictures import as_rgb, upright
from training.errors import one_line

MAX_PIXELS = 80_000_000
"""An image whose header claims more pixels is refused before it is decoded."""
LARGE = 1024 * 1024
"""Pixels above which a size that nobody asked for is warned of."""

ImageData: TypeAlias = bytes | str | PathLike[str]
Size: TypeAlias = tuple[int, int]

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width


class BadImage(ValueError):
    """An image that cannot be read; the message is the reason, fit for a log line."""


def read_image(data: ImageData, max_pixels: int = MAX_PIXELS, at_least: Size | None = None) -> np.ndarray:
    """Decode an image file, given as bytes or a path, to uint8 RGB (H, W, 3), upright, transparency over white.

    `at_least=(h, w)` allows to decode a JPEG at a half, a quarter or an eighth of its size, never below twice (h, w):
    that is many times faster for photographs, and is for callers that then call `fit`. Raises `BadImage` for a file
    that is missing, empty, truncated, corrupt, or larger than `max_pixels`.
    """
    with _reading():
        return np.array(_decoded(data, max_pixels, at_least)[0])


class Fitted(NamedTuple):
    """An image fitted to the model's size, uint8 (h, w, 3). original: (H, W) of the upright file; crop: (top, left) of
    the crop in the scaled image, in pixels; flipped: whether it was mirrored.
    """

    image: np.ndarray
    original: Size
    crop: Size
    flipped: bool


def read_fitted(
    data: ImageData,
    size: Size,
    place: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Fitted:
    """`read_image` and `fit` in one step, without copies between them. Raises `BadImage` as `read_image` does."""
    with _reading():
        image, original = _decoded(data, MAX_PIXELS, at_least=size)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = max(size[0] / original[0], size[1] / original[1])
        down, right = original[0] * scale - size[0], original[1] * scale - size[1]
        crop = round(down * place[0]), round(right * place[1])
        return Fitted(_pixels(_fit(image, size, place)), original, crop, flip)


def _decoded(data: ImageData, max_pixels: int, at_least: Size | None) -> tuple[Image.Image, Size]:
    """(the upright RGB image, its (H, W) in the file)."""
    with _open(data, max_pixels) as image:
        turned = _orientation(image)
        sideways = turned in _SIDEWAYS
        original = image.size if sideways else (image.height, image.width)
        if at_least is not None:
            height, width = reversed(at_least) if sideways else at_least
            image.draft(None, (2 * width, 2 * height))
        image.load()
        return as_rgb(upright(image) if turned else image), original


def read_size(data: ImageData) -> Size:
    """(H, W) of the upright image, from the file's header alone; raises `BadImage` as `read_image` does."""
    with _reading(), _open(data, MAX_PIXELS) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def fit(image: np.ndarray, size: Size, place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Scale uint8 (H, W, 3) to cover `size` = (h, w), antialiased (Lanczos), and crop: uint8 (h, w, 3).

    place: (vertical, horizontal) place of the crop in [0, 1], from the top left; 0.5 is the centre.
    """
    return image if image.shape[:2] == tuple(size) else np.asarray(_fit(Image.fromarray(image), size, place))


def _fit(image: Image.Image, size: Size, place: tuple[float, float]) -> Image.Image:
    (width, height), (h, w) = image.size, size
    if (height, width) == (h, w):
        return image
    scale = max(h / height, w / width)
    crop_h, crop_w = min(height, h / scale), min(width, w / scale)
    top, left = (height - crop_h) * place[0], (width - crop_w) * place[1]
    box = (left, top, min(width, left + crop_w), min(height, top + crop_h))
    return image.resize((w, h), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _pixels(image: Image.Image) -> np.ndarray:
    """np.asarray of an RGB image, but faster: Pillow joins pieces of 64 KB, a tenth of the decoding time."""
    if not hasattr(Image, "_getencoder"):  # not in Pillow's public interface
        return np.asarray(image)
    encoder = Image._getencoder(image.mode, "raw", (image.mode,))
    encoder.setimage(image.im, (0, 0, *image.size))
    _, _, data = encoder.encode(3 * image.width * image.height)
    return np.frombuffer(data, np.uint8).reshape(image.height, image.width, 3)


def fit_size(height: int, width: int, step: int) -> Size:
    """(h, w): the multiples of `step`, at least one step, that are nearest to the given sides."""
    if height < 1 or width < 1 or step < 1:
        raise ValueError(f"image size {height}x{width} with step {step}: all three must be at least 1")
    return max(1, int(height / step + 0.5)) * step, max(1, int(width / step + 0.5)) * step


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever a decoder raises becomes `BadImage`: Pillow's plugins raise OSError, SyntaxError, struct.error ..."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of flaws in images that it can read
            yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format, or its header is corrupt"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return one_line(error) if isinstance(error, OSError) else f"corrupt image: {one_line(error)}"


def _open(data: ImageData, max_pixels: int) -> Image.Image:
    """Open a file and read its header; refuse a decompression bomb by the size that the header claims."""
    if len(data) == 0 if isinstance(data, bytes) else Path(data).stat().st_size == 0:
        raise BadImage("the file is empty (zero bytes)")
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise BadImage(
            f"too large: the header claims {height}x{width} (height x width), the limit is {max_pixels} pixels"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation where the opened image is to be turned or mirrored, else 0; Pillow itself turns a TIFF."""
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():  # saves the search for EXIF data
        return 0
    with suppress(Exception):  # broken EXIF data does not make a bad image
        turned = int(image.getexif().get(_ORIENTATION, 1))
        return turned if image.format != "TIFF" and 2 <= turned <= 8 else 0
    return 0
