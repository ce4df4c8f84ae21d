"""img2img and inpainting."""

from dataclasses import replace

import pytest
import torch

from samplers import SOLVERS, VE, BrownianTree, Cosine, Field, Inpaint, randn, sample, start_from, time_grid
from tests.oracles import MIXTURE
from tests.samplers.common import FLOW, normal

X = normal(4, 2)
KNOWN = MIXTURE.sample(4, torch.Generator().manual_seed(1))
MASK = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
SEEDS = [1, 2, 3, 4]


def test_the_start_is_the_noised_picture_and_the_rest_of_the_grid():
    x, ts = start_from(KNOWN, FLOW, 0.5, 10, generator=SEEDS)
    assert ts.tolist() == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    torch.testing.assert_close(x, FLOW.mix(KNOWN, randn(KNOWN.shape, SEEDS, torch.float64), 0.5))
    assert start_from(KNOWN.bfloat16(), FLOW, 0.5, 10, generator=SEEDS)[0].dtype == torch.bfloat16
    assert start_from(KNOWN, FLOW, 1.0, 10)[1][0] == 1 and len(start_from(KNOWN, FLOW, 0.01, 10)[1]) == 2
    assert len(start_from(KNOWN, FLOW, 1.0, grid=[0.9, 0.3, 0.0])[1]) == 3
    assert torch.equal(start_from(KNOWN, VE(), 1.0, 10, "karras")[1], time_grid("karras", 10, schedule=VE()))
    assert [len(start_from(KNOWN, FLOW, strength, 10)[1]) - 1 for strength in (0.64, 0.66)] == [6, 7]


def test_more_strength_goes_further_from_the_picture():
    def distance(strength):
        x, ts = start_from(KNOWN, FLOW, strength, 20, generator=SEEDS)
        return (sample(MIXTURE.field(FLOW), x, "heun", grid=ts).x - KNOWN).norm().item()

    assert distance(0.1) < distance(0.4) < distance(1.0)


@pytest.mark.parametrize("name", ["heun", "dpmpp-2m", "unipc", "edm-heun", "ddpm", "ab3"])
def test_the_known_part_is_kept_and_the_other_is_made(name):
    solver = Inpaint.of(SOLVERS[name], KNOWN, MASK, SEEDS)
    out = sample(MIXTURE.field(FLOW), X, solver, 12, generator=SEEDS).x
    torch.testing.assert_close(out[:, 0], KNOWN[:, 0])
    assert not torch.isclose(out[:, 1], KNOWN[:, 1]).any()


def test_the_known_part_is_on_its_path_at_every_step():
    solver = Inpaint.of(SOLVERS["euler"], KNOWN, MASK, SEEDS)
    seen = []
    sample(MIXTURE.field(Cosine()), X, solver, 5, callback=seen.append)
    assert len(seen) == 5
    for progress in seen:
        expected = Cosine().mix(KNOWN, solver.eps, progress.t_next)
        torch.testing.assert_close(progress.x_next[:, 0], expected[:, 0])


def test_the_first_state_has_the_known_part_too():
    seen = []
    solver = Inpaint.of("euler", KNOWN, MASK, SEEDS)
    sample(Field(lambda x_t, t: seen.append(x_t) or -x_t, FLOW), X, solver, grid=[0.7, 0.3])
    torch.testing.assert_close(seen[0][:, 0], FLOW.mix(KNOWN, solver.eps, 0.7)[:, 0])
    torch.testing.assert_close(seen[0][:, 1], X[:, 1])


@pytest.mark.parametrize(
    ("name", "diffusion"), [("euler-maruyama", "kl"), ("ddim", 0.5), ("langevin", 0.5), ("ddpm", None)]
)
def test_the_diffusion_is_the_inner_solver_s(name, diffusion):
    field, nothing = MIXTURE.field(FLOW), torch.zeros(1, 1)
    plain = sample(field, X, name, 8, diffusion=diffusion, generator=SEEDS).x
    held = sample(field, X, Inpaint.of(name, KNOWN, nothing, SEEDS), 8, diffusion=diffusion, generator=SEEDS).x
    torch.testing.assert_close(held, plain)
    assert not torch.allclose(plain, sample(field, X, "ddim", 8).x)


def test_masks_of_zero_and_one_and_between():
    field = MIXTURE.field(FLOW)

    def run(mask):
        return sample(field, X, Inpaint.of(SOLVERS["heun"], KNOWN, mask, SEEDS), 8).x

    torch.testing.assert_close(run(torch.zeros(1, 1)), sample(field, X, "heun", 8).x)
    torch.testing.assert_close(run(torch.ones(4, 2)), KNOWN)
    half = run(torch.full((4, 2), 0.5))
    assert not torch.allclose(half, KNOWN) and not torch.allclose(half, run(torch.zeros(1, 1)))


@pytest.mark.parametrize(("x", "known"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_known_data_of_another_dtype_than_x(x, known):
    solver = Inpaint.of("heun", KNOWN.to(known), MASK, SEEDS)
    out = sample(Field(lambda x_t, t: -x_t, FLOW), X.to(x), solver, 4).x
    assert out.dtype == x
    torch.testing.assert_close(out[:, 0], KNOWN[:, 0].to(x), rtol=1e-6, atol=1e-6)


def test_what_inpainting_says_of_itself_is_what_its_inner_solver_says():
    solver = Inpaint.of("heun", KNOWN, MASK.bool(), SEEDS)
    out = sample(MIXTURE.field(FLOW), X, solver, 4)
    assert (solver.order, solver.evals_per_step) == (2, 2) and out.num_evals == 8
    torch.testing.assert_close(out.x[:, 0], KNOWN[:, 0])
    with pytest.raises(ValueError, match="'inpaint-langevin' draws more in a step than a BrownianTree"):
        langevin = replace(SOLVERS["langevin"], num_corrections=2)
        sample(MIXTURE.field(FLOW), X, Inpaint.of(langevin, KNOWN, MASK), 4, generator=BrownianTree(X))


def test_what_cannot_be_done_is_refused():
    for strength in (0, 1.5):
        with pytest.raises(ValueError, match=f"strength = {strength}"):
            start_from(KNOWN, FLOW, strength)
    with pytest.raises(ValueError, match=r"mask \(3, 1\) does not fit"):
        Inpaint.of(SOLVERS["heun"], KNOWN, torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"mask \(4,\) does not fit"):
        Inpaint.of(SOLVERS["heun"], KNOWN, torch.ones(4))
    for value in (1.5, -0.5):
        with pytest.raises(ValueError, match="the mask leaves"):
            Inpaint.of(SOLVERS["heun"], KNOWN, torch.full((4, 2), value))
    with pytest.raises(ValueError, match="'inpaint-heun' solves the ODE"):
        sample(MIXTURE.field(FLOW), X, Inpaint.of("heun", KNOWN, MASK), diffusion=0.5)
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        Inpaint.of("huen", KNOWN, MASK)
    with pytest.raises(ValueError, match=r"x is torch.int64 \(4, 2\): give a floating tensor"):
        start_from(KNOWN.long(), FLOW, 0.5)
    with pytest.raises(ValueError, match=r"x is \(1, 2\), the known data \(4, 2\)"):
        sample(MIXTURE.field(FLOW), X[:1], Inpaint.of("heun", KNOWN, MASK))
