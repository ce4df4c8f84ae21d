"""Plots of a run: a grid of captioned pictures, and the loss curves."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.telemetry import bin_names

if TYPE_CHECKING:
    from training.run import RunFolder

Line = list[tuple[float, float]]
"""(step, value) of each logged step."""


def caption_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None, min_width: int = 128
) -> Image.Image:
    """Pictures in rows of `columns` (None: eight, or four if they are wide), each above its caption. Small pictures are
    enlarged by a whole factor, without smoothing. A caption of more than four lines ends with an ellipsis.
    """
    columns = columns or (8 if images[0].width <= 2 * images[0].height else 4)
    zoom = max(1, -(-min_width // images[0].width))
    width, height = images[0].width * zoom, images[0].height * zoom
    line, fonts = 13, [_font(caption) for caption in captions]
    texts = [_wrapped(caption, font, width) for caption, font in zip(captions, fonts, strict=True)]
    gap, below = 6, line * max(map(len, texts)) + 6
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), "#f4f4f2")
    draw = ImageDraw.Draw(grid)
    for i, (image, text, font) in enumerate(zip(images, texts, fonts, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="#c8c8c4")
        for k, words in enumerate(text):
            draw.text((x + 1, y + height + 3 + k * line), words, fill="#333333", font=font)
    return grid


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 4) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or within those that are longer (or have no spaces)."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < most:
        lengths = range(1, min(len(rest), width) + 1)
        fits = max(1, bisect_right(lengths, width, key=lambda n: ceil(font.getlength(rest[:n]))))
        space = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else -1
        fits = space if space > 0 else fits
        lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        last = lines[-1]
        while len(last) > 1 and font.getlength(last + "\N{HORIZONTAL ELLIPSIS}") > width:
            last = last[:-1]
        lines[-1] = last + "\N{HORIZONTAL ELLIPSIS}"
    return lines


def _font(text: str) -> ImageFont.FreeTypeFont:
    """matplotlib's own font, which has the letters of Europe and more, or the machine's if it has more of this text."""
    import matplotlib

    own = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    letters = [ord(c) for c in text if c.isprintable() and not c.isspace()]
    lacking = [letter for letter in letters if letter not in _letters(own)]
    others = Counter(_fonts_by_letter(own).get(letter, own) for letter in lacking).most_common(1)
    paths = [own, *(path for path, _ in others)]
    try:
        return ImageFont.truetype(max(paths, key=lambda path: sum(n in _letters(path) for n in letters)), 11)
    except OSError:  # it has one size alone, as emoji in colours do
        return ImageFont.truetype(own, 11)


@cache
def _letters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


@cache
def _fonts_by_letter(own: str) -> dict[int, str]:
    """For each letter that the machine's fonts have and `own` has not: the first font that has it."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    found: dict[int, str] = {}
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.fname))
    for path in dict.fromkeys(font.fname for font in fonts if "LastResort" not in font.fname):  # that has boxes alone
        with suppress(OSError, RuntimeError):
            for letter in FT2Font(path).get_charmap().keys() - _letters(own):
                found.setdefault(letter, path)
    return found


def loss_plot(run: RunFolder, path: Path) -> None:
    """Training loss (each logged step and its running mean) and validation loss over steps, as a PNG; beside it, where
    the metrics have it, the running mean of the training loss by time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, Line] = {name: [] for name in ("loss", "loss_image", "validation_loss", *bin_names())}
    for row in run.rows():
        for name in lines.keys() & row.keys():
            lines[name].append((row["step"], row[name]))
    timed = {name: lines[name] for name in bin_names() if lines[name]}
    figure = Figure(figsize=(12 if timed else 7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *beside = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    _plot_loss(axes, lines["loss_image"] or lines["loss"], lines["validation_loss"])  # not the sum with a text's
    for by_time in beside:
        _plot_times(by_time, timed)
    figure.savefig(path, dpi=130)


def _plot_loss(axes: Any, train: Line, valid: Line) -> None:
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.7, label="training, each logged step")
        how: dict[str, Any] = dict(color="#2171b5", linewidth=1.6, marker=_marker(steps), markersize=3)
        axes.plot(steps, _running_mean(losses), label="training, running mean", **how)
        held_out = [loss for _, loss in valid if isfinite(loss)]
        axes.set_ylim(0.9 * min([*losses, *held_out]), 1.1 * max([*losses[len(losses) // 50 :], *held_out]))
    if valid:
        axes.plot(
            *zip(*valid, strict=True), "o-", color="#d94801", markersize=3, label="held-out, mean over fixed times"
        )
    axes.set(xlabel="step", ylabel="mean squared error of the velocity", title="Loss")
    axes.grid(alpha=0.25)
    if train or valid:
        axes.legend(frameon=False)


def _plot_times(axes: Any, timed: dict[str, Line]) -> None:
    """One line a bin of times, from light (data) to dark (noise)."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    for name, values in timed.items():
        t = float(name.removeprefix("loss_t"))
        steps, losses = zip(*values, strict=True)
        how: dict[str, Any] = dict(color=colormaps["viridis_r"](t), linewidth=1.2, marker=_marker(steps), markersize=3)
        axes.plot(steps, _running_mean(losses), label=f"{t:.2f}", **how)
    axes.set(xlabel="step", title="Training loss by time t, running means", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=2, title="t about")


def _marker(steps: Sequence[float]) -> str:
    """A dot for a single step, of which no line can be drawn."""
    return "o" if len(steps) == 1 else ""


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred running means over up to a twentieth of all values on each side, so that the line does not lag. At the
    start the window shrinks on both sides, at the end only on the right.
    """
    num = len(values)
    sums, at = np.cumsum([0.0, *values]), np.arange(num)
    half = np.minimum(at, num // 20)
    first, last = at - half, np.minimum(at + half + 1, num)
    return ((sums[last] - sums[first]) / (last - first)).tolist()
