"""Views: every pair of conversions, inside and at both ends of time, against x_0 and eps themselves."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samplers import VE, VIEWS, Cosine, DiscreteVP, Field, RectifiedFlow, VPLinear, convert, edm_view
from samplers.views import Row

SCHEDULES = [RectifiedFlow(), Cosine(), VPLinear(), VE(), DiscreteVP.scaled_linear()]
PURE = [RectifiedFlow(), Cosine()]
PAIRS = list(itertools.product(VIEWS, VIEWS))
X_0 = torch.tensor([[0.7, -1.2, 0.1]], dtype=torch.float64)
EPS = torch.tensor([[-0.4, 0.3, 2.0]], dtype=torch.float64)


def truth(kind, x_0, eps, c):
    if kind == "edm":  # the table of Karras et al. (2022), with sigma / alpha as their sigma; its limit where alpha = 0
        if c.alpha == 0:
            return x_0 / 0.5
        sigma = c.sigma / c.alpha
        c_in = 1 / (sigma**2 + 0.25).sqrt()
        return (x_0 * sigma / 0.5 - 0.5 * eps) * c_in  # (x_0 - c_skip x) / c_out, its sigma cancelled
    return {
        "data": x_0,
        "noise": eps,
        "velocity": c.d_alpha * x_0 + c.d_sigma * eps,
        "ddpm_v": c.alpha * eps - c.sigma * x_0,
        "score": -eps / c.sigma,
    }[kind]


def converted(schedule, t, source, target, x_0=X_0, eps=EPS):
    c = schedule(t)
    return convert(truth(source, x_0, eps, c), source, target, c.alpha * x_0 + c.sigma * eps, c)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=st.floats(0.01, 0.99))
@example(t=1e-5)
@example(t=1 - 1e-5)
@settings(max_examples=6, deadline=None)
def test_every_pair_inside(schedule, t):
    for source, target in PAIRS:
        expected = truth(target, X_0, EPS, schedule(t))
        torch.testing.assert_close(converted(schedule, t, source, target), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=st.floats(0.01, 0.99))
@settings(max_examples=6, deadline=None)
def test_round_trips_inside(schedule, t):
    c, value = schedule(t), torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    x_t = torch.tensor([[1.0, 0.5]], dtype=torch.float64)  # any value, not only a view of some x_0 and eps
    for source, target in PAIRS:
        there = convert(value, source, target, x_t, c)
        torch.testing.assert_close(convert(there, target, source, x_t, c), value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", PURE)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_at_the_data_end(schedule, source, target):
    """At t = 0 data and score predictions leave eps at 0, its posterior mean; the score is 0 unless predicted."""
    c = schedule(0.0)
    if source == "score":
        value = torch.tensor([[5.0, -1.0, 2.0]], dtype=torch.float64)
        got = convert(value, source, target, X_0, c)
        expected = value if target == "score" else truth(target, X_0, torch.zeros_like(EPS), c)
    else:
        got = converted(schedule, 0.0, source, target)
        eps = torch.zeros_like(EPS) if source == "data" else EPS
        expected = torch.zeros_like(EPS) if target == "score" else truth(target, X_0, eps, c)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("schedule", PURE)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_at_the_noise_end(schedule, source, target):
    """At t = 1 noise and score predictions leave x_0 at 0; all others determine both."""
    x_0 = torch.zeros_like(X_0) if source in ("noise", "score") else X_0
    torch.testing.assert_close(converted(schedule, 1.0, source, target), truth(target, x_0, EPS, schedule(1.0)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_end_gives_nan_in_any_precision(schedule):
    for dtype, t, (source, target) in itertools.product((torch.float32, torch.float64), (0.0, 1.0), PAIRS):
        x_t = torch.randn(2, 3, dtype=dtype)
        times = torch.tensor([t, 0.5], dtype=dtype)
        assert convert(torch.randn(2, 3, dtype=dtype), source, target, x_t, schedule(times)).isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_one_time_per_sample_is_each_sample_alone(schedule, source, target):
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    x_t, value = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    together = convert(value, source, target, x_t, schedule(times))
    for i, t in enumerate(times.tolist()):
        alone = convert(value[i : i + 1], source, target, x_t[i : i + 1], schedule(t))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_an_unknown_view_is_refused_with_the_near_one():
    with pytest.raises(ValueError, match="did you mean 'velocity'"):
        convert(X_0, "velocty", "data", X_0, RectifiedFlow()(0.5))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_view_of_ones_own_is_of_any_size(t):
    """Where it says what x_t says already, its own part is kept."""
    c = RectifiedFlow()(t)
    for row, target, truth in ((Row(2.0, 0.0), "data", X_0), (Row(0.0, -3.0), "noise", EPS)):
        value = row.p * X_0 + row.q * EPS
        got = convert(value, lambda c, row=row: row, target, c.alpha * X_0 + c.sigma * EPS, c)
        torch.testing.assert_close(got, truth)


def test_edm_preconditioning_is_the_published_one():
    sigma, x, network = torch.tensor(3.0, dtype=torch.float64), X_0, EPS
    flow, s_d = RectifiedFlow(), 0.8
    c_skip, c_out = s_d**2 / (sigma**2 + s_d**2), sigma * s_d / (sigma**2 + s_d**2).sqrt()
    c = flow(sigma / (1 + sigma))
    got = convert(network, edm_view(s_d), "data", c.alpha * x, c)
    torch.testing.assert_close(got, c_skip * x + c_out * network)
    assert edm_view(0.8) is edm_view(0.8) and edm_view() is not edm_view(0.8)
    with pytest.raises(ValueError, match="sigma_data = 0"):
        edm_view(0)


def test_a_function_that_is_no_view_is_refused_with_the_field():
    for view, match in ((edm_view, r"give edm_view\(\) or edm_view\(sigma_data\)"), (lambda c: (1.0, 0.0), "gave")):
        with pytest.raises(ValueError, match=match):
            Field(lambda x_t, t: x_t, RectifiedFlow(), view)
        with pytest.raises(ValueError, match=match):
            convert(X_0, "data", view, X_0, RectifiedFlow()(0.5))
