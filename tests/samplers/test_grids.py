"""Grids: the uniform one, the resolution shift, own times, and the refusal of what is no grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import GRIDS, RectifiedFlow, resolution_shift, shift_time, time_grid, uniform

inside = st.floats(0.01, 0.99)
shifts = st.floats(0.1, 10)


def test_uniform():
    torch.testing.assert_close(uniform(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


@pytest.mark.parametrize("name", GRIDS)
@given(num_steps=st.integers(1, 200), shift=shifts)
@settings(max_examples=20, deadline=None)
def test_every_named_grid_falls_from_1_to_0(name, num_steps, shift):
    ts = time_grid(name, num_steps, shift)
    assert len(ts) == num_steps + 1 and ts[0] == 1 and ts[-1] == 0
    assert (ts.diff() < 0).all() and ts.dtype == torch.float64


@given(t=inside, shift=shifts)
@settings(max_examples=20, deadline=None)
def test_shift_lowers_the_log_snr_by_twice_its_log(t, shift):
    flow = RectifiedFlow()
    moved = flow.log_snr(shift_time(t, shift)) - flow.log_snr(t)
    assert moved.item() == pytest.approx(-2 * math.log(shift), abs=1e-6)


@given(t=inside, shift=shifts)
@settings(max_examples=20, deadline=None)
def test_shift_is_undone_by_its_reciprocal(t, shift):
    assert shift_time(shift_time(t, shift), 1 / shift) == pytest.approx(t)


def test_shift_of_sd3():
    assert resolution_shift(4096, 256) == 4
    assert shift_time(0.5, 3.0) == 0.75
    torch.testing.assert_close(time_grid("uniform", 2, 3.0), torch.tensor([1, 0.75, 0], dtype=torch.float64))


def test_own_times():
    own = torch.tensor([0.9, 0.3, 0.1])
    assert torch.equal(time_grid(own, 20), own.double())
    assert time_grid([1.0, 0.25, 0.0], 20).tolist() == [1, 0.25, 0]


@pytest.mark.parametrize(
    ("grid", "num_steps", "message"),
    [
        ("uniform", 0, "num_steps = 0"),
        ("uniform", -3, "num_steps = -3"),
        ("uniform", 2.5, "num_steps = 2.5"),
        ("unifrom", 5, "did you mean 'uniform'"),
        (torch.tensor([0.0, 0.5, 1.0]), 5, "decrease"),
        (torch.tensor([1.0, 0.5, 0.5]), 5, "decrease"),
        (torch.tensor([1.0, math.nan]), 5, "decrease"),
        (torch.tensor([1.2, 0.5]), 5, "lie in"),
        (torch.tensor([1.0, -0.5]), 5, "lie in"),
        (torch.tensor([1, 0]), 5, "floating"),
        (torch.tensor([1.0]), 5, "at least two"),
        (torch.ones(2, 2), 5, "at least two"),
    ],
)
def test_what_is_no_grid_is_refused(grid, num_steps, message):
    with pytest.raises(ValueError, match=message):
        time_grid(grid, num_steps)


def test_a_shift_must_be_positive():
    with pytest.raises(ValueError, match="shift = 0"):
        shift_time(0.5, 0)
    with pytest.raises(ValueError, match="tokens 0"):
        resolution_shift(0, 1)
