"""Exponential integrators: order, invariance under the schedule, DDIM as Euler in the right variable, options."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from samplers import (
    EDM,
    SOLVERS,
    Cosine,
    DiscreteVP,
    Field,
    Multistep,
    VPLinear,
    sample,
)
from samplers.exponential import Exponential, Point, linear, weights
from tests.oracles import MIXTURE, Gaussian
from tests.samplers.common import DISCRETE, FLOW, SMOOTH, log_snr_grid, measured_order, normal, own_grid, path_error

X = normal(4, 2)
NAMES = [n for n, s in SOLVERS.items() if isinstance(s, Exponential) and not s.stochastic and s.view != "velocity"]
ADAMS = ["ab2", "ab3", "ab4", "abm", "abm4", "abm5"]


def started(solver):
    """A method of more than two nodes has its order once it is started by a one-step method: see `Multistep`."""
    return replace(solver, start=SOLVERS["rk4"]) if isinstance(solver, Multistep) and solver.num_nodes > 1 else solver


@pytest.mark.parametrize("schedule", SMOOTH, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_order_in_the_time_of_every_schedule(name, schedule):
    solver = started(SOLVERS[name])
    coarse = {1: 32, 2: 48, 3: 128, 4: 256}[solver.order if isinstance(solver, Multistep) else 2]
    order = measured_order(lambda n: path_error(solver, schedule, own_grid(schedule, n)), coarse)
    assert order == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_order_in_the_log_snr_of_discrete_betas(name):
    """Between betas the time is only piecewise smooth; the log-SNR, the variable of these methods, does not see that.
    So the starting steps are made in it too."""
    solver, betas = SOLVERS[name], DISCRETE
    if isinstance(solver, Multistep) and solver.num_nodes > 1:
        solver = replace(solver, start=SOLVERS["dpm-3"])
    order = measured_order(lambda n: path_error(solver, betas, log_snr_grid(betas, n)), 64 if solver.order < 4 else 128)
    assert order == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize("schedule", SMOOTH[1:], ids=str)
@pytest.mark.parametrize("name", ADAMS)
def test_order_of_adams_bashforth_and_moulton(name, schedule):
    """Not the flow with a Gaussian: on the straight path such a field has more symmetry."""
    solver = started(SOLVERS[name])
    coarse = 192 if solver.order > 4 or solver.corrector else 96
    order = measured_order(lambda n: path_error(solver, schedule, own_grid(schedule, n)), coarse)
    assert order == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_does_not_matter_at_equal_log_snr(name):
    """x / alpha is the same on every schedule, for any network, to rounding."""
    runs = []
    for schedule in (FLOW, Cosine(), VPLinear(), EDM(30.0), DiscreteVP.scaled_linear()):
        grid = log_snr_grid(schedule, 7, 3.0)
        alpha = schedule.alpha(grid)
        runs.append(sample(MIXTURE.field(FLOW).on(schedule), alpha[0] * X, name, grid=grid).x / alpha[-1])
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "edm"])
@pytest.mark.parametrize("name", NAMES)
def test_from_end_to_end_whatever_is_predicted(name, prediction):
    """Pure noise to pure data on a rectified flow: both ends have infinite log-SNR."""
    out = sample(MIXTURE.field(FLOW, prediction), X, name, 24).x
    reference = sample(MIXTURE.field(FLOW), X, "rk4", 100).x
    assert (out - reference).norm() < (1.0 if SOLVERS[name].order == 1 or prediction == "noise" else 0.5)


@pytest.mark.parametrize("name", ["unipc", "unipc-3"])
def test_a_corrector_of_noise_predictions_leaves_pure_noise(name):
    """The first step is DDIM's of data predictions, and is not corrected."""
    reference = sample(MIXTURE.field(FLOW), X, "rk4", 100).x
    assert (sample(MIXTURE.field(FLOW), X, replace(SOLVERS[name], view="noise"), 24).x - reference).norm() < 0.01


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_out_of_pure_noise_is_ddims(name, prediction):
    field, grid = MIXTURE.field(FLOW, prediction), [1.0, 0.8]
    torch.testing.assert_close(sample(field, X, name, grid=grid).x, sample(field, X, "ddim", grid=grid).x)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2s", "heun"])
