"""Solvers: a stepper is one pure step from t to t_next; the loop is in integrate.py.

A Runge-Kutta method is data, its Butcher tableau. A step takes and gives a `state`, so that multistep methods can carry
their past; those here have none. x_t is (B, ...).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.field import Field, Prediction
from samplers.names import lookup
from samplers.noise import Brownian, Diffusion, make_diffusion
from samplers.schedules import Schedule, Time, expand


class Step(NamedTuple):
    """x at t_next; the prediction made at (x_t, t); what the next step needs to know of this one."""

    x: Tensor
    prediction: Prediction
    state: Any = None


@dataclass(frozen=True)
class Solver(ABC):
    """A stepper, with what is known about it: its order of convergence, field evaluations per step, and source."""

    name: str
    order: int
    evals_per_step: int
    source: str

    @abstractmethod
    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Brownian | None = None
    ) -> Step:
        """From x_t at t to t_next; `state` is None at the first step, `noise(t, t_next)` is a Brownian increment."""


@dataclass(frozen=True)
class RungeKutta(Solver):
    """k_i = v(x + dt sum_j a_ij k_j, t + c_i dt);  x_next = x + dt sum_i b_i k_i."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Brownian | None = None
    ) -> Step:
        dt = t_next - t
        stages: list[Prediction] = []
        for c, a in zip(self.c, self.a, strict=True):
            x_stage = advance(x_t, dt, a, [stage.v for stage in stages])
            stages.append(field.predict(x_stage, (1 - c) * t + c * t_next))  # so written, c = 1 meets t_next exactly
        return Step(advance(x_t, dt, self.b, [stage.v for stage in stages]), stages[0])


@dataclass(frozen=True)
class SDESolver(Solver):
    """A stepper of dX = (v - w/2 score) dt + sqrt(w) dW, with its diffusion coefficient w(t)."""

    diffusion: Diffusion | None = None


@dataclass(frozen=True)
class EulerMaruyama(SDESolver):
    """x_next = x + (v - w/2 score) dt + sqrt(w) dW, backwards in time.

    w is bounded by sigma(t_next)^2 / |dt|: a step puts in no more noise than there is where it lands. Any w >= 0 has
    the same marginals, so the limit of small steps is as it was, but the pole of w at t = 1 and that of the score at
    t = 0 are gone, and a step to sigma = 0 is without noise: it ends at the mean.
    """

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Brownian | None = None
    ) -> Step:
        assert self.diffusion is not None and noise is not None
        schedule, dt = field.schedule, torch.as_tensor(t_next - t, dtype=torch.float64)
        w = torch.minimum(torch.as_tensor(self.diffusion(t)), schedule.sigma(t_next) ** 2 / dt.abs())
        prediction = field.predict(x_t, t)
        x = advance(x_t, dt, (1.0,), [prediction.v])
        x = x + expand(w / (2 * schedule.sigma(t)) * dt, x) * prediction.eps  # score = -eps / sigma
        return Step(x + expand(w.sqrt(), x) * noise(t, t_next), prediction)


def advance(x: Tensor, dt: Time, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + dt sum_i weights_i slopes_i."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight == 0:
            continue
        x = x + expand(weight * dt, x) * slope if isinstance(dt, Tensor) else torch.add(x, slope, alpha=weight * dt)
    return x


_ALL: tuple[Solver, ...] = (
    RungeKutta("euler", 1, 1, "Euler 1768", c=(0.0,), a=((),), b=(1.0,)),
    RungeKutta("midpoint", 2, 2, "Runge 1895", c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0)),
    RungeKutta("heun", 2, 2, "Heun 1900", c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5)),
    RungeKutta("ralston", 2, 2, "Ralston 1962", c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(0.25, 0.75)),
    RungeKutta(
        "rk4",
        4,
        4,
        "Kutta 1901",
        c=(0.0, 0.5, 0.5, 1.0),
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    EulerMaruyama("euler-maruyama", 1, 1, "Maruyama 1955; SiT, Ma et al. 2024"),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in _ALL}


def solver_names() -> list[str]:
    """The names that `sample` knows; `SOLVERS[name]` says each one's order, evaluations per step and source."""
    return list(SOLVERS)


def make_solver(solver: str | Solver, schedule: Schedule, diffusion: str | Diffusion | None = None) -> Solver:
    """A solver by name, or one's own, with its diffusion coefficient; ValueError where the two do not go together."""
    solver = solver if isinstance(solver, Solver) else lookup("solver", solver, SOLVERS)
    if not isinstance(solver, SDESolver):
        if diffusion is not None:
            raise ValueError(f"diffusion given, but {solver.name!r} solves the ODE: take solver='euler-maruyama'")
        return solver
    diffusion = solver.diffusion if diffusion is None else diffusion
    if diffusion is None:
        raise ValueError(f"{solver.name!r} solves an SDE: give diffusion='kl', 'sigma', 'sin2', 'constant' or a w(t)")
    return replace(solver, diffusion=make_diffusion(diffusion, schedule))
