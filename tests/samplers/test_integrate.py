"""The loop: exact counts, callback, trajectory, seeds per sample, and what is said when a network gives NaN."""

import math

import pytest
import torch

from samplers import (
    SOLVERS,
    Cosine,
    Field,
    Inpaint,
    Multistep,
    RungeKutta,
    SDESolver,
    cfg,
    integrate,
    randn,
    sample,
    uniform,
)
from tests.oracles import GAUSSIAN, MIXTURE
from tests.samplers.common import DISCRETE, FLOW, normal

X = normal(4, 2)


def counting(calls):
    def network(x_t, t):
        calls.append(t[0].item())
        return -x_t

    return Field(network, FLOW)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=lambda solver: solver.name)
def test_num_evals_is_the_number_of_network_calls(solver):
    calls, diffusion = [], "sigma" if isinstance(solver, SDESolver) else None
    out = sample(counting(calls), X, solver.name, 7, diffusion=diffusion)
    assert out.num_evals == len(calls)
    if isinstance(solver, RungeKutta) or (isinstance(solver, Multistep) and solver.start is None):
        assert out.num_evals == 7 * solver.evals_per_step
    if solver.name not in ("dopri5", "restart"):  # whose number is not fixed; the others may save some at the ends
        assert math.ceil(out.num_evals / 7) == solver.evals_per_step


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=lambda solver: solver.name)
def test_the_state_stays_wide_with_a_network_in_half_precision(solver):
    runs = []
    for network, x in ((lambda x_t, t: -x_t, X), (lambda x_t, t: -x_t.bfloat16(), X.float())):
        diffusion = "sigma" if isinstance(solver, SDESolver) else None
        runs.append(sample(Field(network, FLOW), x, solver, 20, diffusion=diffusion).x)
    assert runs[1].dtype == torch.float32
    if not solver.stochastic:
        torch.testing.assert_close(runs[1].double(), runs[0], rtol=0.01, atol=0.01)


def test_guidance_counts_both_networks_and_only_where_it_is_on():
    on, off = [], []
    field = cfg(counting(on), counting(off), 3.0, interval=(0.35, 0.75))
    out = sample(field, X, "euler", 10)
    assert on == pytest.approx([1 - i / 10 for i in range(10)]) and off == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert out.num_evals == 14
    assert sample(field.on(Cosine()), X, "euler", 10).num_evals == len(on) + len(off) - 14
    for t in (0.5, torch.full((4,), 0.5).double()):
        assert field.predict(X, t).num_evals == field.on(Cosine()).predict(X, t).num_evals == 2


def test_times_given_to_the_network_stay_in_range_and_end_exactly():
    calls = []
    sample(counting(calls), X, "rk4", 13)
    assert max(calls) == 1 and min(calls) == 0


def test_the_solution():
    out = sample(MIXTURE.field(FLOW), X, "heun", 5, trajectory=True)
    assert out.ts.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert out.trajectory.shape == (6, 4, 2)
    assert torch.equal(out.trajectory[0], X) and torch.equal(out.trajectory[-1], out.x)
    plain = sample(MIXTURE.field(FLOW), X)
    assert plain.trajectory is None and plain.num_evals == 40
    assert torch.equal(plain.x, sample(MIXTURE.field(FLOW), X, "heun", 20, "uniform").x)


def test_what_is_printed_is_short_and_holds_no_tensor():
    field, steps, x = Field(lambda x_t, t: -x_t, DISCRETE), [], torch.ones(2, 4, 8, 8)
    out = sample(field, x, "euler", 3, callback=steps.append)
    assert repr(DISCRETE) == "DiscreteVP(1000 betas, 0.00085 ... 0.012)"
    assert repr(field) == f"Field('velocity', {DISCRETE!r})"
    assert repr(out) == "Solution(x (2, 4, 8, 8), 3 steps from t = 1 to 0, num_evals=3)"
    inpaint = Inpaint.of("dopri5", x, x)
    for thing in (field.on(FLOW), cfg(field, field, 2.0), field.predict(x, 0.5), steps[0], inpaint, *SOLVERS.values()):
        assert len(repr(thing)) < 400 and "tensor(" not in repr(thing)
    for name in ("heun", "unipc", "edm-heun", "edm-churn", "restart"):
        assert len(repr(SOLVERS[name].bind(field, uniform(9).tolist()))) < 400


def test_callback_sees_each_step_at_no_further_evaluation():
    seen, calls = [], []
    out = sample(counting(calls), X, "midpoint", 4, callback=seen.append)
    assert [(p.index, p.num_steps, p.num_evals) for p in seen] == [(0, 4, 2), (1, 4, 4), (2, 4, 6), (3, 4, 8)]
    assert [(p.t, p.t_next) for p in seen] == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    assert torch.equal(seen[0].x_t, X) and torch.equal(seen[-1].x_next, out.x)
    torch.testing.assert_close(seen[1].x_0, seen[1].x_t * 1.75)  # x_0 = x_t - t v
    assert len(calls) == 8


def test_a_part_of_the_way_and_the_rest_is_the_whole():
    field, grid = MIXTURE.field(FLOW), torch.linspace(1, 0, 11, dtype=torch.float64)
    half = sample(field, X, "heun", grid=grid[:6]).x
    torch.testing.assert_close(sample(field, half, "heun", grid=grid[5:]).x, sample(field, X, "heun", 10).x)


