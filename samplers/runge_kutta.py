"""Runge-Kutta methods on the velocity: fixed steps, and adaptive ones with an error estimate.

A method is data, its Butcher tableau:  k_i = v(x + dt sum_j a_ij k_j, t + c_i dt);  x_next = x + dt sum_i b_i k_i.

**Ends where the velocity is undetermined.** A network that predicts the data does not determine the velocity at t = 0,
and some schedules have a pole there (`Field.determines_velocity`). A method with a stage at c = 1, such as Heun's,
would evaluate it just there in its last step. That step is then made by a method of one order less (at most 3) without
such a stage: its local error is of the order of the global error, so that the order of convergence is kept, up to 4.
For Heun it is Euler's, as in Karras et al. (2022), alg. 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from samplers.field import Field, Prediction
from samplers.noise import Noise
from samplers.schedules import Time, check_positive, expand, widest_float
from samplers.solver import Solver, Step
from samplers.views import plus


@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit method with nodes c, weights a and b. t may also be a time per sample, (B,).

    in_place: from the second step on x_next is written into x_t, which saves Euler's method a third of its memory
    traffic; only for a network that does not keep its input, and without callback and trajectory. undetermined: set by
    `bind`, the times of the grid at which the velocity is undetermined.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    in_place: bool = False
    undetermined: frozenset[float] = field(default=frozenset(), repr=False)

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        if 1.0 not in self.c:
            return self
        return replace(self, undetermined=frozenset(t for t in ts[1:] if not field.determines_velocity(t)))

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        if self.undetermined and t_next in self.undetermined:
            lower = OPEN[min(max(self.order - 1, 1), len(OPEN))]
            return lower.step(field, x_t, t, t_next)  # never in place
        stages = self._stages(field, x_t, t, t_next)
        owned = self.in_place and state is not None  # the first x_t is the caller's
        return Step(advance(x_t, t_next - t, self.b, [stage.v for stage in stages], owned), stages[0], self.in_place)

    def _stages(self, field: Field, x_t: Tensor, t: Time, t_next: Time) -> list[Prediction]:
        """The predictions at all stages."""
        stages: list[Prediction] = []
        for c, a in zip(self.c, self.a, strict=True):
            x_stage = advance(x_t, t_next - t, a, [stage.v for stage in stages])
            stages.append(field.predict(x_stage, (1 - c) * t + c * t_next))  # in this form c = 1 gives exactly t_next
        return stages


def advance(x: Tensor, dt: Time, weights: Sequence[float], slopes: Sequence[Tensor], owned: bool = False) -> Tensor:
    """x + dt sum_i weights_i slopes_i; if owned, x may be overwritten."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight == 0:
            continue
        if isinstance(dt, Tensor):
            x = x + expand(weight * dt, x) * slope
        else:
            x = plus(x, slope, weight * dt, owned)
            owned = True
    return x


