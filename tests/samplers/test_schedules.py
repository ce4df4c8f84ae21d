"""Schedules: ends, derivatives against autograd, log-SNR and its inverse, the published formulas, refusals."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samplers import EDM, VE, Cosine, DiscreteVP, RectifiedFlow, Trig, VPLinear, lookup

DISCRETE = [DiscreteVP.linear(), DiscreteVP.scaled_linear(), DiscreteVP.cosine(50)]
ZERO_SNR = DiscreteVP.scaled_linear(100).zero_terminal_snr()
SCHEDULES = [
    *(RectifiedFlow(), Cosine(), Cosine(0.008), Trig(0.5), VPLinear(), VE(), EDM()),
    *DISCRETE,
    ZERO_SNR,
]
inside = st.floats(0.02, 0.98)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine(), Cosine(0.008), Trig(), ZERO_SNR])
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
@example(t=0.004)  # between the data and the first index of betas
@example(t=0.996)  # and between the last two, of which the very last has zero SNR
@settings(max_examples=8, deadline=None)
def test_derivatives_are_those_of_the_path(schedule, t):
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    for value, derivative in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        path = getattr(schedule, value)(time)
        (exact,) = torch.autograd.grad(path, time) if path.requires_grad else (torch.zeros_like(time),)
        torch.testing.assert_close(getattr(schedule, derivative)(t), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=inside)
@example(t=0.999)
@settings(max_examples=8, deadline=None)
def test_log_snr_round_trip(schedule, t):
    log_snr = schedule.log_snr(t)
    torch.testing.assert_close(log_snr, 2 * torch.log(schedule.alpha(t) / schedule.sigma(t)))
    assert schedule.t_from_log_snr(log_snr).item() == pytest.approx(t, rel=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_falls_and_coefficients_are_finite(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (schedule.log_snr(t).diff() < 0).all()
    assert all(c.isfinite().all() for c in schedule(t))


@pytest.mark.parametrize("schedule", [*SCHEDULES, DiscreteVP.linear(50)])
def test_log_snr_in_whole_numbers(schedule):
    got = schedule.t_from_log_snr(torch.tensor([3, 0, -2]))
    torch.testing.assert_close(got, schedule.t_from_log_snr(torch.tensor([3, 0, -2], dtype=torch.float64)))


@pytest.mark.parametrize("schedule", [*SCHEDULES, VPLinear(20.0, 0.1)])
def test_far_log_snr_is_met_at_the_ends(schedule):
    for log_snr in (math.inf, 1e6, -1e6, -math.inf):
        assert schedule.t_from_log_snr(log_snr).item() == pytest.approx(float(log_snr < 0), abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pole_is_named(schedule):
    """sigma grows as the root of t where a pole is named, in proportion to t (or not at all) where none is."""
    near, nearer = (schedule.sigma(t).item() - schedule.sigma(0.0).item() for t in (1e-5, 1e-7))
    assert (near / nearer < 50) == (0.0 in schedule.poles)


def test_published_formulas():
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    vp, grown = VPLinear(0.1, 20.0), 0.1 * t + (20 - 0.1) * t**2 / 2
    torch.testing.assert_close(vp.alpha(t) ** 2, torch.exp(-grown))
    torch.testing.assert_close(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t))
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0.0, 0.3)]
    assert Cosine(0.008).alpha(0.3).item() ** 2 == pytest.approx(f[1] / f[0])
    torch.testing.assert_close(VE(0.01, 50.0).sigma(t), 0.01 * 5000**t)
    torch.testing.assert_close(EDM(80.0).sigma(t), 80 * t)
    torch.testing.assert_close(Trig(0.5).sigma(t), 0.5 * Cosine().sigma(t))
    torch.testing.assert_close(Trig(0.5).alpha(t), Cosine().alpha(t))


@pytest.mark.parametrize("schedule", [*DISCRETE, ZERO_SNR])
def test_discrete_betas_are_met_at_their_indices(schedule):
    n, betas = len(schedule), torch.tensor(schedule.betas, dtype=torch.float64)
    index = torch.arange(n, dtype=torch.float64)
    t = schedule.time(index)
    torch.testing.assert_close(schedule.alpha(t) ** 2, torch.cumprod(1 - betas, 0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.index(t), index, rtol=1e-9, atol=1e-9)
    assert schedule.time(0).item() == 1 / n and schedule.time(n - 1).item() == 1
    assert schedule.index(0.0).item() == 0 and schedule.index(0.5 / n).item() == 0
    half = (
        schedule.log_snr(schedule.time(7.5)),
        (schedule.log_snr(schedule.time(7)) + schedule.log_snr(schedule.time(8))) / 2,
    )
    torch.testing.assert_close(*half)


@pytest.mark.parametrize("schedule", [*DISCRETE, ZERO_SNR])
def test_times_between_the_data_and_the_first_index_and_around_the_last(schedule):
    n = len(schedule)
    t = torch.tensor([0.01, 0.5, 0.99, 1.0, n - 0.99, n - 0.5, n - 0.01], dtype=torch.float64) / n
    torch.testing.assert_close(schedule.t_from_log_snr(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    narrow = schedule.t_from_log_snr(schedule.log_snr(t).float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), t, rtol=1e-5, atol=1e-6)
    ratio = schedule.sigma(t[:4]) / schedule.alpha(t[:4])  # sigma / alpha is linear from the data on
    torch.testing.assert_close(ratio, ratio[3] * t[:4] * n)


@pytest.mark.parametrize("schedule", [*DISCRETE, ZERO_SNR])
def test_a_derivative_at_an_index_is_that_of_the_way_before_or_after_it(schedule):
    index = torch.arange(1, len(schedule) - 1, dtype=torch.float64)
    before, at, after = (schedule(schedule.time(index + offset)) for offset in (-1e-7, 0, 1e-7))
    for name in ("d_alpha", "d_sigma"):
        left, here, right = (getattr(c, name) for c in (before, at, after))
        nearer = torch.where((here - left).abs() < (here - right).abs(), left, right)
        torch.testing.assert_close(here, nearer, rtol=1e-4, atol=1e-6)


def test_discrete_families():
    linear, scaled, cosine = DISCRETE
    assert linear.betas[0] == pytest.approx(1e-4) and linear.betas[500] == pytest.approx(1e-4 + 0.0199 * 500 / 999)
    assert scaled.betas[500] ** 0.5 == pytest.approx(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * 500 / 999)
    assert max(cosine.betas) == 0.999
    f = [math.cos((k / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (10, 11)]
    assert cosine.betas[10] == pytest.approx(1 - f[1] / f[0])
    assert linear == DiscreteVP.linear() and hash(linear) == hash(DiscreteVP.linear()) and linear != scaled
    assert DiscreteVP.linear(10, 0.1, 0.2).betas[-1] == pytest.approx(0.2)
    assert DiscreteVP.cosine(50, max_beta=0.5).betas[-1] == 0.5
    assert DiscreteVP.cosine(50, offset=0.1).betas[0] > cosine.betas[0]


def test_zero_terminal_snr_keeps_the_first_index_and_ends_in_noise():
    before, after = DiscreteVP.scaled_linear(100), ZERO_SNR
    assert after.alpha(1.0).item() == 0 and after.sigma(1.0).item() == 1 and before.alpha(1.0).item() > 0.1
    torch.testing.assert_close(after.alpha(0.01), before.alpha(0.01))


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPLinear(beta_min=0.0), "beta_min = 0"),
        (lambda: VPLinear(beta_max=-1.0), "beta_max = -1"),
        (lambda: VE(1.0, 0.5), "sigma_min = 1.0 is not below"),
        (lambda: VE(1.0, 1.0), "sigma_min = 1.0 is not below"),
        (lambda: EDM(-1.0), "sigma_max = -1"),
        (lambda: EDM(math.inf), "sigma_max = inf"),
        (lambda: Trig(0.0), "sigma_data = 0"),
        (lambda: Cosine(-0.1), "offset = -0.1"),
        (lambda: Cosine(1.0), "offset = 1"),
        (lambda: DiscreteVP([0.1, 1.0, 0.1]), "betas must lie"),
        (lambda: DiscreteVP([0.1, 0.1, -0.1]), "betas must lie"),
        (lambda: DiscreteVP(DiscreteVP.linear().alpha_bar), "look like alphas or alphas_cumprod: give betas"),
        (lambda: DiscreteVP(1 - torch.tensor(DiscreteVP.linear().betas)), "look like alphas or alphas_cumprod"),
        (lambda: DiscreteVP([0.1]), "at least two"),
        (lambda: DISCRETE[0].time(1000), "indices run from 0 to 999"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
