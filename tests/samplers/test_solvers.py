"""Runge-Kutta methods: measured order on exact fields, fixed and adaptive; the end that cannot be seen; names."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

import samplers
from samplers import (
    SOLVERS,
    VE,
    Cosine,
    DerivedField,
    DiscreteVP,
    Field,
    Inpaint,
    RectifiedFlow,
    RungeKutta,
    Solver,
    Step,
    VPLinear,
    integrate,
    sample,
    solver_names,
    uniform,
)
from samplers.solvers import make_solver
from tests.oracles import GAUSSIAN, MIXTURE, Gaussian
from tests.samplers.common import SMOOTH, measured_order, normal, own_grid, path_error

ODE = [name for name, solver in SOLVERS.items() if isinstance(solver, RungeKutta)]
SCHEDULES = [RectifiedFlow(), Cosine()]
X = normal(8, 2)


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


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("schedule", SMOOTH, ids=str)
def test_order_in_the_time_of_every_schedule(name, schedule):
    order = measured_order(lambda n: path_error(name, schedule, own_grid(schedule, n)), 48)
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


@pytest.mark.parametrize("name", ODE)
def test_in_place_is_the_same_in_less_memory(name):
    """But for the caller's own x, which is left as it is; the state is one piece of memory from then on."""
    places, inner = set(), MIXTURE.field(Cosine())

    def network(x_t, t):
        if SOLVERS[name].evals_per_step == 1:
            places.add(x_t.data_ptr())
        return inner.network(x_t, t)

    x, solver = X.clone(), replace(SOLVERS[name], in_place=True)
    got = sample(Field(network, Cosine()), x, solver, 9).x
    torch.testing.assert_close(got, sample(inner, X, name, 9).x)
    assert torch.equal(x, X) and len(places) in (0, 2)
    for options in ({"trajectory": True}, {"callback": print}):
        with pytest.raises(ValueError, match="steps in place"):
            sample(inner, X, solver, **options)


def test_a_solver_within_another_steps_in_place_too():
    euler = replace(SOLVERS["euler"], in_place=True)
    for solver in (Inpaint.of(euler, X, 0 * X), replace(SOLVERS["langevin"], inner=euler)):
        with pytest.raises(ValueError, match="steps in place"):
            sample(MIXTURE.field(Cosine()), X, solver, trajectory=True)
    with pytest.raises(ValueError, match="start = 'euler' steps in place"):
        replace(SOLVERS["ab3"], start=euler)


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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), [("euler", "velocity"), ("ddim", "data")])
def test_a_compiled_step_keeps_its_size_where_the_network_ends_in_a_matrix_product(name, prediction):
    field = Field(lambda x_t, t: x_t @ MIXTURE.means[:2], RectifiedFlow(), prediction)
    solver = SOLVERS[name].bind(field, [0.8, 0.6])
    compiled = torch.compile(lambda x: solver.step(field, x, 0.8, 0.6).x)
    torch.testing.assert_close(compiled(X), solver.step(field, X, 0.8, 0.6).x)


OFFSET = RungeKutta("offset", 1, 2, "of no use", c=(0.0, 1.0), a=((), (1.0,)), b=(0.75, 0.25))


@pytest.mark.parametrize("name", ["heun", "rk4"])
@pytest.mark.parametrize("prediction", ["data", "score"])
def test_where_the_velocity_cannot_be_seen_the_order_stays(name, prediction):
    """A data network at t = 0: a stage there would read a velocity that it does not determine (see runge_kutta.py)."""
    asked = []
    inner = MIXTURE.field(RectifiedFlow(), prediction)

    def network(x_t, t):
        asked.append(t[0].item())
        return inner.network(x_t, t)

    field, exact = Field(network, RectifiedFlow(), prediction), mixture_solution(RectifiedFlow())

    def error(num_steps):
        return (sample(field, X, name, num_steps).x - exact).norm().item()

    if prediction == "data":  # a score network says nothing of x_0 at t = 1 either, which no method can mend
        assert measured_order(error, 32) == pytest.approx(SOLVERS[name].order, abs=0.2)
    out = sample(field, X, name, 8)
    assert min(asked) > 0 and out.num_evals == 8 * SOLVERS[name].evals_per_step - 1


@pytest.mark.parametrize(("solver", "order"), [(replace(SOLVERS["dopri5"].tableau, order=5), 4), (OFFSET, 1)])
def test_a_tableau_of_any_order_keeps_off_the_end_that_cannot_be_seen(solver, order):
    """Up to order 4, since the method that it ends with has order 3 at most."""
    flow = RectifiedFlow()
    field, exact = MIXTURE.field(flow, "data"), mixture_solution(flow)
    assert measured_order(lambda n: (sample(field, X, solver, n).x - exact).norm().item(), 16) > order - 0.2


def test_a_method_that_does_not_look_at_the_end_makes_its_last_step_itself():
    assert sample(MIXTURE.field(RectifiedFlow(), "data"), X, "midpoint", 4).num_evals == 8


