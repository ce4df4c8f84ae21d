"""Error over network evaluations of our solvers and of diffusers' schedulers, on data whose exact field is known.

    python -m benchmarks.solvers                       # both mixtures, 6 to 20 evaluations, a table on standard output
    python -m benchmarks.solvers --overhead            # time of a step without the network, ours beside theirs

The error is the distance, per number, between the end of a sampled path and that of the exact one from the same noise
(classical Runge-Kutta with many steps in float64), in units of the data's deviation: its root mean square over paths
and, since one path that ends in another mode outweighs all others in that, its median.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samplers import SOLVERS, Field, Multistep, RectifiedFlow, Solver, grids, sample, shift_time, uniform
from tests.oracles import Mixture

FLOW = RectifiedFlow()
BUDGETS = (6, 8, 10, 16, 20)


def ring(modes: int = 8, dims: int = 2, std: float = 0.08) -> Mixture:
    """Modes on a circle in the first two dimensions (dims = 2), or at random places; unit deviation or near it."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    means = torch.stack((angle.cos(), angle.sin()), 1) * 2**0.5
    if dims > 2:
        means = torch.randn(modes, dims, generator=g, dtype=torch.float64)
    one = torch.ones(modes, dtype=torch.float64)
    return Mixture(one / modes, means, std * one)


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform,
    "cosine": lambda n: grids.cosine(n, FLOW),
    "shift 0.5": lambda n: shift_time(uniform(n), 0.5),
    "shift 2": lambda n: shift_time(uniform(n), 2.0),
    "karras": lambda n: grids.karras(n, FLOW),
    "log-snr": lambda n: grids.log_snr_uniform(n, FLOW, 5e-3),
    "log-snr wide": lambda n: grids.log_snr_uniform(n, FLOW, 2e-2),
    "beta": lambda n: grids.beta(n),
    "shift 1.5": lambda n: shift_time(uniform(n), 1.5),
    "shift 0.7": lambda n: shift_time(uniform(n), 0.7),
}

FLOW3 = Multistep("flow-3", 3, 1, "", variable="flow", num_nodes=3)
METHODS: dict[str, Solver] = {
    name: SOLVERS[name]
    for name in ("euler", "midpoint", "heun", "dpmpp-2m", "dpmpp-3m", "unipc", "unipc-3", "deis", "ab2", "ab3", "abm")
} | {
    "flow-2": replace(FLOW3, num_nodes=2),
    "flow-3": FLOW3,
    "flow-2c": replace(FLOW3, num_nodes=2, corrector=3),
    "flow-3c": replace(FLOW3, num_nodes=3, corrector=4),
}


def theirs(name: str, budget: int, field: Field, x: Tensor, **options: object) -> Tensor | None:
    """The samples of a scheduler of diffusers on its flow sigmas, or None where the budget does not fit it."""
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


def errors(data: Mixture, batch: int, median: bool) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of every method and grid of ours and of every scheduler of theirs, the error at each budget."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, data.means.shape[1], generator=g, dtype=torch.float64)
    field = data.field(FLOW)
    exact = sample(field, x, "rk4", grid=grids.cosine(250, FLOW)).x
    mean, covariance = data.moments()
    deviation = covariance.diagonal().mean().sqrt()

    def error(y: Tensor) -> float:
        distance = (y - exact).square().mean(1).sqrt() / deviation
        return (distance.median() if median else distance.square().mean().sqrt()).item()

    own = {}
    for name, solver in METHODS.items():
        for grid, make in GRIDS.items():
            steps = [budget // solver.evals_per_step for budget in BUDGETS]
            own[f"{name} / {grid}"] = [error(sample(field, x, solver, grid=make(n)).x) for n in steps]
    other = {}
    for name, (scheduler, options) in THEIRS.items():
        other[name] = [error(theirs(scheduler, budget, field, x, **options)) for budget in BUDGETS]
    return own, other


def report(title: str, own: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    """A Markdown table: theirs, our ten best by geometric mean, and the ratio of the best to the best of theirs."""
    print(
        f"\n### {title}\n\n| solver | " + " | ".join(map(str, BUDGETS)) + " |\n|---" * 1 + "|---" * len(BUDGETS) + "|"
    )
    ranked = sorted(own.items(), key=lambda item: math.prod(item[1]))
    for name, row in [*other.items(), *ranked[:10]]:
        print(f"| {name} | " + " | ".join(f"{e:.2e}" for e in row) + " |")
    best = [min(row[i] for row in own.values()) for i in range(len(BUDGETS))]
    of_theirs = [min(row[i] for row in other.values()) for i in range(len(BUDGETS))]
    print(
        "| best of ours / best of theirs | "
        + " | ".join(f"{a / b:.2f}" for a, b in zip(best, of_theirs, strict=True))
        + " |"
    )
    one = ranked[0][1]
    print(
        f"| {ranked[0][0]} / best of theirs | "
        + " | ".join(f"{a / b:.2f}" for a, b in zip(one, of_theirs, strict=True))
        + " |"
    )


def overhead(steps: int = 20, repeats: int = 3) -> None:
    """Milliseconds of a step on (8, 16, 64, 64) float32 latents with a network that returns a fixed tensor."""
    import diffusers

    x, v = torch.randn(8, 16, 64, 64), torch.randn(8, 16, 64, 64)
    field = Field(lambda x_t, t: v, FLOW)
    pairs = {
        "euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "dpmpp-2m": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2}),
        "unipc": ("UniPCMultistepScheduler", {**_DPM, "solver_order": 2}),
        "deis": ("DEISMultistepScheduler", {**_DPM, "solver_order": 2}),
    }
    print("\n| solver | ours, ms a step | diffusers, ms a step | ratio |\n|---|---|---|---|")
    for name, (scheduler, options) in pairs.items():
        solver = replace(SOLVERS[name], num_nodes=2) if name == "deis" else SOLVERS[name]
        mine, other = [], []
        for _ in range(repeats):
            begin = time.perf_counter()
            sample(field, x, solver, steps)
            mine.append((time.perf_counter() - begin) / steps * 1e3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = getattr(diffusers, scheduler)(**options)
                made.set_timesteps(steps)
            y, spent = x, 0.0
            for t in made.timesteps:
                begin = time.perf_counter()
                y = made.step(v, t, y, return_dict=False)[0]
                spent += time.perf_counter() - begin
            other.append(spent / steps * 1e3)
        print(f"| {name} | {min(mine):.2f} | {min(other):.2f} | {min(mine) / min(other):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--overhead", action="store_true", help="time a step instead of measuring errors")
    parser.add_argument("--batch", type=int, default=128, help="paths per mixture")
    args = parser.parse_args()
    if args.overhead:
        overhead()
        return
    for title, data in (("8 modes in 2-D", ring()), ("8 modes in 64-D", ring(dims=64, std=0.3))):
        for median in (False, True):
            report(f"{title}, {'median' if median else 'root mean square'}", *errors(data, args.batch, median))


if __name__ == "__main__":
    main()
