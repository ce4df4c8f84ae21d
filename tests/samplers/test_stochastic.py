"""Stochastic solvers: moments without sampling error, weak and strong order, seeds, options, and the ODE as limit."""

import itertools
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from samplers import (
    DIFFUSIONS,
    EDM,
    SOLVERS,
    VE,
    BrownianTree,
    Cosine,
    DerivedField,
    DiscreteVP,
    Field,
    Inpaint,
    RectifiedFlow,
    Trig,
    VPLinear,
    cfg,
    integrate,
    make_solver,
    randn,
    sample,
)
from samplers.grids import karras_between
from samplers.noise import Brownian, _place_generator, decay, make_diffusion
from samplers.stochastic import bounded
from tests.oracles import GAUSSIAN, MIXTURE
from tests.samplers.common import measured_order, normal

SCHEDULES = [RectifiedFlow(), Cosine()]
X = normal(8, 2)
STOCHASTIC = [name for name, solver in SOLVERS.items() if solver.stochastic]
ALWAYS = {"euler-maruyama": "sigma", "stochastic-heun": "sigma"}  # those that must be told a diffusion


@pytest.mark.parametrize(("name", "order"), [("euler-maruyama", 1), ("ddpm", 1), ("dpmpp-2m-sde", 1)])
def test_strong_order_on_shared_brownian_paths(name, order):
    """The noise is additive, so Euler-Maruyama has strong order 1; paths are shared through a Brownian tree."""
    schedule, tree = RectifiedFlow(), BrownianTree(X, list(range(8)), depth=12)
    start = schedule.mix(torch.ones_like(X), X, 0.8)

    def run(n):
        grid = torch.linspace(0.8, 0.3, n + 1, dtype=torch.float64)
        return sample(GAUSSIAN.field(schedule), start, name, grid=grid, generator=tree, diffusion="kl").x

    fine = run(512)
    assert measured_order(lambda n: (run(n) - fine).norm().item(), 16) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ["euler-maruyama", "stochastic-heun", "ddim", "dpmpp-2m", "sa-solver"])
def test_zero_diffusion_is_the_ode(name):
    field = MIXTURE.field(RectifiedFlow())
    ode = {"euler-maruyama": "euler", "stochastic-heun": "heun", "sa-solver": None}.get(name, name)
    if ode is None:
        ode = replace(SOLVERS["sa-solver"], diffusion=None)
    for zero in (0.0, lambda t: 0.0):
        out = sample(field, X, name, 10, diffusion=zero).x
        torch.testing.assert_close(out, sample(field, X, ode, 10).x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("diffusion", "num_steps"), [("constant", 80), ("constant", 200), (2.0, 80)])
def test_sa_solver_stays_bounded_where_more_noise_than_the_forward_sde_s_is_added(diffusion, num_steps):
    """Gaussian data of deviation s: the spread of 4000 samples is that of the data, within 10 %."""
    flow, x = RectifiedFlow(), normal(4000, 2, seed=5)
    field = Field(lambda x_t, t: x_t * ((t - 0.25 * (1 - t)) / (0.25 * (1 - t) ** 2 + t**2))[:, None], flow)
    out = sample(field, x, "sa-solver", num_steps, diffusion=diffusion, generator=torch.Generator().manual_seed(0)).x
    assert out.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("name", ["euler-maruyama", "stochastic-heun", "ddim", "sa-solver"])
def test_each_diffusion_gives_other_samples(name):
    def run(diffusion):
        generator = torch.Generator().manual_seed(0)
        return sample(MIXTURE.field(Cosine()), X, name, 10, diffusion=diffusion, generator=generator).x

    runs = [run(diffusion) for diffusion in (*DIFFUSIONS, 0.5)]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(runs, 2))


