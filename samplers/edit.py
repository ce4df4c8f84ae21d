"""Editing data: sampling from its noised state (img2img), or with a known part (inpainting)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from samplers.field import Field
from samplers.grids import time_grid
from samplers.integrate import check_states
from samplers.names import lookup
from samplers.noise import Diffusion, Generators, Noise, randn
from samplers.schedules import Schedule, Time
from samplers.solver import Solver, Step, with_diffusion
from samplers.solvers import SOLVERS


def start_from(
    x_0: Tensor,
    schedule: Schedule,
    strength: float,
    num_steps: int = 20,
    grid: str | Tensor | Sequence[float] = "uniform",
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """x_0 noised to a time of the grid, and the grid from there: what `sample` takes for img2img (Meng et al. 2022).

    strength in (0, 1]: the fraction of the grid's steps to take, at least one; at 1 sampling starts at the grid's first
    time, where little or nothing of x_0 is left. Returns x (B, ...) like x_0 and the times (k + 1,). generator: of the
    noise.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength = {strength}: give a number in (0, 1]; 1 starts from noise")
    check_states(x_0)
    ts = time_grid(grid, num_steps, schedule=schedule)
    ts = ts[-1 - max(1, round(strength * (len(ts) - 1))) :]
    eps = randn(x_0.shape, generator, x_0.dtype, x_0.device)
    return schedule.mix(x_0, eps, float(ts[0])), ts


@dataclass(frozen=True, eq=False)
class Inpaint(Solver):
    """Inpainting: after each step of `inner`, known data is put in at the noise level reached (Song et al. 2021, app.
    I.2).

    known (B, ...): data like x; mask, broadcastable to it: 1 where data is known, 0 where it is sampled, in between a
    blend; eps: the noise of the known part, the same at all times, so that this part follows one path. At t = 0 the
    known part is `known` itself. diffusion: of `inner`, if it takes one.
    """

    inner: Solver
    known: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    eps: Tensor = field(repr=False)
    diffusion: Diffusion | None = None

    @classmethod
    def of(cls, inner: str | Solver, known: Tensor, mask: Tensor, generator: Generators = None) -> "Inpaint":
        """Inpainting with a solver or its name, and noise drawn from `generator`.

        Raises ValueError if the shapes do not fit or the mask leaves [0, 1].
        """
        inner = inner if isinstance(inner, Solver) else lookup("solver", inner, SOLVERS)
        check_states(known)
        if mask.ndim != known.ndim or any(m not in (1, k) for m, k in zip(mask.shape, known.shape, strict=True)):
            raise ValueError(
                f"mask {tuple(mask.shape)} does not fit data {tuple(known.shape)}: give 1 or the same size"
            )
        mask = mask.to(known)
        if not ((mask >= 0) & (mask <= 1)).all():
            raise ValueError("the mask leaves [0, 1]: 1 keeps the known data, 0 lets the sampler make it")
        eps = randn(known.shape, generator, known.dtype, known.device)
        return cls(f"inpaint-{inner.name}", inner.order, inner.evals_per_step, inner.source, inner, known, mask, eps)

    @property
    def takes_diffusion(self) -> bool:
        return self.inner.takes_diffusion

    @property
    def stochastic(self) -> bool:
        return self.inner.stochastic or self.diffusion is not None

    @property
    def draws_once(self) -> bool:
        return self.inner.draws_once

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        return replace(self, inner=with_diffusion(self.inner, self.diffusion).bind(field, ts))

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        if state is None:
            if x_t.shape != self.known.shape:
                raise ValueError(f"x is {tuple(x_t.shape)}, the known data {tuple(self.known.shape)}: give one shape")
            x_t = self._with_known(x_t, field.schedule, t)
        x, prediction, inner = self.inner.step(field, x_t, t, t_next, state and state[0], noise)
        return Step(self._with_known(x, field.schedule, t_next), prediction, (inner,))

    def _with_known(self, x: Tensor, schedule: Schedule, t: Time) -> Tensor:
        return torch.lerp(x, schedule.mix(self.known, self.eps, t).to(x), self.mask.to(x))
