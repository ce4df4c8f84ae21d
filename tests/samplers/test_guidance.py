"""Guidance: the algebra of classifier-free guidance in every view, its interval, rescale, and the batched pair."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import (
    VIEWS,
    Cosine,
    DerivedField,
    Field,
    apg,
    cfg,
    cfg_batched,
    cfg_text_image,
    cfg_zero,
    push_away,
    sample,
)
from tests.oracles import GAUSSIAN, MIXTURE
from tests.samplers.common import FLOW, normal

X = normal(5, 2)
COND, UNCOND = GAUSSIAN.field(FLOW), MIXTURE.field(FLOW)


@given(scale=st.floats(-2, 10), t=st.floats(0.05, 0.95))
@settings(max_examples=8, deadline=None)
def test_guidance_is_the_same_combination_in_every_view(scale, t):
    guided, on, off = cfg(COND, UNCOND, scale).predict(X, t), COND.predict(X, t), UNCOND.predict(X, t)
    for kind in VIEWS:
        expected = off.view(kind) + scale * (on.view(kind) - off.view(kind))
        torch.testing.assert_close(guided.view(kind), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("first", "second"), [*itertools.product(["velocity", "noise", "data"], repeat=2)])
def test_fields_may_predict_different_things(first, second):
    guided = cfg(GAUSSIAN.field(FLOW, first), MIXTURE.field(FLOW, second), 4.0)
    torch.testing.assert_close(guided.v(X, 0.4), cfg(COND, UNCOND, 4.0).v(X, 0.4))


def test_fields_may_have_different_schedules():
    guided = cfg(COND, MIXTURE.field(Cosine()), 4.0)
    torch.testing.assert_close(guided.v(X, 0.4), cfg(COND, UNCOND, 4.0).v(X, 0.4))


def test_scale_one_is_the_conditional_field_alone():
    assert cfg(COND, UNCOND, 1.0) is COND
    torch.testing.assert_close(cfg(COND, UNCOND, 0.0).v(X, 0.3), UNCOND.v(X, 0.3))


def test_interval_includes_its_ends_and_evaluates_nothing_outside():
    guided, full = cfg(COND, UNCOND, 4.0, interval=(0.3, 0.6)), cfg(COND, UNCOND, 4.0)
    for t, on in ((0.29, False), (0.3, True), (0.45, True), (0.6, True), (0.61, False)):
        torch.testing.assert_close(guided.v(X, t), (full if on else COND).v(X, t))
        assert guided.predict(X, t).num_evals == (2 if on else 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda on, off: cfg(on, off, 3.0, rescale=0.5),
        lambda on, off: apg(on, off, 3.0, norm=0.3),
        lambda on, off: cfg_zero(on, off, 3.0),
        lambda on, off: cfg_text_image(on, off, off, 3.0, 2.0),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 3)])
def test_samples_are_guided_each_by_itself(make, shape):
    guided = make(Field(lambda x, t: x + 1, FLOW), Field(lambda x, t: x**2 - 0.5, FLOW))
    x = normal(*shape)
    alone = torch.cat([guided.v(x[i : i + 1], 0.5) for i in range(5)])
    torch.testing.assert_close(guided.v(x, 0.5), alone)
    assert alone.isfinite().all()


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_times_of_a_grid_are_ends_to_rounding(num_steps):
    """The grid's 0.3 is not the number 0.3 for all numbers of steps, nor is that of float32."""
    for k in range(1, num_steps):
        below, above = (cfg(COND, UNCOND, 4.0, interval=i) for i in ((0.0, k / num_steps), (k / num_steps, 1.0)))
        counts = [sample(guided, X, "euler", num_steps).num_evals - num_steps for guided in (below, above)]
        assert counts == [k, num_steps - k + 1]
    for t in (0.1, 0.3):
        guided, time = cfg(COND, UNCOND, 4.0, interval=(0.1, 0.3)), torch.full((5,), t)
        torch.testing.assert_close(guided.v(X.float(), time), guided.v(X.float(), t))


