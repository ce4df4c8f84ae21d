"""Views: what a network may predict, and every conversion among them, safe at both ends of time.

With x_t = alpha x_0 + sigma eps, each view is a row (p, q): the view is p x_0 + q eps, up to a scale w,

    data      x_0                             (1, 0)
    noise     eps                             (0, 1)
    velocity  v = alpha' x_0 + sigma' eps     (alpha', sigma')
    ddpm_v    alpha eps - sigma x_0           (-sigma, alpha)         Salimans & Ho 2022, sec. 4
    score     grad log p_t = -eps / sigma     (0, -1), w = sigma      Song et al. 2021

so x_t and one prediction are two linear equations for (x_0, eps), solved by their determinant alpha q - sigma p.

**The ends.** The determinant is zero where a prediction says only what x_t already says: noise (and score) where
alpha = 0, data where sigma = 0. There the prediction's own part is kept, and the other one is its mean, 0: for eps at
t = 0 that is the exact limit, for x_0 at t = 1 it is the mean of normalised data. The score at sigma = 0 cannot be had
from another view, and is given as 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from samplers.names import lookup
from samplers.schedules import Coefficients, expand

TINY = 1e-6  # a determinant below this is zero: what it would divide by has drowned in rounding


class Row(NamedTuple):
    """scale * view = p x_0 + q eps."""

    p: Tensor | float
    q: Tensor | float
    scale: Tensor | float = 1.0


ROWS = {
    "velocity": lambda c: Row(c.d_alpha, c.d_sigma),
    "noise": lambda c: Row(0.0, 1.0),
    "data": lambda c: Row(1.0, 0.0),
    "ddpm_v": lambda c: Row(-c.sigma, c.alpha),
    "score": lambda c: Row(0.0, -1.0, scale=c.sigma),
}
VIEWS = tuple(ROWS)


def convert(value: Tensor, source: str, target: str, x_t: Tensor, c: Coefficients) -> Tensor:
    """The view `target` of a `value` (B, ...) of the view `source`, predicted at x_t (B, ...) with coefficients `c`."""
    row_in, row_out = lookup("view", source, ROWS)(c), lookup("view", target, ROWS)(c)
    if source == target:
        return value
    (x_0_x, x_0_value), (eps_x, eps_value) = _solve(row_in, c)
    weight_x = row_out.p * x_0_x + row_out.q * eps_x
    weight_value = row_out.p * x_0_value + row_out.q * eps_value
    if isinstance(row_out.scale, Tensor):
        weight_x, weight_value = (_safe_divide(weight, row_out.scale) for weight in (weight_x, weight_value))
    return expand(weight_x, x_t) * x_t + expand(weight_value, value) * value


def _solve(row: Row, c: Coefficients) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights of (x_t, value) that give x_0, and that give eps: Cramer's rule, or where it fails the least norm."""
    p, q, scale = row
    determinant = c.alpha * q - c.sigma * p
    solvable = determinant.abs() > TINY
    d, norm = torch.where(solvable, determinant, 1.0), p * p + q * q
    x_0 = torch.where(solvable, q / d, 0.0), torch.where(solvable, -c.sigma / d, p / norm) * scale
    eps = torch.where(solvable, -p / d, 0.0), torch.where(solvable, c.alpha / d, q / norm) * scale
    return x_0, eps


def _safe_divide(weight: Tensor, scale: Tensor) -> Tensor:
    zero = scale.abs() <= TINY
    return torch.where(zero, 0.0, weight / torch.where(zero, 1.0, scale))
