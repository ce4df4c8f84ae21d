"""Likelihood against the closed form, bits per dimension, inversion and the round trip."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from samplers import (
    SOLVERS,
    VE,
    Cosine,
    DerivedField,
    Field,
    Solver,
    VPLinear,
    bits_per_dim,
    invert,
    log_likelihood,
    sample,
    time_grid,
)
from samplers.likelihood import DIVERGENCES
from tests.oracles import MIXTURE, Gaussian
from tests.samplers.common import FLOW

X_0 = MIXTURE.sample(6, torch.Generator().manual_seed(0))
TIGHT = replace(SOLVERS["dopri5"], atol=1e-7, rtol=1e-7)


def log_density(x):
    away = x[:, None] - MIXTURE.means
    normal = -(away**2).sum(-1) / (2 * MIXTURE.stds**2) - torch.log(2 * math.pi * MIXTURE.stds**2)
    return torch.logsumexp(normal + MIXTURE.weights.log(), 1)


@pytest.mark.parametrize("schedule", [FLOW, Cosine()])
@pytest.mark.parametrize("prediction", ["velocity", "ddpm_v"])
def test_log_likelihood_of_a_mixture(schedule, prediction):
    got = log_likelihood(MIXTURE.field(schedule, prediction), X_0, TIGHT)
    torch.testing.assert_close(got, log_density(X_0), rtol=0, atol=1e-4)


def test_a_vp_noise_network_is_seen_on_the_flow():
    """VP has a pole at t = 0, and its own end is not pure noise."""
    field = MIXTURE.field(VPLinear(), "noise")
    got = log_likelihood(field.on(FLOW), X_0, TIGHT)
    torch.testing.assert_close(got, log_density(X_0), rtol=0, atol=2e-3)  # alpha(1) = 0.0066 is where it is last asked
    with pytest.raises(ValueError, match="does not determine the velocity at t = 0"):
        log_likelihood(field, X_0)


def test_a_path_that_ends_early_takes_the_marginal_of_unit_data_there():
    unit = Gaussian.of([0.0, 0.0], 1.0)
    for schedule, t in ((FLOW, 0.6), (VE(0.05, 4.0), 1.0)):
        got = log_likelihood(unit.field(schedule), X_0, TIGHT, grid=[t, 1e-3])
        variance = unit.std_at(1e-3, schedule) ** 2
        expected = -X_0.square().sum(1) / (2 * variance) - torch.log(2 * math.pi * variance)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(divergence):
    """Within 5 standard errors over many probes of the exact divergence, per sample."""
    x = X_0[:1].expand(400, 2).clone()
    options = {"solver": "rk4", "num_steps": 12}
    exact = log_likelihood(MIXTURE.field(FLOW), X_0[:1], **options)
    g = torch.Generator().manual_seed(0)
    drawn = log_likelihood(MIXTURE.field(FLOW), x, divergence=divergence, generator=g, **options)
    error = (drawn.mean() - exact[0]).abs()
    assert error < 5 * drawn.std() / 20 + 1e-9
    several = log_likelihood(MIXTURE.field(FLOW), x, divergence=divergence, num_probes=4, generator=g, **options)
    assert several.std() < 0.8 * drawn.std()


def test_a_seed_per_sample():
    options = {"solver": "rk4", "num_steps": 6, "divergence": "gaussian"}
    seeds = list(range(6))
    together = log_likelihood(MIXTURE.field(FLOW), X_0, generator=seeds, **options)
    more = log_likelihood(MIXTURE.field(FLOW), X_0, generator=seeds, num_probes=2, **options)
    assert not torch.isclose(more, together).any()  # the second probe is another one
    alone = log_likelihood(MIXTURE.field(FLOW), X_0[2:3], generator=seeds[2:3], **options)
    torch.testing.assert_close(together[2:3], alone)


def test_images_are_summed_over_all_numbers():
    """A field linear in x: the divergence over (C, H, W) is the number of numbers times the slope."""
    field = Field(lambda x_t, t: 0.5 * x_t, FLOW)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    end = x.flatten(1) * math.exp(0.5)
    expected = -(end**2).sum(1) / 2 - 6 * math.log(2 * math.pi) + 12 * 0.5
    torch.testing.assert_close(log_likelihood(field, x, "rk4", 20), expected, rtol=1e-6, atol=1e-6)
    for divergence in ("rademacher",):  # exact for a multiple of the identity
        torch.testing.assert_close(
            log_likelihood(field, x, "rk4", 20, divergence=divergence), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("divergence", ["exact", "rademacher"])
def test_inference_mode_has_derivatives_too(divergence):
    options = {"solver": "rk4", "num_steps": 6, "divergence": divergence, "generator": list(range(6))}
    expected = log_likelihood(MIXTURE.field(FLOW), X_0, **options)
    with torch.inference_mode():
        assert torch.equal(log_likelihood(MIXTURE.field(FLOW), X_0.clone(), **options), expected)


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_a_network_without_derivatives_is_refused(prediction):
    field = MIXTURE.field(FLOW, prediction)
    cut = Field(torch.no_grad()(field.network), FLOW, prediction)
    with pytest.raises(ValueError, match="the network gives no derivative"):
        log_likelihood(cut, X_0, grid=[0.999, 0.001])


def test_a_field_begins_anew_and_no_graph_is_kept():
    begun, scale = [], torch.ones((), dtype=torch.float64, requires_grad=True)
    inner = Field(lambda x_t, t: -scale * x_t, FLOW)
    field = DerivedField(inner.predict, FLOW, "velocity", begin=lambda: begun.append(1))
    assert not log_likelihood(field, X_0, "euler", 2).requires_grad and begun == [1]
    assert not invert(field, X_0, "euler", 2).x.requires_grad and begun == [1, 1]


def test_the_grid_is_of_the_field_s_schedule():
    field = MIXTURE.field(VE())
    assert torch.equal(invert(field, X_0, num_steps=5, grid="karras").ts, time_grid("karras", 5, schedule=VE()).flip(0))


def test_the_two_kinds_of_probes():
    """For v = x^2 / 2, e . (dv/dx) e is sum x e^2: exact for signs, which a normal e is not."""
    field = Field(lambda x_t, t: x_t.square() / 2, FLOW)
    options = {"solver": "euler", "num_steps": 1, "generator": list(range(6))}
    exact, signs, normal = (log_likelihood(field, X_0, divergence=d, **options) for d in DIVERGENCES)
    torch.testing.assert_close(signs, exact)
    assert not torch.isclose(normal, exact).any()


def test_samples_of_one_number_each():
    field = Field(lambda x_t, t: 0.5 * x_t, FLOW)
    x = torch.randn(5, dtype=torch.float64)
    for divergence in ("exact", "rademacher"):
        got, expected = (
            log_likelihood(field, y, divergence=divergence, generator=list(range(5))) for y in (x, x[:, None])
        )
        torch.testing.assert_close(got, expected)


def test_bits_per_dim():
    """Uniform data in [-1, 1]: every one of the 256 bins is as likely, which takes 8 bits."""
    uniform = torch.full((3,), -12 * math.log(2.0))
    torch.testing.assert_close(bits_per_dim(uniform, 12), torch.full((3,), 8.0))
    torch.testing.assert_close(bits_per_dim(uniform, 12, bin_width=2 / 16), torch.full((3,), 4.0))


@pytest.mark.parametrize("solver", ["rk4", "heun", "dopri5"])
def test_there_and_back_again(solver):
    field = MIXTURE.field(FLOW)
    noise = invert(field, X_0, solver, 60)
    assert noise.ts[0] == 0 and noise.ts[-1] == 1
    back = sample(field, noise.x, solver, 60).x
    torch.testing.assert_close(back, X_0, rtol=0, atol=2e-3 if solver == "heun" else 1e-4)
    again = invert(field, back, solver, 60).x
    torch.testing.assert_close(again, noise.x, rtol=0, atol=1e-2 if solver == "heun" else 1e-3)


@dataclass(frozen=True)
class OfOnesOwn(Solver):
    def step(self, field, x_t, t, t_next, state=None, noise=None):
        return SOLVERS["rk4"].step(field, x_t, t, t_next)


@pytest.mark.parametrize("solver", ["abm4", OfOnesOwn("own", 4, 4, "tests")])
def test_every_solver_of_the_velocity_will_do(solver):
    got = log_likelihood(MIXTURE.field(FLOW), X_0, solver, 50)
    torch.testing.assert_close(got, log_density(X_0), rtol=0, atol=1e-3)


def test_a_divergence_in_half_precision_is_summed_in_float32():
    """401 / 2, for which bfloat16 has no number."""
    field, x_0 = Field(lambda x_t, t: x_t / 2, FLOW), torch.zeros(2, 401, dtype=torch.bfloat16)
    exact, signs = (log_likelihood(field, x_0, "euler", divergence=d) for d in ("exact", "rademacher"))
    torch.testing.assert_close(exact, torch.full((2,), 401 * (0.5 - math.log(2 * math.pi) / 2)))
    torch.testing.assert_close(signs, exact)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("divergence", ["exact", "rademacher"])
def test_a_network_in_half_precision(dtype, tolerance, divergence):
    """Of many numbers, whose squared length overflows float16, and whose sum wants more digits than bfloat16's."""
    scale = 2.0
    seen, x_0 = set(), (scale * torch.randn(2, 400, generator=torch.Generator().manual_seed(0))).to(dtype)

    def network(x_t, t):
        seen.add(x_t.dtype)
        variance = ((1 - t) ** 2 * scale**2 + t**2)[:, None]
        return ((t[:, None] - (1 - t[:, None]) * scale**2) / variance).to(dtype) * x_t

    field, seeds = Field(network, FLOW), [0, 1]
    got = log_likelihood(field, x_0, "rk4", 20, divergence=divergence, generator=seeds)
    expected = torch.distributions.Normal(0.0, scale).log_prob(x_0.float()).sum(1)
    assert seen == {dtype} and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


