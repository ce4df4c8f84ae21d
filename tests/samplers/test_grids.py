"""Grids: the uniform one, the resolution shift, own times, and the refusal of what is no grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as scipy_beta

from samplers import (
    EDM,
    GRIDS,
    VE,
    Cosine,
    DiscreteVP,
    RectifiedFlow,
    VPLinear,
    dynamic_shift,
    grids,
    resolution_shift,
    shift_time,
    time_grid,
    twice_shifted,
    uniform,
)

inside = st.floats(0.01, 0.99)
shifts = st.floats(0.1, 10)


def test_uniform():
    torch.testing.assert_close(uniform(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


INDEXED = ("leading", "trailing", "linspace")
SCHEDULES = [RectifiedFlow(), Cosine(), VPLinear(), VE(), EDM(), DiscreteVP.scaled_linear()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in GRIDS if name not in INDEXED])
@given(num_steps=st.integers(1, 60), shift=shifts)
@settings(max_examples=6, deadline=None)
def test_every_named_grid_falls_from_1_to_0(name, schedule, num_steps, shift):
    ts = time_grid(name, num_steps, shift, schedule)
    assert len(ts) == num_steps + 1 and ts[0] == 1 and ts[-1] == 0
    assert (ts.diff() < 0).all() and ts.dtype == torch.float64


@given(t=inside, shift=shifts)
@settings(max_examples=8, deadline=None)
def test_shift_lowers_the_log_snr_by_twice_its_log(t, shift):
    flow = RectifiedFlow()
    moved = flow.log_snr(shift_time(t, shift)) - flow.log_snr(t)
    assert moved.item() == pytest.approx(-2 * math.log(shift), abs=1e-6)


@given(t=inside, shift=shifts)
@settings(max_examples=8, deadline=None)
def test_shift_is_undone_by_its_reciprocal(t, shift):
    assert shift_time(shift_time(t, shift), 1 / shift) == pytest.approx(t)


def test_shift_of_sd3():
    assert resolution_shift(4096, 256) == 4
    assert shift_time(0.5, 3.0) == 0.75
    torch.testing.assert_close(time_grid("uniform", 2, 3.0), torch.tensor([1, 0.75, 0], dtype=torch.float64))


def test_own_times():
    own = torch.tensor([0.9, 0.3, 0.1])
    assert torch.equal(time_grid(own, 20), own.double()) and time_grid(own, 20).dtype == torch.float64
    assert not time_grid(own.clone().requires_grad_(), 20).requires_grad
    assert time_grid([1.0, 0.25, 0.0], 20).tolist() == [1, 0.25, 0]
    assert time_grid([1.0, 0.5, 0.0], 20, shift=3.0).tolist() == [1, 0.75, 0]
    assert torch.equal(time_grid("karras", np.int64(5)), time_grid("karras", 5))


@pytest.mark.parametrize(
    ("grid", "num_steps", "message"),
    [
        ("uniform", 0, "num_steps = 0"),
        ("uniform", -3, "num_steps = -3"),
        ("uniform", 2.5, "num_steps = 2.5"),
        ("uniform", 10**19, "num_steps = 1(0){19}: give an integer of at least 1, below"),
        ("unifrom", 5, "did you mean 'uniform'"),
        (torch.tensor([0.0, 0.5, 1.0]), 5, "decrease"),
        (torch.tensor([1.0, 0.5, 0.5]), 5, "step 2 of the grid is from 0.5 to 0.5: its times must decrease"),
        (torch.tensor([1.0, math.nan]), 5, "decrease"),
        (torch.tensor([1.2, 0.5]), 5, "lie in"),
        (torch.tensor([1.0, 0.5, -0.5]), 5, "lie in"),
        (torch.tensor([1, 0]), 5, "floating"),
        (torch.tensor([1.0]), 5, "at least two"),
        (torch.ones(2, 2), 5, "at least two"),
        (None, 5, "grid is None: give a name"),
        (["uniform"], 5, r"grid is \['uniform'\]: give a name"),
        ("uniform", True, "num_steps = True"),
    ],
)
def test_what_is_no_grid_is_refused(grid, num_steps, message):
    with pytest.raises(ValueError, match=message):
        time_grid(grid, num_steps)


def test_a_shift_must_be_positive():
    with pytest.raises(ValueError, match="shift = 0"):
        shift_time(0.5, 0)
    for tokens in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="tokens {} and {}".format(*tokens)):
            resolution_shift(*tokens)


def ratio(schedule, ts):
    return torch.exp(-schedule.log_snr(ts) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_in_sigma_are_what_they_say(schedule):
    n = 8
    low, high = max(0.002, ratio(schedule, 0.0).item()), min(80.0, ratio(schedule, 1.0).item())
    inner = slice(1, n)  # the first time is put to 1
    last = n if low > 0.002 else n - 1
    ramp = torch.arange(n, dtype=torch.float64) / last
    expected = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    torch.testing.assert_close(ratio(schedule, grids.karras(n, schedule)[inner]), expected[inner], rtol=1e-6, atol=0)
    low = max(0.02, ratio(schedule, 0.0).item())
    expected = high * (low / high) ** (torch.arange(n, dtype=torch.float64) / (n if low > 0.02 else n - 1))
    torch.testing.assert_close(
        ratio(schedule, grids.exponential(n, schedule)[inner]), expected[inner], rtol=1e-6, atol=0
    )
    if schedule.log_snr(0.0).isinf():  # else the last step may be the margin
        assert grids.log_snr_uniform(n, schedule)[-2].item() == pytest.approx(1e-3)
    steps = schedule.log_snr(grids.log_snr_uniform(n, schedule)[inner]).diff()
    torch.testing.assert_close(steps, steps[:1].expand(n - 2), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_way_between_two_times_is_uniform_in_the_root_of_sigma(schedule):
    ts = torch.tensor(grids.karras_between(0.8, 0.2, 5, schedule), dtype=torch.float64)
    assert len(ts) == 6 and ts[0] == 0.8 and ts[-1] == 0.2
    assert torch.tensor(grids.karras_between(1.0, 0.0, 5, schedule)).diff().lt(0).all()  # where they may be infinite
    steps = (ratio(schedule, ts) ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(5), rtol=1e-6, atol=0)


def test_options_of_grids_in_sigma():
    flow = RectifiedFlow()
    for grid in (grids.karras, grids.exponential):
        base = grid(8, flow)
        assert grid(8, flow, sigma_min=0.1)[-2] > base[-2] and grid(8, flow, sigma_max=10.0)[1] < base[1]
    assert grids.karras(8, flow, rho=3.0)[4] > grids.karras(8, flow)[4]
    assert all(grids.karras(8, VE(low, 20.0))[-1] == 0 for low in (0.01, 0.03, 0.05, 0.3))
    assert grids.log_snr_uniform(8, flow, margin=0.1)[-2].item() == pytest.approx(0.1)
    expected = torch.lerp(flow.log_snr(0.9), flow.log_snr(0.1), 1 / 7)
    assert flow.log_snr(grids.log_snr_uniform(8, flow, margin=0.1)[1]).item() == pytest.approx(expected.item())


def test_cosine_is_the_uniform_grid_of_the_cosine_schedule():
    torch.testing.assert_close(grids.cosine(10, Cosine()), uniform(10))
    flow = RectifiedFlow()
    torch.testing.assert_close(flow.log_snr(grids.cosine(10, flow))[1:-1], Cosine().log_snr(uniform(10))[1:-1])


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (2.0, 3.0), (0.3, 1.5)])
def test_beta_is_the_quantile_function(a, b):
    torch.testing.assert_close(grids.beta(9, a, b), torch.tensor(scipy_beta.ppf(uniform(9), a, b)), rtol=1e-7, atol=0)
    assert torch.equal(time_grid("beta", 9), grids.beta(9, 0.6, 0.6))  # as published


def test_spacings_of_ddpm_indices():
    s = DiscreteVP.linear()
    indices = {name: s.index(time_grid(name, 4, schedule=s))[:-1].round().tolist() for name in INDEXED}
    assert indices == {"leading": [750, 500, 250, 0], "trailing": [999, 749, 499, 249], "linspace": [999, 666, 333, 0]}
    assert s.index(grids.ddpm(4, s, offset=1)).round().tolist() == [751, 501, 251, 1, 0]
    assert grids.ddpm(4, s)[-1] == 0 and grids.ddpm(4, s, offset=1, to_data=False)[-1].item() == 1 / 1000
    assert len(grids.ddpm(4, s, to_data=False)) == 4  # index 0 to index 0 is no step
    assert torch.equal(grids.ddpm(4, s, "trailing", offset=999), grids.ddpm(4, s, "trailing"))
    indices = {spacing: s.index(grids.ddpm(7, s, spacing)[3:5]).round().tolist() for spacing in INDEXED}
    assert indices["leading"] == [426, 284]  # 1000 // 7 = 142
    assert indices["trailing"] == [570, 428] and indices["linspace"] == [500, 333]  # 571.4 and 428.6; 499.5 and 333


def test_dynamic_shift():
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5)) and dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    assert dynamic_shift(2176) == pytest.approx(math.exp(0.825))
    assert dynamic_shift(100, 100, 200, 0.1, 0.3) == pytest.approx(math.exp(0.1))


def test_the_grid_that_is_shifted_twice():
    assert twice_shifted(28, 3.0)[-2].item() == pytest.approx(0.00893, abs=1e-5)
    once = shift_time(torch.linspace(1, 1e-3, 28, dtype=torch.float64), 3.0)
    assert once[-1].item() == pytest.approx(0.00299, abs=1e-5)
    torch.testing.assert_close(twice_shifted(28, 1.0)[:-1], torch.linspace(1, 1e-3, 28, dtype=torch.float64))
    assert twice_shifted(28, 3.0, num_train=100)[-2] > twice_shifted(28, 3.0)[-2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: time_grid("leading", 5), "counts the indices of a DiscreteVP"),
        (lambda: time_grid("leading", 1001, schedule=DiscreteVP.linear()), "the schedule has 1000 indices"),
        (lambda: grids.ddpm(5, DiscreteVP.linear(), "traling"), "did you mean 'trailing'"),
        (
            lambda: grids.ddpm(1000, DiscreteVP.linear(), offset=1),
            "offset = 1: 1000 leading indices would begin at 1000",
        ),
        (lambda: grids.ddpm(5, DiscreteVP.linear(), offset=-1), "offset = -1"),
        (lambda: grids.karras(5, RectifiedFlow(), sigma_min=2.0, sigma_max=1.0), "sigma_min = 2"),
        (lambda: grids.karras(5, RectifiedFlow(), sigma_min=1.0, sigma_max=1.0), "sigma_min = 1"),
        (lambda: grids.karras(5, RectifiedFlow(), rho=0), "rho = 0"),
        (lambda: grids.karras(0, RectifiedFlow()), "num_steps = 0"),
        (lambda: grids.karras(5, VE(1.0, 2.0), sigma_max=0.5), "runs from 1 to 2"),
        (lambda: grids.log_snr_uniform(5, RectifiedFlow(), margin=0.6), "margin = 0.6"),
        (lambda: grids.beta(5, -1.0), "a = -1"),
        (lambda: grids.log_snr_uniform(5, RectifiedFlow(), margin=0.5), "margin = 0.5"),
        (lambda: grids.log_snr_uniform(5, RectifiedFlow(), margin=0.0), "margin = 0.0"),
        (lambda: grids.beta(5, 1.0, 0.0), "b = 0"),
        (lambda: uniform(-3), "num_steps = -3"),
        (lambda: uniform(2.5), "num_steps = 2.5"),
        (lambda: grids.cosine(0, RectifiedFlow()), "num_steps = 0"),
        (lambda: grids.beta(0), "num_steps = 0"),
        (lambda: grids.ddpm(0, DiscreteVP.linear()), "num_steps = 0"),
        (lambda: twice_shifted(0, 3.0), "num_steps = 0"),
        (lambda: twice_shifted(8, 3.0, num_train=0), "num_train = 0"),
        (lambda: dynamic_shift(0), "tokens 0"),
        (lambda: dynamic_shift(9, 256, 256), "tokens 9 of 256 ... 256"),
        (lambda: dynamic_shift(9, 0, 256), "tokens 9 of 0"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
