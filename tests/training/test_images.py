"""Reading of every kind of image file that the docs name, hostile ones among them, and fitting to the model's size."""

import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from training import images
from training.images import BadImage, fit, fit_size, read_fitted, read_image, read_size

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
ALPHA = RGB[..., 1]
LOSSLESS = ("PNG", "BMP", "TIFF", "WEBP")
FORMATS = (*LOSSLESS, "JPEG", "GIF")
AS_SHOWN = {  # EXIF orientation -> what a viewer does with the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return file.getvalue()


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1).astype(np.uint8)


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS)
def test_rgb_is_exact(kind, tmp_path):
    data = encoded(RGB, kind)
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image", str(tmp_path / "image")):
        image = read_image(source)
        assert image.dtype == np.uint8 and image.flags.writeable
        np.testing.assert_array_equal(image, RGB)
        assert read_size(source) == (6, 10)


def test_jpeg_is_close():
    image = smooth(32, 48)
    assert np.abs(read_image(encoded(image, "JPEG", quality=95)).astype(int) - image).mean() < 2


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 0), (255,) * 3),
        ((0, 0, 0, 255), (0,) * 3),
    ],
)
def test_cmyk(kind, ink, colour):
    image = read_image(encoded(Image.new("CMYK", (8, 8), ink), kind))
    assert np.abs(image.astype(int) - colour).max() <= 3


def test_gray_and_one_bit():
    np.testing.assert_array_equal(read_image(encoded(GRAY)), np.repeat(GRAY[..., None], 3, axis=-1))
    black_white = np.where(GRAY[..., None] > 127, 255, 0).repeat(3, axis=-1)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(GRAY > 127))), black_white)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(kind):
    gray = np.array([[0, 128, 257, 257 * 100], [300, 40000, 65534, 65535]], dtype=np.uint16)
    image = read_image(encoded(gray, kind))
    np.testing.assert_array_equal(image[..., 1], np.rint(gray / 257))
    assert (image == image[..., :1]).all()


def test_16_bit_gray_of_one_transparent_value():
    """Only that value: 1235 rounds to the same 8 bits and stays."""
    gray = np.array([[1234, 1235, 40000]], dtype=np.uint16)
    assert read_image(encoded(gray, transparency=1234))[0, :, 0].tolist() == [255, 5, 156]
    assert read_image(encoded(gray))[0, :, 0].tolist() == [5, 5, 156]


def test_16_bit_big_endian():
    image = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 257 * 7, 65535))
    assert read_image(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 32768, 65535, -5]], np.int32), [0, 128, 255, 0]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1, -1, np.nan]], np.float32), [0, 128, 255, 0, 0]),
        (np.array([[0, 100.4, 255, 300]], np.float32), [0, 100, 255, 255]),
    ],
)
def test_32_bit_gray(pixels, expected):
    assert read_image(encoded(pixels, "TIFF"))[0, :, 0].tolist() == expected


def test_palette():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert read_image(encoded(image, kind)).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    for kind in ("PNG", "GIF"):
        assert read_image(encoded(image, kind, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3, [70, 80, 90]]]
    half = read_image(encoded(image, "PNG", transparency=bytes([255, 255, 51])))[0, 2]
    np.testing.assert_allclose(half, [70 * 0.2 + 204, 80 * 0.2 + 204, 90 * 0.2 + 204], atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_rgba_lies_over_white(kind):
    options = {"exact": True} if kind == "WEBP" else {}
    image = read_image(encoded(np.dstack([RGB, ALPHA]), kind, **options))
    np.testing.assert_allclose(image, over_white(RGB, ALPHA), atol=1)


def test_gray_with_alpha_lies_over_white():
    image = read_image(encoded(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)])))
    np.testing.assert_allclose(image, over_white(np.repeat(GRAY[..., None], 3, axis=-1), ALPHA), atol=1)


def test_one_transparent_colour():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert read_image(encoded(pixels, transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255] * 3]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", AS_SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind, exif=exif)
    shown = AS_SHOWN[orientation](RGB)
    np.testing.assert_array_equal(read_image(data), shown)
    assert read_size(data) == shown.shape[:2]


def test_broken_exif_does_not_make_a_bad_image():
    data = encoded(RGB, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30)
    np.testing.assert_array_equal(read_image(data), RGB)


@pytest.mark.parametrize("orientation", [1, 6])
def test_at_least_reads_large_jpegs_smaller_but_not_too_small(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(512, 1024), "JPEG", exif=exif)
    height, width = read_image(data, at_least=(64, 32)).shape[:2]
    assert (height, width) == ((128, 256) if orientation == 1 else (128, 64))
    assert read_image(encoded(RGB), at_least=(2, 2)).shape == RGB.shape


# --- hostile ---------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 1000) + b"IDAT"


def test_zero_bytes(tmp_path):
    (tmp_path / "empty.png").touch()
    for source in (b"", tmp_path / "empty.png"):
        with pytest.raises(BadImage, match="empty"):
            read_image(source)


