"""Time densities: the distribution of the times t in [0, 1] that a flow is trained at (SD3 paper, sec. 3.1).

t = 0 is data, t = 1 noise. Each density is drawn through its quantile function t = F^-1(u) of uniform u in [0, 1);
stratified draws take one u in each of n equal strata, in random order. `t`, `u` are of any shape; `n` is the batch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from samplers import lookup, shift_time


@dataclass(frozen=True)
class TimeDensity(ABC):
    """A probability density on [0, 1]."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """F^-1(u), the inverse of the distribution function, rising from 0 to 1."""

    @abstractmethod
    def _density(self, t: Tensor) -> Tensor:
        """The density within [0, 1]."""

    def density(self, t: Tensor) -> Tensor:
        """pi(t), 0 outside [0, 1]."""
        t = torch.as_tensor(t)
        inside = (t >= 0) & (t <= 1)
        return torch.where(inside, self._density(t.clamp(0, 1)), 0.0)

    def sample(
        self,
        n: int,
        generator: Generator | None = None,
        stratified: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """n times (n,); stratified: exactly one in each of the n quantile strata, in random order.

        They are drawn where the generator is, without one on the CPU, and go to `device` then.
        """
        drawn_on = "cpu" if generator is None else generator.device
        u = torch.rand(n, generator=generator, device=drawn_on, dtype=torch.float64)
        if stratified:
            u = (torch.randperm(n, generator=generator, device=drawn_on) + u) / n
        return self.quantile(u).to(device, dtype)


@dataclass(frozen=True)
class Uniform(TimeDensity):
    """pi(t) = 1, plain rectified flow."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def _density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """logit t ~ N(m, s^2) (SD3 paper, sec. 3.1): m below 0 favours data, above 0 noise."""

    m: float = 0.0
    s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.s < math.inf:
            raise ValueError(f"LogitNormal s = {self.s}: the standard deviation must be positive")
        if not math.isfinite(self.m):
            raise ValueError(f"LogitNormal m = {self.m}: the mean must be a finite number")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.m + self.s * torch.special.ndtri(u))

    def _density(self, t: Tensor) -> Tensor:
        normal = torch.exp(-((torch.logit(t) - self.m) ** 2) / (2 * self.s**2)) / (self.s * math.sqrt(2 * math.pi))
        return torch.where(normal > 0, normal / (t * (1 - t)), 0.0)


@dataclass(frozen=True)
class Mode(TimeDensity):
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u) (SD3 paper, sec. 3.1): s > 0 favours the middle, s < 0 the ends."""

    s: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.s <= 2 / (math.pi - 2):
            raise ValueError(f"Mode s = {self.s}: f(u; s) is monotone only for -1 <= s <= 2 / (pi - 2) = 1.752")

    def quantile(self, u: Tensor) -> Tensor:
        return u - self.s * (torch.sin(math.pi * u / 2) ** 2 - u)  # f(1 - u): f itself falls from 1 to 0

    def _density(self, t: Tensor) -> Tensor:
        u = self._distribution(t)
        return 1 / (1 + self.s - self.s * math.pi / 2 * torch.sin(math.pi * u))

    def _distribution(self, t: Tensor) -> Tensor:
        """F(t), the inverse of `quantile`, by bisection to the last bit."""
        lo, hi = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (lo + hi) / 2
            below = self.quantile(middle) < t
            lo, hi = torch.where(below, middle, lo), torch.where(below, hi, middle)
        return (lo + hi) / 2


@dataclass(frozen=True)
class CosMap(TimeDensity):
    """t = 1 - 1 / (tan(pi u / 2) + 1), the log-SNR density of the cosine schedule (SD3 paper, sec. 3.1)."""

    def quantile(self, u: Tensor) -> Tensor:
        sin, cos = torch.sin(math.pi * u / 2), torch.cos(math.pi * u / 2)
        return sin / (sin + cos)

    def _density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


@dataclass(frozen=True)
class Shifted(TimeDensity):
    """The density of shift_time(t, shift), t drawn from `base` (SD3 paper, sec. 5.3.2): for another resolution."""

    base: TimeDensity
    shift: float

    def __post_init__(self) -> None:
        shift_time(0.5, self.shift)  # raises ValueError for a bad shift

    def quantile(self, u: Tensor) -> Tensor:
        return shift_time(self.base.quantile(u), self.shift)

    def _density(self, t: Tensor) -> Tensor:
        d_base = self.shift / (self.shift - (self.shift - 1) * t) ** 2  # of shift_time(t, 1 / shift), the inverse
        return self.base.density(shift_time(t, 1 / self.shift)) * d_base


TIME_DENSITIES: dict[str, type[TimeDensity]] = {
    "uniform": Uniform,
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
}


def make_time_density(name: str, m: float = 0.0, s: float = 1.0, shift: float = 1.0) -> TimeDensity:
    """A time density by name, moved by `shift`: "uniform", "logit-normal" (of m and s), "mode" (of s) or "cosmap"."""
    kind = lookup("time density", name, TIME_DENSITIES)
    density = kind(**{field.name: {"m": m, "s": s}[field.name] for field in fields(kind)})
    return density if shift == 1 else Shifted(density, shift)