def test_what_is_no_field_or_interval_is_refused():
    for make in (
        lambda: cfg(COND, None, 3.0),
        lambda: cfg_batched(COND, None, 3.0),
        lambda: push_away(COND, None, UNCOND, 3.0, 1.0),
        lambda: push_away(COND, COND, None, 3.0, 1.0),
    ):
        with pytest.raises(ValueError, match="guidance by None: give samplers.Field"):
            make()
    with pytest.raises(ValueError, match="interval = 0.5: give"):
        cfg(COND, UNCOND, 3.0, interval=0.5)


def test_interval_with_a_time_per_sample():
    t = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.9], dtype=torch.float64)
    got = cfg(COND, UNCOND, 4.0, interval=(0.3, 0.6)).v(X, t)
    inside = torch.tensor([False, True, True, True, False])[:, None]
    torch.testing.assert_close(got, torch.where(inside, cfg(COND, UNCOND, 4.0).v(X, t), COND.v(X, t)))


def test_rescale_brings_back_the_spread_of_the_conditional_prediction():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    cond, uncond = Field(lambda x_t, t: 0.7 * x_t, FLOW), Field(lambda x_t, t: x_t.flip(1), FLOW)
    spread = [cfg(cond, uncond, 5.0, rescale=phi).v(x, 0.5).std((1, 2, 3)) for phi in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(spread[2], cond.v(x, 0.5).std((1, 2, 3)))
    torch.testing.assert_close(spread[1], (spread[0] + spread[2]) / 2)
    assert (spread[0] > spread[2]).all()


@pytest.mark.parametrize("t", [0.4, 0.9, torch.tensor(0.5), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)])
def test_a_batched_pair_is_the_two_fields(t):
    calls = []

    def both(x_t, t):
        calls.append(len(x_t))
        (x_on, x_off), (t_on, t_off) = x_t.chunk(2), t.chunk(2)
        return torch.cat((COND.v(x_on, t_on), UNCOND.v(x_off, t_off)))

    options = {"interval": (0.0, 0.7), "rescale": 0.3}
    pair, apart = cfg_batched(COND, Field(both, FLOW), 4.0, **options), cfg(COND, UNCOND, 4.0, **options)
    torch.testing.assert_close(pair.v(X, t), apart.v(X, t))
    assert calls == ([] if isinstance(t, float) and t > 0.7 else [10])
    calls.clear()
    assert sample(pair, X, "heun", 5).num_evals == sample(apart, X, "heun", 5).num_evals
    torch.testing.assert_close(sample(pair, X, "heun", 5).x, sample(apart, X, "heun", 5).x)


@pytest.mark.parametrize("scale", [torch.ones(5), float("nan"), "4", None])
def test_a_scale_is_one_number(scale):
    for guide in (cfg, cfg_batched, apg, cfg_zero):
        with pytest.raises(ValueError, match="scale = .*: give a finite number"):
            guide(COND, UNCOND, scale)
    with pytest.raises(ValueError, match="image_scale = .*: give a finite number"):
        cfg_text_image(COND, UNCOND, UNCOND, 2.0, scale)
    with pytest.raises(ValueError, match="weak_scale = .*: give a finite number"):
        push_away(COND, COND, UNCOND, 2.0, scale)


def test_a_scale_may_be_learned():
    scale = torch.tensor(3.0, requires_grad=True)
    cfg(COND, UNCOND, scale).v(X, 0.4).sum().backward()
    torch.testing.assert_close(scale.grad, (COND.v(X, 0.4) - UNCOND.v(X, 0.4)).sum().float())