def test_the_naive_last_stage_would_spoil_heun():
    """What the rule is for: data on a manifold, here nearly a point, which every path meets with an eps of its own."""
    thin, flow = Gaussian.of([1.0, -0.5], std=1e-5), RectifiedFlow()
    field, exact = thin.field(flow, "data"), thin.solve(X, 1.0, 0.0, flow)
    naive = DerivedField(field.predict, flow, "data", lambda t: True)  # eps = 0 at t = 0

    def error(f, num_steps):
        return (sample(f, X, "heun", num_steps).x - exact).norm().item()

    assert error(field, 32) < 1e-4
    assert error(naive, 32) > 0.01 and measured_order(lambda n: error(naive, n), 32) == pytest.approx(1, abs=0.2)


def test_a_pole_of_the_schedule_is_not_looked_at():
    for name in ("heun", "rk4", "dopri5"):
        assert sample(GAUSSIAN.field(VPLinear()), X, name, 8).x.isfinite().all()


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_dopri5_meets_its_tolerance(tolerance, prediction):
    schedule = Cosine()
    solver = replace(SOLVERS["dopri5"], atol=tolerance, rtol=tolerance)
    out = sample(GAUSSIAN.field(schedule, prediction), X, solver, 1)
    error = (out.x - GAUSSIAN.solve(X, 1.0, 0.0, schedule)).abs().max().item()
    assert error < 10 * tolerance and out.num_evals < 250


def test_dopri5_needs_more_evaluations_for_less_error():
    def run(**settings):
        return sample(MIXTURE.field(Cosine()), X, replace(SOLVERS["dopri5"], **settings), 1).num_evals

    base = run()
    assert run(atol=1e-8, rtol=1e-8) > base > run(atol=1e-2, rtol=1e-2)
    assert run(atol=1e-9) > base and run(atol=1e-9, rtol=1e-9) > run(atol=1e-9)
    assert run(first_step=1e-4) > base and run(safety=0.5) > base


def test_dopri5_takes_the_steps_of_its_equations():
    """Its loop written out for one number, with scipy's tableau: every time that the network is asked for."""
    from scipy.integrate import RK45

    def v(x, t):
        return -30 * (x - math.cos(6 * t)) if t > 0.5 else math.cos(6 * t)  # refused at first, then quick

    asked, expected = [], []

    def network(x_t, t):
        asked.append(t.item())
        return torch.full_like(x_t, v(x_t.item(), t.item()))

    solver = replace(SOLVERS["dopri5"], atol=1e-4, rtol=1e-3, first_step=0.4)
    got = sample(Field(network, RectifiedFlow()), X[:1, :1], solver, grid=[1.0, 0.47, 0.0]).x.item()
    x, h, last_error, refused = X[0, 0].item(), 0.4, 1.0, 0
    for t, end in ((1.0, 0.47), (0.47, 0.0)):
        expected.append(t)
        first = v(x, t)
        while t > end:
            last = h >= t - end
            new = end if last else t - h
            slopes = [first]
            for c, a in zip([*RK45.C[1:], 1.0], [*RK45.A[1:], RK45.B], strict=True):
                x_new = x + (new - t) * sum(w * k for w, k in zip(a, slopes, strict=False))
                expected.append(t + c * (new - t))
                slopes.append(v(x_new, expected[-1]))
            error = abs((new - t) * RK45.E @ slopes) / (1e-4 + 1e-3 * max(abs(x), abs(x_new)))
            if error > 1:
                h, refused = min(h, t - end) * min(max(0.9 * error ** (-1 / 5), 0.2), 1), refused + 1
                continue
            factor = min(max(0.9 * error ** (-0.7 / 5) * last_error ** (0.4 / 5), 0.2), 5)
            h = max(h, (t - end) * factor) if last else h * factor
            x, t, first, last_error = x_new, new, slopes[-1], max(error, 1e-4)
    assert asked == pytest.approx(expected, rel=1e-9) and refused > 0
    assert got == pytest.approx(x, rel=1e-9)


def test_dopri5_does_not_look_at_an_end_that_cannot_be_seen():
    def asked(prediction, grid="uniform"):
        calls, inner = [], GAUSSIAN.field(RectifiedFlow(), prediction)

        def network(x_t, t):
            calls.append(t[0].item())
            return inner.network(x_t, t)

        sample(Field(network, RectifiedFlow(), prediction), X[:1], "dopri5", 1, grid)
        return calls

    seen, blind = asked("velocity"), asked("data")
    assert min(seen) == 0 and len(seen) % 6 == 1  # the last stage of a step is the first of the next
    assert min(blind) == pytest.approx(1e-4, rel=1e-9) and len(blind) % 6 == 2  # and DDIM's step from there
    assert max(asked("data", [5e-5, 0.0])) == 5e-5  # from below 1e-4 it goes half of the way


