"""Options of sampling: each is the one of `samplers`, acts where it says, and is refused where it cannot work."""

import pytest
import torch

import samplers
from mmdit.drawing import Drawing
from mmdit.sampling import Sampling
from mmdit.text_to_image import TextToImage
from tests.mmdit.test_text_to_image import PROMPTS, evaluations, pipe, pixels

__all__ = ["evaluations", "pipe"]  # fixtures


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        (dict(rule="apg"), samplers.apg),
        (dict(rule="cfg-zero"), samplers.cfg_zero),
        (dict(rescale=0.7), lambda on, off, scale: samplers.cfg(on, off, scale, rescale=0.7)),
    ],
    ids=["apg", "cfg-zero", "rescale"],
)
def test_every_rule_of_guidance_is_the_one_of_samplers(pipe, option, rule):
    trunk = pipe.model.transformer

    def field(prompts):
        condition = pipe.conditions(prompts)
        return samplers.Field(lambda x, t: trunk(x, t, *condition), samplers.RectifiedFlow())

    with torch.no_grad():
        guided = rule(field(PROMPTS[:2]), field([None, None]), 3.0)
        expected = samplers.sample(guided, pipe.noise([0, 1], 8, 12), "euler", 4).x
    how, seen = dict(solver="euler", num_steps=4, guidance=3.0), []
    pipe(PROMPTS[:2], **how, **option, callback=seen.append)
    torch.testing.assert_close(seen[-1].x_next, expected, rtol=1e-4, atol=1e-5)
    pipe(PROMPTS[:2], **how, callback=seen.append)
    assert (seen[-1].x_next - expected).abs().max() > 1e-3


def test_skip_layer_guidance_acts_in_its_steps_alone(evaluations, pipe):
    pipe(PROMPTS[:2], solver="euler", num_steps=5, guidance=3, skip_layers=[0], skip_steps=(0.0, 0.6))
    assert evaluations == [4, 4, 2, 4, 2, 4, 4]  # after the first step, before the fourth