@pytest.mark.parametrize("options", [{"interval": (0.7, 0.3)}, {"interval": (-1, 1)}, {"rescale": 1.5}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} = "):
        cfg(COND, UNCOND, 4.0, **options)


SHAPE = (3, 2, 4, 4)
Z = normal(*SHAPE, seed=1)


def linear_field(seed):
    """A field whose velocity is a fixed random one, plus a little of x_t."""
    v = normal(*SHAPE, seed=seed)
    return Field(lambda x_t, t: v[: len(x_t)] + 0.1 * x_t, FLOW)


A, B, C = (linear_field(seed) for seed in (2, 3, 4))
DIMS = (1, 2, 3)


def test_apg_with_all_of_the_parallel_part_is_cfg():
    torch.testing.assert_close(apg(A, B, 5.0, parallel=1.0).v(Z, 0.5), cfg(A, B, 5.0).v(Z, 0.5))
    assert apg(A, B, 1.0) is A


def test_apg_adds_what_is_orthogonal_to_the_conditional_data():
    on, guided = A.x_0(Z, 0.5), apg(A, B, 5.0).x_0(Z, 0.5)
    torch.testing.assert_close(((guided - on) * on).sum(DIMS), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    half = apg(A, B, 5.0, parallel=0.5).x_0(Z, 0.5)
    torch.testing.assert_close(half, (guided + cfg(A, B, 5.0).x_0(Z, 0.5)) / 2)


def test_apg_shortens_the_difference():
    on = A.x_0(Z, 0.5)
    long, short = (apg(A, B, 2.0, parallel=1.0, norm=norm).x_0(Z, 0.5) - on for norm in (1e9, 0.3))
    torch.testing.assert_close(short.square().sum(DIMS).sqrt(), torch.full((3,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(long, A.x_0(Z, 0.5) - B.x_0(Z, 0.5))


def test_apg_remembers_the_difference_until_time_rises():
    field = apg(A, B, 2.0, parallel=1.0, momentum=-0.5)
    first, second = field.x_0(Z, 0.8), field.x_0(Z, 0.6)
    plain = cfg(A, B, 2.0)
    torch.testing.assert_close(first, plain.x_0(Z, 0.8))
    before = A.x_0(Z, 0.8) - B.x_0(Z, 0.8)
    torch.testing.assert_close(second, plain.x_0(Z, 0.6) - 0.5 * before)
    third = plain.x_0(Z, 0.5) - 0.5 * (A.x_0(Z, 0.6) - B.x_0(Z, 0.6) - 0.5 * before)  # of all times before
    torch.testing.assert_close(field.x_0(Z, 0.5), third)
    torch.testing.assert_close(field.x_0(Z, 1.0), plain.x_0(Z, 1.0))


def test_apg_remembers_a_time_per_sample_by_its_latest():
    field = apg(A, B, 2.0, parallel=1.0, momentum=-0.5)
    first, second = (torch.tensor(ts, dtype=torch.float64) for ts in ([0.9, 0.5, 0.5], [0.8, 0.6, 0.5]))
    field.x_0(Z, first)
    expected = cfg(A, B, 2.0).x_0(Z, second) - 0.5 * (A.x_0(Z, first) - B.x_0(Z, first))
    torch.testing.assert_close(field.x_0(Z, second), expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_apg_is_the_same_in_every_run_of_one_step(solver):
    field = apg(A, B, 2.0, momentum=-0.5)
    first = sample(field, Z, solver, 1).x
    torch.testing.assert_close(sample(field, Z, solver, 1).x, first, rtol=0, atol=0)


@pytest.mark.parametrize(
    "around",
    [
        lambda field: field,
        lambda field: field.on(Cosine()),
        lambda field: cfg(A, field, 2.0),
        lambda field: push_away(field, halves(A, B), C, 2.0, 1.0, (0.0, 0.0)),
        lambda field: push_away(A, halves(A, B), field, 2.0, 1.0),
    ],
)
def test_apg_forgets_a_run_that_was_broken_off(around):
    """Where the next one begins below it, time has not risen; also within other fields."""

    def break_off(progress):
        raise KeyboardInterrupt

    def run():
        return sample(field, Z, "euler", grid=[0.7, 0.4, 0.1]).x

    field = around(apg(A, B, 2.0, momentum=-0.5))
    first = run()
    with pytest.raises(KeyboardInterrupt):
        sample(field, Z, "euler", grid=[0.9, 0.8, 0.0], callback=break_off)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)


def test_apg_asked_twice_at_one_time_answers_the_same():
    field = apg(A, B, 2.0, momentum=-0.5)
    field.x_0(Z, 0.8)
    torch.testing.assert_close(field.x_0(Z, 0.6), field.x_0(Z, 0.6), rtol=0, atol=0)
    other = field.x_0(Z[:2], 0.4)  # a batch of another size has nothing to remember
    torch.testing.assert_close(other, apg(A, B, 2.0).x_0(Z[:2], 0.4), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "guide",
    [
        lambda on, off: cfg(on, off, 4.0, rescale=0.7),
        lambda on, off: apg(on, off, 4.0, norm=15.0),
        lambda on, off: cfg_zero(on, off, 4.0),
        lambda on, off: cfg_text_image(on, off, on, 4.0, 1.5),
    ],
)
def test_a_large_picture_in_half_precision(guide, dtype):
    """Its 65536 numbers have a squared length beyond the largest number of float16."""
    x = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    guided = guide(Field(lambda x, t: 2 * x, FLOW), Field(lambda x, t: 0.5 * x.abs(), FLOW))
    got, expected = guided.v(x, 0.5), guided.v(x.float(), 0.5)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "guide", [lambda on, off: cfg(on, off, 4.0, rescale=0.7), lambda on, off: cfg_zero(on, off, 4.0)]
)
def test_a_network_that_gives_zeros_is_guided_to_zeros(guide, dtype):
    """As one does whose last layer begins at zero."""
    zeros = Field(lambda x, t: 0 * x, FLOW)
    assert not guide(zeros, zeros).v(Z.to(dtype), 0.5).any()


def test_cfg_zero_fits_the_unconditional_velocity():
    on, off = A.v(Z, 0.5), B.v(Z, 0.5)
    fit = ((on * off).sum(DIMS) / (off**2).sum(DIMS))[:, None, None, None]
    torch.testing.assert_close(cfg_zero(A, B, 4.0).v(Z, 0.5), fit * off + 4 * (on - fit * off))
    twice = Field(lambda x_t, t: 2 * A.v(x_t, t), FLOW)
    torch.testing.assert_close(cfg_zero(A, twice, 4.0).v(Z, 0.5), on)  # a multiple of cond is no guidance


def test_cfg_zero_does_not_move_at_the_start():
    assert not cfg_zero(A, B, 4.0).v(Z, 1.0).any() and cfg_zero(A, B, 4.0).v(Z, 0.99).any()
    assert not cfg_zero(A, B, 4.0, zero_from=0.9).v(Z, 0.95).any()
    assert cfg_zero(A, B, 4.0, zero_from=None).v(Z, 1.0).any()
    t = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    assert cfg_zero(A, B, 4.0).v(Z, t).flatten(1).any(1).tolist() == [False, True, False]


def test_two_conditions_are_guided_one_after_the_other():
    full, no_text, no_image = A.v(Z, 0.5), B.v(Z, 0.5), C.v(Z, 0.5)
    text = no_text + 4 * (full - no_text)
    both = no_image + 2 * (text - no_image)
    torch.testing.assert_close(cfg_text_image(A, B, C, 4.0, 2.0, renorm="none").v(Z, 0.5), both)
    torch.testing.assert_close(cfg_text_image(A, B, C, 4.0, 1.0, renorm="none").v(Z, 0.5), text)
    counts = [cfg_text_image(A, B, C, *s).predict(Z, 0.5).num_evals for s in ((4.0, 2.0), (4.0, 1.0), (1.0, 2.0))]
    assert counts == [3, 2, 2] and cfg_text_image(A, B, C, 1.0, 1.0) is A


def test_two_conditions_are_renormed_in_the_velocity_whatever_is_predicted():
    def guided(kind):
        fields = (Field(lambda x, t, f=f: f.predict(x, t).view(kind), FLOW, kind) for f in (A, B, C))
        return cfg_text_image(*fields, 4.0, 2.0).v(Z, 0.5)

    torch.testing.assert_close(guided("data"), guided("velocity"))


def test_renorm_never_lengthens():
    guided = [cfg_text_image(A, B, C, 0.5, 0.9, renorm=how).v(Z, 0.5) for how in ("global", "none")]
    assert (guided[1].flatten(1).norm(dim=1) < A.v(Z, 0.5).flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(*guided)


def test_renorm_brings_back_the_length():
    full = A.v(Z, 0.5)

    def run(renorm, least=0.0, image=2.0):
        return cfg_text_image(A, B, C, 4.0, image, renorm=renorm, renorm_min=least).v(Z, 0.5)

    torch.testing.assert_close(run("global").square().sum(DIMS), full.square().sum(DIMS))
    assert (run("channel").square().sum(1) <= full.square().sum(1) + 1e-9).all()
    torch.testing.assert_close(run("text-channel", image=1.0), run("channel", image=1.0))
    assert not torch.allclose(run("text-channel"), run("channel"))
    text, off = run("channel", image=1.0), C.v(Z, 0.5)  # the text's part is brought back, and the image's is not
    torch.testing.assert_close(run("text-channel"), off + 2 * (text - off))
    torch.testing.assert_close(run("global", least=1.0), run("none"))
    alone = cfg_text_image(A, B, C, 4.0, 2.0).v(Z[:1], 0.5)  # per sample: alone as in the batch
    torch.testing.assert_close(alone, run("global")[:1])


@pytest.mark.parametrize("make", [apg, cfg_zero, lambda a, b, s, **o: cfg_text_image(a, b, C, s, 2.0, **o)])
def test_every_guidance_has_an_interval(make):
    guided, full = make(A, B, 4.0, interval=(0.3, 0.6)), make(A, B, 4.0)
    for t, on in ((0.29, False), (0.3, True), (0.6, True), (0.61, False)):
        torch.testing.assert_close(guided.v(Z, t), (full if on else A).v(Z, t))
    with pytest.raises(ValueError, match="interval = "):
        make(A, B, 4.0, interval=(0.7, 0.3))


def test_a_guided_field_sees_what_its_parts_see():
    data = MIXTURE.field(FLOW, "data")
    assert cfg(COND, UNCOND, 4.0).determines_velocity(0.0)
    assert not cfg(COND, data, 4.0).determines_velocity(0.0) and not cfg(data, COND, 4.0).determines_velocity(0.0)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="norm = 0"):
        apg(A, B, 2.0, norm=0.0)
    with pytest.raises(ValueError, match="did you mean 'global'"):
        cfg_text_image(A, B, C, 2.0, 2.0, renorm="gloabl")
    with pytest.raises(ValueError, match="renorm_min = 2"):
        cfg_text_image(A, B, C, 2.0, 2.0, renorm_min=2.0)


# --- two weaker models --------------------------------------------------------------------------------------------


def halves(first, second):
    """Both fields behind one network, which is given each sample twice."""

    def network(x, t):
        (x_1, x_2), (t_1, t_2) = x.chunk(2), t.chunk(2)
        return torch.cat([first.v(x_1, t_1), second.v(x_2, t_2)])

    return Field(network, FLOW)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_push_away_adds_the_difference_to_the_weak_model_within_its_interval(t):
    weak = MIXTURE.field(FLOW, "noise")
    guided = push_away(COND, halves(COND, UNCOND), weak, 3.0, 1.5, (0.4, 1.0), (0.3, 0.7))
    expected = cfg(COND, UNCOND, 3.0, (0.4, 1.0)).v(X, t)
    if t == 0.5:
        expected = expected + 1.5 * (COND.v(X, t) - weak.v(X, t))
    torch.testing.assert_close(guided.v(X, t), expected)
    assert guided.predict(X, t).num_evals == {0.2: 1, 0.5: 3, 0.8: 2}[t]


@pytest.mark.parametrize(
    ("scales", "interval", "evals"), [((3.0, 1.5), (0.6, 1.0), 2), ((1.0, 1.5), (0, 1), 2), ((3.0, 0.0), (0, 1), 2)]
)
def test_push_away_evaluates_only_what_counts(scales, interval, evals):
    calls = []

    def told(name, field):
        return Field(lambda x, t: calls.append(name) or field.v(x, t), FLOW)

    pair = told("pair", halves(COND, UNCOND))
    guided = push_away(told("cond", COND), pair, told("weak", UNCOND), *scales, interval)
    prediction = guided.predict(X, 0.5)
    difference = COND.v(X, 0.5) - UNCOND.v(X, 0.5)
    expected = cfg(COND, UNCOND, scales[0], interval).v(X, 0.5) + scales[1] * difference
    torch.testing.assert_close(prediction.v, expected)
    assert prediction.num_evals == evals
    assert calls == (["pair"] if scales[1] == 0 else ["cond", "weak"])


def test_push_away_takes_a_weak_model_of_another_schedule_and_sees_what_it_sees():
    def guided(weak):
        return push_away(COND, halves(COND, UNCOND), weak, 3.0, 1.5)

    torch.testing.assert_close(guided(MIXTURE.field(Cosine())).v(X, 0.5), guided(UNCOND).v(X, 0.5))
    assert guided(UNCOND).determines_velocity(0.0)
    assert not guided(MIXTURE.field(FLOW, "data")).determines_velocity(0.0)


def test_a_pair_begins_anew_with_each_solution():
    begun, pair = [], halves(COND, UNCOND)
    pair = DerivedField(pair.predict, FLOW, "velocity", begin=lambda: begun.append(1))
    for guided in (cfg_batched(COND, pair, 3.0), push_away(COND, pair, UNCOND, 3.0, 1.5)):
        begun.clear()
        sample(guided, X, "euler", 3)
        assert begun == [1]


def test_a_solver_does_not_look_where_the_pair_cannot_see():
    data = MIXTURE.field(FLOW, "data")
    for guided in (cfg_batched(COND, data, 3.0), push_away(COND, data, UNCOND, 3.0, 1.5)):
        assert not guided.determines_velocity(0.0) and guided.determines_velocity(0.1)
    for guided in (cfg_batched(COND, data, 1.0), push_away(COND, data, UNCOND, 1.0, 1.5)):  # the pair is not asked
        assert guided.determines_velocity(0.0)


def test_push_away_with_a_time_per_sample():
    guided = push_away(COND, halves(COND, UNCOND), GAUSSIAN.field(FLOW, "noise"), 3.0, 1.5, (0.4, 1.0), (0.3, 0.7))
    ts = torch.tensor([0.2, 0.35, 0.5, 0.8, 1.0], dtype=torch.float64)
    expected = torch.stack([guided.v(X, t)[i] for i, t in enumerate(ts.tolist())])
    torch.testing.assert_close(guided.v(X, ts), expected)
    assert sample(guided, X, "dopri5").x.isfinite().all()


def test_push_away_outside_of_guidance_starts_from_the_conditional_field():
    guided = push_away(COND, halves(COND, UNCOND), UNCOND, 3.0, 1.5, (0.6, 1.0), (0.0, 1.0))
    torch.testing.assert_close(guided.v(X, 0.5), COND.v(X, 0.5) + 1.5 * (COND.v(X, 0.5) - UNCOND.v(X, 0.5)))
    with pytest.raises(ValueError, match="interval"):
        push_away(COND, halves(COND, UNCOND), UNCOND, 3.0, 1.5, weak_interval=(0.7, 0.2))


# --- a pair on another schedule -----------------------------------------------------------------------------------


def test_a_pair_may_have_another_schedule():
    other = Cosine()

    def network(x, t):
        (x_1, x_2), (t_1, t_2) = x.chunk(2), t.chunk(2)
        return torch.cat([GAUSSIAN.field(other).v(x_1, t_1), MIXTURE.field(other).v(x_2, t_2)])

    pair, expected = Field(network, other), cfg(COND, UNCOND, 3.0).v(X, 0.4)
    torch.testing.assert_close(cfg_batched(COND, pair, 3.0).v(X, 0.4), expected)
    weak = COND.v(X, 0.4) - UNCOND.v(X, 0.4)
    torch.testing.assert_close(push_away(COND, pair, UNCOND, 3.0, 1.5).v(X, 0.4), expected + 1.5 * weak)


def test_cfg_zero_fits_in_the_velocity_whatever_is_predicted():
    fields = [Field(lambda x, t, f=f: f.predict(x, t).x_0, FLOW, "data") for f in (A, B)]
    torch.testing.assert_close(cfg_zero(*fields, 4.0).v(Z, 0.5), cfg_zero(A, B, 4.0).v(Z, 0.5))
