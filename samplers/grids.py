"""Time grids: the times a sampler visits, a decreasing float64 tensor (num_steps + 1,) within [0, 1]."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor

from samplers.discrete import DiscreteVP
from samplers.names import lookup
from samplers.schedules import RectifiedFlow, Schedule, Trig, check_positive

T = TypeVar("T", float, Tensor)


def uniform(num_steps: int) -> Tensor:
    """t_i = 1 - i / num_steps."""
    _check_steps(num_steps)
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def shift_time(t: T, shift: float) -> T:
    """t' = s t / (1 + (s - 1) t), which lowers the log-SNR of a rectified flow by 2 log s (SD3 paper, sec. 5.3.2)."""
    if not shift > 0:
        raise ValueError(f"shift = {shift}: give a positive number; 1 changes nothing, above 1 favours noise")
    return shift * t / (shift * t + (1 - t))  # in this form 0 and 1 are mapped exactly to themselves


def resolution_shift(num_tokens: int, base_tokens: int) -> float:
    """The shift sqrt(m / n) at which m tokens have the same uncertainty as n without shift (SD3 paper, sec. 5.3.2)."""
    if num_tokens < 1 or base_tokens < 1:
        raise ValueError(f"tokens {num_tokens} and {base_tokens}: both are counts of at least 1")
    return (num_tokens / base_tokens) ** 0.5


