"""What a person looks at: a grid of captioned pictures, and the loss."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from training.run import RunFolder


def caption_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None, min_width: int = 128
) -> Image.Image:
    """Pictures in rows of `columns` (None: eight, or four wide ones), each over its caption; small ones are enlarged by
    a whole factor, without smoothing.
    """
    columns = columns or (8 if images[0].width <= 2 * images[0].height else 4)
    zoom = max(1, -(-min_width // images[0].width))
    width, height = images[0].width * zoom, images[0].height * zoom
    font, line = ImageFont.load_default(11), 13
    texts = [textwrap.wrap(caption, max(8, width // 6))[:4] for caption in captions]
    gap, below = 6, line * max(map(len, texts)) + 6
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), "#f4f4f2")
    draw = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="#c8c8c4")
        for k, words in enumerate(text):
            draw.text((x + 1, y + height + 3 + k * line), words, fill="#333333", font=font)
    return grid


def loss_plot(run: RunFolder, path: Path) -> None:
    """Training loss (each logged step and its running mean) and validation loss over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = run.metrics()
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    valid = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        mean, smooth = losses[0], []
        for loss in losses:
            mean += (loss - mean) * 0.05
            smooth.append(mean)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.7, label="training, each logged step")
        axes.plot(steps, smooth, color="#2171b5", linewidth=1.6, label="training, running mean")
        axes.set_ylim(0.9 * min(losses), 1.1 * max(losses[len(losses) // 50 :]))
    if valid:
        axes.plot(
            *zip(*valid, strict=True), "o-", color="#d94801", markersize=3, label="held-out, mean over fixed times"
        )
    axes.set(xlabel="step", ylabel="mean squared error of the velocity", title="Loss")
    axes.grid(alpha=0.25)
    if train or valid:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
