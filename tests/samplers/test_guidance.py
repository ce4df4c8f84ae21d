"""Guidance: the algebra of classifier-free guidance in every view, its interval, rescale, and the batched pair."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import VIEWS, Cosine, Field, RectifiedFlow, cfg, cfg_batched, sample
from tests.oracles import GAUSSIAN, MIXTURE

FLOW = RectifiedFlow()
X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COND, UNCOND = GAUSSIAN.field(FLOW), MIXTURE.field(FLOW)


@given(scale=st.floats(-2, 10), t=st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
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


@pytest.mark.parametrize("t", [0.4, 0.9, torch.linspace(0.1, 0.9, 5, dtype=torch.float64)])
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


@pytest.mark.parametrize("options", [{"interval": (0.7, 0.3)}, {"interval": (-1, 1)}, {"rescale": 1.5}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} = "):
        cfg(COND, UNCOND, 4.0, **options)