def test_named_diffusions_are_the_formulas():
    flow, t = RectifiedFlow(), 0.3
    assert float(DIFFUSIONS["kl"](flow, t)) == pytest.approx(2 * t / (1 - t))
    assert float(DIFFUSIONS["kl"](Cosine(), t)) == pytest.approx(math.pi * math.tan(math.pi * t / 2))
    assert float(DIFFUSIONS["kl"](VPLinear(), t)) == pytest.approx(0.1 + t * 19.9)
    assert float(DIFFUSIONS["sigma"](flow, t)) == t and float(DIFFUSIONS["constant"](flow, t)) == 1
    assert float(DIFFUSIONS["sin2"](flow, t)) == pytest.approx(math.sin(math.pi * t) ** 2)
    assert float(make_diffusion(0.5, flow)(t)) == pytest.approx(0.25 * 2 * t / (1 - t))
    assert float(make_diffusion(0.5, flow)(0.0)) == 0


def test_kl_is_the_solver_s_own_diffusion_to_the_last_digit():
    field, runs = MIXTURE.field(RectifiedFlow()), []
    for diffusion in (None, "kl", 1, 1.0):
        runs.append(sample(field, X, "ddpm", 6, diffusion=diffusion, generator=list(range(8))).x)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("diffusion", [-0.1, math.inf, math.nan, [0.5]])
def test_a_diffusion_that_is_none_is_refused(diffusion):
    with pytest.raises(ValueError, match="diffusion (=|is) .*eta"):
        sample(MIXTURE.field(RectifiedFlow()), X, "euler-maruyama", diffusion=diffusion)
    with pytest.raises(ValueError, match="'heun' solves the ODE and takes no diffusion"):
        sample(MIXTURE.field(RectifiedFlow()), X, "heun", diffusion=0.0)


def test_brownian_motion_has_the_variance_of_its_time():
    noise = Brownian(torch.zeros(4000, 1), torch.Generator().manual_seed(0))
    for t, t_next in ((0.5, 0.46), (0.2, 0.9)):
        assert noise(t, t_next).var().item() == pytest.approx(abs(t - t_next), rel=0.12)  # 5 standard errors


def test_decay_is_the_integral():
    """exp(-int w / (2 sigma^2)) for w = w_kl is e^-h; the quadrature for an own function agrees with it."""
    flow, t, t_next = RectifiedFlow(), 0.6, 0.5
    expected = (t_next / (1 - t_next)) / (t / (1 - t))
    assert decay(make_diffusion("kl", flow), flow, t, t_next) == pytest.approx(expected)
    assert decay(lambda s: DIFFUSIONS["kl"](flow, s), flow, t, t_next) == pytest.approx(expected, rel=1e-5)
    assert decay(make_diffusion(1.3, flow), flow, t, t_next) == pytest.approx(expected**1.69)
    assert decay(make_diffusion(0.5, flow), flow, t, t_next) == pytest.approx((1 - 0.25 * (1 - expected**2)) ** 0.5)
    assert decay(None, flow, t, t_next) == 1
    assert decay(make_diffusion("kl", flow), flow, t_next, t) == 1  # upwards it is the ODE


@pytest.mark.parametrize("name", ["euler-maruyama", "stochastic-heun"])
def test_an_sde_is_not_solved_from_data_to_noise(name):
    """There the sign of w would be another, and the marginals with it."""
    flow, ts = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9])
    field = Field(lambda x_t, t: pytest.fail("the network was asked"), flow)
    with pytest.raises(ValueError, match=f"'{name}' solves the SDE from noise to data: give times that fall"):
        integrate(field, X, make_solver(name, flow, "sigma"), ts, Brownian(X))


