"""What makes a sampler stochastic: the diffusion coefficient w(t), and the Brownian motion it scales.

Every w >= 0 has the same marginals (SiT, Ma et al. 2024, eq. 4), backwards in time:

    dX = (v - w/2 score) dt + sqrt(w) dW
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from samplers.names import lookup
from samplers.schedules import Schedule, Time, expand

Diffusion = Callable[[Time], Tensor | float]
Generators = Generator | Sequence[Generator] | None


def _kl(schedule: Schedule, t: Time) -> Tensor:
    """w = 2 sigma (sigma' - alpha' sigma / alpha), the forward SDE's own g^2; infinite at alpha = 0."""
    c = schedule(t)
    return 2 * c.sigma * (c.d_sigma - c.d_alpha * c.sigma / c.alpha)


DIFFUSIONS: dict[str, Callable[[Schedule, Time], Tensor | float]] = {
    "kl": _kl,
    "sigma": lambda schedule, t: schedule.sigma(t),
    "sin2": lambda schedule, t: torch.sin(math.pi * torch.as_tensor(t, dtype=torch.float64)) ** 2,
    "constant": lambda schedule, t: 1.0,
}


def make_diffusion(diffusion: str | Diffusion, schedule: Schedule) -> Diffusion:
    """w(t) by name ("kl", "sigma", "sin2", "constant"), or one's own function of t."""
    if callable(diffusion):
        return diffusion
    w = lookup("diffusion", diffusion, DIFFUSIONS)
    return lambda t: w(schedule, t)


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise; a list of generators, one per sample, makes a sample independent of the batch it is in."""
    if isinstance(generator, Sequence):
        _check_generators(generator, shape[0])
        return torch.stack([randn(shape[1:], g, dtype, device) for g in generator])
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=drawn_on).to(device)


class Brownian:
    """Brownian motion shaped like x: the increment from t to t_next is N(0, |t_next - t|), drawn when asked for."""

    def __init__(self, x: Tensor, generator: Generators = None) -> None:
        _check_generators(generator, len(x))
        self.shape, self.dtype, self.device, self.generator = x.shape, x.dtype, x.device, generator

    def __call__(self, t: Time, t_next: Time) -> Tensor:
        z = randn(self.shape, self.generator, self.dtype, self.device)
        return expand(torch.as_tensor(t_next - t, dtype=torch.float64).abs().sqrt(), z) * z


def _check_generators(generator: Generators, batch: int) -> None:
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one per sample")