def test_dopri5_meets_a_time_that_its_first_step_misses_by_rounding():
    """0.101 - 0.05 is not the 0.051 that is asked for; the step of 1e-17 that is left is none."""
    flow = RectifiedFlow()
    out = sample(GAUSSIAN.field(flow), X, "dopri5", grid=[0.101, 0.051, 0.0])
    torch.testing.assert_close(out.x, GAUSSIAN.solve(X, 0.101, 0.0, flow), rtol=0, atol=1e-4)
    assert out.num_evals == 14  # a step of the grid is one of its own


@pytest.mark.parametrize("schedule", [RectifiedFlow(), DiscreteVP.linear()])
def test_where_a_device_has_no_float64_float32_does(monkeypatch, schedule):
    """Times per sample, their steps, and tables of alpha."""

    def solved():
        return sample(
            MIXTURE.field(schedule), X.float(), replace(SOLVERS["dopri5"], atol=1e-4, rtol=1e-4), grid=[0.9, 0.5, 0.1]
        )

    expected = solved()
    for module in (samplers.discrete, samplers.runge_kutta):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    out = solved()
    torch.testing.assert_close(out.x, expected.x, rtol=0, atol=3e-3)
    assert out.num_evals <= 1.1 * expected.num_evals


def test_dopri5_goes_on_with_the_step_it_had_and_not_with_what_was_left_of_a_grid_s_step():
    whole, cut = (
        sample(MIXTURE.field(RectifiedFlow()), X, "dopri5", grid=grid).num_evals
        for grid in ([0.9, 0.5, 0.1], [0.9, 0.5001, 0.5, 0.1])
    )
    assert cut <= whole + 7  # the first stage of the further grid step, and its only step


def test_dopri5_solves_a_sample_alike_in_any_batch():
    field = MIXTURE.field(Cosine())
    together = sample(field, X, "dopri5", 2).x
    torch.testing.assert_close(together[:1], sample(field, X[:1], "dopri5", 2).x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[5:], sample(field, X[5:], "dopri5", 2).x, rtol=1e-12, atol=1e-12)


def test_dopri5_solves_single_numbers_as_vectors_of_one():
    field = Field(lambda x_t, t: torch.sin(3 * x_t), RectifiedFlow())
    x = X.flatten()
    torch.testing.assert_close(sample(field, x, "dopri5", 1).x, sample(field, x[:, None], "dopri5", 1).x[:, 0])


def test_dopri5_has_order_five():
    """The tableau with fixed steps."""
    field, x = GAUSSIAN.field(Cosine()), X + 1.0
    exact = GAUSSIAN.solve(x, 0.9, 0.2, Cosine())

    def error(n):
        grid = torch.linspace(0.9, 0.2, n + 1, dtype=torch.float64)
        return (sample(field, x, SOLVERS["dopri5"].tableau, grid=grid).x - exact).norm().item()

    assert measured_order(error, 32) == pytest.approx(5, abs=0.2)


def test_dopri5_says_when_it_cannot_go_on():
    bad = Field(lambda x_t, t: x_t * torch.nan, RectifiedFlow())
    with pytest.raises(ValueError, match="dopri5 stayed at t = 1"):
        sample(bad, X, "dopri5")
    with pytest.raises(ValueError, match="dopri5 stayed at t"):
        sample(MIXTURE.field(RectifiedFlow()), X, replace(SOLVERS["dopri5"], max_attempts=2), 1)
    with pytest.raises(ValueError, match="atol = 0"):
        replace(SOLVERS["dopri5"], atol=0)


def test_names_and_refusals():
    field = MIXTURE.field(RectifiedFlow())
    assert {"euler", "midpoint", "heun", "ralston", "rk4", "euler-maruyama"} <= set(solver_names())
    with pytest.raises(ValueError, match="unknown solver 'huen': did you mean 'heun'"):
        sample(field, X, "huen")
    with pytest.raises(ValueError, match=r"unknown solver \['heun'\]"):
        sample(field, X, ["heun"])
    with pytest.raises(ValueError, match="'heun' solves the ODE"):
        sample(field, X, "heun", diffusion="kl")
    with pytest.raises(ValueError, match="give a diffusion, 'kl'"):
        sample(field, X, "euler-maruyama")
    with pytest.raises(ValueError, match="diffusion = -1"):
        sample(field, X, "euler-maruyama", diffusion=-1.0)
    with pytest.raises(ValueError, match="draws noise"):
        integrate(field, X, make_solver("ddpm", field.schedule), uniform(3))
    with pytest.raises(ValueError, match=r"diffusion is tensor\(0.5000\): give a name \(kl, "):
        sample(field, X, "euler-maruyama", diffusion=torch.tensor(0.5))
    with pytest.raises(ValueError, match="unknown diffusion 'sigm': did you mean 'sigma'"):
        sample(field, X, "euler-maruyama", diffusion="sigm")
