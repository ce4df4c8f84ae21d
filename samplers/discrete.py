"""The discrete schedules of DDPM: a list of betas, and the continuous path that runs through them.

N betas give alpha_bar_k = prod_{i <= k} (1 - beta_i), k = 0 ... N-1 (Ho et al. 2020, eq. 4). Index k is the time
t = (k + 1) / N, so that t = 0 is the data and t = 1 the last, noisiest index. Between two indices the log-SNR is linear
in t, as k-diffusion and diffusers interpolate. From the data to index 0 it is sigma / alpha that is linear, and to a
last index of zero SNR alpha / sigma, so that the derivatives are finite at both ends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.schedules import Coefficients, Schedule, Time, as_time, float_tensor, widest_float


@dataclass(frozen=True, eq=False)
class DiscreteVP(Schedule):
    """The schedule of N DDPM betas, a tensor or sequence (N,), each in (0, 1); the last may be 1 (zero SNR)."""

    betas: tuple[float, ...] | Sequence[float] | Tensor
    _log_snr: Tensor = field(init=False)

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64).detach().cpu()
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"betas of shape {tuple(betas.shape)}: give at least two, (N,)")
        if not ((betas > 0) & (betas < 1))[:-1].all() or not 0 < betas[-1] <= 1:
            raise ValueError("betas must lie in (0, 1); only the last may be 1, which is zero terminal SNR")
        if betas[0] > 0.9 and betas[0] > betas[-1]:
            raise ValueError(f"betas from {betas[0]:g} to {betas[-1]:g} look like alphas or alphas_cumprod: give betas")
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        log_snr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        object.__setattr__(self, "_log_snr", log_snr)
        object.__setattr__(self, "_hash", hash(self.betas))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, DiscreteVP) and self.betas == other.betas)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"DiscreteVP({len(self)} betas, {self.betas[0]:g} ... {self.betas[-1]:g})"

    @classmethod
    def linear(cls, num: int = 1000, first: float = 1e-4, last: float = 0.02) -> "DiscreteVP":
        """betas linear in the index (Ho et al. 2020, sec. 4)."""
        return cls(torch.linspace(first, last, num, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, num: int = 1000, first: float = 0.00085, last: float = 0.012) -> "DiscreteVP":
        """Square roots of the betas linear in the index, as in Stable Diffusion (Rombach et al. 2022)."""
        return cls(torch.linspace(first**0.5, last**0.5, num, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, num: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> "DiscreteVP":
        """betas of the cosine alpha_bar with an offset, each at most `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
        angle = (torch.arange(num + 1, dtype=torch.float64) / num + offset) / (1 + offset) * math.pi / 2
        alpha_bar = angle.cos() ** 2
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    def zero_terminal_snr(self) -> "DiscreteVP":
        """The schedule rescaled to pure noise at the last index, the first unchanged (Lin et al. 2023, alg. 1)."""
        alpha = self.alpha_bar.sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        alpha_bar = torch.cat((torch.ones(1, dtype=torch.float64), alpha**2))
        return DiscreteVP(1 - alpha_bar[1:] / alpha_bar[:-1])

    @property
    def alpha_bar(self) -> Tensor:
        """alpha^2 at each index, (N,) float64."""
        return torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float64), 0)

    def index(self, t: Time) -> Tensor:
        """The time of a DDPM network: N t - 1, fractional between two indices, and 0 from the data to index 0.

        At index k it is k up to rounding: for a network that takes only integers use `index(t).round().long()`.
        """
        return (as_time(t) * len(self) - 1).clamp(min=0)

    def time(self, index: Time | int) -> Tensor:
        """The time (k + 1) / N of an index k in [0, N - 1]; ValueError outside this range."""
        index = float_tensor(index)
        if not ((index >= 0) & (index <= len(self) - 1)).all():
            raise ValueError(f"index {index.tolist()}: indices run from 0 to {len(self) - 1}")
        return (index + 1) / len(self)

    def coefficients(self, t: Tensor) -> Coefficients:
        wide = widest_float(t.device)
        n, table = len(self), self._log_snr.to(t.device, wide)
        place = t.to(wide) * n
        k = place.floor().long().clamp(1, n - 1)  # between the knots k and k + 1, which are the indices k - 1 and k
        low, high = table[k - 1], table[k]
        high = torch.where(high.isneginf(), low, high)  # handled below; an infinity here would make gradients NaN
        # Half the log-SNR, l = log(alpha / sigma), and its derivative.
        slope = (high - low) / 2 * n
        middle = low / 2 + slope * (place - k) / n
        ratio, d_ratio = torch.exp(-middle), -slope * torch.exp(-middle)  # sigma / alpha
        first = torch.exp(-table[0] / 2)
        ratio, d_ratio = torch.where(place < 1, first * place, ratio), torch.where(place < 1, first * n, d_ratio)
        alpha = torch.rsqrt(1 + ratio**2)
        sigma, d_alpha, d_sigma = ratio * alpha, -ratio * d_ratio * alpha**3, d_ratio * alpha**3
        if table[-1].isneginf():  # alpha / sigma is linear to 0
            last = torch.exp(table[-2] / 2)
            inverse, ending = last * (n - place), place >= n - 1
            far = torch.rsqrt(1 + inverse**2)
            sigma, alpha = torch.where(ending, far, sigma), torch.where(ending, inverse * far, alpha)
            d_alpha = torch.where(ending, -last * n * far**3, d_alpha)
            d_sigma = torch.where(ending, inverse * last * n * far**3, d_sigma)
        return Coefficients(*(c.to(t.dtype) for c in (alpha, sigma, d_alpha, d_sigma)))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        given = float_tensor(log_snr)
        wide = widest_float(given.device)
        n, table, level = len(self), self._log_snr.to(given.device, wide), given.to(wide)
        k = torch.searchsorted(-table, -level.contiguous()).clamp(1, n - 1)
        low, high = table[k - 1], table[k]
        place = k + ((level - low) / (high - low)).clamp(0, 1)
        place = torch.where(level > table[0], torch.exp((table[0] - level) / 2), place)
        if table[-1].isneginf():
            place = torch.where(level < table[-2], n - torch.exp((level - table[-2]) / 2), place)
        return (place / n).clamp(0, 1).to(given.dtype)