EULER = RungeKutta("euler", 1, 1, "Euler 1768", c=(0.0,), a=((),), b=(1.0,))
MIDPOINT = RungeKutta("midpoint", 2, 2, "Runge 1895", c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0))
HEUN = RungeKutta("heun", 2, 2, "Heun 1900", c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))
RALSTON = RungeKutta("ralston", 2, 2, "Ralston 1962", c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(0.25, 0.75))
RALSTON3 = RungeKutta(
    "ralston3",
    3,
    3,
    "Ralston 1962",
    c=(0.0, 1 / 2, 3 / 4),
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
)
RK4 = RungeKutta(
    "rk4",
    4,
    4,
    "Kutta 1901",
    c=(0.0, 0.5, 0.5, 1.0),
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
OPEN = {1: EULER, 2: MIDPOINT, 3: RALSTON3}
"""Methods without a stage at c = 1, by order."""


@dataclass(frozen=True)
class Adaptive(Solver):
    """Dormand & Prince's embedded pair (1980), with a step size per sample that a PI controller adapts.

    Each sample has its own time and step, so that it does not depend on its batch; the network takes a time per sample.
    A step is accepted if the root mean square over the sample of error / (atol + rtol max(|x|, |x_next|)) is at most 1;
    the next is h * safety * error^(-0.7/5) * last_error^(0.4/5) (Hairer et al. 1993, sec. IV.2), within a factor of 0.2
    to 5. The last stage of a step is the first of the next. A step of the grid takes any number of these, so that
    the grid [1, 0] suffices. An end with undetermined velocity is approached to 1e-4, and reached by one step of DDIM.
    The number of evaluations depends on the data, so that each attempt synchronises with the accelerator.
    Raises ValueError after `max_attempts` attempts in one step of the grid, or if the step size falls below 1e-9.
    """

    tableau: RungeKutta = field(repr=False)
    error: tuple[float, ...] = field(repr=False)
    atol: float = 1e-5
    rtol: float = 1e-5
    first_step: float = 0.05
    safety: float = 0.9
    max_attempts: int = 10_000

    def __post_init__(self) -> None:
        check_positive(atol=self.atol, rtol=self.rtol, first_step=self.first_step, safety=self.safety)

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        t, t_next = float(t), float(t_next)
        end, sign = t_next, 1.0 if t_next > t else -1.0
        if not field.determines_velocity(t_next):
            end = t_next - sign * min(1e-4, abs(t_next - t) / 2)
        now = torch.full((len(x_t),), t, dtype=widest_float(x_t.device), device=x_t.device)
        h, last_error = state or (torch.full_like(now, self.first_step), torch.ones_like(now))
        first = prediction = field.predict(x_t, now)
        slope, x = first.v, x_t
        for _ in range(self.max_attempts):
            left = (end - now).abs()
            if not (left > 0).any():
                return Step(self._finish(field, x, end, t_next), prediction, (h, last_error))
            if (h < 1e-9).any():
                break
            last = h * (1 + 1e-6) >= left  # with tolerance, so that no step of 1e-17 is left over
            new = torch.where(last, end, now + sign * h)
            x_new, error, last_slope = self._attempt(field, x, now, new, slope)
            done, accepted = left == 0, error <= 1
            grow = self.safety * error.clamp(min=1e-10) ** (-0.7 / 5) * last_error ** (0.4 / 5)
            shrink = self.safety * error.clamp(min=1e-10) ** (-1 / 5)
            factor = torch.where(accepted, grow.clamp(0.2, 5), shrink.clamp(0.2, 1))
            h_next = torch.where(last, left, h) * factor
            h = torch.where(done, h, torch.where(last & accepted, torch.maximum(h, h_next), h_next))
            last_error = torch.where(accepted & ~done, error.clamp(min=1e-4), last_error)
            now = torch.where(accepted, new, now)
            update = expand(accepted.to(x.dtype), x) > 0
            x, slope = torch.where(update, x_new, x), torch.where(update, last_slope, slope)
        raise ValueError(
            f"{self.name} stayed at t = {now.max():g} on its way from {t:g} to {t_next:g}, its step {h.min():.1e}: "
            "give a larger atol and rtol, x in float64, or look for NaN in the network's output"
        )

    def _attempt(
        self, field: Field, x: Tensor, now: Tensor, new: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x at the new times, the error norm of each sample (B,), and the slope there."""
        rk, slopes, dt = self.tableau, [slope], new - now
        for c, a in zip(rk.c[1:], rk.a[1:], strict=True):
            x_new = advance(x, dt, a, slopes)
            slopes.append(field.predict(x_new, (1 - c) * now + c * new).v)
        difference = advance(torch.zeros_like(x), dt, self.error, slopes)
        norm = (difference / (self.atol + self.rtol * torch.maximum(x.abs(), x_new.abs()))).to(now.dtype)
        error = norm.flatten(1).square().mean(1).sqrt() if norm.ndim > 1 else norm.abs()
        return x_new, torch.where(error.isfinite(), error, torch.inf), slopes[-1]  # NaN rejects the step

    def _finish(self, field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        """The step of DDIM to an end with undetermined velocity, if there is one."""
        if t == t_next:
            return x
        prediction, c = field.predict(x, t), field.schedule(t_next)
        return c.alpha * prediction.x_0 + c.sigma * prediction.eps


_DOPRI5 = RungeKutta(
    "dormand-prince",
    5,
    7,
    "Dormand & Prince 1980",
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
)
DOPRI5 = Adaptive(
    "dopri5",
    5,
    6,
    "Dormand & Prince 1980",
    tableau=_DOPRI5,
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