def dynamic_shift(
    num_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """The shift e^mu of Flux, mu linear through (base_tokens, base_mu) and (max_tokens, max_mu), not clamped."""
    if num_tokens < 1 or not 0 < base_tokens < max_tokens:
        raise ValueError(f"tokens {num_tokens} of {base_tokens} ... {max_tokens}: give counts, base below max")
    slope = (max_mu - base_mu) / (max_tokens - base_tokens)
    return math.exp(base_mu + slope * (num_tokens - base_tokens))


def log_snr_uniform(num_steps: int, schedule: Schedule, margin: float = 1e-3) -> Tensor:
    """Uniform in log-SNR from the time 1 - margin (replaced by 1) to margin; then 0 (Lu et al. 2022, sec. 3.3).

    The margin avoids the ends, where the log-SNR may be infinite.
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"margin = {margin}: give a time in (0, 0.5)")
    high, low = schedule.log_snr(1 - margin), schedule.log_snr(margin)
    return _from_ratios(lambda ramp: torch.exp(-torch.lerp(high, low, ramp) / 2), num_steps, schedule)


def exponential(num_steps: int, schedule: Schedule, sigma_min: float = 0.02, sigma_max: float = 80.0) -> Tensor:
    """sigma / alpha in geometric progression from sigma_max to sigma_min; then 0. Also uniform in log-SNR."""
    low, high = _sigma_range(sigma_min, sigma_max, schedule)
    return _from_ratios(lambda ramp: high * (low / high) ** ramp, num_steps, schedule)


def karras(
    num_steps: int, schedule: Schedule, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """(sigma / alpha)^(1/rho) uniform from sigma_max to sigma_min; then 0 (Karras et al. 2022, eq. 5).

    The range is clipped to the schedule's own; the first time is replaced by 1.
    """
    check_positive(rho=rho)
    low, high = _sigma_range(sigma_min, sigma_max, schedule)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return _from_ratios(lambda ramp: (first + ramp * (last - first)) ** rho, num_steps, schedule)


def karras_between(t: float, t_next: float, num_steps: int, schedule: Schedule, rho: float = 7.0) -> list[float]:
    """num_steps + 1 times from t to t_next, (sigma / alpha)^(1/rho) uniform (Karras et al. 2022, eq. 5)."""
    first, last = (min(math.exp(-float(schedule.log_snr(s)) / 2), 1e3) ** (1 / rho) for s in (t, t_next))
    ratios = (first + _ramp(num_steps + 1) * (last - first)) ** rho
    return [t, *schedule.t_from_log_snr(-2 * ratios.log()).tolist()[1:-1], t_next]


def cosine(num_steps: int, schedule: Schedule) -> Tensor:
    """Uniform in the angle arctan(sigma / alpha), the time of the cosine schedule, between the schedule's ends."""
    first, last = (Trig().t_from_log_snr(schedule.log_snr(t)) for t in (1.0, 0.0))
    ts = schedule.t_from_log_snr(Trig().log_snr(torch.lerp(last, first, uniform(num_steps))))
    ts[0], ts[-1] = 1.0, 0.0
    return ts


def beta(num_steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of the beta distribution, dense at both ends for a, b < 1 (Lee et al. 2024, sec. 3.3)."""
    check_positive(a=a, b=b)
    return torch.tensor([_beta_quantile(p, a, b) for p in uniform(num_steps).tolist()], dtype=torch.float64)


def ddpm(num_steps: int, schedule: Schedule, spacing: str = "leading", offset: int = 0, to_data: bool = True) -> Tensor:
    """Integer indices of a discrete schedule, spaced "leading", "trailing" or "linspace" (Lin et al. 2023, table 2).

    offset is added to leading indices (1 for Stable Diffusion), which do not begin at t = 1. The last step goes to the
    data, t = 0, or with to_data=False to index 0. Raises ValueError for a schedule without indices.
    """
    if not isinstance(schedule, DiscreteVP):
        raise ValueError(f"grid {spacing!r} counts the indices of a DiscreteVP schedule, not of {schedule}")
    _check_steps(num_steps)
    n = len(schedule)
    if num_steps > n:
        raise ValueError(f"num_steps = {num_steps}: the schedule has {n} indices")
    first = (num_steps - 1) * (n // num_steps) + offset
    if spacing == "leading" and not 0 <= offset <= first < n:
        raise ValueError(f"offset = {offset}: {num_steps} leading indices would begin at {first}, of {n}")
    ramp = torch.arange(num_steps, dtype=torch.float64)
    spacings = {
        "leading": (num_steps - 1 - ramp) * (n // num_steps) + offset,
        "trailing": (n - ramp * n / num_steps).round() - 1,
        "linspace": torch.linspace(n - 1, 0, num_steps, dtype=torch.float64).round(),
    }
    times = schedule.time(lookup("spacing", spacing, spacings))
    end = torch.zeros(1, dtype=torch.float64) if to_data else schedule.time(0)[None]
    return torch.cat((times[times > end], end))


def twice_shifted(num_steps: int, shift: float, num_train: int = 1000) -> Tensor:
    """The sigmas of diffusers' flow-matching schedulers for a static shift: the smallest one is shifted twice.

    They run from 1 to 1 / num_train shifted once, and then all are shifted. With shift 3 and 28 steps the smallest is
    0.0089 instead of 0.0030. Use it for the same samples as theirs; the correct grid is `shift_time` of a uniform one.
    """
    _check_steps(num_steps)
    check_positive(num_train=num_train)
    ts = 1 + _ramp(num_steps) * (shift_time(1 / num_train, shift) - 1)
    return torch.cat((shift_time(ts, shift), torch.zeros(1, dtype=torch.float64)))


GRIDS: dict[str, Callable[[int, Schedule], Tensor]] = {
    "uniform": lambda num_steps, schedule: uniform(num_steps),
    "log-snr": log_snr_uniform,
    "karras": karras,
    "exponential": exponential,
    "cosine": cosine,
    "beta": lambda num_steps, schedule: beta(num_steps),
    "leading": lambda num_steps, schedule: ddpm(num_steps, schedule, "leading"),
    "trailing": lambda num_steps, schedule: ddpm(num_steps, schedule, "trailing"),
    "linspace": lambda num_steps, schedule: ddpm(num_steps, schedule, "linspace"),
}


def time_grid(
    grid: str | Tensor | Sequence[float], num_steps: int, shift: float = 1.0, schedule: Schedule | None = None
) -> Tensor:
    """A named grid with `num_steps` steps on `schedule`, or your own times after a check; shifted. float64, CPU."""
    if isinstance(grid, str):
        _check_steps(num_steps)
        return shift_time(lookup("grid", grid, GRIDS)(int(num_steps), schedule or RectifiedFlow()), shift)
    return shift_time(_checked_times(grid), shift)


def _check_steps(num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or not 1 <= num_steps < 2**53:
        raise ValueError(f"num_steps = {num_steps!r}: give an integer of at least 1, below 2**53")


def _checked_times(grid: Tensor | Sequence[float]) -> Tensor:
    """A user's grid as a float64 tensor; ValueError unless its times decrease strictly within [0, 1]."""
    try:
        ts = grid if isinstance(grid, Tensor) else torch.tensor(grid, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"grid is {grid!r}: give a name ({', '.join(GRIDS)}) or falling times from 1 to 0") from error
    if ts.ndim != 1 or len(ts) < 2 or not ts.is_floating_point():
        raise ValueError(
            f"grid is {ts.dtype} of shape {tuple(ts.shape)}: give at least two floating times, (num_steps + 1,)"
        )
    ts = ts.detach().to("cpu", torch.float64)
    falls = (ts.diff() < 0).tolist()
    if not all(falls):
        i = falls.index(False)
        raise ValueError(
            f"step {i + 1} of the grid is from {ts[i]:g} to {ts[i + 1]:g}: its times must decrease strictly"
        )
    if not ts[0] <= 1 or not ts[-1] >= 0:
        raise ValueError(f"grid runs {ts[0]:g} ... {ts[-1]:g}: its times must lie in [0, 1]")
    return ts


def _ramp(num: int) -> Tensor:
    return torch.linspace(0, 1, num, dtype=torch.float64)


def _sigma_range(sigma_min: float, sigma_max: float, schedule: Schedule) -> tuple[float, float]:
    """The intersection of a range of sigma / alpha with the schedule's own."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: give 0 < sigma_min < sigma_max")
    low, high = (math.exp(-float(schedule.log_snr(t)) / 2) for t in (0.0, 1.0))
    if max(low, sigma_min) >= min(high, sigma_max):
        raise ValueError(
            f"sigma / alpha of {schedule} runs from {low:g} to {high:g}: outside {sigma_min} ... {sigma_max}"
        )
    return max(low, sigma_min), min(high, sigma_max)


def _from_ratios(ratios: Callable[[Tensor], Tensor], num_steps: int, schedule: Schedule) -> Tensor:
    """Times from sigma / alpha as a decreasing function of a ramp in [0, 1]; the first becomes 1, and 0 is appended.

    If the last sigma / alpha is that of the schedule at t = 0, as for VE, its time is 0 already, and none is appended.
    """
    _check_steps(num_steps)
    reaches_0 = schedule.t_from_log_snr(-2 * ratios(_ramp(2)).log())[-1] < 1e-9
    ts = schedule.t_from_log_snr(-2 * ratios(_ramp(num_steps + 1 if reaches_0 else num_steps)).log())
    ts[0] = 1.0
    if reaches_0:
        ts[-1] = 0.0
        return ts
    return torch.cat((ts, torch.zeros(1, dtype=torch.float64)))


@lru_cache(maxsize=1024)
def _beta_quantile(p: float, a: float, b: float) -> float:
    """x with I_x(a, b) = p, by bisection."""
    low, high = 0.0, 1.0
    if p in (low, high):
        return p
    while low < (middle := (low + high) / 2) < high:
        if _beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle
    return middle


def _beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    fraction = 1.0
    for m in range(60, 0, -1):  # from the innermost term; 60 terms are more than enough below the mean
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * fraction)
