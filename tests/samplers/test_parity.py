"""Parity with diffusers: the same network, noise and grid give the same samples; where they are wrong it is shown.

Their tables are float32, so that equality is to 1e-5 of the largest number. Their sigma schedulers keep x / alpha.
"""

import inspect
import math
from dataclasses import replace

import diffusers
import pytest
import torch

from samplers import (
    EDM,
    SOLVERS,
    Brownian,
    DerivedField,
    DiscreteVP,
    Field,
    RectifiedFlow,
    Trig,
    edm_network,
    edm_view,
    grids,
    integrate,
    invert,
    sample,
    shift_time,
    twice_shifted,
)
from samplers.solvers import make_solver

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS, FLOW = DiscreteVP.scaled_linear(), RectifiedFlow()
X = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
N = 20  # divides 1000, so that all their spacings step evenly


def network(x, index):
    """A smooth function of x and the integer time."""
    return 0.6 * torch.tanh(x + 0.3) + 0.2 * torch.sin(index / 300) * x.roll(1, -1)


def timeless(x, index):
    """For grids whose times they round to integers for the network, as we do not."""
    return 0.6 * torch.tanh(x + 0.3)


def theirs(scheduler, net, x, steps=None, **options):
    """Their loop over the times that the scheduler has set; noise from seed 0."""
    generator = torch.Generator().manual_seed(0)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    for t in scheduler.timesteps[:steps]:
        value = net(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t.double())
        x = scheduler.step(value, t, x, **({"generator": generator} if takes else {}), **options).prev_sample
    return x


def ours(solver, net, x, times, diffusion=None, betas=BETAS, dtype=torch.float64):
    field = Field(lambda x_t, t: net(x_t, betas.index(t)[:, None, None]), betas, "noise")
    return walk(field, x, make_solver(solver, betas, diffusion), times, dtype)


def walk(field, x, solver, times, dtype=torch.float64):
    noise = Brownian(x, torch.Generator().manual_seed(0))
    noise.dtype = dtype
    return integrate(field, x, solver, torch.as_tensor(times, dtype=torch.float64), noise).x


def same(got, expected, tolerance=1e-5):
    assert ((got - expected).abs().max() / expected.abs().max()).item() < tolerance


def to_data(timesteps):
    return torch.cat((BETAS.time(timesteps.double()), torch.zeros(1, dtype=torch.float64)))


def final(name, **changes):
    return replace(SOLVERS[name], lower_order_final=True, **changes)