def test_a_noise_network_leaves_pure_noise_exactly_where_the_data_have_no_mean(name):
    """The rule of views.py at alpha = 0, x_0 = 0, is E[x_0 | x_t] there if the data have no mean; else they pay it."""

    def shortfall(mean):
        data = Gaussian.of([mean, 0.0], 0.6)
        seen, blind = (sample(data.field(FLOW, view), X, name, 40).x for view in ("velocity", "noise"))
        return (seen - blind).abs().max().item()

    assert shortfall(0.0) < 1e-9 < 1e-3 < shortfall(0.5) < shortfall(1.0)


@pytest.mark.parametrize(
    ("name", "prediction", "order"),
    [("dpmpp-3s", "velocity", 2), ("unipc-3", "velocity", 2), ("abm4", "velocity", 4), ("rk4", "noise", 1)],
)
def test_order_from_pure_noise_to_pure_data(name, prediction, order):
    """At an infinite log-SNR a step is DDIM's; and of a mean that is not 0 a noise network says nothing at t = 1."""
    exact, field = sample(MIXTURE.field(FLOW), X, "rk4", 500).x, MIXTURE.field(FLOW, prediction)
    measured = measured_order(lambda n: (sample(field, X, started(SOLVERS[name]), n).x - exact).norm().item(), 96)
    assert measured == pytest.approx(order, abs=0.3)


def test_ddim_is_euler_in_the_right_variable():
    """x / sigma over alpha / sigma, x / alpha over sigma / alpha, x / (alpha + sigma) over sigma / (alpha + sigma)."""
    vp = VPLinear()
    field, grid = MIXTURE.field(vp), torch.tensor([0.8, 0.5, 0.3], dtype=torch.float64)
    expected = sample(field, X, "ddim", grid=grid).x
    c = vp(grid)
    by_data, by_noise, by_flow = X.clone(), X.clone(), X.clone()
    for i in range(2):
        t, sigma, alpha = float(grid[i]), c.sigma[i : i + 2], c.alpha[i : i + 2]
        step = (alpha / sigma).diff() * field.x_0(by_data, t)
        by_data = sigma[1] * (by_data / sigma[0] + step)
        by_noise = alpha[1] * (by_noise / alpha[0] + (sigma / alpha).diff() * field.eps(by_noise, t))
        total, p = alpha + sigma, field.predict(by_flow, t)
        by_flow = total[1] * (by_flow / total[0] + (sigma / total).diff() * (p.eps - p.x_0))
    for other in (by_data, by_noise, by_flow):
        torch.testing.assert_close(other, expected)
    torch.testing.assert_close(
        sample(MIXTURE.field(FLOW), X, "ddim", 5).x, sample(MIXTURE.field(FLOW), X, "euler", 5).x
    )
    one = sample(field, X, "dpm-1", grid=grid).x
    torch.testing.assert_close(one, expected)


def test_edm_heun_is_heun_in_sigma():
    field, grid = MIXTURE.field(EDM(10.0)), torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)
    out = sample(field, 10 * X, "edm-heun", grid=grid)
    torch.testing.assert_close(out.x, sample(MIXTURE.field(EDM(10.0), "data"), 10 * X, "heun", grid=grid).x)
    assert out.num_evals == 5


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_edm_heun_leaves_nearly_pure_noise(prediction):
    """The betas of iDDPM end at sigma / alpha = 2e4, with which a mean of two noise predictions multiplies their
    difference."""
    betas, x = DiscreteVP.cosine(), normal(64, 2)
    field = MIXTURE.field(betas, prediction)
    exact = sample(field, x, "dpm-3", 200, grid="cosine").x
    for num_steps, error in ((10, 0.05), (20, 0.02)):
        got = sample(field, x, "edm-heun", num_steps, grid="trailing").x
        assert (got - exact).square().mean().sqrt() < error


def test_two_nodes_are_the_published_coefficients():
    """DPM-Solver++(2M): x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) ((1 + 1/2r) m_0 - 1/2r m_1)."""
    grid = torch.tensor([0.8, 0.6, 0.45], dtype=torch.float64)
    bound = SOLVERS["dpmpp-2m"].bind(MIXTURE.field(FLOW), grid.tolist())
    lam = FLOW.log_snr(grid) / 2
    h, r = (lam[2] - lam[1]).item(), ((lam[1] - lam[0]) / (lam[2] - lam[1])).item()
    total = -0.55 * math.expm1(-h)
    assert bound.predict[1].a == pytest.approx(0.45 / 0.6)
    assert bound.predict[1].b == pytest.approx((total * (1 + 0.5 / r), -total * 0.5 / r))


