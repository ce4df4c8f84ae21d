"""The law of what stochastic solvers make: moments and expectations without sampling error, their order, and samples.

For Gaussian data a solver is affine in x and in its noise, so that its response to one unit of each noise gives mean
and deviation exactly. For other data the expectation of a smooth function is carried back through the steps, with
Gauss-Hermite quadrature over the noise and Chebyshev interpolation in x.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from samplers import DIFFUSIONS, EDM, SOLVERS, Cosine, Field, RectifiedFlow, integrate, sample, uniform
from samplers.solvers import make_solver
from tests.oracles import MIXTURE, Gaussian, Mixture
from tests.samplers.common import measured_order, normal

DATA = Gaussian.of([1.0], 0.6)
SCHEDULES = [RectifiedFlow(), Cosine(), EDM(10.0)]
STOCHASTIC = [name for name, solver in SOLVERS.items() if solver.stochastic]


class Impulses:
    """Noise that is 1 in the one draw that a sample's row names, and 0 in all others: a linear solver's response."""

    def __init__(self, batch):
        self.batch, self.draw = batch, 0

    def unit(self, t, t_next):
        self.draw += 1
        z = torch.zeros(self.batch, 1, dtype=torch.float64)
        assert self.draw < self.batch - 1
        z[self.draw + 1] = 1
        return z

    def __call__(self, t, t_next):
        return abs(t_next - t) ** 0.5 * self.unit(t, t_next)


def moment_errors(schedule, solver, grid, diffusion=None, num_draws=None):
    """How far mean and deviation at the end of the grid are off, from the exact marginal at its start."""
    num = (num_draws or len(grid)) + 2
    x = torch.zeros(num, 1, dtype=torch.float64) + schedule.alpha(grid[0])
    x[1] += DATA.std_at(float(grid[0]), schedule)
    out = integrate(DATA.field(schedule), x, make_solver(solver, schedule, diffusion), grid, Impulses(num)).x[:, 0]
    mean, deviation = out[0], (out[1:] - out[0]).norm()
    end = float(grid[-1])
    return (mean - schedule.alpha(end)).item(), (deviation - DATA.std_at(end, schedule)).item()


def moment_error(*args, **kwargs):
    return math.hypot(*moment_errors(*args, **kwargs))


def log_snr_grid(schedule, n):
    return schedule.t_from_log_snr(torch.linspace(-4, 4, n + 1, dtype=torch.float64))


def inner_grid(n):
    return torch.linspace(0.9, 0.2, n + 1, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
@pytest.mark.parametrize("diffusion", [*DIFFUSIONS, lambda t: 3 * t])
def test_euler_maruyama_converges_weakly_to_the_marginals(schedule, diffusion):
    def error(n):
        return moment_error(schedule, "euler-maruyama", uniform(n), diffusion)

    assert error(100) < 0.02
    assert measured_order(error, 50) > 0.8


@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m-sde", "dpmpp-3m-sde", "sa-solver"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weak_order_of_exponential_solvers(name, schedule):
    order = measured_order(lambda n: moment_error(schedule, name, log_snr_grid(schedule, n)), 80)
    assert order == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize(("name", "order"), [("dpmpp-2m-sde", 2), ("dpmpp-3m-sde", 3)])
def test_three_nodes_have_order_three_where_the_noise_is_small(name, order):
    """The variance is off by tau^2 h^2, and by h^3 whatever the noise: see exponential.py."""

    def error(n):
        solver = replace(SOLVERS[name], start=SOLVERS["rk4"], diffusion=(5 / n) ** 0.5)  # tau^2 is as small as h
        return moment_error(RectifiedFlow(), solver, log_snr_grid(RectifiedFlow(), n))

    assert measured_order(error, 160) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("diffusion", [*DIFFUSIONS, 0.5, lambda t: 0.3 + t**2])
def test_weak_order_of_stochastic_heun(schedule, diffusion):
    order = measured_order(lambda n: moment_error(schedule, "stochastic-heun", inner_grid(n), diffusion), 80)
    assert order == pytest.approx(SOLVERS["stochastic-heun"].order, abs=0.2)


CHURN = replace(SOLVERS["edm-churn"], noise_scale=1.0, sigma_min=0.0, churn=20.0)


@pytest.mark.parametrize("grid", [log_snr_grid, lambda schedule, n: inner_grid(n)], ids=["log-snr", "uniform"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_of_churn(schedule, grid):
    """Noise is put in exactly, so that what is left is Heun's error. Inflated noise has a limit of its own."""
    order = measured_order(lambda n: moment_error(schedule, CHURN, grid(schedule, n)), 100)
    assert order == pytest.approx(SOLVERS["edm-churn"].order, abs=0.2)
    inflated = [moment_errors(schedule, replace(CHURN, noise_scale=1.01), grid(schedule, n))[1] for n in (200, 400)]
    assert inflated[1] > 5e-3 and inflated[0] / inflated[1] < 1.2


