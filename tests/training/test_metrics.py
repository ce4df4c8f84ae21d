"""Scores on features: against closed forms, plain loops, and the libraries called by hand."""

import numpy as np
import pytest
import torch

from training import metrics
from training.metrics import clip_score, cmmd, fid, kid, need, precision_recall

pytest.importorskip("torchmetrics")


def features(count: int, dims: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)) + shift


def test_fid_is_the_distance_of_two_gaussians():
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by scipy."""
    from scipy.linalg import sqrtm

    x, y = features(60), 1.5 * features(40, seed=1, shift=0.5)
    (m1, s1), (m2, s2) = ((z.mean(0).double().numpy(), np.cov(z.double().numpy().T)) for z in (x, y))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fid(x, y) == pytest.approx(expected, rel=1e-4)
    assert fid(x, x) == pytest.approx(0, abs=1e-4)


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    """Over the whole sets, in one subset."""
    x, y = features(50).double(), features(50, seed=1, shift=0.3).double()
    k = lambda a, b: (a @ b.T / 6 + 1) ** 3  # noqa: E731
    off = lambda m: (m.sum() - m.trace()) / (50 * 49)  # noqa: E731
    mean, deviation = kid(x, y, 50, subsets=3)
    assert mean == pytest.approx(float(off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()))
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kid_repeats_leaves_the_random_state_alone_and_takes_what_there_is():
    x, y = features(50), features(30, seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kid(x, y, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == kid(x, y, 10) != kid(x, y, 10, seed=1)
    assert kid(x, y, 1000) == kid(x, y, 30)


def loops(reference: torch.Tensor, made: torch.Tensor, k: int) -> tuple[float, float]:
    """Precision and recall as the paper's section 3 says them, pair by pair."""

    def inside(points, manifold):
        radii = [
            sorted((p - q).norm() for j, q in enumerate(manifold) if j != i)[k - 1] for i, p in enumerate(manifold)
        ]
        return np.mean([any((x - p).norm() <= r for p, r in zip(manifold, radii, strict=True)) for x in points])

    return inside(made, reference), inside(reference, made)


@pytest.mark.parametrize("score", [fid, kid])
def test_no_other_process_of_a_run_is_waited_for_or_counted(score, monkeypatch):
    """Of several the first one alone may score; where all do, each has all pictures."""

    def gather(*which):
        raise AssertionError("the others are asked")

    alone = score(features(40), features(30))
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", gather)
    assert score(features(40), features(30)) == alone


@pytest.mark.parametrize("chunk", [7, 2048])
def test_precision_and_recall_are_what_the_paper_says(chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    x, y = features(40, 3), features(30, 3, seed=1, shift=0.7)
    for k in (1, 3, 5):
        assert precision_recall(x, y, k) == pytest.approx(loops(x, y, k))
    assert 0 < precision_recall(x, y)[0] < 1


def test_precision_is_of_quality_and_recall_of_variety():
    """Few kinds, each right; and all kinds, half of them wrong."""
    x = torch.cat([features(50), features(50, seed=1, shift=30)])
    assert precision_recall(x, features(50)) == (1.0, 0.5)
    precision, recall = precision_recall(x, torch.cat([x + 0.01, features(100, seed=3, shift=-50)]))
    assert (precision, recall) == (0.5, 1.0)


def test_cmmd_is_the_mmd_of_a_gaussian_kernel_on_unit_vectors(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 16)
    x, y = features(40).double(), features(30, seed=1, shift=0.4).double()
    units = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    k = lambda a, b: np.mean([[np.exp(-float((p - q).square().sum()) / 200) for q in b] for p in a])  # noqa: E731
    a, b = units
    assert cmmd(x, y) == pytest.approx(1000 * (k(a, a) + k(b, b) - 2 * k(a, b)), rel=1e-9)
    assert cmmd(x, 3 * y) == pytest.approx(cmmd(x, y)) and cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_clip_score_is_a_hundred_cosines():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert clip_score(x, torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(100)
    assert clip_score(x, torch.tensor([[3.0, 0.0], [1.0, 0.0]])) == pytest.approx(50)
    assert clip_score(x, -x) == 0


@pytest.mark.parametrize(("score", "least"), [(fid, 2), (kid, 2), (precision_recall, 4), (cmmd, 1)])
def test_too_few_pictures_are_named(score, least):
    with pytest.raises(ValueError, match=f"at least {least} pictures on either side, not 40 and {least - 1}"):
        score(features(40), features(least - 1))


def test_a_library_that_is_not_there_is_named_with_what_installs_it():
    with pytest.raises(ValueError, match=r"FID needs no_such_library, .*pip install 'mmdit\[evaluation\]'"):
        need("no_such_library", "FID")