def test_ddim_with_eta_is_the_published_step():
    """Song et al. 2021, eq. 12 and 16, for a step between two indices of DDPM's betas."""
    betas = DiscreteVP.linear()
    field, t, s = MIXTURE.field(betas, "noise"), 0.601, 0.501
    (a_t, a_s), eta = ((betas.alpha(t) ** 2, betas.alpha(s) ** 2)), 0.7
    eps = field.eps(X, t)
    x_0 = (X - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    dev = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
    z = torch.randn(X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = a_s.sqrt() * x_0 + (1 - a_s - dev**2).sqrt() * eps + dev * z
    got = sample(field, X, "ddim", grid=[t, s], diffusion=eta, generator=torch.Generator().manual_seed(3)).x
    torch.testing.assert_close(got, expected)


def test_ddpm_is_the_posterior():
    """Ho et al. 2020, eq. 6 and 7, for one index to the one before."""
    betas = DiscreteVP.linear(100)
    k, bar, beta = 50, betas.alpha_bar, torch.tensor(betas.betas, dtype=torch.float64)
    x_0 = (field := MIXTURE.field(betas, "noise")).x_0(X, betas.time(k))
    mean = bar[k - 1].sqrt() * beta[k] / (1 - bar[k]) * x_0 + (1 - beta[k]).sqrt() * (1 - bar[k - 1]) / (1 - bar[k]) * X
    deviation = ((1 - bar[k - 1]) / (1 - bar[k]) * beta[k]).sqrt()
    z = torch.randn(X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grid = [betas.time(k).item(), betas.time(k - 1).item()]
    got = sample(field, X, "ddpm", grid=grid, generator=torch.Generator().manual_seed(3)).x
    torch.testing.assert_close(got, mean + deviation * z)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sample_of_a_seed_is_the_same_alone_and_in_any_batch(name):
    field, seeds = MIXTURE.field(RectifiedFlow()), list(range(8))
    options = {"num_steps": 6, "diffusion": ALWAYS.get(name)}
    for source in (lambda x, s: s, lambda x, s: BrownianTree(x, s, depth=8)):
        together = sample(field, X, name, generator=source(X, seeds), **options).x
        alone = sample(field, X[3:4], name, generator=source(X[3:4], seeds[3:4]), **options).x
        torch.testing.assert_close(together[3:4], alone, rtol=1e-10, atol=1e-10)
        parts = [
            sample(field, X[i], name, generator=source(X[i], seeds[i]), **options).x for i in (slice(0, 5), slice(5, 8))
        ]
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-10, atol=1e-10)
        other = sample(field, X, name, generator=source(X, [s + 9 for s in seeds]), **options).x
        assert not torch.allclose(together, other)


def test_the_tree_is_one_brownian_path_on_every_grid():
    x = torch.zeros(4000, 1, dtype=torch.float64)
    tree, again = BrownianTree(x, 7, depth=10), BrownianTree(x, 7, depth=10)
    whole = tree(0.9, 0.1)
    parts = again(0.3, 0.1) + again(0.9, 0.7) + again(0.7, 0.3)
    torch.testing.assert_close(whole, parts)
    for t, t_next in ((1.0, 0.0), (0.51, 0.5), (0.9, 0.1)):
        assert tree(t, t_next).var().item() == pytest.approx(abs(t - t_next), rel=0.12)  # 5 standard errors
        assert tree.unit(t, t_next).var().item() == pytest.approx(1, rel=0.12)
    torch.testing.assert_close(tree.unit(0.75, 0.5) * 0.5, tree.at(0.5) - tree.at(0.75))
    first, second = tree(0.9, 0.6), tree(0.6, 0.2)
    assert abs((first * second).mean().item()) < 5 * (0.3 * 0.4 / 4000) ** 0.5
    assert not torch.allclose(whole, BrownianTree(x, 8, depth=10)(0.9, 0.1))


def test_times_of_the_tree_are_rounded_and_its_memory_is_bounded():
    tree = BrownianTree(torch.zeros(4000, 1), 7, depth=3)
    assert torch.equal(tree.at(0.99), tree.at(1.0)) and torch.equal(tree.at(0.3), tree.at(0.25))
    assert tree.unit(0.5, 0.3).var().item() == pytest.approx(1, rel=0.12)  # from 0.5 to 0.25, 5 standard errors
    tree = BrownianTree(X)
    assert tree.unit(0.5, 0.5 + 2**-20).isfinite().all() and torch.equal(tree.at(0.3), BrownianTree(X, 0).at(0.3))
    for step in range(200):
        tree.at(step / 200)
    assert len(tree._cache) <= 4 * tree.depth


def test_the_tree_keeps_the_dtype_of_x_to_the_last_time():
    tree = BrownianTree(X.bfloat16(), 7, depth=4)
    assert tree(0.5, 0.0).dtype == tree.unit(0.5, 0.25).dtype == torch.bfloat16


def test_small_steps_of_a_tree_in_half_precision_are_those_of_float32():
    x = torch.zeros(1000, 1)
    exact, half = (BrownianTree(x.to(dtype), 7, depth=10) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(half(1.0, 1 - 2**-10), exact(1.0, 1 - 2**-10).bfloat16())


def test_each_seed_and_place_of_the_tree_has_a_generator_of_its_own():
    states = {_place_generator(seed, place).initial_seed() for seed in range(-32, 32) for place in range(1, 65)}
    assert len(states) == 64 * 64


def test_a_step_that_draws_more_than_its_increment_takes_no_tree():
    """The tree would give the same noise again, and the marginals would be others."""
    langevin, restart = SOLVERS["langevin"], SOLVERS["restart"]
    tree, field = BrownianTree(X, 1, depth=8), MIXTURE.field(RectifiedFlow())
    for solver, diffusion in (
        (replace(langevin, num_corrections=2), None),
        (replace(langevin, inner=SOLVERS["ddpm"]), None),
        (langevin, "kl"),
        (replace(restart, intervals=((0.2, 0.6, 2, 4),)), None),
        (replace(restart, inner=SOLVERS["ddpm"]), None),
        (Inpaint.of(replace(langevin, num_corrections=2), X, torch.ones_like(X)), None),
    ):
        with pytest.raises(ValueError, match="draws more in a step than a BrownianTree has for it"):
            sample(field, X, solver, 6, diffusion=diffusion, generator=tree)
    assert sample(field, X, Inpaint.of("ddpm", X, torch.ones_like(X)), 6, generator=tree).x.isfinite().all()


def test_refusals_of_the_tree():
    with pytest.raises(ValueError, match="2 seeds for a batch of 8"):
        BrownianTree(X, [1, 2])
    for seeds in (None, 1.5, [1.5] * 8, torch.Generator()):
        with pytest.raises(ValueError, match="give a whole number, or a list with one per sample"):
            BrownianTree(X, seeds)
    for depth in (0, 31):
        with pytest.raises(ValueError, match=f"depth = {depth}"):
            BrownianTree(X, 1, depth=depth)
    with pytest.raises(ValueError, match=r"nearer than 2\^-4"):
        BrownianTree(X, 1, depth=4).unit(0.5, 0.501)
    with pytest.raises(ValueError, match="give a torch.Generator"):
        Brownian(X, 3)
    with pytest.raises(ValueError, match=r"noise is for \(1, 2\), x is \(8, 2\)"):
        sample(MIXTURE.field(RectifiedFlow()), X, "ddpm", generator=BrownianTree(X[:1], 1))


@pytest.mark.parametrize("name", ["euler-maruyama", "stochastic-heun", "ddpm", "ddim"])
def test_a_diffusion_below_zero_or_nan_is_refused_before_the_first_step(name):
    field = Field(lambda x_t, t: pytest.fail("the network was asked"), RectifiedFlow())
    for w in (lambda t: t - 0.3, lambda t: torch.tensor(math.nan), lambda t: torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match=r"diffusion is .* at t = .*: give a w\(t\) of at least 0"):
            sample(field, X, name, 5, diffusion=w, generator=range(8))


@pytest.mark.parametrize(("name", "share"), [("euler-maruyama", 0.0), ("stochastic-heun", 0.5)])
def test_a_diffusion_is_asked_where_it_is_taken(name, share):
    """So that one with a pole at t = 1 goes with Heun's rule, which takes it in the middle of a step."""
    asked = []
    run = {"diffusion": lambda t: asked.append(t) or 1.0, "generator": range(8)}
    sample(MIXTURE.field(RectifiedFlow()), X, name, grid=[1.0, 0.6, 0.0], **run)
    assert asked == pytest.approx([t + share * (t_next - t) for t, t_next in ((1.0, 0.6), (0.6, 0.0))] * 2)


def test_seeds_are_whole_numbers_of_any_kind():
    expected = randn((2, 3), [3, 4])
    for seeds in (range(3, 5), [np.int64(3), np.int64(4)], np.arange(3, 5), [torch.Generator().manual_seed(3), 4]):
        assert torch.equal(randn((2, 3), seeds), expected)
    wide = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(randn((2, 3), [3, 4], torch.float64)[0], wide)  # all its digits are drawn
    for seeds in (3, "34", [0.5, 1.0], [None, 1]):
        with pytest.raises(ValueError, match="give a torch.Generator, or a list"):
            randn((2, 3), seeds)
    tree = BrownianTree(X, list(range(8)), depth=4)(0.5, 0.25)
    assert torch.equal(tree, BrownianTree(X, np.arange(8), depth=4)(0.5, 0.25))
    assert torch.equal(BrownianTree(X, np.int64(3)).at(1.0), BrownianTree(X, 3).at(1.0))


def run(solver, field=None, **options):
    field = field or MIXTURE.field(EDM(20.0))
    x = field.schedule.sigma(1.0) * X
    return sample(field, x, solver, 12, grid="karras", generator=list(range(8)), **options).x


@pytest.mark.parametrize("name", ["dpm-2-ancestral", "dpmpp-2s-ancestral"])
@pytest.mark.parametrize("schedule", [EDM(20.0), RectifiedFlow(), VE(0.05, 20.0), DiscreteVP.cosine()], ids=str)
def test_ancestral_sampling_is_between_its_inner_solver_and_ddpm(name, schedule):
    field, ancestral = MIXTURE.field(schedule), SOLVERS[name]
    torch.testing.assert_close(run(replace(ancestral, eta=0.0), field), run(ancestral.inner, field))
    if not isinstance(schedule, VE):  # which has no noise level below its own least
        torch.testing.assert_close(run(replace(ancestral, inner=SOLVERS["dpm-1"]), field), run("ddpm", field))
    assert not torch.allclose(run(replace(ancestral, noise_scale=0.5), field), run(ancestral, field))
    with pytest.raises(ValueError, match="eta = -1"):
        replace(ancestral, eta=-1.0)
    with pytest.raises(ValueError, match="ancestral' goes from noise to data: give times that fall"):
        integrate(field, X, ancestral, torch.tensor([0.0, 0.5], dtype=torch.float64), Brownian(X))


def test_a_large_eta_draws_all_noise_anew():
    """sigma_up is sigma_next then: a step to the data, and noise."""
    ts = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
    field, seeds = MIXTURE.field(EDM(10.0)), list(range(8))
    noise = Brownian(X, seeds)
    got = integrate(field, 5 * X, replace(SOLVERS["dpmpp-2s-ancestral"], eta=5.0), ts, noise).x
    noise, x = Brownian(X, seeds), 5 * X
    for t, t_next in pairwise(ts.tolist()):
        x = field.x_0(x, t) + 10 * t_next * noise.unit(t, t_next)
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize("name", ["edm-churn", "dpm-2-ancestral"])
def test_without_its_noise_a_step_scales_the_data_all_the_same(name):
    """So that a flow is sampled as EDM's schedule, of which it is another scale."""
    solver, seeds = replace(SOLVERS[name], noise_scale=0.0), list(range(8))
    flow, edm, ts = RectifiedFlow(), EDM(10.0), [0.8, 0.6, 0.5, 0.2]
    got = sample(MIXTURE.field(flow), X, solver, grid=ts, generator=seeds).x
    sigmas = [t / (1 - t) / 10 for t in ts]
    expected = sample(MIXTURE.field(edm), X / 0.2, solver, grid=sigmas, generator=seeds).x
    torch.testing.assert_close(got / 0.8, expected)


def test_no_churn_is_edm_heun():
    churn, heun = SOLVERS["edm-churn"], run("edm-heun")
    torch.testing.assert_close(run(replace(churn, churn=0.0)), heun)
    torch.testing.assert_close(run(replace(churn, sigma_min=0.0, sigma_max=0.0)), heun)
    with pytest.raises(ValueError, match="churn = -1"):
        replace(churn, churn=-1.0)


def test_churn_draws_only_where_it_adds_noise():
    drawn = []

    class Counted(Brownian):
        def unit(self, t, t_next):
            drawn.append(t)
            return super().unit(t, t_next)

    ts = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.0], dtype=torch.float64)  # sigma = 8, 4, 2, 0.8
    churn = replace(SOLVERS["edm-churn"], sigma_min=2.0, sigma_max=4.0)  # both ends included
    integrate(MIXTURE.field(EDM(8.0)), 8 * X, churn, ts, Counted(X, torch.Generator().manual_seed(0)))
    assert drawn == [0.5, 0.25]


def test_churn_adds_no_more_noise_than_the_schedule_has():
    """At sigma = 9 of 10, 9 (2^1/2) would be above it."""
    churn = replace(SOLVERS["edm-churn"], churn=1e3, noise_scale=1.0)
    near, far = (plan.before for plan in churn.bind(MIXTURE.field(EDM(10.0)), [0.9, 0.5, 0.2]).plans)
    assert near.a == far.a == 1
    assert near.noise == pytest.approx((10**2 - 9**2) ** 0.5) and far.noise == pytest.approx(5.0)
    (plan,) = replace(churn, churn=0.1).bind(MIXTURE.field(EDM(10.0)), [0.5, 0.0]).plans  # gamma = churn / num_steps
    assert plan.before.noise == pytest.approx(5 * (1.1**2 - 1) ** 0.5)


def test_churn_on_a_flow_lands_on_its_path():
    """sigma / alpha = 1 becomes 2^1/2; the data keeps the weight alpha there, and the noise the deviation sigma."""
    churn, flow = replace(SOLVERS["edm-churn"], churn=1e3, noise_scale=1.0), RectifiedFlow()
    (plan,) = churn.bind(MIXTURE.field(flow), [0.5, 0.2]).plans
    t = 2**0.5 / (1 + 2**0.5)
    assert plan.before.a * 0.5 == pytest.approx(1 - t)
    assert math.hypot(plan.before.a * 0.5, plan.before.noise) == pytest.approx(t)
    field, seeds = MIXTURE.field(flow), list(range(8))
    raised = plan.before.a * X + plan.before.noise * randn(X.shape, seeds, torch.float64)
    got = sample(field, X, churn, grid=[0.5, 0.2], generator=seeds).x
    torch.testing.assert_close(got, sample(field, raised, "edm-heun", grid=[t, 0.2]).x)


def test_langevin_that_corrects_nothing_is_its_predictor():
    langevin = SOLVERS["langevin"]
    assert not torch.allclose(run("langevin", diffusion=1.0), run("langevin"))
    with pytest.raises(ValueError, match="'langevin' draws noise of its own"):
        run(replace(langevin, inner=SOLVERS["heun"]), diffusion=1.0)
    with pytest.raises(ValueError, match="'euler-maruyama' solves an SDE: give a diffusion, 'kl'"):
        run(replace(langevin, inner=SOLVERS["euler-maruyama"]))
    torch.testing.assert_close(run(replace(langevin, snr=1e-9)), run("ddim"), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="snr = 0"):
        replace(langevin, snr=0)
    with pytest.raises(ValueError, match="num_corrections = 0"):
        replace(langevin, num_corrections=0)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), EDM(10.0)])
