"""Solvers: measured order of convergence on exact fields; the SDE's moments, order and agreement with the ODE."""

import itertools
import math
from functools import cache

import pytest
import torch

from samplers import (
    DIFFUSIONS,
    SOLVERS,
    VE,
    Cosine,
    RectifiedFlow,
    SDESolver,
    Solver,
    Step,
    VPLinear,
    sample,
    solver_names,
    uniform,
)
from samplers.solvers import RungeKutta, make_solver
from tests.oracles import GAUSSIAN, MIXTURE

ODE = [name for name, solver in SOLVERS.items() if not isinstance(solver, SDESolver)]
SCHEDULES = [RectifiedFlow(), Cosine()]
X = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def measured_order(error, coarse):
    """The slope of log error over log step size, between `coarse` and twice as many steps."""
    return math.log2(error(coarse) / error(2 * coarse))


@cache
def mixture_solution(schedule):
    return sample(MIXTURE.field(schedule), X, "rk4", 300).x


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_on_a_mixture(name, schedule):
    field, exact = MIXTURE.field(schedule), mixture_solution(schedule)
    order = measured_order(lambda n: (sample(field, X, name, n).x - exact).norm().item(), 32)
    assert order == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize("name", ODE)
def test_order_on_a_gaussian(name):
    schedule = Cosine()  # on the straight path a Gaussian's field has more symmetry: midpoint gains an order there
    field, exact = GAUSSIAN.field(schedule), GAUSSIAN.solve(X, 1.0, 0.0, schedule)
    order = measured_order(lambda n: (sample(field, X, name, n).x - exact).norm().item(), 32)
    assert order == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "ddpm_v", "score"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine(), VPLinear(), VE(0.05, 5.0)])
def test_the_exact_solution_is_reached_whatever_is_predicted(schedule, prediction):
    field, x = GAUSSIAN.field(schedule, prediction), schedule.sigma(0.95) * X
    grid = 0.95 - 0.9 * torch.linspace(0, 1, 201, dtype=torch.float64)
    exact = GAUSSIAN.solve(x, 0.95, 0.05, schedule)
    torch.testing.assert_close(sample(field, x, "rk4", grid=grid).x, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ODE)
def test_tableaux_are_consistent(name):
    solver = SOLVERS[name]
    assert isinstance(solver, RungeKutta)
    assert sum(solver.b) == pytest.approx(1) and len(solver.b) == len(solver.c) == solver.evals_per_step
    assert [sum(row) for row in solver.a] == pytest.approx(list(solver.c))


@pytest.mark.parametrize("name", ODE)
def test_one_time_per_sample_is_each_sample_alone(name):
    field = MIXTURE.field(RectifiedFlow())
    t, t_next = torch.linspace(0.4, 1, 8, dtype=torch.float64), torch.linspace(0, 0.3, 8, dtype=torch.float64)
    together = SOLVERS[name].step(field, X, t, t_next).x
    for i in range(8):
        alone = SOLVERS[name].step(field, X[i : i + 1], t[i].item(), t_next[i].item()).x
        torch.testing.assert_close(together[i : i + 1], alone)


class AdamsBashforth2(Solver):
    """A multistep method as a user would add it: the state is the velocity of the step before."""

    def step(self, field, x_t, t, t_next, state=None, noise=None):
        prediction = field.predict(x_t, t)
        v = prediction.v if state is None else 1.5 * prediction.v - 0.5 * state
        return Step(x_t + (t_next - t) * v, prediction, state=prediction.v)


def test_a_multistep_method_of_ones_own_fits_in():
    solver = AdamsBashforth2("ab2", order=2, evals_per_step=1, source="Bashforth & Adams 1883")
    schedule = Cosine()
    field, exact = GAUSSIAN.field(schedule), GAUSSIAN.solve(X, 1.0, 0.0, schedule)
    assert sample(field, X, solver, 10).num_evals == 10
    assert measured_order(lambda n: (sample(field, X, solver, n).x - exact).norm().item(), 64) == pytest.approx(
        2, abs=0.2
    )


