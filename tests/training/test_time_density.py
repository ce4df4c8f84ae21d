"""Time densities: samples against densities (Kolmogorov-Smirnov), the paper's formulas, strata, and the shift."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from samplers import shift_time
from training.time_density import CosMap, LogitNormal, Mode, Shifted, Uniform, make_time_density

S_MAX = 2 / (math.pi - 2)
DENSITIES = [
    Uniform(),
    LogitNormal(),
    LogitNormal(-0.5, 0.6),
    LogitNormal(1.0, 1.5),
    Mode(),
    Mode(1.75),
    Mode(-0.9),
    Mode(0.0),
    CosMap(),
    Shifted(LogitNormal(), 3.0),
    Shifted(Mode(1.29), 0.5),
]
every = pytest.mark.parametrize("density", DENSITIES, ids=str)
U = torch.linspace(0, 1, 10_001, dtype=torch.float64)
GRID = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distribution(density):
    """The distribution function by numerical integration of `density.density`."""
    nodes = torch.linspace(0, 1, 5001, dtype=torch.float64)
    t = torch.cat((nodes, density.quantile(nodes))).clamp(0, 1).sort().values  # dense where the density is steep
    rise = integrate.cumulative_trapezoid(density.density(t).numpy(), t.numpy(), initial=0)
    return lambda x: np.interp(x, t.numpy(), rise)


@every
def test_density_integrates_to_one(density):
    assert distribution(density)(1.0) == pytest.approx(1, abs=2e-4)
    assert distribution(density)(0.5) == pytest.approx((density.quantile(U) <= 0.5).double().mean().item(), abs=1e-3)


@every
@pytest.mark.parametrize(("stratified", "batch"), [(False, 20_000), (True, 20_000), (True, 8)])
def test_samples_follow_the_density(density, stratified, batch):
    generator = seeded()
    t = torch.cat([density.sample(batch, generator, stratified) for _ in range(20_000 // batch)])
    assert t.shape == (20_000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    assert stats.kstest(t.numpy(), distribution(density)).pvalue > 0.001


def test_the_test_above_tells_neighbours_apart():
    t = LogitNormal(0.1, 1.0).sample(20_000, seeded())
    assert stats.kstest(t.numpy(), distribution(LogitNormal())).pvalue < 1e-6


@every
def test_density_is_the_slope_of_the_distribution(density):
    """pi(F^-1(u)) dF^-1/du = 1."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    t = density.quantile(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(density.density(t.detach()), 1 / slope, rtol=1e-6, atol=1e-8)


@every
def test_quantiles_rise_from_0_to_1(density):
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = density.quantile(u)
    assert t[0] == pytest.approx(0, abs=1e-9) and t[-1] == pytest.approx(1, abs=1e-9) and (t.diff() > 0).all()


def test_formulas_of_sd3():
    t = GRID.numpy()
    logit = np.log(t / (1 - t))
    log_normal = np.exp(-((logit - 0.5) ** 2) / (2 * 0.6**2)) / (0.6 * np.sqrt(2 * np.pi) * t * (1 - t))
    np.testing.assert_allclose(LogitNormal(0.5, 0.6).density(GRID), log_normal)
    np.testing.assert_allclose(CosMap().density(GRID), 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2))
    u = GRID.numpy()
    f_mode = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    np.testing.assert_allclose(Mode().quantile(1 - GRID), f_mode, atol=1e-12)
    slope = np.gradient(f_mode, u, edge_order=2)
    np.testing.assert_allclose(Mode(1.29).density(torch.from_numpy(f_mode)), 1 / np.abs(slope), rtol=1e-4)
    np.testing.assert_allclose(CosMap().quantile(GRID), 1 - 1 / (np.tan(np.pi * u / 2) + 1), atol=1e-12)


def test_orientation():
    """t = 1 is noise: m above 0 favours noise, and so does a shift above 1."""
    mean = [LogitNormal(m).sample(4000, seeded()).mean().item() for m in (-1, 0, 1)]
    assert mean[0] < 0.4 < mean[1] < 0.6 < mean[2]
    assert Shifted(Uniform(), 3.0).sample(4000, seeded()).mean() > 0.6


@every
def test_stratified_draws_take_one_of_each_stratum(density):
    n = 64
    t = density.sample(n, seeded(), stratified=True, dtype=torch.float64)
    edges = density.quantile(torch.linspace(0, 1, n + 1, dtype=torch.float64))
    counts = torch.histogram(t, edges).hist
    assert (counts == 1).all()
    assert not (t.diff() > 0).all()  # in random order


@given(shift=st.floats(0.2, 5), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_shifted_draws_are_the_shift_of_the_draws(shift, seed):
    for base in (LogitNormal(0.3, 0.8), Mode(1.0), CosMap()):
        drawn = base.sample(8, seeded(seed), dtype=torch.float64)
        shifted = Shifted(base, shift).sample(8, seeded(seed), dtype=torch.float64)
        torch.testing.assert_close(shifted, shift_time(drawn, shift))


def test_special_cases():
    for uniform in (Mode(0.0), Shifted(Uniform(), 1.0)):
        torch.testing.assert_close(uniform.density(GRID), torch.ones_like(GRID))
    shifted = Shifted(LogitNormal(0, 1), 3.0)  # a shift moves the mean of the logit by log s
    torch.testing.assert_close(shifted.density(GRID), LogitNormal(math.log(3), 1).density(GRID))


@every
def test_density_beyond_the_ends_is_zero_and_at_the_ends_no_nan(density):
    assert density.density(torch.tensor([-0.1, 1.1])).tolist() == [0, 0]
    assert not density.density(torch.tensor([0.0, 1.0])).isnan().any()


def test_draws_are_a_function_of_the_generator():
    assert torch.equal(LogitNormal().sample(9, seeded(1), True), LogitNormal().sample(9, seeded(1), True))
    assert not torch.equal(LogitNormal().sample(9, seeded(1)), LogitNormal().sample(9, seeded(2)))
    assert LogitNormal().sample(9).shape == (9,)
    whole = LogitNormal().sample(9, seeded(), dtype=torch.float64)
    assert torch.equal(LogitNormal().sample(9, seeded()), whole.float())  # the same in every type, and on every device
    assert LogitNormal().sample(9, seeded(), device="meta").device.type == "meta"


def test_by_name():
    assert make_time_density("uniform") == Uniform()
    assert make_time_density("logit-normal", m=-0.5, s=0.7) == LogitNormal(-0.5, 0.7)
    assert make_time_density("mode", s=1.29) == Mode(1.29)
    assert make_time_density("cosmap", shift=3.0) == Shifted(CosMap(), 3.0)


def test_refusals():
    with pytest.raises(ValueError, match="unknown time density 'lognormal': did you mean 'logit-normal'"):
        make_time_density("lognormal")
    for s in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="the standard deviation must be positive"):
            LogitNormal(0.0, s)
    for m in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="the mean must be a finite number"):
            LogitNormal(m, 1.0)
    for s in (-1.01, S_MAX + 0.01, math.nan):
        with pytest.raises(ValueError, match="monotone only for"):
            Mode(s)
    assert all((Mode(s).quantile(U).diff() >= 0).all() for s in (-1.0, S_MAX))
    with pytest.raises(ValueError, match="shift = -1"):
        Shifted(Uniform(), -1.0)