def test_a_langevin_step_is_its_formula(schedule):
    field, seeds, size = MIXTURE.field(schedule), list(range(8)), 2 * (0.3 * schedule.sigma(0.4)) ** 2
    x = sample(field, X, "ddim", grid=[0.7, 0.4]).x
    expected = x + size * field.score(x, 0.4) + (2 * size).sqrt() * randn(X.shape, seeds, torch.float64)
    got = sample(field, X, replace(SOLVERS["langevin"], snr=0.3), grid=[0.7, 0.4], generator=seeds).x
    torch.testing.assert_close(got, expected)
    assert sample(field, X, "langevin", 4).num_evals == 2 * 4 - 1  # data are not corrected


def test_a_step_adds_no_more_noise_than_there_is_at_its_end():
    field = MIXTURE.field(EDM(10.0))
    for at in (0.0, 0.5):
        w = bounded(lambda t: math.inf, field, 0.9, 0.3, at)
        assert (w * 0.6).sqrt().item() == pytest.approx(3.0)  # the deviation that w adds in this step is sigma(0.3)
        assert bounded(lambda t: t, field, 0.9, 0.3, at).item() == pytest.approx(0.9 - 0.6 * at)


def test_a_step_of_stochastic_heun_is_its_formula():
    """(f(x, t) + f(x', t')) dt / 2 + sqrt(w) dW with x' = x + f(x, t) dt + sqrt(w) dW and f = v - w/2 score."""
    field, t, t_next = MIXTURE.field(RectifiedFlow()), 0.7, 0.4
    w = (0.4 + 0.5 * (t + t_next)) / 5

    def f(x, t):
        return field.v(x, t) - w / 2 * field.score(x, t)

    kick = w**0.5 * Brownian(X, list(range(8)))(t, t_next)
    ahead = X + f(X, t) * (t_next - t) + kick
    expected = X + (f(X, t) + f(ahead, t_next)) / 2 * (t_next - t) + kick
    run = {"diffusion": lambda t: (0.4 + t) / 5, "generator": list(range(8))}
    torch.testing.assert_close(sample(field, X, "stochastic-heun", grid=[t, t_next], **run).x, expected)