def test_the_defaults():
    field = MIXTURE.field(FLOW)
    assert torch.equal(log_likelihood(field, X_0), log_likelihood(field, X_0, "dopri5", 1))
    assert torch.equal(invert(field, X_0).x, invert(field, X_0, "heun", 50).x)


def test_what_cannot_be_done_is_refused():
    field = MIXTURE.field(FLOW)
    for solver in ("dpmpp-2m", "euler-maruyama", "edm-churn"):
        with pytest.raises(ValueError, match="does not integrate the velocity"):
            log_likelihood(field, X_0, solver)
    with pytest.raises(ValueError, match="did you mean 'rademacher'"):
        log_likelihood(field, X_0, divergence="rademaher")
    for call in (log_likelihood, invert):
        with pytest.raises(ValueError, match=r"x is torch.int64 \(6, 2\): give a floating tensor"):
            call(field, X_0.long())
        with pytest.raises(ValueError, match="give a samplers.Field"):
            call(field.network, X_0)
    with pytest.raises(ValueError, match="num_probes = 0"):
        log_likelihood(field, X_0, num_probes=0)
    with pytest.raises(ValueError, match="does not determine the velocity at t = 1"):
        log_likelihood(MIXTURE.field(FLOW, "noise"), X_0, num_steps=3)
    with pytest.raises(ValueError, match="cannot leave t = 0"):
        invert(field, X_0, "dpmpp-2m")
    for solver, view in (("heun", "data"), ("edm-heun", "data"), ("heun", "score"), ("ab2", "data")):
        with pytest.raises(ValueError, match="does not determine the velocity at t = 0: keep the grid"):
            invert(MIXTURE.field(FLOW, view), X_0, solver)
    with pytest.raises(ValueError, match="does not determine the velocity at t = 0"):  # a pole of the schedule
        invert(MIXTURE.field(VPLinear()), X_0, "heun")
    with pytest.raises(ValueError, match="does not determine the velocity at t = 0"):
        invert(MIXTURE.field(VPLinear()), X_0, "ab2")
    assert invert(MIXTURE.field(FLOW, "data"), X_0, "heun", grid=[1.0, 0.5, 1e-4]).x.isfinite().all()
    assert invert(MIXTURE.field(VPLinear(), "noise"), X_0, "edm-heun").x.isfinite().all()
    with pytest.raises(ValueError, match="'ddpm' draws noise, and cannot be run backwards"):
        invert(field, X_0, "ddpm")
    for num_dims, bin_width in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match=f"num_dims = {num_dims}, bin_width = {bin_width}: give positive"):
            bits_per_dim(torch.zeros(1), num_dims, bin_width)
