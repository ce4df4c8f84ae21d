"""Likelihood by the probability-flow ODE, and inversion: the ODE from data to noise.

Along dx = v dt the density changes by the divergence of v, so that with x_1 the end of the path from x_0

    log p_0(x_0) = log p_1(x_1) + int_0^1 div v(x_t, t) dt          (Chen et al. 2018; Song et al. 2021, eq. 39)

The divergence is exact, from D derivatives, or Hutchinson's estimate e . (dv/dx) e with one random e for the whole path
(Grathwohl et al. 2019), which is unbiased. B batch, D numbers per sample.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers.exponential import Exponential
from samplers.field import DerivedField, Field, Prediction
from samplers.grids import time_grid
from samplers.integrate import Solution, check_field, check_states, integrate
from samplers.names import lookup
from samplers.noise import Generators, randn, seeded
from samplers.schedules import Time
from samplers.solver import Solver
from samplers.solvers import make_solver

DIVERGENCES = ("exact", "rademacher", "gaussian")


def log_likelihood(
    field: Field,
    x_0: Tensor,
    solver: str | Solver = "dopri5",
    num_steps: int = 1,
    grid: str | Tensor | Sequence[float] = "uniform",
    divergence: str = "exact",
    num_probes: int = 1,
    generator: Generators = None,
) -> Tensor:
    """log p_0(x_0) of each sample in nats, (B,).

    x_0 (B, ...): data at the last time of the grid, which is integrated to its first. solver: an ODE solver of the
    velocity ("dopri5", "rk4", "ab2", your own). divergence: "exact", by one backward pass per number of a sample, or
    Hutchinson's with "rademacher" (smaller variance) or "gaussian" probes, the mean over `num_probes` of them, drawn
    from `generator`. For x_0 in half precision the sum is float32. The prior at the noise end is N(0, sigma^2 +
    alpha^2) per number, which is exact where alpha = 0 and for data of unit variance. Raises ValueError if the velocity
    at an end of the grid is not determined, and if the network gives no gradient, as under torch.no_grad.
    """
    check_field(field)
    check_states(x_0)
    lookup("divergence", divergence, dict.fromkeys(DIVERGENCES))
    if num_probes < 1:
        raise ValueError(f"num_probes = {num_probes}: give a count of at least 1")
    method, ts = _data_to_noise(field, solver, num_steps, grid)
    if method.stochastic or not _uses_velocity(method):
        raise ValueError(f"{method.name!r} does not integrate the velocity: take 'dopri5' or a Runge-Kutta method")
    _check_determined(field.determines_velocity, ts[0], ts[-1])
    with torch.inference_mode(False), torch.no_grad():  # inference mode has no gradients
        probes = None
        if divergence != "exact":
            own = seeded(generator, len(x_0))
            z = torch.stack([randn(x_0.shape, own, x_0.dtype, x_0.device) for _ in range(num_probes)])
            probes = z.sign() if divergence == "rademacher" else z
        wide = torch.promote_types(x_0.dtype, torch.float32)
        start = torch.cat((x_0.reshape(len(x_0), -1), x_0.new_zeros(len(x_0), 1)), 1).to(wide)
        end = integrate(_augmented(field, x_0, probes), start, method, ts).x
    c = field.schedule(float(ts[-1]))
    variance, x_1 = float(c.sigma**2 + c.alpha**2), end[:, :-1]
    prior = -x_1.square().sum(1) / (2 * variance) - x_1.shape[1] / 2 * math.log(2 * math.pi * variance)
    return prior + end[:, -1]


def bits_per_dim(log_likelihood: Tensor, num_dims: int, bin_width: float = 2 / 256) -> Tensor:
    """Bits per dimension: -log2 of the probability of a sample's bin, divided by `num_dims`.

    log_likelihood (B,) in nats, of quantised data with bins of `bin_width`, 2/256 for 8-bit pixels in [-1, 1], to which
    noise uniform over the bin was added (Theis et al. 2016). For data scaled by c the width is c times as large.
    """
    if num_dims < 1 or not bin_width > 0:
        raise ValueError(f"num_dims = {num_dims}, bin_width = {bin_width}: give positive numbers")
    return -(log_likelihood / num_dims + math.log(bin_width)) / math.log(2)


def invert(
    field: Field,
    x_0: Tensor,
    solver: str | Solver = "heun",
    num_steps: int = 50,
    grid: str | Tensor | Sequence[float] = "uniform",
) -> Solution:
    """The ODE from data to noise: the x that `sample` takes back to x_0 on the same grid, up to the solver's error.

    x_0 (B, ...): the state at the last time of the grid. solver: one that can leave t = 0, such as "heun" or "rk4".
    Raises ValueError if the network does not determine the first step, such as a data prediction at t = 0, which says
    nothing about the noise.
    """
    check_field(field)
    check_states(x_0)
    method, ts = _data_to_noise(field, solver, num_steps, grid)
    if method.stochastic:
        raise ValueError(f"{method.name!r} draws noise, and cannot be run backwards: take a solver of the ODE")
    _check_determined(field.determines_velocity if _uses_velocity(method) else field.determined, ts[0])
    with torch.no_grad():
        return integrate(field, x_0, method, ts)


def _data_to_noise(
    field: Field, solver: str | Solver, num_steps: int, grid: str | Tensor | Sequence[float]
) -> tuple[Solver, Tensor]:
    """The solver, and the grid from data to noise."""
    return make_solver(solver, field.schedule), time_grid(grid, num_steps, schedule=field.schedule).flip(0)


def _uses_velocity(solver: Solver) -> bool:
    return not isinstance(solver, Exponential) or solver.view == "velocity"


def _check_determined(determined: Callable[[Time], bool], *ts: Tensor) -> None:
    for t in map(float, ts):
        if not determined(t):
            raise ValueError(
                f"the network or its schedule does not determine the velocity at t = {t:g}: "
                "keep the grid 1e-4 away from it, as grid=[1, 1e-4] does from t = 0"
            )


def _augmented(field: Field, like: Tensor, probes: Tensor | None) -> Field:
    """The field of (x, log-density), (B, D + 1), whose last component of the velocity is the divergence; like: the
    data, whose shape and dtype the network takes.
    """

    def predict(state: Tensor, t: Time) -> Prediction:
        x = state[:, :-1].reshape(like.shape).to(like.dtype).detach()
        with torch.enable_grad():
            x.requires_grad_()
            v = field.predict(x, t)
            flat, evals = v.v.reshape(len(x), -1), v.num_evals
            if not v.value.requires_grad:
                raise ValueError("the network gives no derivative: let it run without torch.no_grad and detach")
            divergence = _exact(flat, x) if probes is None else _hutchinson(flat, x, probes)
        value = torch.cat((flat.detach().to(state), divergence[:, None].to(state)), 1)
        return Prediction(value, "velocity", state, t, field.schedule, evals)

    return DerivedField(predict, field.schedule, "velocity", field.determined, field.begin)


def _exact(v: Tensor, x: Tensor) -> Tensor:
    """sum_d dv_d / dx_d, by one backward pass per number."""
    total = torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for d in range(v.shape[1]):
        (row,) = torch.autograd.grad(v[:, d].sum(), x, retain_graph=d + 1 < v.shape[1])
        total += row.reshape(v.shape)[:, d]
    return total


def _hutchinson(v: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """The mean over probes e of e . (dv/dx) e."""
    total = torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for i, e in enumerate(probes):
        (row,) = torch.autograd.grad((v * e.reshape(v.shape)).sum(), x, retain_graph=i + 1 < len(probes))
        total += (row * e).reshape(v.shape).sum(1, dtype=total.dtype)
    return total / len(probes)