def test_the_midpoint_alone_leads_to_the_end_in_dpm_solver_2():
    """Lu et al. 2022a, alg. 1: x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps(u, the middle in log-SNR)."""
    _, (middle, step) = SOLVERS["dpm-2"].bind(MIXTURE.field(FLOW), [0.8, 0.5]).plans[0]
    h = (FLOW.log_snr(0.5) - FLOW.log_snr(0.8)).item() / 2
    assert FLOW.log_snr(middle).item() == pytest.approx(FLOW.log_snr(0.8).item() + h)
    assert step.a == pytest.approx(0.5 / 0.2) and step.b == pytest.approx((0, -0.5 * math.expm1(h)))


@pytest.mark.parametrize("variable", ["log-snr", "rho", "flow"])
@pytest.mark.parametrize(
    ("rate", "end"), [(1, 0.5), (2, 0.5), (-1, 0.5), (1, 15), (-1, 15), (-1, 60), (1, -2), (-1, -2)]
)
def test_weights_integrate_polynomials(variable, rate, end):
    """Against a fine midpoint rule; to data and to noise."""
    start, nodes = -0.3, (-0.3, -0.7, -1.2)
    value = {"log-snr": lambda x: x, "rho": lambda x: (-x).exp(), "flow": lambda x: torch.sigmoid(-x)}[variable]
    x = start + (end - start) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = torch.exp(rate * x)
    w = torch.tensor(weights(start, end, nodes, variable, "exact", rate), dtype=torch.float64)
    for k in range(3):
        mean = (density * value(x) ** k).sum() / density.sum()
        at_nodes = (w * value(torch.tensor(nodes, dtype=torch.float64)) ** k).sum()
        assert at_nodes.item() == pytest.approx(mean.item(), rel=1e-6)


def test_the_rule_for_small_steps_ends_where_noise_outgrows_them():
    """E[tau] = r h / 2 / (1 - e^-rh) at the rate r = 1 + tau^2 up to 2, then 1/2; one node is h before the start."""
    h = 0.5
    for rate, mean in ((1.0, h / 2 / (1 - math.exp(-h))), (2.0, h / (1 - math.exp(-2 * h))), (5.0, 0.5)):
        assert weights(0.0, h, (0.0, -h), "log-snr", "bh1", rate) == pytest.approx((1 + mean, -mean))


def test_weights_at_infinite_ends():
    """The time of the flow is finite there: a polynomial is extrapolated to the data; in log-SNR one node is left."""
    assert weights(0.0, math.inf, (0.0, -1.0), "log-snr", "exact", 1.0) == (1.0, 0.0)
    assert weights(-math.inf, 0.0, (-math.inf,), "log-snr", "exact", 1.0) == (1.0,)
    tau = [1 / (1 + math.exp(x)) for x in (0.0, -1.0)]
    w = weights(0.0, math.inf, (0.0, -1.0), "flow", "exact", 1.0)
    assert w[0] * tau[0] + w[1] * tau[1] == pytest.approx(0) and sum(w) == pytest.approx(1)
    without = weights(1.0, 2.0, (1.0, 0.0), "log-snr", "exact", 1.0)
    assert weights(1.0, 2.0, (1.0, 0.0, -math.inf), "log-snr", "exact", 1.0) == (*without, 0.0)
    assert weights(-math.inf, 0.0, (-math.inf, 0.0), "log-snr", "exact", 1.0) == (1.0, 0.0)
    for variable in ("rho", "flow"):  # under e^-l nearly all the mass is near the start
        near, end = (weights(0.0, at, (0.0, -1.0, -1.5), variable, "exact", -1.0) for at in (50.0, math.inf))
        assert near == pytest.approx(end)


def test_the_published_three_node_rule_is_of_second_order():
    """diffusers and k-diffusion have half of the second difference: `third-halved` is theirs, "exact" is of order 3."""

    exact = started(SOLVERS["dpmpp-3m"])
    for solver, order in ((exact, 3), (replace(exact, rule="third-halved"), 2)):
        measured = measured_order(lambda n, solver=solver: path_error(solver, FLOW, log_snr_grid(FLOW, n)), 64)
        assert measured == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("name", "steps"), [("dpmpp-2m", 1), ("dpmpp-3m", 2), ("abm4", 2), ("ab4", 3)])
