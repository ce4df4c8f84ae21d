"""Draws as a function of counters."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.seeds import generator_for


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=3))
def test_equal_counters_draw_equally(counters):
    assert torch.equal(*(torch.rand(3, generator=generator_for(*counters)) for _ in range(2)))


def test_no_two_counters_draw_alike():
    """Also where one only has zeros more, and where seed and counter are exchanged."""
    counters = [(s, *rest) for s in range(3) for n in range(3) for rest in itertools.product(range(3), repeat=n)]
    draws = {torch.rand(2, generator=generator_for(*c), dtype=torch.float64).sum().item() for c in counters}
    assert len(draws) == len(counters)
