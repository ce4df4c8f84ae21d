"""Schedules: the path from data to noise, x_t = alpha(t) x_0 + sigma(t) eps, with its derivatives.

`t` is in [0, 1], t = 0 data, t = 1 noise; a float, a 0-d tensor, or (B,), one time per sample. For a float, the values
are 0-d float64 tensors on the CPU: exact, and without synchronisation. `x_0`, `eps`, `x_t` are (B, ...).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Time = float | Tensor
POLE = 1e-4  # lower bound of the sigma that sigma' is divided by, near a pole


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at one `t`, each shaped like it."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Schedule(ABC):
    """A path x_t = alpha(t) x_0 + sigma(t) eps whose log-SNR decreases strictly with t; a subclass defines it.

    The four coefficients are finite on all of [0, 1]: at a pole of a derivative, whose time is in `poles`, the schedule
    gives a large finite value. Schedules are compared by value: make a subclass a frozen dataclass.
    """

    poles: ClassVar[tuple[float, ...]] = ()

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives at a floating tensor `t` in [0, 1]."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """The inverse of `log_snr`: the time in [0, 1], clamped to its ends."""

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
        return torch.sigmoid(-float_tensor(log_snr) / 2)


@dataclass(frozen=True)
class Trig(Schedule):
    """x_t = cos(pi t / 2) x_0 + sin(pi t / 2) s eps: TrigFlow, s the data's deviation (Lu & Song 2024, sec. 3).

    With s = 1 it is the generalised VP interpolant of SiT (Ma et al. 2024, sec. 2).
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def coefficients(self, t: Tensor) -> Coefficients:
        half_pi, s = math.pi / 2, self.sigma_data
        alpha, sigma = torch.sin(half_pi * (1 - t)), torch.sin(half_pi * t)  # as sines both ends are exactly 0
        return Coefficients(alpha, s * sigma, d_alpha=-half_pi * sigma, d_sigma=s * half_pi * alpha)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        ratio = torch.exp(-float_tensor(log_snr) / 2) / self.sigma_data
        return (torch.atan(ratio) * (2 / math.pi)).clamp(0, 1)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(u (t + s)) / cos(u s), u = pi / (2 + 2 s), sigma^2 = 1 - alpha^2 (Nichol & Dhariwal 2021, eq. 17).

    Without the offset s (the default) it is x_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps. With it (0.008 in the paper)
    sigma grows as the square root of t near t = 0, where its derivative has a pole.
    """

    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset = {self.offset}: give a number in [0, 1), such as 0.008")

    @property
    def poles(self) -> tuple[float, ...]:  # type: ignore[override]
        return (0.0,) if self.offset else ()

    def coefficients(self, t: Tensor) -> Coefficients:
        rate = math.pi / 2 / (1 + self.offset)
        start = rate * self.offset
        # cos(rate (t + s)) as the sine of rate (1 - t), exact at t = 1; sigma^2 = 1 - alpha^2 as a product of sines.
        alpha = torch.sin(rate * (1 - t)) / math.cos(start)
        sigma = (torch.sin(rate * t) * torch.sin(rate * t + 2 * start)).sqrt() / math.cos(start)
        d_alpha = -rate * torch.sin(rate * t + start) / math.cos(start)
        if not self.offset:
            sigma = torch.sin(rate * t)
            return Coefficients(alpha, sigma, d_alpha, rate * alpha)
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=POLE))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        rate = math.pi / 2 / (1 + self.offset)
        start = rate * self.offset
        log_snr = float_tensor(log_snr)
        # cosine and sine of the angle rate (t + s), from cos^2 = cos^2 start * alpha^2
        cos = torch.sigmoid(log_snr).sqrt() * math.cos(start)
        sin = (torch.sigmoid(-log_snr) + torch.sigmoid(log_snr) * math.sin(start) ** 2).sqrt()
        return ((torch.atan2(sin, cos) - start) / rate).clamp(0, 1)


@dataclass(frozen=True)
class VPLinear(Schedule):
    """The VP SDE with beta(t) linear: alpha = exp(-t^2 (b1 - b0) / 4 - t b0 / 2) (Song et al. 2021, eq. 33).

    sigma = (1 - alpha^2)^1/2 grows as the square root of t near t = 0, where its derivative has a pole. At t = 1 a
    little of the data is left (alpha = 0.0066 for the defaults).
    """

    poles = (0.0,)
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_positive(beta_min=self.beta_min, beta_max=self.beta_max)

    def coefficients(self, t: Tensor) -> Coefficients:
        slope = self.beta_max - self.beta_min
        log_alpha = -(t**2) * slope / 4 - t * self.beta_min / 2
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = -alpha * (self.beta_min + t * slope) / 2
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=POLE))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        # -2 log alpha = log(1 + e^-log_snr) = t^2 slope / 2 + t beta_min, a quadratic equation, free of cancellation
        y = torch.nn.functional.softplus(-float_tensor(log_snr), threshold=40.0)
        slope = self.beta_max - self.beta_min
        t = 2 * y / (self.beta_min + (self.beta_min**2 + 2 * slope * y).clamp(min=0).sqrt())
        return torch.where(y.isposinf(), 1.0, t).clamp(0, 1)


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding SDE: x_t = x_0 + sigma_min (sigma_max / sigma_min)^t eps (Song et al. 2021, eq. 30).

    Neither end is pure: at t = 0 there is noise of deviation sigma_min. Start from sigma(1) eps.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min} is not below sigma_max = {self.sigma_max}")

    def coefficients(self, t: Tensor) -> Coefficients:
        rate = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(rate * t)
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), rate * sigma)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        rate = math.log(self.sigma_max / self.sigma_min)
        return ((-float_tensor(log_snr) / 2 - math.log(self.sigma_min)) / rate).clamp(0, 1)


@dataclass(frozen=True)
class EDM(Schedule):
    """x_t = x_0 + sigma_max t eps: time is the noise level itself (Karras et al. 2022, table 1 and sec. 3).

    t = sigma / sigma_max, so v = sigma_max eps; at t = 0 there is no noise. Start from sigma_max eps.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_positive(sigma_max=self.sigma_max)

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(one, self.sigma_max * t, torch.zeros_like(t), self.sigma_max * one)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return (torch.exp(-float_tensor(log_snr) / 2) / self.sigma_max).clamp(0, 1)


def check_positive(**numbers: float) -> None:
    """Raises ValueError naming the first of `numbers` that is not positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} = {number}: give a positive number")


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
    return float_tensor(t)


def batch_time(t: Time, x: Tensor) -> Tensor:
    """`t` as a network takes it: (B,) on x's device, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, Tensor):
        t = as_time(t).to(x.device, dtype)
        if t.ndim == 1:
            _check_batch(t, x)
        return t.expand(len(x))
    if not (isinstance(t, float) and 0 <= t <= 1):
        t = float(as_time(t))
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


def expand(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, () or (B,), reshaped to multiply x (B, ...)."""
    if c.ndim == 0:
        return c  # a 0-d tensor does not change x's dtype, and on the CPU needs no copy to x's device
    _check_batch(c, x)
    return c.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def _check_batch(t: Tensor, x: Tensor) -> None:
    if len(t) != len(x):
        raise ValueError(f"t holds {len(t)} times for a batch of {len(x)}: give one per sample, or a scalar")


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no wider numbers (the GPU of a Mac)."""
    return torch.float32 if device.type == "mps" else torch.float64


def float_tensor(value: Time) -> Tensor:
    """A floating tensor unchanged; an integer tensor or a number as float64."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.to(widest_float(value.device))
    return torch.tensor(float(value), dtype=torch.float64)
