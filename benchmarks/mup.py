"""The best learning rate of a small problem at three widths, with muP and without.

    OMP_NUM_THREADS=1 python -m benchmarks.mup --out benchmarks/results/mup.md

Each run trains a new MMDiT of two blocks on images of the drawn world, 32 x 32 pixels in 16 patches, with the same
images, times and noise. Its loss is the mean over the last fifth of the steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.timing import hardware
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from training.config import OptimizerConfig
from training.mup import scale_start
from training.objectives import Batch, FlowMatching
from training.optim import learning_rate, make_optimizer, set_rate
from training.seeds import generator_for
from training.shapes import ShapesWorld
from training.time_density import LogitNormal

HEAD = 16
WIDTHS = (32, 128, 256)
RATES = tuple(2.0**k for k in range(-11, -3))
Name = Literal["adamw", "muon"]


def data(count: int = 512) -> tuple[Batch, Tokenizer]:
    """Images of the drawn world (count, 3, 32, 32) in [-1, 1] with their captions, and a tokenizer."""
    world = ShapesWorld((32, 32), 0)
    samples = [world[i] for i in range(count)]
    captions = [caption for _, caption, _ in samples]
    tokenizer = Tokenizer.train(captions, 320, 16)
    images = torch.from_numpy(np.stack([image for image, _, _ in samples])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Batch(images, tokenizer(captions)), tokenizer


def final_loss(
    width: int, rate: float, base: int | None, name: Name, given: tuple[Batch, Tokenizer], steps: int, batch: int = 16
) -> float:
    """The loss of a model of this width; base: muP's base width, or None without muP. Infinity if it diverged."""
    (pictures, tokens, _), tokenizer = given
    torch.manual_seed(0)
    trunk = MMDiT(
        MMDiTConfig(3, 8, 2, width // HEAD, HEAD, context_dim=32, pooled_dim=32, qk_norm="rms_norm", sample_size=32)
    )
    if base is not None:
        scale_start(trunk, base)
    model = CaptionedMMDiT(trunk, LearnedText(TextConfig(320, 16, 32, 1, 2), tokenizer))
    config = OptimizerConfig(name=name, lr=rate, warmup_steps=10, weight_decay=0.0, base_width=base)
    optimizer, rates = make_optimizer(model, config), learning_rate(config, steps)
    objective, losses = FlowMatching(LogitNormal(0.0, 1.0)), []
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch,), generator=generator_for(1, step))
        part = Batch(pictures[rows], type(tokens)(tokens.ids[rows], tokens.mask[rows]))
        loss = objective(model, part, generator_for(0, step)).total
        loss.backward()
        set_rate(optimizer, rates(step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, steps // 5) :]
    return sum(last) / len(last) if all(map(math.isfinite, last)) else math.inf


def sweep(widths: Sequence[int], rates: Sequence[float], name: Name, steps: int) -> dict[bool, dict[int, list[float]]]:
    """Losses by whether muP was used and by width, one for each rate."""
    given = data()
    found: dict[bool, dict[int, list[float]]] = {False: {}, True: {}}
    for width in widths:
        for scaled in (False, True):
            if scaled and width == widths[0]:
                found[scaled][width] = found[False][width]  # the same runs
                continue
            base = widths[0] if scaled else None
            found[scaled][width] = [final_loss(width, rate, base, name, given, steps) for rate in rates]
            print(width, "muP" if scaled else "plain", *(f"{loss:.4f}" for loss in found[scaled][width]), flush=True)
    return found


def table(found: dict[bool, dict[int, list[float]]], rates: Sequence[float]) -> str:
    """The losses as a Markdown table, the least of each row in bold."""
    lines = ["| | width | " + " | ".join(f"2^{math.log2(rate):.0f}" for rate in rates) + " |"]
    lines.append("|" + "---|" * (len(rates) + 2))
    for scaled, rows in found.items():
        for width, losses in rows.items():
            cells = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
            lines.append(f"| {'muP' if scaled else 'plain'} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[bool, dict[int, list[float]]], rates: Sequence[float], path: Path) -> None:
    """Plot loss over learning rate, a line for each width, without muP and with it."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
    for axis, (scaled, rows) in zip(axes, found.items(), strict=True):
        for width, losses in rows.items():
            axis.plot(rates, losses, marker="o", label=f"width {width}")
            axis.plot(
                rates[losses.index(min(losses))], min(losses), marker="*", ms=14, color=axis.lines[-1].get_color()
            )
        axis.set(xscale="log", xlabel="learning rate", title="with muP" if scaled else "without")
        axis.grid(alpha=0.3)
    bests = [min(losses) for rows in found.values() for losses in rows.values()]
    axes[0].set(ylabel="loss", ylim=(min(bests) - 0.05, max(bests) + 0.15))
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write; the plot goes beside it")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--steps", type=int, default=120)
    asked = parser.parse_args()
    found = sweep(WIDTHS, RATES, asked.optimizer, asked.steps)
    plot(found, RATES, asked.out.with_suffix(".png"))
    command = f"python -m benchmarks.mup --out {asked.out} --optimizer {asked.optimizer} --steps {asked.steps}"
    asked.out.write_text(
        f"# The best rate at three widths\n\n`{command}`, {hardware()}, {asked.steps} steps "
        f"of 16 pictures, {asked.optimizer}, base width {WIDTHS[0]}. Loss by learning rate; `inf` diverged.\n\n"
        f"{table(found, RATES)}\n\n![Loss over rate]({asked.out.with_suffix('.png').name})\n"
    )


if __name__ == "__main__":
    main()
