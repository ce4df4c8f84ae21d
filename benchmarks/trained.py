"""Solvers on a trained model: the distance to the exact solution, and the score of the pictures.

    python -m benchmarks.trained runs/demo --out benchmarks/results/trained.md

All start from the same noise, with the run's guidance and shift. A budget is the number of network evaluations per
picture, where a guided one counts as two; a solver takes as many steps as fit into it. The distance is the root mean
square over pixels, of 255, to the picture by Heun's method with many steps (for ODE solvers only, as the others add
noise); the score is the mean of ShapesEval's six questions.
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmdit import TextToImage
from samplers import SOLVERS, Progress
from training.shapes_eval import ShapesEval

NAMES = (
    *("euler", "midpoint", "heun", "ab2", "ab3", "abm", "ddim", "dpm-2", "dpmpp-2m", "dpmpp-3m", "deis", "unipc"),
    *("ddpm", "dpmpp-2m-sde", "sa-solver"),
)
REFERENCE_STEPS = 60
MOST_STEPS = 64


def evaluations(pipe: TextToImage, solver: str, num_steps: int) -> int:
    """Network evaluations per picture."""
    counted = [0]

    def count(progress: Progress) -> None:
        counted[0] = progress.num_evals

    pipe("a circle", solver=solver, num_steps=num_steps, callback=count)
    return counted[0]


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number of steps, up to MOST_STEPS, that fits; 0 if none does."""
    low, high = 0, MOST_STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def table(pipe: TextToImage, budgets: list[int], prompts_per_question: int) -> str:
    """The results as Markdown."""
    judge = ShapesEval(pipe.size, prompts_per_question, seed=1)
    prompts = [prompt.caption for prompt in judge.prompts]

    def pictures(solver: str, num_steps: int) -> np.ndarray:
        images = pipe(prompts, solver=solver, num_steps=num_steps, seed=1, batch_size=512)
        return np.stack([np.asarray(i) for i in images])

    exact = pictures("heun", REFERENCE_STEPS)
    lines = [
        f"| solver |{''.join(f' {b}: steps | distance | score |' for b in budgets)}",
        "|---" * (3 * len(budgets) + 1) + "|",
    ]
    for name in NAMES:
        cells = []
        for budget in budgets:
            steps = largest(lambda n, name=name, budget=budget: evaluations(pipe, name, n) <= budget)  # type: ignore[misc]
            if steps == 0:
                cells.append(" | | |")
                continue
            made = pictures(name, steps)
            distance = np.sqrt(np.mean((made.astype(float) - exact) ** 2))
            shown = "" if SOLVERS[name].stochastic else f"{distance:.1f}"
            cells.append(f" {steps} | {shown} | {judge.score(list(made))['mean']:.2f} |")
        lines.append(f"| {name} |" + "".join(cells))
        print(lines[-1], flush=True)
    lines += [
        "",
        f"Heun with {REFERENCE_STEPS} steps scores {judge.score(list(exact))['mean']:.2f}; {len(prompts)} prompts.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of mmdit train on the drawn world")
    parser.add_argument("--budgets", type=int, nargs="+", default=[12, 20, 29])
    parser.add_argument("--prompts-per-question", type=int, default=32)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    pipe = TextToImage.load(arguments.run)
    results = table(pipe, arguments.budgets, arguments.prompts_per_question)
    print(results)
    if arguments.out:
        cpu = platform.processor() or platform.machine()
        machine = f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}, torch {torch.__version__}"
        about = f"`python -m benchmarks.trained {arguments.run}`, {machine}.\n\n{str(__doc__).split(chr(10) * 2, 2)[2]}"
        arguments.out.write_text(f"# Solvers on a trained model\n\n{about}\n{results}\n")


if __name__ == "__main__":
    main()
