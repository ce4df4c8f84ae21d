"""Solvers of the SDE dX = (v - w/2 score) dt + sqrt(w) dW, and solvers that add noise between the steps of another.

Exponential integrators of the SDE (DDPM, DPM-Solver++ SDE, SA-Solver) are in exponential.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from samplers.exponential import DDIM, DPMPP_2S, EDM_HEUN, Linear, Point, SingleStep, points
from samplers.field import Field
from samplers.grids import karras_between
from samplers.noise import Diffusion, Noise
from samplers.runge_kutta import advance
from samplers.schedules import Time, check_positive, expand
from samplers.solver import NoisySolver, SDESolver, Solver, Step, with_diffusion
from samplers.views import plus


@dataclass(frozen=True)
class EulerMaruyama(SDESolver):
    """x_next = x + (v - w/2 score) dt + sqrt(w) dW, backwards in time.

    w is at most sigma(t_next)^2 / |dt|, so that a step adds no more noise than there is at its end. As every w >= 0 has
    the same marginals, this does not change the limit of small steps, but it removes the poles of w at t = 1 and of the
    score at t = 0, and a step to sigma = 0 adds no noise: it ends at the mean.
    """

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        assert self.diffusion is not None and noise is not None
        w, dt = bounded(self.diffusion, field, t, t_next, self.w_at), torch.as_tensor(t_next - t, dtype=torch.float64)
        prediction = field.predict(x_t, t)
        x = advance(x_t, dt, (1.0,), [prediction.v])
        x = x + expand(w / (2 * field.schedule.sigma(t)) * dt, x) * prediction.eps  # score = -eps / sigma
        return Step(x + expand(w.sqrt(), x) * noise(t, t_next), prediction)


@dataclass(frozen=True)
class StochasticHeun(SDESolver):
    """Heun's rule for the drift, after the noise of the step: weak order 2 (Kloeden & Platen 1992, sec. 15.1).

    Within a step w is constant, its value at the middle, bounded as in `EulerMaruyama`: another SDE of the same family,
    with the same marginals. To an end with undetermined velocity (see runge_kutta.py) the step is Euler-Maruyama's.
    """

    w_at = 0.5

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        assert self.diffusion is not None and noise is not None
        w = bounded(self.diffusion, field, t, t_next, self.w_at)
        dt = torch.as_tensor(t_next - t, dtype=torch.float64)
        first = field.predict(x_t, t)
        diffused = expand(w.sqrt(), x_t) * noise(t, t_next)

        def drift(prediction: Any, at: Time) -> Tensor:
            sigma = field.schedule.sigma(at)
            weight = torch.where(w > 0, w / (2 * sigma), 0.0)  # w = 0 where sigma = 0
            return prediction.v + expand(weight, x_t) * prediction.eps  # score = -eps / sigma

        slope = drift(first, t)
        x_euler = x_t + expand(dt, x_t) * slope + diffused
        if not field.determines_velocity(t_next):
            return Step(x_euler, first)
        slope = (slope + drift(field.predict(x_euler, t_next), t_next)) / 2
        return Step(x_t + expand(dt, x_t) * slope + diffused, first)


def bounded(diffusion: Diffusion, field: Field, t: Time, t_next: Time, at: float) -> Tensor:
    """w at this fraction of the step, at most sigma(t_next)^2 / |dt|, float64."""
    dt = torch.as_tensor(t_next - t, dtype=torch.float64)
    w = torch.as_tensor(diffusion(t + at * (t_next - t)))
    return torch.minimum(w, field.schedule.sigma(t_next) ** 2 / dt.abs())


class _Renoised(NamedTuple):
    """The inner solver bound to its part of a step, and the noise before and after it."""

    inner: SingleStep
    before: Linear | None = None
    after: Linear | None = None


class _Renoising(NoisySolver):
    """The base of solvers that make steps of another, whose `plans` add noise before or after each."""

    plans: tuple[_Renoised, ...]

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: int | None = None, noise: Noise | None = None
    ) -> Step:
        index = 0 if state is None else state + 1
        inner, before, after = self.plans[index]

        def noised(x: Tensor, lift: Linear | None) -> Tensor:
            assert noise is not None
            return x if lift is None else lift(x, (), noise.unit(t, t_next) if lift.noise > 0 else None)

        x, first, _ = inner.step(field, noised(x_t, before), t, t_next)
        return Step(noised(x, after), first, index)


def _lift(low: Point, high: Point, noise_scale: float = 1.0) -> Linear:
    """The scaling and noise that take a sample from one noise level to a higher one."""
    a = high.alpha / low.alpha
    return Linear("data", a, (), math.sqrt(max(high.sigma**2 - (a * low.sigma) ** 2, 0.0)) * noise_scale)


@dataclass(frozen=True)
class Ancestral(_Renoising):
    """Ancestral sampling with any one-step solver, which goes below the next noise level before noise makes up for it.

    With s = sigma / alpha, `inner` goes to s_down, and noise of deviation s_up is added: s_down^2 + s_up^2 = s_next^2,
    s_up = eta s_next (1 - s_next^2 / s^2)^1/2, at most s_next (k-diffusion). eta: 0 is `inner` alone; 1 adds the noise
    of DDPM, whose step it is with DDIM's as `inner`. The noise is scaled by `noise_scale`.
    """

    eta: float = 1.0
    noise_scale: float = 1.0
    inner: SingleStep = DPMPP_2S
    plans: tuple[_Renoised, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf or not 0 <= self.noise_scale < math.inf:
            raise ValueError(f"eta = {self.eta}, noise_scale = {self.noise_scale}: give finite numbers >= 0")

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        if any(t_next > t for t, t_next in pairwise(ts)):
            raise ValueError(f"{self.name!r} goes from noise to data: give times that fall")
        schedule, plans = field.schedule, []
        for start, end in pairwise(points(schedule, ts)):
            s, s_next = math.exp(-start.l), math.exp(-end.l)
            up = min(s_next, self.eta * s_next * math.sqrt(max(1 - (s_next / s) ** 2, 0.0)))
            down, after = end, None
            if up > 0:
                log_snr = -math.log(s_next**2 - up**2) if up < s_next else math.inf
                down = points(schedule, [float(schedule.t_from_log_snr(log_snr))])[0]  # perhaps the schedule's last
                after = _lift(down, end, self.noise_scale)
            plans.append(_Renoised(self.inner.bind(field, [start.t, down.t]), after=after))
        return replace(self, plans=tuple(plans))


@dataclass(frozen=True)
class Churn(_Renoising):
    """EDM's stochastic sampler: noise raises sigma to sigma (1 + gamma) before each step (Karras et al. 2022, alg. 2).

    gamma = min(churn / num_steps, sqrt(2) - 1) where sigma_min <= sigma / alpha <= sigma_max, else 0; the noise is
    scaled by `noise_scale`. inner: the one-step solver. Sigma is not raised beyond the schedule's own.
    """

    churn: float = 40.0
    sigma_min: float = 0.05
    sigma_max: float = 50.0
    noise_scale: float = 1.003
    inner: SingleStep = EDM_HEUN
    plans: tuple[_Renoised, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.churn < 0 or not 0 <= self.sigma_min <= self.sigma_max or self.noise_scale < 0:
            raise ValueError(
                f"churn = {self.churn}, sigma {self.sigma_min} ... {self.sigma_max}: give ordered numbers >= 0"
            )

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        schedule, num = field.schedule, len(ts) - 1
        sigma_end = math.exp(-float(schedule.log_snr(1.0)) / 2)
        plans = []
        for start, end in pairwise(points(schedule, ts)):
            sigma, hat, before = math.exp(-start.l), start, None
            if self.sigma_min <= sigma <= self.sigma_max:
                raised = min(sigma * (1 + min(self.churn / num, math.sqrt(2) - 1)), sigma_end)
                hat = points(schedule, [float(schedule.t_from_log_snr(-2 * math.log(raised)))])[0]
                before = _lift(start, hat, self.noise_scale)
            plans.append(_Renoised(self.inner.bind(field, [hat.t, end.t]), before))
        return replace(self, plans=tuple(plans))


@dataclass(frozen=True)
class Langevin(NoisySolver):
    """Predictor-corrector: after each step of `inner`, `num_corrections` Langevin steps at the time it reached.

    x <- x + e s + sqrt(2 e) z with the score s and e = 2 (snr sigma)^2. That is the 2 (snr |z| / |s|)^2 of Song et al.
    (2021, alg. 5) with the expected norms, |s| = |z| / sigma: a step size that depends on the sample would change the
    distribution, and one that depends on the batch would make samples depend on each other.
    At sigma = 0 there is no correction.
    """

    inner: Solver = DDIM
    snr: float = 0.16
    num_corrections: int = 1
    diffusion: Diffusion | None = None

    def __post_init__(self) -> None:
        check_positive(snr=self.snr, num_corrections=self.num_corrections)

    @property
    def takes_diffusion(self) -> bool:
        return self.inner.takes_diffusion

    @property
    def draws_once(self) -> bool:
        return self.num_corrections == 1 and not self.inner.stochastic and self.diffusion is None

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        return replace(self, inner=with_diffusion(self.inner, self.diffusion).bind(field, ts))

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        assert noise is not None
        x, first, state = self.inner.step(field, x_t, t, t_next, state, noise)
        sigma = float(field.schedule.sigma(t_next))
        size = 2 * (self.snr * sigma) ** 2
        for _ in range(self.num_corrections if sigma > 0 else 0):
            score = field.predict(x, t_next).score
            x = plus(plus(x, score, size), noise.unit(t, t_next), math.sqrt(2 * size), owned=True)
        return Step(x, first, state)


@dataclass(frozen=True)
class Restart(NoisySolver):
    """Restart sampling: repeatedly add noise from a low noise level to a high one and denoise (Xu et al. 2023, alg. 1).

    intervals: each (t_low, t_high, times, num_steps). When the grid first reaches t_low or below, `times` times: noise
    takes x up to t_high, and `inner` back down in num_steps steps, spaced as in Karras et al. 2022.
    """

    inner: Solver = EDM_HEUN
    intervals: tuple[tuple[float, float, int, int], ...] = ((0.2, 0.6, 1, 4),)
    loops: tuple[tuple[int, Linear, Solver, tuple[float, ...], int], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for low, high, times, num_steps in self.intervals:
            if not 0 < low < high <= 1 or times < 1 or num_steps < 1:
                raise ValueError(
                    f"interval {(low, high, times, num_steps)}: give 0 < t_low < t_high <= 1 and counts >= 1"
                )

    @property
    def draws_once(self) -> bool:
        return sum(times for _, _, times, _ in self.intervals) == 1 and not self.inner.stochastic

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        loops = []
        for low, high, times, num_steps in self.intervals:
            near = low + 1e-6  # a time of the grid may equal `low` only up to rounding
            reached = next((i for i, (t, t_next) in enumerate(pairwise(ts)) if t_next <= near < t), None)
            if reached is None or ts[reached + 1] <= 0:
                raise ValueError(
                    f"no step of the grid from {ts[0]:g} to {ts[-1]:g} ends between t = 0 and {low}, where "
                    f"{self.name!r} turns back: take more steps"
                )
            down = karras_between(high, ts[reached + 1], num_steps, field.schedule)
            bottom, top = points(field.schedule, [down[-1], high])
            loops.append((reached, _lift(bottom, top), self.inner.bind(field, down), tuple(down), times))
        return replace(self, inner=self.inner.bind(field, ts), loops=tuple(loops))

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        assert noise is not None
        index, inner_state = (0, None) if state is None else (state[0] + 1, state[1])
        x, first, inner_state = self.inner.step(field, x_t, t, t_next, inner_state, noise)
        for reached, lift, inner, down, times in self.loops:
            for _ in range(times if reached == index else 0):
                x, within = lift(x, (), noise.unit(t, t_next)), None
                for high, low in pairwise(down):
                    x, _, within = inner.step(field, x, high, low, within, noise)
        return Step(x, first, (index, inner_state))
