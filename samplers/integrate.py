"""The one sampling loop: a solver's step over a time grid, with the count of network evaluations and the callback.

Nothing in the loop synchronises with the accelerator: times are Python floats, and NaN is checked for at the end, in
the sum of each step's state, which stays on the device until then. The sums also show at which step it arose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from samplers.field import DerivedField, Field, Prediction
from samplers.grids import time_grid
from samplers.noise import Brownian, BrownianTree, Diffusion, Generators, Noise
from samplers.schedules import Time
from samplers.solver import Solver
from samplers.solvers import make_solver


@dataclass(frozen=True)
class Solution:
    """x at the last time; ts (num_steps + 1,), the times visited; num_evals, network evaluations per sample.

    trajectory (num_steps + 1, B, ...): the states at `ts`, if asked for.
    """

    x: Tensor
    ts: Tensor
    num_evals: int
    trajectory: Tensor | None = None

    def __repr__(self) -> str:
        steps = f"{len(self.ts) - 1} steps from t = {self.ts[0]:g} to {self.ts[-1]:g}"
        return f"Solution(x {tuple(self.x.shape)}, {steps}, num_evals={self.num_evals})"


@dataclass(frozen=True)
class Progress:
    """The argument of a callback after each step: step `index` of `num_steps` went from x_t at t to x_next at t_next.

    prediction: that at (x_t, t), whose views, such as the data estimate, cost no further network evaluation.
    """

    index: int
    num_steps: int
    t: float
    t_next: float
    x_t: Tensor = field(repr=False)
    x_next: Tensor = field(repr=False)
    prediction: Prediction
    num_evals: int

    @property
    def x_0(self) -> Tensor:
        """The data estimate at (x_t, t)."""
        return self.prediction.x_0


Callback = Callable[[Progress], object]


@torch.no_grad()
def sample(
    field: Field,
    x: Tensor,
    solver: str | Solver = "heun",
    num_steps: int = 20,
    grid: str | Tensor | Sequence[float] = "uniform",
    diffusion: str | float | Diffusion | None = None,
    generator: Generators | BrownianTree = None,
    callback: Callback | None = None,
    *,
    trajectory: bool = False,
) -> Solution:
    """Solve the probability-flow ODE dx = v dt, or an SDE with its marginals (see noise.py), from noise to data.

    x (B, ...): the state at grid[0]; sigma(1) eps for pure noise. solver: one of `solver_names()`, or a Solver.
    grid: a name, with `num_steps` steps, or your own decreasing times in [0, 1], which determine the number of steps.
    diffusion: None for the solver's own (else the ODE); "kl", "sigma", "sin2", "constant", a number eta or w(t) for a
    solver that takes it (see noise.py). generator: of the noise, one for the batch, a list with a generator or seed per
    sample, or a `BrownianTree`. callback: called with a `Progress` after each step.
    Raises ValueError for invalid arguments before the first step, and for NaN after the last, saying where it arose.
    """
    check_field(field)
    check_states(x)
    method = make_solver(solver, field.schedule, diffusion)
    ts = time_grid(grid, num_steps, schedule=field.schedule)
    noise = generator if isinstance(generator, BrownianTree) else Brownian(x, generator)
    return integrate(field, x, method, ts, noise if method.stochastic else None, callback, trajectory)


def integrate(
    field: Field,
    x: Tensor,
    solver: Solver,
    ts: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    trajectory: bool = False,
) -> Solution:
    """Step `solver` through `ts` from x at ts[0], in either direction; differentiable in x and the network, not in ts.

    noise: of x's shape. An SDE solver goes from noise to data only. Not for `torch.func.vmap`, under which NaN cannot
    be checked for: batch x itself.
    """
    if not isinstance(solver, Solver) or not isinstance(ts, Tensor):
        raise ValueError(f"solver is {solver!r}, ts a {type(ts).__name__}: give a Solver, by make_solver, and a tensor")
    if getattr(noise, "shape", x.shape) != x.shape:
        raise ValueError(f"noise is for {tuple(noise.shape)}, x is {tuple(x.shape)}: make it for this x")  # type: ignore
    if solver.stochastic and noise is None:
        raise ValueError(f"{solver.name!r} draws noise: give noise=Brownian(x, generator)")
    if isinstance(noise, BrownianTree) and not solver.draws_once:
        raise ValueError(f"{solver.name!r} draws more in a step than a BrownianTree has for it: give a generator")
    if solver.steps_in_place and (callback is not None or trajectory):
        raise ValueError(f"{solver.name!r} steps in place: it has no states left for a callback or a trajectory")
    times, num_evals = ts.tolist(), 0
    solver = solver.bind(field, times)
    field.begin()

    def counted(x_t: Tensor, t: Time) -> Prediction:
        nonlocal num_evals
        prediction = field.predict(x_t, t)
        num_evals += prediction.num_evals
        return prediction

    counting = DerivedField(counted, field.schedule, field.prediction, field.determined)
    states, state = [x], None
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum in half precision overflows
    sums = torch.empty(
        len(times) - 1, dtype=wide, device=x.device
    )  # one tensor: small ones between the states would fragment memory
    dims = tuple(range(x.ndim))
    for index, (t, t_next) in enumerate(pairwise(times)):
        step = solver.step(counting, x, t, t_next, state, noise)
        if callback is not None:
            callback(Progress(index, len(times) - 1, t, t_next, x, step.x, step.prediction, num_evals))
        x, state = step.x, step.state
        torch.sum(x.detach(), dims, dtype=wide, out=sums[index])
        if trajectory:
            states.append(x)
    _check_finite(x, sums, times)
    return Solution(x, ts, num_evals, torch.stack(states) if trajectory else None)


def check_field(field: Field) -> None:
    """Raises ValueError for what is not a Field."""
    if not isinstance(field, Field):
        raise ValueError(f"field is {field!r}: give a samplers.Field(network, schedule, prediction)")


def check_states(x: Tensor) -> None:
    """Raises ValueError for what is not a batch of states."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}: give a floating tensor (B, ...) with B >= 1")
    if not x.is_floating_point() or x.ndim < 1 or not len(x):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: give a floating tensor (B, ...) with B >= 1")


def _check_finite(x: Tensor, sums: Tensor, times: list[float]) -> None:
    """Raises ValueError naming the first step whose state is not finite, unless the last state is finite."""
    finite = sums.isfinite().tolist()
    if all(finite) or x.isfinite().all():
        return
    index = finite.index(False)
    raise ValueError(
        f"NaN or inf after step {index + 1} of {len(sums)}, from t = {times[index]:g} to {times[index + 1]:g}: "
        "look at the network's output there, or give x in float32"
    )
