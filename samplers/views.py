"""Views: the quantities that a network may predict, and all conversions between them, safe at both ends of time.

With x_t = alpha x_0 + sigma eps, each view is a row (p, q): the view is p x_0 + q eps, up to a scale w,

    data      x_0                             (1, 0)
    noise     eps                             (0, 1)
    velocity  v = alpha' x_0 + sigma' eps     (alpha', sigma')
    ddpm_v    alpha eps - sigma x_0           (-sigma, alpha)         Salimans & Ho 2022, sec. 4
    score     grad log p_t = -eps / sigma     (0, -1), w = sigma      Song et al. 2021
    edm       F of D = c_skip x + c_out F     (sigma / s_d, -s_d alpha) / (sigma^2 + s_d^2 alpha^2)^1/2
                                                                      Karras et al. 2022, eq. 7 and table 1

so x_t and one prediction are two linear equations for (x_0, eps), solved by their determinant alpha q - sigma p.

**The ends.** The determinant is zero where the prediction adds nothing to x_t: noise (and score) where alpha = 0, data
where sigma = 0. There the predicted one of x_0 and eps is kept, and the other is its mean, 0: for eps at t = 0 that is
the mean given x_0, for x_0 at t = 1 the mean of normalised data. The score at sigma = 0 does not follow from another
view, and is given as 0. Whether eps tends to 0 on a path to t = 0 depends on the data: it does where these have a
density (eps = -sigma score), but not where they lie on a manifold, as images nearly do, where each path has its own eps
at its end. So a data or score prediction does not determine the velocity at t = 0, nor a noise prediction at t = 1 of a
schedule that ends in pure noise: `determined` says so, and solvers do not evaluate it there (runge_kutta.py).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.names import lookup
from samplers.schedules import Coefficients, Schedule, Time, check_positive, expand

TINY = 1e-6  # a determinant below this counts as zero: it is only rounding error


class Row(NamedTuple):
    """scale * view = p x_0 + q eps."""

    p: Tensor | float
    q: Tensor | float
    scale: Tensor | float = 1.0


View = str | Callable[[Coefficients], Row]


@lru_cache
def edm_view(sigma_data: float = 0.5) -> Callable[[Coefficients], Row]:
    """The view of the raw output F of an EDM-preconditioned network, for data of standard deviation `sigma_data`."""
    if isinstance(sigma_data, Coefficients):
        raise ValueError("edm_view is not a view, but makes one: give edm_view() or edm_view(sigma_data)")
    check_positive(sigma_data=sigma_data)

    def row(c: Coefficients) -> Row:
        norm = torch.hypot(c.sigma, sigma_data * c.alpha)
        return Row(c.sigma / (sigma_data * norm), -sigma_data * c.alpha / norm)

    return row


ROWS: dict[str, Callable[[Coefficients], Row]] = {
    "velocity": lambda c: Row(c.d_alpha, c.d_sigma),
    "noise": lambda c: Row(0.0, 1.0),
    "data": lambda c: Row(1.0, 0.0),
    "ddpm_v": lambda c: Row(-c.sigma, c.alpha),
    "score": lambda c: Row(0.0, -1.0, scale=c.sigma),
    "edm": edm_view(),
}
VIEWS = tuple(ROWS)


def row_of(view: View, c: Coefficients) -> Row:
    """The row of a view, given by name or as a function of the coefficients."""
    row = (view if callable(view) else lookup("view", view, ROWS))(c)
    if not isinstance(row, Row):
        raise ValueError(f"the view {view!r} gave {row!r}: give a name, or a function that gives a views.Row")
    return row


def convert(value: Tensor, source: View, target: View, x_t: Tensor, c: Coefficients) -> Tensor:
    """The view `target` of a `value` (B, ...) of the view `source`, predicted at x_t (B, ...) with coefficients `c`."""
    weight_x, weight_value = weights(source, target, c)
    if source == target:
        return value
    return expand(weight_x, x_t) * x_t + expand(weight_value, value) * value


def convert_at(value: Tensor, source: View, target: View, x_t: Tensor, schedule: Schedule, t: Time) -> Tensor:
    """`convert` at a time; if that is a number, the weights are numbers, and cached."""
    if source == target:
        return value
    if isinstance(t, Tensor) or torch.compiler.is_compiling():
        return convert(value, source, target, x_t, schedule(t))
    return combine(x_t, value, *_weights_at(source, target, schedule, t))


def weights(source: View, target: View, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(a, b) such that the view `target` is a x_t + b value, for a value of the view `source`."""
    row_in, row_out = row_of(source, c), row_of(target, c)
    (x_0_x, x_0_value), (eps_x, eps_value) = _solve(row_in, c)
    weight_x = row_out.p * x_0_x + row_out.q * eps_x
    weight_value = row_out.p * x_0_value + row_out.q * eps_value
    if isinstance(row_out.scale, Tensor):
        weight_x, weight_value = (_safe_divide(weight, row_out.scale) for weight in (weight_x, weight_value))
    return weight_x, weight_value


def determined(source: View, c: Coefficients) -> Tensor:
    """Whether x_t and a value of the view `source` determine x_0 and eps, and so the velocity; shaped like the time."""
    row = row_of(source, c)
    return ((c.alpha * row.q - c.sigma * row.p).abs() > TINY) & (torch.as_tensor(row.scale) > TINY)


@lru_cache(maxsize=8192)
def _weights_at(source: View, target: View, schedule: Schedule, t: float) -> tuple[float, float]:
    weight_x, weight_value = weights(source, target, schedule(t))
    return float(weight_x), float(weight_value)


def combine(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """a x + b y in as few passes over memory as possible."""
    if a == 0 or b == 0:
        return y * b if a == 0 else x * a
    return plus(x, y, b) if a == 1 else plus(x * a, y, b, owned=True)


def plus(x: Tensor, y: Tensor, b: float, owned: bool = False) -> Tensor:
    """x + b y in one pass over memory; if owned, x is overwritten."""
    if torch.compiler.is_compiling():
        return x + b * y  # torch 2.14 loses alpha when it fuses `add` with a matrix product
    return x.add_(y, alpha=b) if owned else torch.add(x, y, alpha=b)


def _solve(row: Row, c: Coefficients) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights of (x_t, value) for x_0 and for eps: by Cramer's rule, or the least-norm solution if it is singular."""
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