@pytest.mark.parametrize("name", ["dpm-2-ancestral", "dpmpp-2s-ancestral"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_of_ancestral_sampling(schedule, name):
    """As of churn: what is left is the error of the inner solver."""
    order = measured_order(lambda n: moment_error(schedule, SOLVERS[name], log_snr_grid(schedule, n)), 40)
    assert order == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_of_restart(schedule):
    """With the steps of the way down in proportion to those of the grid; with a fixed number of them error stays."""

    def error(n, down):
        solver = replace(SOLVERS["restart"], intervals=((0.3, 0.7, 2, down),))
        return moment_error(schedule, solver, inner_grid(n))

    assert measured_order(lambda n: error(n, n // 4), 80) == pytest.approx(SOLVERS["restart"].order, abs=0.2)
    assert error(320, 4) > 0.5 * error(160, 4)


def test_restart_hands_its_noise_to_an_inner_solver_that_draws():
    """DDPM's step on the way down too: the deviation is that of the data, where without its noise it falls short."""
    solver = replace(SOLVERS["restart"], inner=SOLVERS["ddpm"], intervals=((0.3, 0.7, 1, 40),))
    errors = moment_errors(RectifiedFlow(), solver, inner_grid(80), num_draws=200)
    assert errors == pytest.approx((0, 0), abs=0.02)
    assert solver.inner.stochastic and not solver.draws_once


def test_langevin_leaves_the_variance_that_theory_says():
    """v = (1 - e / s^2)^2 v + 2 e has the fixed point s^2 / (1 - e / (2 s^2)), where s^2 is the true variance."""
    flow, t, snr = RectifiedFlow(), 0.4, 0.5
    grid = torch.linspace(t + 1e-7, t, 2, dtype=torch.float64)
    solver = replace(SOLVERS["langevin"], snr=snr, num_corrections=200)
    mean, std = moment_errors(flow, solver, grid, num_draws=200)
    variance, e = DATA.std_at(t, flow).item() ** 2, 2 * (snr * t) ** 2
    assert (std + variance**0.5) ** 2 == pytest.approx(variance / (1 - e / (2 * variance)), rel=1e-5)
    assert mean == pytest.approx(0, abs=1e-6)


def test_langevin_converges_with_order_two_thirds():
    """On a uniform grid to t = 0. At level s a correction forgets snr^2 s^2 and leaves a variance off by as much; n of
    them forget what happened above s where n snr^2 s^3 is 1, and so the end is off by snr^2 s^2 ~ n^-2/3."""
    solver = replace(SOLVERS["langevin"], snr=0.5)

    def error(n):
        grid = torch.linspace(0.9, 0, n + 1, dtype=torch.float64)
        return moment_error(RectifiedFlow(), solver, grid)

    assert measured_order(error, 600) == pytest.approx(2 / 3, abs=0.05)
    weak = moment_error(RectifiedFlow(), SOLVERS["langevin"], torch.linspace(0.9, 0, 601, dtype=torch.float64))
    assert weak < 0.5 * error(600)  # the usual snr of 0.16


BIMODAL = Mixture(
    torch.tensor([0.6, 0.4], dtype=torch.float64),
    torch.tensor([[-1.0], [1.2]], dtype=torch.float64),
    torch.tensor([0.5, 0.7], dtype=torch.float64),
)


class Given:
    """Unit noise that is handed in."""

    def __init__(self, z):
        self.z = z

    def unit(self, t, t_next):
        return self.z

    def __call__(self, t, t_next):
        return abs(t_next - t) ** 0.5 * self.z


def expectation_error(solver, schedule, grid, nodes=140, draws=20, reach=7.0):
    """How far E f of the last state is off for f = sin(2 x) + cos(x), from the exact law of two modes at the first."""
    times = grid.tolist()
    field, angle = BIMODAL.field(schedule), (torch.arange(nodes, dtype=torch.float64) + 0.5) * math.pi / nodes
    at, sign = reach * angle.cos(), torch.where(torch.arange(nodes) % 2 == 0, 1.0, -1.0)
    barycentric = sign * angle.sin()
    z, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(draws))

    def between(values, x):
        away = x[:, None] - at
        share = barycentric / torch.where(away == 0, 1e-300, away)
        return (share @ values) / share.sum(1)

    def f(x):
        return torch.sin(2 * x) + torch.cos(x)

    def mean(values_of, t):
        x = torch.linspace(-reach, reach, 4001, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        std = torch.hypot(alpha * BIMODAL.stds, sigma)
        away = (x[:, None] - alpha * BIMODAL.means[:, 0]) / std
        p = (BIMODAL.weights / std * torch.exp(-(away**2) / 2)).sum(1)
        return (p * values_of(x)).sum() / p.sum()

    bound = solver.bind(field, times)
    x, z_all = at.repeat_interleave(draws)[:, None], z.repeat(nodes)[:, None]
    values = None
    for i in reversed(range(len(times) - 1)):
        state = i - 1 if i else None
        x_next = bound.step(field, x, times[i], times[i + 1], state, Given(z_all)).x[:, 0].clamp(-reach, reach)
        after = f(x_next) if values is None else between(values, x_next)
        values = (after.reshape(nodes, draws) @ w) / w.sum()
    return abs((mean(lambda x: between(values, x), times[0]) - mean(f, times[-1])).item())


NONLINEAR = {"churn": CHURN} | {
    f"{name} {label}": make_solver(name, RectifiedFlow(), diffusion)
    for name in ("euler-maruyama", "stochastic-heun")
    for label, diffusion in {"sigma": "sigma", "kl": "kl", "own": lambda t: 0.3 + t**2}.items()
}


@pytest.mark.parametrize("solver", NONLINEAR.values(), ids=NONLINEAR)
def test_weak_order_where_the_drift_is_not_linear(solver):
    order = measured_order(lambda n: expectation_error(solver, RectifiedFlow(), inner_grid(n)), 40)
    assert order == pytest.approx(solver.order, abs=0.2)


MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def correlated(schedule):
    """The exact field of N(MEAN, COVARIANCE)."""

    def velocity(x_t, t):
        c = schedule(t[0])
        eye = torch.eye(2, dtype=torch.float64)
        eps = c.sigma * torch.linalg.solve(c.alpha**2 * COVARIANCE + c.sigma**2 * eye, (x_t - c.alpha * MEAN).T).T
        x_0 = MEAN + c.alpha / c.sigma.clamp(min=1e-300) * eps @ COVARIANCE
        return c.d_alpha * torch.where(c.sigma > 0, x_0, x_t) + c.d_sigma * eps

    return Field(velocity, schedule)


OPTIONS = {"euler-maruyama": "sigma", "stochastic-heun": "sigma"}  # the diffusion of those that must be told one


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids=["flow", "edm"])
def test_every_stochastic_solver_reaches_the_mean_and_covariance(name, schedule):
    """Of correlated Gaussian data: the sum of squares of the five normalised deviations is chi^2 of 5 degrees, below
    25.7 with a probability of 0.9999. A covariance that is off by a tenth would give 40."""
    n, solver = 8_000, replace(SOLVERS[name], **({"noise_scale": 1.0} if name == "edm-churn" else {}))
    if name == "restart":
        solver = replace(solver, intervals=((0.2, 0.6, 1, 12),))
    steps = 400 if solver.order == 1 else 100
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if isinstance(schedule, EDM):
        grid = grid**3
    c = schedule(1.0)
    scale = torch.linalg.cholesky(c.alpha**2 * COVARIANCE + c.sigma**2 * torch.eye(2, dtype=torch.float64))
    start = c.alpha * MEAN + normal(n, 2, seed=1) @ scale.T
    generator = torch.Generator().manual_seed(2)
    out = sample(correlated(schedule), start, solver, grid=grid, diffusion=OPTIONS.get(name), generator=generator).x
    y = torch.linalg.solve(torch.linalg.cholesky(COVARIANCE), (out - MEAN).T)
    off = y @ y.T / n - torch.eye(2, dtype=torch.float64)
    chi2 = n * (y.mean(1).square().sum() + off.diagonal().square().sum() / 2 + off[0, 1] ** 2).item()
    assert chi2 < 25.7


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_stochastic_solver_reaches_the_mean_and_covariance_of_a_mixture(name):
    """Within 5 standard errors (p < 1e-5 over the 5 numbers) of the exact ones, and 0.03 for the step size."""
    generator, n = torch.Generator().manual_seed(0), 3_000
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    options = {"num_steps": 40, "diffusion": OPTIONS.get(name), "generator": generator}
    x = sample(MIXTURE.field(RectifiedFlow()), x, name, **options).x
    mean, covariance = MIXTURE.moments()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / n**0.5 + 0.03).all()
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / n**0.5 + 0.06).all()