def test_integrate_runs_to_noise_and_back():
    x_0 = MIXTURE.sample(4, torch.Generator().manual_seed(1))
    field, ts = MIXTURE.field(FLOW), torch.linspace(0, 1, 101, dtype=torch.float64)
    noise = integrate(field, x_0, SOLVERS["rk4"], ts).x
    torch.testing.assert_close(integrate(field, noise, SOLVERS["rk4"], ts.flip(0)).x, x_0, rtol=1e-6, atol=1e-6)


def test_sample_keeps_no_graph_and_integrate_does():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    field = Field(lambda x_t, t: scale * x_t, FLOW)
    assert not sample(field, X).x.requires_grad
    (scale * sample(field, X).x).sum().backward()  # which can be trained on
    x = integrate(field, X, SOLVERS["rk4"], torch.linspace(1, 0, 21, dtype=torch.float64)).x
    (grad,) = torch.autograd.grad(x.sum(), scale)
    assert grad.item() == pytest.approx(-math.exp(-1) * X.sum().item(), rel=1e-4)  # x(0) = exp(-scale) x(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_keeps_its_dtype(dtype):
    for prediction in ("velocity", "noise", "data"):
        assert sample(Field(lambda x_t, t: x_t, FLOW, prediction), X.to(dtype)).x.dtype == dtype


def test_a_generator_per_sample_makes_it_independent_of_the_batch():
    def run(rows):
        generators = [torch.Generator().manual_seed(10 + i) for i in rows]
        x = randn((len(rows), 2), generators, dtype=torch.float64)
        return sample(GAUSSIAN.field(FLOW), x, "euler-maruyama", 6, diffusion="kl", generator=generators).x

    together = run([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat((run([0, 1]), run([2]), run([3]))), together, rtol=0, atol=0)


def test_one_generator_reproduces_and_another_seed_does_not():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(GAUSSIAN.field(FLOW), X, "euler-maruyama", 6, diffusion="sin2", generator=generator).x

    assert torch.equal(run(0), run(0)) and not torch.allclose(run(0), run(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("solver", "where"),
    [(name, "5 of 10, from t = 0.6 to 0.5") for name in ("euler", "dpmpp-2m", "ddpm")]
    + [("heun", "4 of 10, from t = 0.7 to 0.6")],
)
def test_nan_is_named_with_its_step_and_time(bad, solver, where):
    calls = []

    def network(x_t, t):
        calls.append(t[0].item())
        spoilt = x_t.clone()
        spoilt[1, 0] = bad  # one number of one sample
        return torch.where(t[:, None] < 0.65, spoilt, x_t)

    field, grid = Field(network, FLOW, "data"), [*(1 - 0.1 * i for i in range(10)), 0.05]
    with pytest.raises(ValueError, match=f"NaN or inf after step {where}"):
        sample(field, X, solver, grid=grid, generator=[1, 2, 3, 4])
    assert len(calls) == 10 * SOLVERS[solver].evals_per_step  # no step is made again


def test_large_numbers_are_no_nan():
    """Sums that overflow do not count: finite states in half precision, and near the end of single precision."""
    field = Field(lambda x_t, t: torch.zeros_like(x_t), FLOW)
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 3e38)):
        x = torch.full((2, 1000), size, dtype=dtype)
        assert torch.equal(sample(field, x, "euler", 3).x, x)


def test_a_sum_that_overflows_in_half_precision_is_not_taken_for_the_step_that_went_wrong():
    x = torch.full((2, 1000), 6e4, dtype=torch.float16)
    field = Field(lambda x_t, t: torch.where(t[:, None] < 0.5, torch.nan, 0.0).to(x_t.dtype).expand_as(x_t), FLOW)
    with pytest.raises(ValueError, match="after step 3 of 4, from t = 0.4 to 0.2"):
        sample(field, x, "euler", grid=[1.0, 0.7, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("x", [torch.zeros(2, 3, dtype=torch.int64), torch.tensor(1.0), torch.zeros(0, 2), [1.0]])
def test_what_is_no_state_is_refused(x):
    with pytest.raises(ValueError, match="give a floating tensor"):
        sample(MIXTURE.field(FLOW), x)


def test_what_is_no_field_or_network_is_refused():
    for field in (lambda x_t, t: x_t, None):
        with pytest.raises(ValueError, match="give a samplers.Field"):
            sample(field, X)
    with pytest.raises(ValueError, match="network is 3: give a function"):
        Field(3, FLOW)
    with pytest.raises(ValueError, match="the network gave a tuple for x_t"):
        sample(Field(lambda x_t, t: (x_t,), FLOW), X)
    for solver, ts in (("heun", uniform(4)), (SOLVERS["heun"], [1.0, 0.0])):
        with pytest.raises(ValueError, match="give a Solver"):
            integrate(MIXTURE.field(FLOW), X, solver, ts)


def test_too_few_or_many_generators_are_refused_before_the_first_evaluation():
    calls = []
    for num in (1, 5):
        with pytest.raises(ValueError, match=f"{num} generators for a batch of 4"):
            sample(counting(calls), X, "euler-maruyama", diffusion="kl", generator=list(range(num)))
    assert not calls
