"""Exact answers: data whose marginals, and so every view of the field, are known in closed form.

For a mixture of isotropic Gaussians sum_k w_k N(mu_k, s_k^2), x_t = alpha x_0 + sigma eps is again one, and the
posterior means of x_0 and eps are exact. A single Gaussian also has an exact ODE flow: it moves along its quantiles.

K components, D dimensions, B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers import Field, Schedule


def column(c: Tensor | float, like: Tensor) -> Tensor:
    """() or (B,) -> a shape that multiplies (B, D); written apart from the library's own."""
    c = torch.as_tensor(c, dtype=like.dtype)
    return c if c.ndim == 0 else c[:, None]


@dataclass(frozen=True)
class Mixture:
    """weights (K,), means (K, D), stds (K,)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.stds[which, None] * z

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D)."""
        w, eye = self.weights[:, None, None], torch.eye(self.means.shape[1], dtype=self.means.dtype)
        mean = self.weights @ self.means
        away = self.means - mean
        return mean, (w * (away[:, :, None] * away[:, None, :] + self.stds[:, None, None] ** 2 * eye)).sum(0)

    def posterior(self, x_t: Tensor, t: float | Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], (B, D) each."""
        alpha = column(schedule.alpha(t), x_t)[..., None]  # () or (B, 1, 1)
        sigma = column(schedule.sigma(t), x_t)[..., None]
        variance = (alpha * self.stds[:, None]) ** 2 + sigma**2  # (..., K, 1)
        away = x_t[:, None, :] - alpha * self.means  # (B, K, D)
        dims = self.means.shape[1]
        log_p = self.weights.log() - (away**2 / variance).sum(-1) / 2 - dims / 2 * variance.log().squeeze(-1)
        r = log_p.softmax(-1)[..., None]
        x_0 = (r * (self.means + alpha * self.stds[:, None] ** 2 * away / variance)).sum(1)
        eps = (r * sigma * away / variance).sum(1)
        return x_0, eps

    def view(self, kind: str, x_t: Tensor, t: float | Tensor, schedule: Schedule) -> Tensor:
        x_0, eps = self.posterior(x_t, t, schedule)
        alpha, sigma = column(schedule.alpha(t), x_t), column(schedule.sigma(t), x_t)
        if kind == "velocity":
            return column(schedule.d_alpha(t), x_t) * x_0 + column(schedule.d_sigma(t), x_t) * eps
        if kind == "score":
            return -eps / sigma
        if kind == "edm":  # of the preconditioned D = c_skip x + c_out F, deviation 1/2: (D - c_skip x) / c_out
            return (2 * sigma * x_0 - alpha / 2 * eps) / (sigma**2 + alpha**2 / 4) ** 0.5
        return {"data": x_0, "noise": eps, "ddpm_v": alpha * eps - sigma * x_0}[kind]

    def field(self, schedule: Schedule, prediction: str = "velocity") -> Field:
        """The exact network of this data, as one that predicts `prediction`."""
        return Field(lambda x_t, t: self.view(prediction, x_t, t, schedule), schedule, prediction)


@dataclass(frozen=True)
class Gaussian(Mixture):
    """One component."""

    @classmethod
    def of(cls, mean: list[float], std: float) -> "Gaussian":
        one = torch.ones(1, dtype=torch.float64)
        return cls(one, torch.tensor([mean], dtype=torch.float64), std * one)

    def std_at(self, t: float, schedule: Schedule) -> Tensor:
        return torch.hypot(schedule.alpha(t) * self.stds[0], schedule.sigma(t))

    def solve(self, x: Tensor, t: float, t_next: float, schedule: Schedule) -> Tensor:
        """The exact solution of the probability-flow ODE: (x - alpha mu) / std is constant along it."""
        quantile = (x - schedule.alpha(t) * self.means[0]) / self.std_at(t, schedule)
        return schedule.alpha(t_next) * self.means[0] + self.std_at(t_next, schedule) * quantile


GAUSSIAN = Gaussian.of([1.0, -0.5], std=0.6)
MIXTURE = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64),
    torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64),
)
