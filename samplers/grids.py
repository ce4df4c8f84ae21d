"""Time grids: the times a sampler visits, a decreasing float64 tensor (num_steps + 1,) within [0, 1]."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from samplers.names import lookup
from samplers.schedules import RectifiedFlow, Schedule

T = TypeVar("T", float, Tensor)


def uniform(num_steps: int) -> Tensor:
    """t_i = 1 - i / num_steps."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def shift_time(t: T, shift: float) -> T:
    """t' = s t / (1 + (s - 1) t), which lowers the log-SNR of a rectified flow by 2 log s (SD3 paper, sec. 5.3.2)."""
    if not shift > 0:
        raise ValueError(f"shift = {shift}: give a positive number; 1 changes nothing, above 1 favours noise")
    return shift * t / (shift * t + (1 - t))  # the denominator so written keeps 0 and 1 exactly where they are


def resolution_shift(num_tokens: int, base_tokens: int) -> float:
    """The shift sqrt(m / n) that gives m tokens the uncertainty that n tokens had (SD3 paper, sec. 5.3.2)."""
    if num_tokens < 1 or base_tokens < 1:
        raise ValueError(f"tokens {num_tokens} and {base_tokens}: both are counts of at least 1")
    return (num_tokens / base_tokens) ** 0.5


GRIDS: dict[str, Callable[[int, Schedule], Tensor]] = {
    "uniform": lambda num_steps, schedule: uniform(num_steps),
}


def time_grid(
    grid: str | Tensor | Sequence[float], num_steps: int, shift: float = 1.0, schedule: Schedule | None = None
) -> Tensor:
    """A grid by name with `num_steps` steps on `schedule`, or one's own times, checked; then shifted. float64, CPU."""
    if isinstance(grid, str):
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps = {num_steps!r}: give an integer of at least 1")
        return shift_time(lookup("grid", grid, GRIDS)(num_steps, schedule or RectifiedFlow()), shift)
    return shift_time(_own_grid(grid), shift)


def _own_grid(grid: Tensor | Sequence[float]) -> Tensor:
    ts = grid if isinstance(grid, Tensor) else torch.tensor(grid, dtype=torch.float64)
    if ts.ndim != 1 or len(ts) < 2 or not ts.is_floating_point():
        raise ValueError(
            f"grid is {ts.dtype} of shape {tuple(ts.shape)}: give at least two floating times, (num_steps + 1,)"
        )
    ts = ts.detach().to("cpu", torch.float64)
    if not (ts.diff() < 0).all() or not ts[0] <= 1 or not ts[-1] >= 0:
        raise ValueError(f"grid runs {ts[0]:g} ... {ts[-1]:g}: its times must decrease strictly and lie in [0, 1]")
    return ts