@pytest.mark.parametrize("side", [100_000, 10_000])
def test_decompression_bomb_is_refused_by_its_header(side, recwarn):
    for read in (read_image, read_size):
        with pytest.raises(BadImage, match="too large"):
            read(png_header(side, side))
    assert [w for w in recwarn if w.category is not ResourceWarning] == []  # which is of what other tests left


def test_max_pixels():
    data = encoded(RGB)
    assert read_image(data, max_pixels=60).shape == (6, 10, 3)
    with pytest.raises(BadImage, match="claims 6x10 .* limit is 59 pixels"):
        read_image(data, max_pixels=59)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated(kind):
    data = encoded(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    with pytest.raises(BadImage) as error:
        read_image(data[: len(data) // 2])
    assert str(error.value) and "\n" not in str(error.value)


def test_not_an_image_and_not_a_file(tmp_path):
    with pytest.raises(BadImage, match="not an image"):
        read_image(b"hello")
    with pytest.raises(BadImage, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(BadImage, match="directory"):
        read_image(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_gives_an_image_or_bad_image(data):
    intact = encoded(RGB, data.draw(st.sampled_from(FORMATS)))
    damaged = bytearray(intact[: data.draw(st.integers(0, len(intact)))])
    if damaged:
        for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
            damaged[place] = data.draw(st.integers(0, 255))
    try:
        image = read_image(bytes(damaged), max_pixels=10**6)
    except BadImage:
        return
    assert image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size <= 3 * 10**6


# --- fitting ---------------------------------------------------------------------------------------------------------

sides = st.integers(1, 70)


@settings(max_examples=100, deadline=None)
@given(sides, sides, sides, sides)
def test_fit_gives_the_size_and_keeps_a_flat_colour(height, width, h, w):
    image = np.full((height, width, 3), (200, 10, 77), np.uint8)
    fitted = fit(image, (h, w))
    assert fitted.shape == (h, w, 3) and fitted.dtype == np.uint8
    assert (fitted == (200, 10, 77)).all()


def test_fit_leaves_the_right_size_alone():
    np.testing.assert_array_equal(fit(RGB, (6, 10)), RGB)


def test_fit_crops_the_centre():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert (fit(wide, (20, 20)) == 255).all()


def test_fit_is_a_resize_of_the_whole_and_a_crop():
    image = np.random.default_rng(2).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    whole = np.array(Image.fromarray(image).resize((30, 10), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(fit(image, (10, 10)), whole[:, 10:20], atol=1)
    upright = fit(image.swapaxes(0, 1), (10, 10))
    np.testing.assert_allclose(upright, whole[:, 10:20].swapaxes(0, 1), atol=4)  # rounded between the other two passes


@pytest.mark.parametrize("factor", [4, 16])
def test_fit_is_antialiased(factor):
    checkerboard = np.indices((16 * factor, 16 * factor)).sum(axis=0) % 2 * 255
    fitted = fit(np.repeat(checkerboard[..., None], 3, axis=-1).astype(np.uint8), (16, 16))
    assert np.abs(fitted.astype(float) - 127.5).max() < 4


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64))
@example(1, 1, 9)  # less than half a step
def test_fit_size_is_the_nearest_multiple(height, width, step):
    for side, fitted in zip((height, width), fit_size(height, width, step), strict=True):
        assert fitted % step == 0 and fitted >= step
        assert abs(fitted - side) <= step / 2 or fitted == step > side


def test_fit_size_refuses_nonsense():
    for arguments in ((0, 4, 2), (4, 0, 2), (4, 4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            fit_size(*arguments)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (131, 67), (600, 700)])
def test_pixels_come_out_in_one_piece_as_they_are(size):
    """Also those of more bytes than Pillow gives at a time, and of scaled images."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.array_equal(read_fitted(encoded(pixels), size).image, pixels)
    scaled = (size[0] + 3, 2 * size[1])
    assert np.array_equal(read_fitted(encoded(pixels), scaled).image, fit(pixels, scaled))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("sideways", "step", "place"), [(False, 2, 0.25), (True, 2, 0.75), (True, 3, 1.0)])
def test_the_crop_that_is_told_is_the_one_that_is_cut(sideways, step, place, flip):
    """Of a picture whose grey is the row, or the column, scaled down by `step`."""
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 20 * step, 3))
    ramp = ramp.transpose(1, 0, 2) if sideways else ramp
    image, original, crop, flipped = read_fitted(encoded(np.ascontiguousarray(ramp)), (20, 20), (place, place), flip)
    assert (original, flipped) == (ramp.shape[:2], flip)
    first = round(place * (240 // step - 20))
    assert crop == ((0, first) if sideways else (first, 0))
    seen = step * (first + np.arange(20)) + (step - 1) / 2
    seen = 239 - seen if flip and sideways else seen
    assert np.abs((image[0] if sideways else image[:, 0])[:, 0] - seen)[1:-1].max() <= 1


def test_pixels_come_without_pillow_s_own_encoder_too(monkeypatch):
    picture = Image.fromarray(RGB)
    monkeypatch.setattr(images, "Image", SimpleNamespace())
    assert np.array_equal(images._pixels(picture), RGB)
