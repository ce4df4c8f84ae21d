"""Error over network evaluations of our solvers, diffusers' schedulers and k-diffusion, on fields known exactly.

    python -m benchmarks.solvers                        # both mixtures, 4 to 64 evaluations: tables on standard output
    python -m benchmarks.solvers --out benchmarks/results/solvers          # and solvers.md, solvers.png
    python -m benchmarks.solvers --k-diffusion FOLDER   # k-diffusion too: pip install --no-deps --target FOLDER
                                                        #   k-diffusion torchdiffeq torchsde trampoline
    python -m benchmarks.solvers --overhead             # time of a step without the network, ours and theirs

The error of a path is the root mean square distance between its end and that of the exact path from the same noise
(classical Runge-Kutta with many steps in float64), in units of the data's standard deviation. The tables have its root
mean square over paths, its median, as a few paths that end in another mode dominate the former, and the sliced
Wasserstein distance between the two sets of ends, which does not depend on which path ends where.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import hardware
from samplers import EDM, SOLVERS, Field, Multistep, RectifiedFlow, Solver, grids, sample, shift_time, uniform
from tests.oracles import Mixture

FLOW = RectifiedFlow()
BUDGETS = (4, 6, 8, 10, 16, 20, 32, 64)
METRICS = ("root mean square", "median", "sliced Wasserstein")
Errors = dict[str, list[list[float]]]  # by method: for each budget its error in each metric


def ring(modes: int = 8, dims: int = 2, std: float = 0.08) -> Mixture:
    """A mixture with its modes on a circle (dims = 2) or at random points; its standard deviation is about 1."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    means = torch.stack((angle.cos(), angle.sin()), 1) * 2**0.5
    if dims > 2:
        means = torch.randn(modes, dims, generator=g, dtype=torch.float64)
    one = torch.ones(modes, dtype=torch.float64)
    return Mixture(one / modes, means, std * one)


def shifted(shift: float, power: float = 1.0) -> Callable[[int], Tensor]:
    """The uniform grid raised to a power, which if above 1 makes steps near the data smaller, and shifted."""
    return lambda n: shift_time(uniform(n) ** power, shift)


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform,
    "cosine": lambda n: grids.cosine(n, FLOW),
    "shift 0.5": shifted(0.5),
    "shift 0.7": shifted(0.7),
    "shift 1.5": shifted(1.5),
    "shift 2": shifted(2.0),
    "shift 1.75, power 1.2": shifted(1.75, 1.2),
    "shift 2, power 1.2": shifted(2.0, 1.2),
    "karras": lambda n: grids.karras(n, FLOW),
    "log-snr": lambda n: grids.log_snr_uniform(n, FLOW, 5e-3),
    "log-snr wide": lambda n: grids.log_snr_uniform(n, FLOW, 2e-2),
    "beta": lambda n: grids.beta(n),
}

FLOW3 = Multistep("flow-3", 3, 1, "", variable="flow", num_nodes=3)
METHODS: dict[str, Solver] = {
    name: SOLVERS[name]
    for name in (
        "euler",
        "midpoint",
        "heun",
        "dpmpp-2m",
        "dpmpp-3m",
        "unipc",
        "unipc-3",
        "deis",
        "ab2",
        "ab3",
        "abm",
        "abm4",
        "abm5",
    )
} | {
    "abm4, 4 nodes": replace(SOLVERS["abm"], num_nodes=4, corrector=4),
    "flow-3": FLOW3,
    "flow-2c": replace(FLOW3, num_nodes=2, corrector=3),
    "flow-3c": replace(FLOW3, num_nodes=3, corrector=4),
}


