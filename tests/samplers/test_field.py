"""Fields: exact views of known data, whatever is predicted; one evaluation for all views; change of schedule."""

import math

import pytest
import torch

from samplers import (
    EDM,
    VE,
    VIEWS,
    Cosine,
    DiscreteVP,
    Field,
    RectifiedFlow,
    Trig,
    VPLinear,
    edm_network,
    edm_view,
    sample,
)
from tests.oracles import GAUSSIAN, MIXTURE
from tests.samplers.common import normal

SCHEDULES = [RectifiedFlow(), Trig(0.5), VPLinear(), VE(), EDM(15.0), DiscreteVP.scaled_linear()]
X = normal(6, 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", VIEWS)
def test_views_of_a_mixture_are_exact(schedule, prediction):
    field = MIXTURE.field(schedule, prediction)
    for t in (0.1, 0.5, 0.9, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)):
        x_0, eps = MIXTURE.posterior(X, t, schedule)
        torch.testing.assert_close(field.x_0(X, t), x_0, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(field.eps(X, t), eps, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(field.v(X, t), MIXTURE.view("velocity", X, t, schedule), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(field.score(X, t), MIXTURE.view("score", X, t, schedule), rtol=1e-6, atol=1e-6)
        expected = MIXTURE.view("ddpm_v", X, t, schedule)
        torch.testing.assert_close(field.predict(X, t).ddpm_v, expected, rtol=1e-6, atol=1e-6)


def test_the_score_is_the_gradient_of_the_log_density():
    schedule, t, x = RectifiedFlow(), 0.4, X.clone().requires_grad_()
    std = GAUSSIAN.std_at(t, schedule)
    log_p = -((x - schedule.alpha(t) * GAUSSIAN.means) ** 2).sum() / (2 * std**2)
    (score,) = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(GAUSSIAN.field(schedule).score(X, t), score)


def test_one_evaluation_answers_every_view():
    calls = []

    def network(x_t, t):
        calls.append(t)
        return x_t

    prediction = Field(network, RectifiedFlow(), "noise").predict(X.float(), 0.3)
    _ = prediction.x_0, prediction.eps, prediction.v, prediction.score, prediction.ddpm_v
    assert prediction.eps is prediction.value and prediction.x_0 is prediction.x_0
    assert len(calls) == 1 and prediction.num_evals == 1


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.full((6,), 0.3)])
@pytest.mark.parametrize(("dtype", "seen"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_a_network_sees_one_time_per_sample_in_full_precision(t, dtype, seen):
    def network(x_t, t):
        assert t.shape == (6,) and t.dtype == seen
        torch.testing.assert_close(t, torch.full((6,), 0.3, dtype=seen))
        return x_t

    Field(network, RectifiedFlow()).v(X.to(dtype), t)


@pytest.mark.parametrize("theirs", SCHEDULES)
@pytest.mark.parametrize("ours", SCHEDULES)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_on_another_schedule_is_the_exact_field_there(theirs, ours, prediction):
    seen = MIXTURE.field(theirs, prediction).on(ours)
    for t in (0.3, 0.45, 0.6, torch.linspace(0.3, 0.6, 6, dtype=torch.float64)):  # within the log-SNR range of each
        torch.testing.assert_close(seen.x_0(X, t), MIXTURE.view("data", X, t, ours), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(seen.v(X, t), MIXTURE.view("velocity", X, t, ours), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["velocity", "data", "ddpm_v"])
def test_on_another_schedule_at_both_ends(prediction):
    seen = MIXTURE.field(RectifiedFlow(), prediction).on(Cosine())
    torch.testing.assert_close(seen.x_0(X, 0.0), X)
    torch.testing.assert_close(seen.x_0(X, 1.0), MIXTURE.view("data", X, 1.0, Cosine()))
    torch.testing.assert_close(seen.v(X, 1.0), MIXTURE.view("velocity", X, 1.0, Cosine()))


def test_beyond_its_range_a_field_is_asked_at_the_nearer_end():
    asked = []

    def network(x_t, t):
        asked.append(t[0].item())
        return torch.zeros_like(x_t)

    field = Field(network, VPLinear(), "noise").on(RectifiedFlow())
    assert field.v(X, 0.0).isfinite().all() and field.v(X, 1.0).isfinite().all()
    assert asked == [0.0, 1.0]


def test_on_its_own_schedule_is_itself_and_back_again_is_the_same():
    field = MIXTURE.field(RectifiedFlow())
    assert field.on(RectifiedFlow()) is field
    back = field.on(Cosine()).on(RectifiedFlow())
    torch.testing.assert_close(back.v(X, 0.37), field.v(X, 0.37))


def test_change_of_schedule_does_not_change_the_solution():
    flow, other = RectifiedFlow(), Cosine()
    exact = GAUSSIAN.solve(X, 1.0, 0.0, flow)
    torch.testing.assert_close(
        sample(GAUSSIAN.field(flow).on(other), X, "rk4", 100).x, exact, rtol=1e-7, atol=1e-7
    )  # both start from eps


def test_there_is_no_score_without_noise():
    field = MIXTURE.field(RectifiedFlow())
    for seen in (field, field.on(Trig())):
        with pytest.raises(ValueError, match="there is no score at t = 0, where sigma = 0"):
            seen.score(X, 0.0)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    assert not field.score(X, t)[0].any() and field.score(X, t)[1:].all()
    assert MIXTURE.field(VE()).score(X, 0.0).all()  # where noise is left, there is one


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="unknown prediction 'nois': did you mean 'noise'"):
        Field(lambda x, t: x, RectifiedFlow(), "nois")
    with pytest.raises(ValueError, match="give a samplers.Schedule"):
        Field(lambda x, t: x, "rectified-flow", "noise")
    with pytest.raises(ValueError, match="give a samplers.Schedule"):
        Field(lambda x, t: x, RectifiedFlow()).on("cosine")
    with pytest.raises(ValueError, match=r"the network gave \(6, 1\) for x_t \(6, 2\)"):
        Field(lambda x, t: x[:, :1], RectifiedFlow()).v(X, 0.5)
    with pytest.raises(ValueError, match="t holds 3 times for a batch of 6"):
        Field(lambda x, t: x, RectifiedFlow()).v(X, torch.rand(3))
    with pytest.raises(ValueError, match="sigma_data = 0"):
        edm_network(lambda x, t: x, RectifiedFlow(), sigma_data=0.0)
    for t in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="time is a number in"):
            Field(lambda x, t: x, RectifiedFlow()).predict(X, t)


@pytest.mark.parametrize("ours", [RectifiedFlow(), EDM(15.0), VE(0.05, 14.0), Trig()])
def test_a_ddpm_network_of_integer_indices_is_sampled_as_a_flow(ours):
    """Discrete betas, noise prediction, an index as the network's time: the same solution on every schedule."""
    betas = DiscreteVP.scaled_linear()

    def network(x_t, t):
        assert ((betas.index(t) >= 0) & (betas.index(t) <= 999)).all()
        return MIXTURE.view("noise", x_t, t, betas)

    field, grid = Field(network, betas, "noise"), torch.linspace(0.9, 0.1, 61, dtype=torch.float64)
    there = ours.t_from_log_snr(betas.log_snr(grid))
    x = betas.sigma(0.9) * X
    expected = sample(field, x, "rk4", grid=grid).x / betas.alpha(0.1)
    x_there = x * ours.alpha(there[0]) / betas.alpha(0.9)
    got = sample(field.on(ours), x_there, "rk4", grid=there).x / ours.alpha(there[-1])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 1.0), (torch.zeros(6).double(), torch.ones(6).double())], ids=["one", "each"]
)
def test_beyond_its_range_x_0_is_kept_in_noise_and_eps_in_data(start, end):
    vp = DiscreteVP.scaled_linear()  # alpha(1) = 0.068: it never saw pure noise
    field = MIXTURE.field(vp, "velocity")
    torch.testing.assert_close(field.on(RectifiedFlow()).x_0(X, end), field.x_0(X, 1.0))
    torch.testing.assert_close(field.on(RectifiedFlow()).v(X, end), X - field.x_0(X, 1.0))
    explode = MIXTURE.field(VE(0.01, 50.0), "noise")  # at its t = 0 it has noise still
    torch.testing.assert_close(explode.on(RectifiedFlow()).eps(X, start), explode.eps(X, 0.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("prediction", "blind_at"),
    [("velocity", []), ("ddpm_v", []), ("edm", []), ("data", [0.0]), ("score", [0.0, 1.0]), ("noise", [1.0])],
)
@pytest.mark.parametrize("on", [RectifiedFlow(), Trig()])
def test_where_the_velocity_is_determined(prediction, blind_at, on):
    field = MIXTURE.field(RectifiedFlow(), prediction).on(on)
    for t in (0.0, 0.5, 1.0):
        assert field.determines_velocity(t) == (t not in blind_at)


def test_another_schedule_that_keeps_off_its_ends_determines_what_they_do_not():
    field = MIXTURE.field(RectifiedFlow(), "noise")
    assert not field.determined(1.0) and field.on(VPLinear()).determined(1.0) and field.on(VE()).determined(1.0)


def test_a_pole_of_the_schedule_hides_the_velocity():
    field = MIXTURE.field(VPLinear(), "velocity")
    assert not field.determines_velocity(0.0) and field.determines_velocity(0.5)
    assert field.determined(0.0) and field.on(RectifiedFlow()).determines_velocity(0.0)


def test_times_of_a_batch_are_determined_where_each_is():
    data, pole = MIXTURE.field(RectifiedFlow(), "data"), MIXTURE.field(VPLinear(), "velocity")
    for field in (data, pole, data.on(Trig())):
        assert field.determines_velocity(torch.tensor([0.5, 1.0], dtype=torch.float64))
        assert not field.determines_velocity(torch.tensor([0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("s_d", "how", "prediction"), [(0.8, (0.8,), edm_view(0.8)), (0.5, (), "edm")])
def test_a_raw_edm_network_is_adapted(s_d, how, prediction):
    schedule, seen = RectifiedFlow(), []

    def raw(x, c_noise):
        seen.append((x, c_noise))
        return 0.3 * x

    field = Field(edm_network(raw, schedule, *how), schedule, prediction)
    t = 0.6
    sigma, x = t / (1 - t), X / (1 - t)
    scaled = x / (sigma**2 + s_d**2) ** 0.5
    data = s_d**2 / (sigma**2 + s_d**2) * x + sigma * s_d / (sigma**2 + s_d**2) ** 0.5 * 0.3 * scaled
    torch.testing.assert_close(field.x_0(X, t), data)
    torch.testing.assert_close(seen[0][0], scaled)
    torch.testing.assert_close(seen[0][1], torch.full((6,), sigma, dtype=torch.float64).log() / 4)
    assert field.v(X, 0.0).isfinite().all() and field.v(X, 1.0).isfinite().all()
    for options, ends in (({"sigma_min": 0.1, "sigma_max": 10.0}, (0.1, 10.0)), ({}, (0.002, 80.0))):
        for t, sigma in zip((0.0, 1.0), ends, strict=True):
            edm_network(raw, schedule, s_d, **options)(X, torch.full((6,), t, dtype=torch.float64))
            assert seen[-1][1][0].item() == pytest.approx(math.log(sigma) / 4)