@pytest.mark.parametrize("inner", ["ab2", "ddpm"])
def test_a_restart_is_its_formula(inner):
    """On the flow from 0.2 up to 0.6: x keeps the weight 0.4 / 0.8, and noise makes its deviation 0.6."""
    flow, inner, noise = RectifiedFlow(), SOLVERS[inner], Brownian(X, list(range(8)))
    field, grid = MIXTURE.field(flow), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    down = torch.tensor(karras_between(0.6, 0.2, 3, flow), dtype=torch.float64)
    x = integrate(field, X, inner, grid, noise).x
    for _ in range(2):
        raised = x / 2 + (0.6**2 - 0.1**2) ** 0.5 * noise.unit(0.2, 0.6)
        x = integrate(field, raised, inner, down, noise).x
    restart = replace(SOLVERS["restart"], inner=inner, intervals=((0.2, 0.6, 2, 3),))
    torch.testing.assert_close(integrate(field, X, restart, grid, Brownian(X, list(range(8)))).x, x)


@pytest.mark.parametrize(("low", "num_steps"), [(0.5, 10), (0.3, 10), (0.35, 20)])
def test_restart_turns_back_where_the_grid_meets_its_low_time(low, num_steps):
    """Also to rounding: the grid's 0.3 is not the number."""
    asked, inner = [], MIXTURE.field(RectifiedFlow())

    def predict(x_t, t):
        asked.append(t)
        return inner.predict(x_t, t)

    restart = replace(SOLVERS["restart"], inner=SOLVERS["euler"], intervals=((low, 0.8, 1, 2),))
    sample(DerivedField(predict, RectifiedFlow(), "velocity"), X, restart, num_steps)
    rises = [t for t, t_next in pairwise(asked) if t_next > t]
    assert rises == [pytest.approx(low + 1 / num_steps)]  # the last time asked before it, a step to `low`