def test_only_as_many_steps_are_started_as_there_are_nodes_before(name, steps):
    out = sample(MIXTURE.field(FLOW), X, replace(SOLVERS[name], start=SOLVERS["rk4"]), 9)
    assert out.num_evals == 4 * steps + 9 - steps


def test_a_started_step_is_not_corrected():
    predictor, corrected = (replace(SOLVERS[name], start=SOLVERS["rk4"]) for name in ("dpmpp-2m", "unipc"))
    got, expected = (sample(MIXTURE.field(FLOW), X, s, grid=[0.8, 0.6, 0.4]).x for s in (corrected, predictor))
    assert torch.equal(got, expected)  # and no more is the last step


def test_a_corrector_costs_no_evaluation():
    field = MIXTURE.field(FLOW)
    assert sample(field, X, "unipc", 9).num_evals == sample(field, X, "dpmpp-2m", 9).num_evals == 9


def test_no_host_value_is_read_in_the_loop():
    """The coefficients of all steps are numbers before the first one: on the meta device nothing can be read back."""
    field = Field(lambda x_t, t: x_t * 0.5, FLOW)
    x = torch.empty(2, 3, device="meta")
    for name in ("dpmpp-2m", "unipc", "dpm-3", "edm-heun", "heun", "ab3"):
        solver = SOLVERS[name].bind(field, [1.0, 0.7, 0.4, 0.0])
        state, at = None, x
        for t, t_next in ((1.0, 0.7), (0.7, 0.4), (0.4, 0.0)):
            at, _, state = solver.step(field, at, t, t_next, state)
        assert at.shape == x.shape


@pytest.mark.parametrize(("nodes", "corrector", "kept"), [(1, 0, 1), (3, 0, 3), (2, 3, 2), (1, 4, 3)])
def test_as_many_predictions_are_kept_as_are_used(nodes, corrector, kept):
    times = torch.linspace(0.9, 0.1, 7, dtype=torch.float64).tolist()
    solver = Multistep("mine", 1, 1, "", num_nodes=nodes, corrector=corrector).bind(MIXTURE.field(FLOW), times)
    x, state = X, None
    for t, t_next in pairwise(times):
        x, _, state = solver.step(MIXTURE.field(FLOW), x, t, t_next, state)
    assert len(state.outputs) == kept
    assert max((len(step.b) for step in solver.correct if step), default=0) == corrector


def test_a_multistep_step_compiles_without_a_break():
    field, times = MIXTURE.field(FLOW), [0.9, 0.7, 0.5]
    solver = SOLVERS["dpmpp-2m"].bind(field, times)
    first = solver.step(field, X, 0.9, 0.7)
    expected = solver.step(field, first.x, 0.7, 0.5, first.state).x
    compiled = torch.compile(lambda x, state: solver.step(field, x, 0.7, 0.5, state).x, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(first.x, first.state), expected)


def test_what_cannot_be_solved_is_refused_before_the_loop():
    with pytest.raises(ValueError, match="cannot leave t = 0"):
        linear("data", Point(0.0, 1.0, 0.0, math.inf), Point(0.5, 0.5, 0.5, 0.0), [math.inf], "log-snr", "exact")
    with pytest.raises(ValueError, match="unknown view of an integrator 'dato': did you mean 'data'"):
        Multistep("mine", 1, 1, "", view="dato")
    with pytest.raises(ValueError, match="unknown variable"):
        Multistep("mine", 1, 1, "", variable="time")
    with pytest.raises(ValueError, match="start = 'ddpm' draws noise"):
        replace(SOLVERS["dpmpp-2m"], start=SOLVERS["ddpm"])
    for options in ({"num_nodes": 0}, {"corrector": 1}):
        with pytest.raises(ValueError, match="give 1 or more nodes, and 0 or 2 or more"):
            replace(SOLVERS["unipc"], **options)
    with pytest.raises(ValueError, match="unknown rule"):
        Multistep("mine", 1, 1, "", rule="exakt")


def test_times_that_no_polynomial_goes_through_are_refused():
    with pytest.raises(ValueError, match="the times of some steps are too near each other"):
        weights(0.0, 1.0, (0.25, 0.25), "log-snr", "exact", 0.0)