def test_skip_layer_guidance_leads_away_from_the_model_without_the_layers(pipe):
    """One step: x_0 moves by the scale times what the layers add."""
    trunk, seen = pipe.model.transformer, []
    how = dict(solver="euler", num_steps=2, guidance=2.0, skip_steps=(0.0, 1.0))
    for scale in (0.0, 1.0, 3.0):
        last = []
        options = how | dict(skip_layers=[1], skip_scale=scale)
        pipe(PROMPTS[:1], **options, callback=lambda p, last=last: last.append(p))
        seen.append(last[1])
    x, t, (context, pooled, mask) = seen[0].x_t, torch.tensor([0.5]), pipe.conditions(PROMPTS[:1])
    with torch.no_grad():
        added = trunk(x, t, context, pooled, mask) - trunk(x, t, context, pooled, mask, [1])
    assert added.abs().max() > 0.01
    for one, scale in zip(seen, (0.0, 1.0, 3.0), strict=True):
        torch.testing.assert_close(one.x_next - seen[0].x_next, -0.5 * scale * added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", ["karras", "log-snr", "cosine", "diffusers"])
def test_grids_are_those_of_samplers_shifted(pipe, grid):
    shifted, seen = TextToImage(pipe.model, pipe.autoencoder, pipe.size, shift=3.0), []
    shifted(PROMPTS[:1], solver="euler", num_steps=3, grid=grid, callback=lambda p: seen.append(p.t_next))
    named = samplers.twice_shifted(3, 3.0) if grid == "diffusers" else samplers.time_grid(grid, 3, 3.0)
    assert seen == pytest.approx(named[1:].tolist())


def test_the_grid_of_diffusers_is_the_same_at_every_size(pipe):
    shifted, seen = TextToImage(pipe.model, pipe.autoencoder, pipe.size, shift=3.0), []
    how = dict(solver="euler", num_steps=3, grid="diffusers", height=16, width=24)
    shifted(PROMPTS[:1], **how, callback=lambda p: seen.append(p.t_next))
    assert seen == pytest.approx(samplers.twice_shifted(3, 3.0)[1:].tolist())


@pytest.mark.parametrize("solver", [name for name in samplers.solver_names() if name != "dopri5"])  # takes seconds
def test_every_solver_is_the_same_alone_and_in_a_batch(pipe, solver):
    how = dict(solver=solver, num_steps=6)
    how |= dict(diffusion="sin2") if solver in ("euler-maruyama", "stochastic-heun") else {}
    together = pixels(pipe(PROMPTS, seed=4, **how))
    assert abs(pixels(pipe(PROMPTS[2], seed=6, **how))[0] - together[2]).max() <= 2
    assert together.std() > 5


def test_noise_of_the_steps_is_not_the_noise_of_the_start(pipe):
    """An Euler-Maruyama step of a field that is still: what it adds is new noise."""
    still = samplers.Field(lambda x, t: torch.zeros_like(x), samplers.RectifiedFlow())
    how = Sampling(solver="euler-maruyama", diffusion="constant")
    drawing = Drawing(still, how, torch.tensor([0.9, 0.89], dtype=torch.float64), range(64))
    start = pipe.noise(range(64), 8, 12)
    added = drawing.from_noise(start[0]) - start
    correlation = torch.corrcoef(torch.stack([start.flatten(), added.flatten()]))[0, 1]
    assert 0.05 < added.std() < 0.2 and abs(correlation) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(guidence=3), "no option 'guidence' of sampling; did you mean guidance"),
        (dict(zzz=3), "no option 'zzz' of sampling; there are solver, num_steps"),
        (dict(rule="pag"), "rule is 'pag', expected one of cfg, apg, cfg-zero"),
        (dict(rule="apg", skip_layers=[1]), "goes with neither skip_layers nor rescale"),
        (dict(rescale=0.5, skip_layers=[1]), "do not go together"),
        (dict(skip_layers=[2]), r"names blocks \[2\], but there are blocks 0 to 1"),
        (dict(skip_layers=[1], skip_steps=(0.5, 0.1)), "skip_steps is"),
        (dict(grid="squared"), "squared"),
        (dict(grid="diffusers", num_steps=0), "num_steps"),
        (dict(diffusion="kl", solver="heun"), "'heun' solves the ODE and takes no diffusion"),
        (dict(rescale=2.0), "rescale"),
        (dict(interval=(0.6, 0.4)), "interval"),
        (dict(interval=0.5), "interval is 0.5, expected two finite numbers"),
        (dict(skip_steps=[0.1, "x"]), "skip_steps is .*, expected two finite numbers"),
        (dict(guidance=float("nan")), "guidance is nan, expected a finite number"),
        (dict(skip_scale="4"), "skip_scale is '4', expected a finite number"),
        (dict(skip_layers="01"), "skip_layers is '01', expected a list of whole numbers"),
        (dict(solver=["euler"]), r"solver is \['euler'\], expected one of"),
        (dict(rule=["cfg"]), "expected one of cfg, apg, cfg-zero"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[:1], **options)


def test_what_is_none_is_as_the_model_says(pipe):
    assert (pixels(pipe(PROMPTS, solver=None, num_steps=None)) == pixels(pipe(PROMPTS))).all()


def test_a_diffusion_of_the_defaults_goes_with_solvers_that_take_one():
    own = {"solver": "sa-solver", "diffusion": "sigma"}
    assert Sampling.of(own, {}).diffusion == "sigma"
    assert Sampling.of(own, {"solver": "euler-maruyama"}).diffusion == "sigma"
    assert Sampling.of(own, {"solver": "heun"}).diffusion is None
    assert Sampling.of(own, {"solver": samplers.SOLVERS["heun"]}).diffusion is None
    assert Sampling.of(own, {"solver": "heun", "diffusion": "kl"}).diffusion == "kl"  # and is refused