@pytest.mark.parametrize("name", ["dopri5", "stochastic-heun"])
def test_no_solver_looks_at_an_end_that_one_of_the_fields_cannot_see(name):
    asked, flow = [], RectifiedFlow()

    def network(x_t, t):
        asked.append(t.min().item())
        return MIXTURE.view("data", x_t, t, flow)

    diffusion = "sigma" if name == "stochastic-heun" else None
    for field in (cfg(MIXTURE.field(flow), Field(network, flow, "data"), 2.0), Field(network, flow, "data").on(Trig())):
        sample(field, X, name, 4, diffusion=diffusion)
    assert min(asked) > 0


def test_restart_that_never_does_is_its_inner_solver():
    restart, field = SOLVERS["restart"], MIXTURE.field(RectifiedFlow())
    torch.testing.assert_close(run(replace(restart, intervals=()), field), run("edm-heun", field))
    with pytest.raises(ValueError, match="give 0 < t_low < t_high"):
        replace(restart, intervals=((0.6, 0.2, 1, 4),))
    with pytest.raises(ValueError, match="no step of the grid"):
        sample(field, X, "restart", 1)
    with pytest.raises(ValueError, match="no step of the grid from 1 to 0.5 .*: take more steps"):
        sample(field, X, "restart", grid=[1.0, 0.7, 0.5])
