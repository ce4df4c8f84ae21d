"""Muon's steps against torch's own, and several processes against one."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.processes import together
from training.muon import ROUNDS, Axis, Matrix, Muon, Team, _chunks, assign_owners, matrices, newton_schulz


def test_newton_schulz_keeps_the_singular_vectors_and_evens_the_values():
    for rows, columns in ((8, 8), (24, 6), (6, 24)):
        x = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
        u, values, v = torch.linalg.svd(x, full_matrices=False)
        core = u.mT @ newton_schulz(x).float() @ v.mT  # diagonal where the vectors are kept
        evened = torch.diagonal(core, dim1=-2, dim2=-1)
        wide = values > 0.1 * values[:, :1]  # the rounds lift smaller ones only part of the way
        assert evened[wide].min() > 0.6 and evened.max() < 1.34
        assert (core - torch.diag_embed(evened)).abs().max() < 0.05


def test_each_round_is_the_best_one_for_what_the_rounds_before_leave():
    """An odd quintic is nearest to 1 where it errs as far at four points, below and above in turn (Chebyshev)."""
    low, high = 0.002, 1.0
    for a, b, c in ROUNDS:
        x = np.geomspace(low, 1.01 * high, 100_001)
        error = a * x + b * x**3 + c * x**5 - 1
        most = np.abs(error).max()
        sides = np.sign(error[np.abs(error) > 0.99 * most])
        assert sides[np.r_[True, sides[1:] != sides[:-1]]].tolist() == [-1, 1, -1, 1]
        low, high = 1 - most, 1 + most
    assert (low, high) == pytest.approx((0.666, 1.334), abs=1e-3)


@pytest.mark.parametrize("shape", [(12, 12), (48, 12), (12, 48)])
@mock.patch("training.muon.ROUNDS", [(3.4445, -4.7750, 2.0315)] * 5)  # Jordan's, which torch has
def test_a_step_of_muon_is_that_of_torch(shape):
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = Muon([{"params": [ours], "weight_decay": 0.3, "muon": True}], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.3, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * 0.2 * 48**0.5 * 3 * 0.02)  # theirs rounds to bf16


def test_a_step_does_not_hang_on_the_size_of_the_gradient():
    """Nor is a gradient of zeros, as a layer before a zero-initialised one has at first, a step of NaN."""
    gradient = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

    def step(size):
        w = nn.Parameter(torch.zeros(12, 6))
        w.grad = size * gradient
        Muon([{"params": [w], "weight_decay": 0.0, "muon": True}], lr=1.0, betas=(0.9, 0.99), eps=1e-8).step()
        return w.detach()

    for size in (1e-3, 1e3):
        torch.testing.assert_close(step(size), step(1.0), rtol=0, atol=0.01)
    assert not step(0.0).any()


def test_a_turn_has_as_many_weights_as_fit():
    weights = [(torch.empty(n), {}) for n in (10, 4, 4, 4, 9, 3, 5, 1)]
    assert [[len(w) for w, _ in turn] for turn in _chunks(weights, 8)] == [[10], [4, 4], [4], [9], [3, 5], [1]]


def test_muon_takes_the_parts_of_a_stacked_matrix_apart():
    """Queries, keys and values in one matrix move as they would in three."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 8, 8, generator=generator) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    moved = []
    for given in (gradients.reshape(1, 24, 8), gradients):
        weights = [nn.Parameter(torch.zeros_like(g)) for g in given]
        for w, g in zip(weights, given, strict=True):
            w.grad = g.clone()
        Muon([{"params": weights, "weight_decay": 0.0, "muon": True}], lr=1.0, betas=(0.9, 0.99), eps=1e-8).step()
        moved.append(torch.cat([w.detach() for w in weights]))
    torch.testing.assert_close(moved[0], moved[1])


def test_what_is_taken_apart_and_what_a_round_of_it_costs():
    """Queries, keys and values, and the modulations of one stream; not the way into an MLP. m^2 (2 n + m)."""
    assert {k: len(matrices(0, k * 8, 8)) for k in range(1, 10)} == {
        1: 1,
        2: 2,
        3: 3,
        4: 1,
        5: 1,
        6: 6,
        7: 1,
        8: 1,
        9: 9,
    }
    assert [m.cost for shape in ((6, 24), (24, 6)) for m in matrices(0, *shape)] == [36 * (48 + 6)] * 2


# --- several processes --------------------------------------------------------------------------------------------


def test_a_matrix_in_parts_has_the_rows_that_torch_gives_them():
    """Of 5 rows in 4 parts: 2, 2, 1 and none; and those of one matrix of a stack of them, within each."""
    for total, parts in ((5, 4), (2, 4), (12, 4), (7, 3), (1, 1)):
        chunks = [len(chunk) for chunk in torch.arange(total).chunk(parts)]
        [whole] = matrices(0, total, 100)
        assert [whole.rows(k, parts) for k in range(parts)] == [(0, n) for n in (*chunks, *[0] * (parts - len(chunks)))]
    stack = matrices(7, 9, 3)
    assert stack == [Matrix(7, 9, 0, 3, 3), Matrix(7, 9, 3, 6, 3), Matrix(7, 9, 6, 9, 3)]
    assert [[m.rows(k, 2) for k in range(2)] for m in stack] == [[(0, 3), (0, 0)], [(3, 5), (0, 1)], [(5, 5), (1, 4)]]
    assert [sum(m.numel(k, 2) for m in stack) for k in range(2)] == [15, 12]


def test_work_is_shared_out_evenly():
    """Twelve blocks of SD3's over six processes: the busiest has the mean and no more than one small matrix."""
    team = Team(Axis(None, 3, 0), Axis(None, 2, 0), torch.device("cpu"))
    shapes = [(18, 6), (6, 6), (24, 6), (6, 24), (36, 6)] * 24
    jobs = [m for i, shape in enumerate(shapes) for m in matrices(i, *shape)]
    owned = assign_owners(jobs, team)
    assert sorted(m for copy in owned for owner in copy for m in owner) == sorted(jobs)
    loads = [sum(m.cost for m in owner) for copy in owned for owner in copy]
    assert max(loads) - min(loads) <= min(m.cost for m in jobs)
    alone = assign_owners(jobs[:1], team)
    assert [len(owner) for copy in alone for owner in copy].count(0) == 5


@pytest.mark.slow
def test_several_processes_step_as_one_does():
    """Copies, parts and both; rows that do not divide, and fewer than processes; in one turn and in several.

    Each matrix is made orthogonal by one process alone.
    """
    found = [json.loads(said.splitlines()[-1]) for said in together(4, Path(__file__).parent / "muon_steps.py")]
    for way in found[0]:
        assert all(one[way]["error"] < 1e-5 for one in found), way
        assert sum(one[way]["made"] for one in found) == found[0][way]["matrices"], way
        assert sum(one[way]["made"] > 0 for one in found) >= (2 if "turns" in way else 4), way