def made(name, **options):
    scheduler = getattr(diffusers, name)(**SD, **options)
    scheduler.set_timesteps(N)
    return scheduler


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim(spacing):
    scheduler = made("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
    times = to_data(scheduler.timesteps)
    torch.testing.assert_close(times, grids.ddpm(N, BETAS, spacing))
    if (
        spacing != "linspace"
    ):  # there they step by N // num_steps whatever the spacing: it is not the grid that they set
        same(ours("ddim", network, X, times), theirs(scheduler, network, X))
        scheduler = made("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
        same(ours("ddim", network, X, times, diffusion=0.6), theirs(scheduler, network, X, eta=0.6))


def test_ddpm():
    scheduler = made("DDPMScheduler", clip_sample=False)
    same(ours("ddpm", network, X, to_data(scheduler.timesteps)), theirs(scheduler, network, X))


def test_ddpm_with_x_0_clipped():
    scheduler = made("DDPMScheduler", clip_sample=True)
    field = Field(lambda x_t, t: network(x_t, BETAS.index(t)[:, None, None]), BETAS, "noise")

    def predict(x_t, t):
        found = field.predict(x_t, t)
        return replace(found, value=found.x_0.clamp(-1, 1), kind="data")

    got = walk(DerivedField(predict, BETAS, "data"), X, SOLVERS["ddpm"], to_data(scheduler.timesteps))
    same(got, theirs(scheduler, network, X))


SIGMAS = [
    ("EulerDiscreteScheduler", "ddim", {}),
    ("EulerAncestralDiscreteScheduler", "euler-ancestral", {}),
    ("LMSDiscreteScheduler", "lms", {}),
]


@pytest.mark.parametrize(("name", "solver", "options"), SIGMAS)
def test_schedulers_that_keep_x_over_alpha(name, solver, options):
    scheduler = made(name, timestep_spacing="trailing", **options)
    times = to_data(scheduler.timesteps)
    start = BETAS.alpha(times[0])
    same(ours(solver, network, X * start, times), theirs(scheduler, network, X))


def test_heun_discrete():
    scheduler = made("HeunDiscreteScheduler", timestep_spacing="trailing")
    times = to_data(scheduler.timesteps[::2])
    same(ours("edm-heun", network, X * BETAS.alpha(times[0]), times), theirs(scheduler, network, X))


def test_kdpm2_discrete():
    """Their timesteps are those of the interpolated sigmas, rounded, so the network has no time."""
    scheduler = made("KDPM2DiscreteScheduler", timestep_spacing="trailing")
    times = BETAS.t_from_log_snr(-2 * torch.unique(scheduler.sigmas[1::2].double()).flip(0).log())
    times = torch.cat((torch.ones(1, dtype=torch.float64), times))
    same(ours("dpm-2", timeless, X * BETAS.alpha(1.0), times), theirs(scheduler, timeless, X))


def test_kdpm2_ancestral_discrete():
    scheduler = made("KDPM2AncestralDiscreteScheduler", timestep_spacing="trailing")
    times = to_data(scheduler.timesteps[::2])
    same(ours("dpm-2-ancestral", timeless, X * BETAS.alpha(1.0), times), theirs(scheduler, timeless, X))


def test_ddim_inverse():
    scheduler = made("DDIMInverseScheduler", clip_sample=False, timestep_spacing="trailing")
    field = Field(lambda x_t, t: timeless(x_t, t), BETAS, "noise")  # they evaluate at the end of each step
    same(invert(field, X, "dpm-1", N, "trailing").x, theirs(scheduler, timeless, X))


@pytest.mark.parametrize(
    ("name", "solver"), [("EDMEulerScheduler", "ddim"), ("EDMDPMSolverMultistepScheduler", final("dpmpp-2m"))]
)
def test_edm_schedulers(name, solver):
    scheduler, edm = getattr(diffusers, name)(sigma_data=0.5, prediction_type="epsilon"), EDM(80.0)
    scheduler.set_timesteps(N)
    raw = Field(edm_network(lambda x, c_noise: network(x, c_noise.reshape(-1, 1, 1)), edm, 0.5), edm, edm_view(0.5))
    same(sample(raw, 80 * X, solver, N, grid="karras").x, theirs(scheduler, network, 80 * X))


def test_consistency_models_draw_all_noise_anew():
    """DDIM with a large eta is their sampling."""
    scheduler = diffusers.LCMScheduler(**SD)
    scheduler.set_timesteps(4)
    times = to_data(scheduler.timesteps)
    same(ours("ddim", network, X, times, diffusion=1e4), theirs(scheduler, network, X), 5e-5)

    flow = Field(lambda x_t, t: network(x_t, 1000 * t[:, None, None]), FLOW)
    scheduler = diffusers.FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    got = walk(flow, X, make_solver("ddim", FLOW, 1e4), scheduler.sigmas.double())
    same(got, theirs(scheduler, network, X))

    trig, scheduler = Trig(0.5), diffusers.SCMScheduler()
    scheduler.set_timesteps(2)
    x, generator = X / 2, torch.Generator().manual_seed(0)
    for t in scheduler.timesteps[:-1]:
        x, denoised = scheduler.step(timeless(x, t), t, x, generator=generator, return_dict=False)
    field = Field(lambda x_t, t: math.pi / 2 * timeless(x_t, t), trig)  # their time is pi t / 2
    times = (scheduler.timesteps.double() * 2 / math.pi).clamp(max=1)
    same(walk(field, X / 2, make_solver("ddim", trig, 1e4), times, dtype=torch.float32), denoised)


MULTISTEP = {
    "++2M": ({"solver_order": 2}, SOLVERS["dpmpp-2m"]),
    "++2M heun": ({"solver_order": 2, "solver_type": "heun"}, replace(SOLVERS["dpmpp-2m"], rule="exact")),
    "++3M": ({"solver_order": 3}, replace(SOLVERS["dpmpp-3m"], rule="third-halved")),
    "2M": (
        {"solver_order": 2, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        replace(SOLVERS["dpmpp-2m"], view="noise"),
    ),
    "sde 2M": ({"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, SOLVERS["dpmpp-2m-sde"]),
    "sde 2M heun": (
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        replace(SOLVERS["dpmpp-2m-sde"], rule="exact"),
    ),
}


@pytest.mark.parametrize("case", MULTISTEP)
def test_dpm_solver_multistep(case):
    options, solver = MULTISTEP[case]
    scheduler = made("DPMSolverMultistepScheduler", timestep_spacing="trailing", **options)
    times = to_data(scheduler.timesteps)
    if options.get("final_sigmas_type"):
        times[-1] = BETAS.time(0)
    got = ours(solver, network, X, times, dtype=torch.float32)  # they draw their noise so
    same(got, theirs(scheduler, network, X))


def test_three_nodes_with_noise_have_a_wrong_sign_of_theirs():
    """Their weight of the second difference is (1 - e^-2h - 2h) / (2h)^2 - 1/2, which must be + 1/2: it is -1 at h = 0,
    where it must be 0. With alpha times the difference given back, ours are theirs."""

    class Mended(diffusers.DPMSolverMultistepScheduler):
        def multistep_dpm_solver_third_order_update(self, outputs, **given):
            sigmas, (older, old, new) = self.sigmas[self.step_index - 2 : self.step_index + 2], outputs
            before, last, h = -sigmas.log().diff()
            second = ((new - old) / last - (old - older) / before) * h**2 / (last + before)
            alpha = self._sigma_to_alpha_sigma_t(sigmas[-1])[0]
            return super().multistep_dpm_solver_third_order_update(outputs, **given) + alpha * second

    def away(scheduler):
        scheduler = scheduler(
            **SD,
            solver_order=3,
            algorithm_type="sde-dpmsolver++",
            timestep_spacing="trailing",
            lower_order_final=False,
        )
        scheduler.set_timesteps(N)
        solver = replace(SOLVERS["dpmpp-3m-sde"], rule="third-halved")
        got = ours(solver, network, X, to_data(scheduler.timesteps), dtype=torch.float32)  # they draw their noise so
        return ((got - theirs(scheduler, network, X)).abs().max() / got.abs().max()).item()

    assert away(Mended) < 1e-5 or away(diffusers.DPMSolverMultistepScheduler) < 1e-5  # once they have mended it


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("num_steps", [5, N])  # with few steps the lower orders of the last ones count
def test_unipc(order, kind, num_steps):
    scheduler = made(
        "UniPCMultistepScheduler",
        timestep_spacing="trailing",
        solver_order=order,
        solver_type=kind,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(num_steps)
    times = to_data(scheduler.timesteps)
    times[-1] = BETAS.time(0)
    named = {(1, "bh2"): "unipc-1", (2, "bh1"): "unipc-bh1", (2, "bh2"): "unipc", (3, "bh2"): "unipc-3"}
    own = {"num_nodes": order, "corrector": order + 1, "rule": "bh1"}  # of those without a name
    solver = final(named[order, kind]) if (order, kind) in named else final("unipc", **own)
    same(ours(solver, network, X, times), theirs(scheduler, network, X))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler = made("DEISMultistepScheduler", timestep_spacing="trailing", solver_order=order)
    times = to_data(scheduler.timesteps)
    times[-1] = BETAS.t_from_log_snr(-2 * float(scheduler.sigmas[-1].double().log())) if scheduler.sigmas[-1] else 0.0
    same(ours(replace(SOLVERS["deis"], num_nodes=order), network, X, times), theirs(scheduler, network, X))


@pytest.mark.parametrize(("predictor", "corrector"), [(2, 2), (3, 4), (1, 2)])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_sa_solver(predictor, corrector, tau):
    scheduler = diffusers.SASolverScheduler(
        **SD,
        predictor_order=predictor,
        corrector_order=corrector,
        tau_func=lambda t: tau,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(N)
    times = to_data(scheduler.timesteps)
    times[-1] = BETAS.t_from_log_snr(-2 * float(scheduler.sigmas[-1].double().log())) if scheduler.sigmas[-1] else 0.0
    solver = final("sa-solver", num_nodes=predictor, corrector=corrector, diffusion=tau or None)
    tolerance = 1e-4 if predictor == 3 else 1e-5  # their weights of three and four nodes cancel, in float32
    same(ours(solver, network, X, times), theirs(scheduler, network, X), tolerance)


def test_dpm_solver_singlestep():
    """They take the stages from the grid; uniform in log-SNR, two of its steps are one of ours."""
    scheduler = made("DPMSolverSinglestepScheduler", solver_order=2, use_exponential_sigmas=True)
    times = BETAS.t_from_log_snr(-2 * scheduler.sigmas[:7:2].double().log())
    got = ours("dpmpp-2s", timeless, X, times)
    same(got, theirs(scheduler, timeless, X, steps=6))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler_on_its_twice_shifted_grid(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(N)
    times = twice_shifted(N, shift)
    torch.testing.assert_close(scheduler.sigmas.double(), times, rtol=1e-5, atol=1e-6)
    field = Field(lambda x_t, t: network(x_t, 1000 * t[:, None, None]), FLOW)
    same(sample(field, X, "euler", grid=times).x, theirs(scheduler, network, X))
    once = shift_time(torch.linspace(1, 1e-3, N, dtype=torch.float64), shift)
    assert (times[-2] > 2 * once[-1]) == (shift == 3.0)  # what a single shift would give


def test_flow_match_heun():
    """Their last step is Euler's whatever the network predicts, as if the velocity at t = 0 were not determined."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(N)
    times = torch.unique(scheduler.sigmas.double()).flip(0)
    field = Field(lambda x_t, t: network(x_t, 1000 * t[:, None, None]), FLOW)
    blind = DerivedField(field.predict, FLOW, "velocity", lambda t: t > 0)
    same(sample(blind, X, "heun", grid=times).x, theirs(scheduler, network, X))


def test_their_churn_arguments_do_nothing_for_a_flow():
    """s_churn of FlowMatchEuler is accepted and has no effect; ours has one."""
    runs = []
    for churn in (0.0, 40.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(N)
        runs.append(theirs(scheduler, network, X, s_churn=churn))
    torch.testing.assert_close(*runs)
    field = Field(lambda x_t, t: network(x_t, 1000 * t[:, None, None]), FLOW)
    seeds = [1, 2]
    ours_churned = [sample(field, X, replace(SOLVERS["edm-churn"], churn=c), N, generator=seeds).x for c in (0.0, 40.0)]
    assert not torch.allclose(*ours_churned)


@pytest.mark.parametrize(
    ("options", "solver"),
    [
        ({"solver_order": 2}, SOLVERS["dpmpp-2m"]),
        ({"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, SOLVERS["dpmpp-2m-sde"]),
    ],
)
def test_dpm_solver_on_flow_sigmas(options, solver):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **options
    )
    scheduler.set_timesteps(N)
    times = scheduler.sigmas.double()
    field = Field(lambda x_t, t: timeless(x_t, t), FLOW)
    got = walk(field, X, make_solver(solver, FLOW), times, dtype=torch.float32)
    same(got, theirs(scheduler, timeless, X))


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_sigma_grids(name):
    scheduler = made("EulerDiscreteScheduler", **{f"use_{name}_sigmas": True})
    low, high = (float(scheduler.sigmas[i]) for i in (-2, 0))
    times = getattr(grids, name)(N, BETAS, sigma_min=low, sigma_max=high)
    expected = BETAS.t_from_log_snr(-2 * scheduler.sigmas[:-1].double().log())
    torch.testing.assert_close(times[1:-1], expected[1:], rtol=1e-5, atol=1e-6)


def test_the_beta_grid_in_sigma():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    scheduler.set_timesteps(N)
    sigmas = scheduler.sigmas[:-1].double()
    expected = sigmas[-1] + (sigmas[0] - sigmas[-1]) * grids.beta(N - 1)
    torch.testing.assert_close(sigmas, expected, rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr():
    scheduler = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(BETAS.zero_terminal_snr().alpha_bar, expected, rtol=1e-4, atol=1e-7)
