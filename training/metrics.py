"""Scores from features of pictures: distances between two sets of pictures, and how well pictures fit their captions.

FID (Heusel et al. 2017, arXiv 1706.08500) and KID (Binkowski et al. 2018, arXiv 1801.01401) are computed by
torchmetrics; precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), CMMD (Jayasumana et al. 2024, arXiv
2401.09603) and CLIPScore (Hessel et al. 2021, arXiv 2104.08718, on torchmetrics' scale) here.

Shape letters: N pictures of the reference, M pictures scored, D features.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 2048  # rows of a matrix of distances at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ALONE: dict[str, Any] = {"sync_on_compute": False}
"""Options for torchmetrics: do not gather from other processes; each has all pictures, or process 0 alone scores."""
NEIGHBOURS = 3
LEAST = {"fid": 2, "kid": 2, "precision-recall": NEIGHBOURS + 1, "cmmd": 1, "clip-score": 1}
"""Fewest pictures, on either side, that a score needs."""


class _Features(nn.Identity):
    """A network for torchmetrics that passes on features which were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def need(module: str, what: str) -> None:
    """Raises ValueError, which says how to install it, where a library is missing."""
    if find_spec(module) is None:
        raise ValueError(f"{what} needs {module}, which is not installed: pip install 'mmdit[evaluation]'")


def fid(reference: Tensor, features: Tensor) -> float:
    """Frechet distance of the Gaussians of features (N, D) and (M, D), as torchmetrics computes it."""
    need("torchmetrics", "FID")
    from torchmetrics.image.fid import FrechetInceptionDistance

    _enough("fid", LEAST["fid"], reference, features)
    metric = FrechetInceptionDistance(feature=_Features(reference.shape[1]), **ALONE)
    return _fed(metric, reference, features).item()


def kid(
    reference: Tensor, features: Tensor, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of the squared MMD of a cubic kernel over random subsets, as torchmetrics computes it.

    Subsets are no larger than the sets; they are drawn from `seed`.
    """
    need("torchmetrics", "KID")
    from torchmetrics.image.kid import KernelInceptionDistance

    _enough("kid", LEAST["kid"], reference, features)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of the memory for all features, which we have anyway
        torch.manual_seed(seed)
        size = min(subset_size, len(reference), len(features))
        metric = KernelInceptionDistance(_Features(reference.shape[1]), subsets, size, **ALONE)
        mean, deviation = _fed(metric, reference, features)
    return mean.item(), deviation.item()


def _fed(metric: Any, reference: Tensor, features: Tensor) -> Any:
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute()


def precision_recall(reference: Tensor, features: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall): the share of the pictures (M, D) in the reference's manifold, and of the reference (N, D) in
    theirs. A manifold is the union of the spheres around its points that reach to their k-th nearest neighbours.
    """
    _enough("precision-recall", k + 1, reference, features)
    return _within(features, reference, k), _within(reference, features, k)


def _within(points: Tensor, manifold: Tensor, k: int) -> float:
    """The share of points (M, D) that lie in the manifold of others (N, D)."""
    radii = []
    for first, some in zip(range(0, len(manifold), CHUNK), manifold.split(CHUNK), strict=True):
        distances = torch.cdist(some, manifold)
        distances.diagonal(first).fill_(torch.inf)  # a point is not its own neighbour
        radii.append(distances.kthvalue(k).values)
    inside = [(torch.cdist(some, manifold) <= torch.cat(radii)).any(1) for some in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def cmmd(reference: Tensor, embeddings: Tensor) -> float:
    """1000 times the squared MMD of a Gaussian kernel, sigma 10, on CLIP embeddings (N, D), (M, D) of any length.

    The biased estimator, which counts pairs of a picture with itself, as in the paper's code; it has less variance.
    """
    _enough("cmmd", LEAST["cmmd"], reference, embeddings)
    x, y = (F.normalize(z.double(), dim=1) for z in (reference, embeddings))
    return CMMD_SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    """Mean over all pairs of exp(-|x - y|^2 / (2 sigma^2)), of unit vectors."""
    sums = [torch.exp((some @ y.T - 1) / CMMD_SIGMA**2).sum() for some in x.split(CHUNK)]
    return torch.stack(sums).sum().item() / (len(x) * len(y))


def clip_score(images: Tensor, texts: Tensor) -> float:
    """100 times the mean cosine of pictures' and captions' CLIP embeddings (M, D), at least 0."""
    _enough("clip-score", LEAST["clip-score"], images, texts)
    return max(0.0, 100 * F.cosine_similarity(images.double(), texts.double()).mean().item())


def _enough(name: str, least: int, *sets: Tensor) -> None:
    if min(map(len, sets)) < least:
        raise ValueError(
            f"{name} needs at least {least} pictures on either side, not {' and '.join(str(len(s)) for s in sets)}"
        )
