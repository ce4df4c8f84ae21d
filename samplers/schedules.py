"""Schedules: the path from data to noise, x_t = alpha(t) x_0 + sigma(t) eps, with its derivatives.

`t` is in [0, 1], t = 0 data, t = 1 noise; a float, a 0-d tensor, or (B,), one time per sample. A float is computed as a
0-d float64 tensor on the CPU: exact, and no reason to wait for the accelerator. `x_0`, `eps`, `x_t` are (B, ...).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

Time = float | Tensor


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at one `t`, each shaped like it."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class Schedule(ABC):
    """A path x_t = alpha(t) x_0 + sigma(t) eps whose log-SNR falls strictly with t; a subclass states its mathematics.

    The four coefficients are finite on all of [0, 1]: where a derivative has a pole, the schedule says what it gives.
    """

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """The path and its derivatives at a floating tensor `t` in [0, 1]."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """The time in [0, 1] with this log-SNR, the inverse of `log_snr`; beyond its range, the nearer end."""

    def __call__(self, t: Time) -> Coefficients:
        return self.coefficients(as_time(t))

    def alpha(self, t: Time) -> Tensor:
        return self(t).alpha

    def sigma(self, t: Time) -> Tensor:
        return self(t).sigma

    def d_alpha(self, t: Time) -> Tensor:
        return self(t).d_alpha

    def d_sigma(self, t: Time) -> Tensor:
        return self(t).d_sigma

    def log_snr(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha^2 / sigma^2): inf where sigma = 0, -inf where alpha = 0."""
        c = self(t)
        return 2 * (c.alpha.log() - c.sigma.log())

    def mix(self, x_0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) eps."""
        c = self(t)
        return expand(c.alpha, x_0) * x_0 + expand(c.sigma, eps) * eps

    def velocity(self, x_0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """v = dx_t/dt = alpha'(t) x_0 + sigma'(t) eps."""
        c = self(t)
        return expand(c.d_alpha, x_0) * x_0 + expand(c.d_sigma, eps) * eps


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """x_t = (1 - t) x_0 + t eps, v = eps - x_0 (Liu et al. 2022; SD3 paper, sec. 3)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(alpha=1 - t, sigma=t, d_alpha=-one, d_sigma=one)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return torch.sigmoid(-_float_tensor(log_snr) / 2)


@dataclass(frozen=True)
class Cosine(Schedule):
    """x_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps, the cosine schedule (Nichol & Dhariwal 2021) without its offset."""

    def coefficients(self, t: Tensor) -> Coefficients:
        half_pi = math.pi / 2
        alpha, sigma = torch.sin(half_pi * (1 - t)), torch.sin(half_pi * t)  # as sines both ends are exactly 0
        return Coefficients(alpha, sigma, d_alpha=-half_pi * sigma, d_sigma=half_pi * alpha)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return (torch.atan(torch.exp(-_float_tensor(log_snr) / 2)) * (2 / math.pi)).clamp(0, 1)


def as_time(t: Time) -> Tensor:
    """`t` as a floating tensor, () or (B,); ValueError for another shape or type, or a number outside [0, 1]."""
    if isinstance(t, Tensor):
        if t.ndim > 1 or not t.is_floating_point():
            raise ValueError(
                f"t is {t.dtype} of shape {tuple(t.shape)}: give a float tensor, a scalar or one per sample"
            )
        return t
    if not isinstance(t, Real) or not 0 <= t <= 1:
        raise ValueError(f"t = {t!r}: time is a number in [0, 1], 0 for data and 1 for noise")
    return _float_tensor(t)


def batch_time(t: Time, x: Tensor) -> Tensor:
    """`t` as a network takes it: (B,) on x's device, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, Tensor):
        t = as_time(t).to(x.device, dtype)
        if t.ndim == 1:
            _check_batch(t, x)
        return t.expand(len(x))
    return torch.full((len(x),), float(as_time(t)), dtype=dtype, device=x.device)


def expand(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, () or (B,), shaped to multiply x (B, ...); the one place where time meets the batch."""
    if c.ndim == 0:
        return c  # a 0-d tensor leaves x's dtype as it is, and on the CPU it needs no copy to x's device
    _check_batch(c, x)
    return c.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def _check_batch(t: Tensor, x: Tensor) -> None:
    if len(t) != len(x):
        raise ValueError(f"t holds {len(t)} times for a batch of {len(x)}: give one per sample, or a scalar")


def _float_tensor(value: Time) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
