"""Grids and the loss plot: every picture where it belongs, every number drawn."""

import numpy as np
import pytest
from PIL import Image

from training.config import load_config
from training.plots import _font, _fonts_by_letter, _letters, _running_mean, _wrapped, caption_grid, loss_plot
from training.run import RunFolder


def solid(*colours, size=(64, 64)):
    return [Image.new("RGB", size, colour) for colour in colours]


def test_pictures_stand_in_rows_each_over_its_caption():
    grid = caption_grid(solid("red", "lime", "blue", "black", "white"), ["a", "b", "c", "d", "e"], columns=3)
    pixels = np.asarray(grid)
    # Three columns of 128 with gaps of 6, two rows.
    assert grid.width == 3 * 134 + 6
    row = (grid.height - 6) // 2
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)]):
        x, y = 6 + i % 3 * 134, 6 + i // 3 * row
        assert (pixels[y + 2 : y + 126, x + 2 : x + 126] == colour).all()
        below = pixels[y + 130 : y + 146, x : x + 128]
        assert below.min() < 100, "no caption"
    empty = pixels[6 + row + 2 :, 6 + 2 * 134 + 2 : -8]
    assert (empty == empty[0, 0]).all()


def test_small_pictures_grow_by_a_whole_factor_and_large_ones_stay():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8))
    grid = caption_grid([noise], [""], columns=1)
    shown = np.asarray(grid)[6 : 6 + 60, 6 : 6 + 150]
    assert (shown[1:-1, 1:-1] == np.asarray(noise).repeat(3, 0).repeat(3, 1)[1:-1, 1:-1]).all()
    assert caption_grid(solid("red", size=(300, 40)), ["x"], columns=1).width == 312


def test_a_row_holds_eight_pictures_or_four_wide_ones():
    assert caption_grid(solid(*["red"] * 9), [""] * 9).width == 8 * 134 + 6
    assert caption_grid(solid(*["red"] * 9, size=(200, 64)), [""] * 9).width == 4 * 206 + 6


@pytest.mark.parametrize("caption", ["", "word " * 300, "x" * 500, "größe 星 🙂 \n\t", "\x00"])
def test_any_caption_can_be_drawn(caption):
    assert caption_grid(solid("red", "red"), [caption, "a"], columns=2).height < 64 * 2 + 100


def test_captions_have_the_letters_of_their_languages():
    """A letter that a font lacks is a box, the same for all: so different letters have to look different."""
    for one, other in ("äö", "жщ", "αβ", "שק", "سع", "ớự"):
        grids = [np.asarray(caption_grid(solid("red"), [letter], columns=1)) for letter in (one, other)]
        assert (grids[0] != grids[1]).any(), one + other


def test_letters_that_the_font_lacks_come_from_one_that_has_them():
    own = _font("a star").path
    letter, other = next((chr(n), path) for n, path in _fonts_by_letter(own).items() if chr(n).isprintable())
    assert _font(letter + "a").path == other != own
    assert _font("a star " + letter).path == own or ord("s") in _letters(other)  # not by a font without the others
    assert _font("\U000fffff star").path == own  # which no font has


def test_captions_stay_below_their_pictures_and_say_where_they_are_cut():
    for caption in ("MMMM WWWWW " * 9, "狗" * 100, "W" * 300):
        grid = np.asarray(caption_grid(solid("red", "red"), [caption, ""], columns=2))
        assert (grid[6 + 130 :, 6 + 134 - 3 :] == grid[-1, -1]).all(), caption
    words, font = "one two three four five six seven", _font("one")
    assert _wrapped(words, font, 1000) == [words] and _wrapped("", font, 50) == []
    assert _wrapped(words, font, 60, most=2)[-1].endswith("\N{HORIZONTAL ELLIPSIS}")
    assert " ".join(_wrapped(words, font, 60, most=9)) == words


def test_each_picture_needs_a_caption():
    with pytest.raises(ValueError):
        caption_grid(solid("red", "red"), ["a"], columns=2)


def test_a_grey_picture_is_no_error():
    caption_grid([Image.new("L", (64, 64), 100)], ["a"], columns=1)


@pytest.mark.parametrize("kinds", [(), ("loss",), ("validation_loss",), ("loss", "validation_loss")])
def test_loss_plot_draws_what_there_is(tmp_path, kinds):
    run = RunFolder.create(tmp_path / "run", load_config("pixels-tiny"))
    for kind in kinds:
        for step in range(1, 5):
            run.write_metrics(step, **{kind: 1 / step})
    run.close()
    loss_plot(run, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3)
    blue, orange = (33, 113, 181), (217, 72, 1)
    assert (pixels == blue).all(1).any() == ("loss" in kinds)
    assert (pixels == orange).all(1).any() == ("validation_loss" in kinds)


@pytest.mark.parametrize("losses", [dict(loss=9.0, loss_image=1.0), dict(loss=0.1)])
def test_held_out_losses_are_in_the_picture(tmp_path, losses):
    """Of a model of text and images too, whose whole loss is many times that of its images; and far above others."""
    run = RunFolder.create(tmp_path / "run", load_config("pixels-tiny"))
    for step in range(1, 9):
        run.write_metrics(step, validation_loss=1.1 + step / 100, **losses)
    loss_plot(run, tmp_path / "loss.png")
    run.close()
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert (pixels == (217, 72, 1)).all(-1).sum() > 300, "that of the legend alone, not the line of 8 points"


def test_the_loss_of_a_single_step_is_a_dot(tmp_path):
    run = RunFolder.create(tmp_path / "run", load_config("pixels-tiny"))
    blue = []
    for step in (1, 2):
        run.write_metrics(step, loss=1.0)
        loss_plot(run, tmp_path / "loss.png")
        pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
        left = pixels[:, : pixels.shape[1] // 2 + 50]  # without the legend
        rows, columns = (left == (33, 113, 181)).all(-1).nonzero()
        blue.append((np.ptp(rows), np.ptp(columns)) if len(rows) else None)
    run.close()
    (high, wide), line = blue
    assert 1 < high < 12 and 1 < wide < 12 and line[1] > 100


def test_losses_by_time_stand_beside(tmp_path):
    """A line for each bin that the metrics have, in a second plot; without any there is none."""
    run = RunFolder.create(tmp_path / "run", load_config("pixels-tiny"))
    sizes, colours = [], []
    for bins in ({}, {"loss_t0.0625": 1.0}, {"loss_t0.0625": 1.0, "loss_t0.9375": 0.1}):
        for step in range(1, 5):
            run.write_metrics(step, loss=1 / step, **{name: value / step for name, value in bins.items()})
        loss_plot(run, tmp_path / "loss.png")
        picture = Image.open(tmp_path / "loss.png").convert("RGB")
        sizes.append(picture.width)
        right = np.asarray(picture)[:, picture.width // 2 :].reshape(-1, 3)
        colours.append((right == (72, 23, 105)).all(1).any())
    run.close()
    assert sizes[0] < sizes[1] == sizes[2]
    assert colours[2] and not colours[1], "dark is the line near t = 1"


def test_the_running_mean_does_not_lag():
    falling = [float(v) for v in range(200, 0, -1)]
    mean = _running_mean(falling)
    assert mean[:-10] == pytest.approx(falling[:-10]) and mean[-1] == np.mean(falling[-11:])
    spike = [0.0] * 100 + [21.0] + [0.0] * 99
    assert _running_mean(spike) == pytest.approx([0.0] * 90 + [1.0] * 21 + [0.0] * 89)
    assert _running_mean([3.0]) == [3.0]