def test_a_step_compiles_without_a_break():
    field, step = MIXTURE.field(RectifiedFlow()), SOLVERS["heun"].step
    compiled = torch.compile(lambda x, t, t_next: step(field, x, t, t_next).x, backend="eager", fullgraph=True)
    t, t_next = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(compiled(X, t, t_next), step(field, X, 0.8, 0.7).x)


def moments(schedule, diffusion, num_steps):
    """Mean and standard deviation that Euler-Maruyama's own (affine) steps give to Gaussian data: no sampling error."""
    field, solver = GAUSSIAN.field(schedule), make_solver("euler-maruyama", schedule, diffusion)
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for t, t_next in itertools.pairwise(uniform(num_steps).tolist()):
        still = solver.step(field, x, t, t_next, None, lambda t, t_next: torch.zeros_like(x)).x
        moved = solver.step(field, x, t, t_next, None, lambda t, t_next: (t - t_next) ** 0.5 * torch.ones_like(x)).x
        slope, offset, noise = still[1] - still[0], still[0], (moved - still)[0]
        mean, variance = slope * mean + offset, slope**2 * variance + noise**2
    return mean, variance.sqrt()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("diffusion", [*DIFFUSIONS, lambda t: 3 * t])
def test_euler_maruyama_converges_weakly_to_the_marginals(schedule, diffusion):
    def error(num_steps):
        mean, std = moments(schedule, diffusion, num_steps)
        return torch.cat((mean - GAUSSIAN.means[0], std - GAUSSIAN.stds)).norm().item()

    assert error(100) < 0.02
    assert measured_order(error, 50) > 0.8


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_euler_maruyama_samples_a_mixture(diffusion):
    """Mean and covariance within 5 standard errors (p < 1e-5 over the 5 numbers), and 0.02 for the step size."""
    generator, n = torch.Generator().manual_seed(0), 4_000
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = sample(MIXTURE.field(RectifiedFlow()), x, "euler-maruyama", 64, diffusion=diffusion, generator=generator).x
    mean, covariance = MIXTURE.moments()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / n**0.5 + 0.02).all()
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / n**0.5 + 0.02).all()


def test_zero_diffusion_is_euler():
    field = MIXTURE.field(RectifiedFlow())
    out = sample(field, X, "euler-maruyama", 10, diffusion=lambda t: 0.0)
    torch.testing.assert_close(out.x, sample(field, X, "euler", 10).x)


def test_each_diffusion_gives_other_samples():
    def run(diffusion):
        generator = torch.Generator().manual_seed(0)
        return sample(MIXTURE.field(Cosine()), X, "euler-maruyama", 10, diffusion=diffusion, generator=generator).x

    runs = [run(diffusion) for diffusion in DIFFUSIONS]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(runs, 2))


def test_named_diffusions_are_the_formulas():
    flow, t = RectifiedFlow(), 0.3
    assert float(DIFFUSIONS["kl"](flow, t)) == pytest.approx(2 * t / (1 - t))
    assert float(DIFFUSIONS["kl"](Cosine(), t)) == pytest.approx(math.pi * math.tan(math.pi * t / 2))
    assert float(DIFFUSIONS["kl"](VPLinear(), t)) == pytest.approx(0.1 + t * 19.9)
    assert float(DIFFUSIONS["sigma"](flow, t)) == t
    assert float(DIFFUSIONS["sin2"](flow, t)) == pytest.approx(math.sin(math.pi * t) ** 2)


def test_names_and_refusals():
    field = MIXTURE.field(RectifiedFlow())
    assert {"euler", "midpoint", "heun", "ralston", "rk4", "euler-maruyama"} <= set(solver_names())
    with pytest.raises(ValueError, match="unknown solver 'huen': did you mean 'heun'"):
        sample(field, X, "huen")
    with pytest.raises(ValueError, match="'heun' solves the ODE"):
        sample(field, X, "heun", diffusion="kl")
    with pytest.raises(ValueError, match="give diffusion="):
        sample(field, X, "euler-maruyama")
    with pytest.raises(ValueError, match="unknown diffusion 'sigm': did you mean 'sigma'"):
        sample(field, X, "euler-maruyama", diffusion="sigm")