def theirs(name: str, budget: int, field: Field, x: Tensor, **options: object) -> Tensor:
    """Samples by one of diffusers' schedulers on its own flow sigmas."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**options)
        steps = (budget + 1) // 2 if "Heun" in name else budget
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(field.v(x, min(float(t) / 1000, 1.0)), t, x, return_dict=False)[0].double()
    return x


_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
THEIRS: dict[str, tuple[str, dict[str, object]]] = {
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 3}),
    "DEIS": ("DEISMultistepScheduler", {**_DPM, "solver_order": 2}),
    "UniPC 2": ("UniPCMultistepScheduler", {**_DPM, "solver_order": 2}),
    "UniPC 3": ("UniPCMultistepScheduler", {**_DPM, "solver_order": 3}),
}


def k_diffusion(folder: str) -> types.ModuleType:
    """k_diffusion.sampling alone: the package itself imports training code and its dependencies."""
    sys.path.append(folder)
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [str(Path(folder) / "k_diffusion")]
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


K_SAMPLERS = {"euler": 1, "heun": 2, "dpm_2": 2, "lms": 1, "dpmpp_2m": 1}
K_SIGMAS = {"karras": ("get_sigmas_karras", 0.01), "exponential": ("get_sigmas_exponential", 0.02)}
SIGMA_MAX = 80.0


def of_k_diffusion(folder: str, data: Mixture, x: Tensor, error: Callable[[Tensor, Tensor], list[float]]) -> Errors:
    """Errors of its samplers on sigmas 80 to 0, from 80 times the same noise x; the exact path starts there too."""
    sampling, field = k_diffusion(folder), data.field(EDM(SIGMA_MAX))
    start = SIGMA_MAX * x
    exact = sample(field, start, "rk4", grid=grids.cosine(250, EDM(SIGMA_MAX))).x

    def model(x_t: Tensor, sigma: Tensor) -> Tensor:
        return field.x_0(x_t, (sigma.double() / SIGMA_MAX).clamp(max=1))

    out: Errors = {}
    for name, evals in K_SAMPLERS.items():
        for grid, (make, low) in K_SIGMAS.items():
            rows = []
            for budget in BUDGETS:
                sigmas = getattr(sampling, make)((budget + evals - 1) // evals, low, SIGMA_MAX).double()
                rows.append(error(getattr(sampling, f"sample_{name}")(model, start, sigmas, disable=True), exact))
            out[f"k-diffusion {name} / {grid}"] = rows
    return out


def errors(data: Mixture, batch: int, k_folder: str | None = None) -> tuple[Errors, Errors]:
    """(errors of our methods on each grid, errors of the other libraries') at each budget."""
    g = torch.Generator().manual_seed(1)
    dims = data.means.shape[1]
    x = torch.randn(batch, dims, generator=g, dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.randn(128, dims, generator=g, dtype=torch.float64), dim=1)
    field = data.field(FLOW)
    exact = sample(field, x, "rk4", grid=grids.cosine(250, FLOW)).x
    _, covariance = data.moments()
    deviation = covariance.diagonal().mean().sqrt()

    def error(y: Tensor, end: Tensor) -> list[float]:
        distance = (y - end).square().mean(1).sqrt() / deviation
        one, other = ((z @ directions.T).sort(0).values for z in (y, end))
        sliced = (one - other).square().mean().sqrt() / deviation
        return [distance.square().mean().sqrt().item(), distance.median().item(), sliced.item()]

    own, other = {}, {}
    for name, solver in METHODS.items():
        for grid, make in GRIDS.items():
            steps = [budget // solver.evals_per_step for budget in BUDGETS]
            own[f"{name} / {grid}"] = [error(sample(field, x, solver, grid=make(n)).x, exact) for n in steps]
    for name, (scheduler, options) in THEIRS.items():
        rows = [error(theirs(scheduler, budget, field, x, **options), exact) for budget in BUDGETS]
        other[f"diffusers {name}"] = rows
    if k_folder:
        other |= of_k_diffusion(k_folder, data, x, error)
    return own, other


def row(name: str, values: Sequence[float], form: str = ".2e") -> str:
    return f"| {name} | " + " | ".join(f"{value:{form}}" for value in values) + " |"


def best(table: Errors, metric: int) -> list[float]:
    """The smallest error at each budget."""
    return [min(rows[i][metric] for rows in table.values()) for i in range(len(BUDGETS))]


def ranked(table: Errors, metric: int) -> list[str]:
    """Names in the order of the geometric mean of their errors over budgets."""
    return sorted(table, key=lambda name: math.prod(one[metric] for one in table[name]))


def report(title: str, own: Errors, other: Errors, metric: int) -> str:
    """A Markdown table: theirs, our eight best by geometric mean, and ratios to the best of theirs."""
    lines = [f"\n### {title}, {METRICS[metric]}\n", row("solver", BUDGETS, "d"), "|---" * (len(BUDGETS) + 1) + "|"]
    names = ranked(own, metric)
    for table, some in ((other, ranked(other, metric)), (own, names[:8])):
        lines += [row(name, [one[metric] for one in table[name]]) for name in some]
    of_theirs = best(other, metric)
    for name, ours in (("best of ours", best(own, metric)), (names[0], [one[metric] for one in own[names[0]]])):
        lines.append(row(f"{name} / best of theirs", [a / b for a, b in zip(ours, of_theirs, strict=True)], ".2f"))
    return "\n".join(lines)


def plot(path: Path, tables: dict[str, tuple[Errors, Errors]]) -> None:
    """Root mean square and median error over evaluations: the best of each, and our best single one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(tables), 3, figsize=(13, 4 * len(tables)), squeeze=False)
    for line, (title, (own, other)) in zip(axes, tables.items(), strict=True):
        for metric, axis in enumerate(line):
            for name in ranked(other, metric)[:4]:
                axis.loglog(BUDGETS, [one[metric] for one in other[name]], color="0.6", linewidth=1)
            axis.loglog(BUDGETS, best(other, metric), "o-", color="0.3", label="best of diffusers and k-diffusion")
            name = ranked(own, metric)[0]
            axis.loglog(BUDGETS, [one[metric] for one in own[name]], "s-", color="C0", label=name)
            axis.loglog(BUDGETS, best(own, metric), "--", color="C1", label="best of ours")
            axis.set(title=f"{title}: {METRICS[metric]}", xlabel="network evaluations", xticks=BUDGETS)
            axis.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
            axis.minorticks_off()
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


OVERHEAD: dict[str, tuple[Solver, str, dict[str, object]]] = {
    "euler": (SOLVERS["euler"], "FlowMatchEulerDiscreteScheduler", {}),
    "euler, in place": (replace(SOLVERS["euler"], in_place=True), "FlowMatchEulerDiscreteScheduler", {}),
    "heun": (SOLVERS["heun"], "FlowMatchHeunDiscreteScheduler", {}),
    "dpmpp-2m": (SOLVERS["dpmpp-2m"], "DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2}),
    "unipc": (SOLVERS["unipc"], "UniPCMultistepScheduler", {**_DPM, "solver_order": 2}),
    "deis": (replace(SOLVERS["deis"], num_nodes=2), "DEISMultistepScheduler", {**_DPM, "solver_order": 2}),
}


def overhead(dtype: torch.dtype, steps: int = 20, repeats: int = 25) -> str:
    """Milliseconds of a step on (8, 16, 64, 64) latents with a network that returns a constant tensor.

    Ours is the time of `sample`, with its setup and check for NaN, over the number of steps; theirs is the time within
    scheduler.step. Both alternate; the table has medians, and the ratio of the minima, which other work on the machine
    affects little.
    """
    import diffusers

    x, v = torch.randn(2, 8, 16, 64, 64, dtype=dtype).unbind(0)
    field = Field(lambda x_t, t: v, FLOW)

    def of_ours(solver: Solver) -> float:
        begin = time.perf_counter()
        sample(field, x, solver, steps)
        return (time.perf_counter() - begin) / steps * 1e3

    def of_theirs(name: str, options: dict[str, object]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(diffusers, name)(**options)
            made.set_timesteps(steps)
        y, spent = x, 0.0
        for t in made.timesteps:
            begin = time.perf_counter()
            y = made.step(v, t, y, return_dict=False)[0]
            spent += time.perf_counter() - begin
        return spent / steps * 1e3  # two calls of Heun's scheduler are one step of ours

    title = f"\n## Latents in {str(dtype).removeprefix('torch.')}\n"
    lines = [
        title,
        "| solver | ours, ms a step | diffusers, ms a step | ratio | ratio of the least |",
        "|---" * 5 + "|",
    ]
    for name, (solver, scheduler, options) in OVERHEAD.items():
        pairs = [(of_ours(solver), of_theirs(scheduler, options)) for _ in range(repeats)]
        (mine, other), (least, of_them) = ([f(column) for column in zip(*pairs, strict=True)] for f in (middle, min))
        lines.append(f"| {name} | {mine:.3f} | {other:.3f} | {mine / other:.2f} | {least / of_them:.2f} |")
    return "\n".join(lines)


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--overhead", action="store_true", help="time a step instead of measuring errors")
    parser.add_argument("--batch", type=int, default=128, help="paths per mixture")
    parser.add_argument("--k-diffusion", metavar="FOLDER", help="where k-diffusion and what it needs are installed")
    parser.add_argument("--out", type=Path, help="write the tables to OUT.md and the plot to OUT.png")
    args = parser.parse_args()
    text = [
        f"`python -m benchmarks.solvers {'--overhead' if args.overhead else f'--batch {args.batch}'}` on {hardware()}."
    ]
    tables = {}
    if args.overhead:
        text += [overhead(dtype) for dtype in (torch.float32, torch.bfloat16)]
    else:
        for title, data in (("8 modes in 2-D", ring()), ("8 modes in 64-D", ring(dims=64, std=0.3))):
            tables[title] = errors(data, args.batch, args.k_diffusion)
            text += [report(title, *tables[title], metric) for metric in range(len(METRICS))]
    print("\n".join(text))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text("\n".join(text) + "\n")
        if tables:
            plot(args.out.with_suffix(".png"), tables)


if __name__ == "__main__":
    main()
