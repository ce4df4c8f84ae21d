"""The Transfusion paper's ablations at small scale (Zhou et al. 2024, arXiv 2408.11039, tables 5 to 8), and two more.

    python -m benchmarks.transfusion_ablations --runs runs/ablations --out benchmarks/results/transfusion_ablations.md

Each variant differs from the base as its name says, and is trained with each seed as by `mmdit train`, into a run
folder of its own; finished runs are not trained again. A process uses one core. Measured on held-out samples of the
drawn world: the image loss (mean over fixed times), nats per token of captions alone and after their picture, the mean
of ShapesEval's six questions, and the share of pictures that are described correctly.

The U-Nets have 128 channels at the trunk for every patch size. Each claim of the paper is tested on each measure by
the sign of the difference of the means. It "agrees" or "disagrees" only if this difference exceeds the mean of both
sides' ranges over seeds (largest less smallest), else there is no clear difference.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

MEASURES = {  # key in scores.json: (title, whether more is better)
    "validation_loss": ("image loss", False),
    "validation_text": ("nats alone", False),
    "validation_caption": ("nats after picture", False),
    "shapes_eval": ("ShapesEval", True),
    "captions_right": ("described rightly", True),
}
BASE = (
    *("data.num_samples=6000", "model.patch_size=2", "evaluation.prompts_per_question=25"),
    *("transfusion.weights=shared", "transfusion.time=added", "training.compile=off"),
    *("training.sample_every=0", "training.validate_every=0", "training.checkpoint_every=0"),
)
VARIANTS = {
    "base": (),
    "causal": ("transfusion.attention=causal",),
    "U-Net": ("transfusion.codec=unet",),
    "U-Net, causal": ("transfusion.codec=unet", "transfusion.attention=causal"),
    "patch 1": ("model.patch_size=1",),
    "patch 4": ("model.patch_size=4",),
    "patch 8": ("model.patch_size=8",),
    "U-Net, patch 4": ("transfusion.codec=unet", "transfusion.codec_width=32", "model.patch_size=4"),
    "U-Net, patch 8": ("transfusion.codec=unet", "transfusion.codec_width=16", "model.patch_size=8"),
    "no cap": ("transfusion.image_first_cap=1.0",),
    "lambda 1": ("transfusion.image_weight=1.0",),
    "lambda 20": ("transfusion.image_weight=20.0",),
    "separate": ("transfusion.weights=separate",),
}


@dataclass(frozen=True)
class Claim:
    """A claim that the variant `better` is better than `worse` in some measures."""

    source: str
    better: str
    worse: str
    measures: tuple[str, ...]


CLAIMS = (
    Claim("table 5, linear: patches that see each other", "base", "causal", ("validation_loss", "validation_caption")),
    Claim("table 5, U-Net: patches that see each other", "U-Net", "U-Net, causal", ("validation_caption",)),
    Claim("table 7: U-Net over linear", "U-Net", "base", ("validation_loss", "validation_caption")),
    Claim("table 6, linear: patches of 2 over 4", "base", "patch 4", ("validation_loss", "validation_caption")),
    Claim("table 6, linear: patches of 4 over 8", "patch 4", "patch 8", ("validation_loss", "validation_caption")),
    Claim("table 6, linear: patches of 2 over 1, captions", "base", "patch 1", ("validation_caption",)),
    Claim("table 6, U-Net: patches of 4 over 2", "U-Net, patch 4", "U-Net", ("validation_loss", "validation_caption")),
    Claim("table 6: text is better with small patches", "base", "patch 8", ("validation_text",)),
    Claim("table 8: image-first images of little noise", "base", "no cap", ("validation_caption", "captions_right")),
    Claim("BAGEL, not this paper: weights of its own", "separate", "base", ("validation_loss", "validation_caption")),
)


def trained(runs: Path, steps: int, job: tuple[str, int]) -> dict[str, float]:
    """The scores of one variant with one seed."""
    from training import load_config, train

    name, seed = job
    folder = runs / f"{name.replace(' ', '-').replace(',', '').lower()}-{seed}"
    if not (folder / "scores.json").exists():
        own = (f"training.num_steps={steps}", f"seed={seed}", f"training.out={folder}")
        train(load_config("transfusion-demo", [*BASE, *VARIANTS[name], *own]), resume=folder.exists())
    scores = json.loads((folder / "scores.json").read_text())
    scores["shapes_eval"] = scores["shapes_eval"]["mean"]
    return {measure: scores[measure] for measure in MEASURES}


Results = dict[str, list[dict[str, float]]]


def table(results: Results) -> list[str]:
    """The table of mean and range over seeds, by variant and measure."""
    lines = ["| variant | " + " | ".join(name for name, _ in MEASURES.values()) + " |", "|---" * 6 + "|"]
    for name, rows in results.items():
        cells = []
        for measure in MEASURES:
            values = [row[measure] for row in rows]
            cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def verdicts(results: Results) -> list[str]:
    """The table of whether each claim holds here."""
    lines = ["| claim | measure | better side | other side | here |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        for measure in claim.measures:
            a, b = ([row[measure] for row in results[name]] for name in (claim.better, claim.worse))
            gain = mean(a) - mean(b) if MEASURES[measure][1] else mean(b) - mean(a)
            apart = abs(gain) > (max(a) - min(a) + max(b) - min(b)) / 2
            verdict = ("agrees" if gain > 0 else "disagrees") if apart else "no clear difference"
            cells = (f"{claim.source} | {MEASURES[measure][0]} | {claim.better} {mean(a):.3f} | "
                     f"{claim.worse} {mean(b):.3f} | {verdict}")  # fmt: skip
            lines.append(f"| {cells} |")
    return lines


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plot(results: Results, path: Path) -> None:
    """Plot the results: a panel for each measure, a row for each variant, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURES), figsize=(15, 0.32 * len(results) + 1.2), sharey=True)
    for panel, (measure, (title, more)) in zip(panels, MEASURES.items(), strict=True):
        for row, (name, rows) in enumerate(results.items()):
            values = [one[measure] for one in rows]
            color = "C1" if name == "base" else "C0"
            panel.plot(values, [row] * len(values), "o", color=color, alpha=0.5, markersize=4)
            panel.plot(mean(values), row, "|", color=color, markersize=14)
        panel.axvline(mean([one[measure] for one in results["base"]]), color="0.8", linewidth=1, zorder=0)
        panel.set_title(f"{title} ({'more' if more else 'less'} is better)", fontsize=9)
    panels[0].set_yticks(range(len(results)), list(results))
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder that holds the run folders")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--plot", type=Path, help="plot to write")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.variants]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        scores = list(pool.map(partial(trained, arguments.runs, arguments.steps), jobs))
    results: Results = {name: [] for name in arguments.variants}
    for (name, _), row in zip(jobs, scores, strict=True):
        results[name].append(row)
    lines = table(results)
    if set(arguments.variants) == set(VARIANTS):
        lines += ["", *verdicts(results)]
    print("\n".join(lines))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.out:
        head = f"{arguments.steps} steps, {arguments.seeds} seeds, {platform.processor() or platform.machine()}"
        text = "\n".join(
            ["# Transfusion's ablations at small scale", "", head, "", *str(__doc__).split("\n")[2:], *lines]
        )
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
