"""Schedules: ends, derivatives against autograd, log-SNR and its inverse, and the refusal of a wrong time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import Cosine, RectifiedFlow, lookup
from tests.oracles import VarianceExploding, VariancePreserving

SCHEDULES = [RectifiedFlow(), Cosine(), VariancePreserving(), VarianceExploding()]
inside = st.floats(0.02, 0.98)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_pure_data_and_pure_noise(schedule, dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert schedule.alpha(ends).tolist() == [1, 0]
    assert schedule.sigma(ends).tolist() == [0, 1]
    assert schedule.log_snr(ends).tolist() == [math.inf, -math.inf]
    assert schedule.t_from_log_snr(schedule.log_snr(ends)).tolist() == [0, 1]


def test_rectified_flow_is_the_straight_line():
    x_0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    s, column = RectifiedFlow(), t[:, None, None, None]
    torch.testing.assert_close(s.mix(x_0, eps, t), (1 - column) * x_0 + column * eps)
    torch.testing.assert_close(s.velocity(x_0, eps, t), eps - x_0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=inside)
@settings(max_examples=20, deadline=None)
def test_derivatives_are_those_of_the_path(schedule, t):
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    for value, derivative in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        path = getattr(schedule, value)(time)
        (exact,) = torch.autograd.grad(path, time) if path.requires_grad else (torch.zeros_like(time),)
        torch.testing.assert_close(getattr(schedule, derivative)(t), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=inside)
@settings(max_examples=20, deadline=None)
def test_log_snr_round_trip(schedule, t):
    log_snr = schedule.log_snr(t)
    torch.testing.assert_close(log_snr, 2 * torch.log(schedule.alpha(t) / schedule.sigma(t)))
    assert schedule.t_from_log_snr(log_snr).item() == pytest.approx(t, rel=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_falls_and_coefficients_are_finite(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (schedule.log_snr(t).diff() < 0).all()
    assert all(c.isfinite().all() for c in schedule(t))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scalar_and_batched_time_agree(schedule):
    x_0, eps = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    batched = schedule.mix(x_0, eps, torch.full((4,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(schedule.mix(x_0, eps, 0.3), batched)
    torch.testing.assert_close(schedule.mix(x_0, eps, torch.tensor(0.3, dtype=torch.float64)), batched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("t", [0.3, torch.tensor([0.3, 0.4])])
def test_time_leaves_the_dtype_of_the_state(dtype, t):
    x_0 = torch.randn(2, 3).to(dtype)
    assert RectifiedFlow().mix(x_0, x_0, t).dtype == dtype


@pytest.mark.parametrize(
    "t", [-0.1, 1.5, math.nan, torch.tensor([[0.5]]), torch.tensor([1, 0]), "0.5", torch.tensor([0.1, 0.2, 0.3])]
)
def test_a_wrong_time_is_refused(t):
    with pytest.raises(ValueError, match="t = |t is |t holds "):
        RectifiedFlow().mix(torch.zeros(2, 3), torch.zeros(2, 3), t)


def test_lookup_suggests_the_near_name():
    table = {"heun": 1, "euler": 2}
    assert lookup("solver", "heun", table) == 1
    with pytest.raises(ValueError, match="unknown solver 'huen': did you mean 'heun'"):
        lookup("solver", "huen", table)
    with pytest.raises(ValueError, match="known: euler, heun"):
        lookup("solver", "zzz", table)
