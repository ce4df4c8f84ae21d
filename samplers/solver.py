"""The interface of solvers: one pure step from t to t_next. The loop is in integrate.py."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from samplers.field import Field, Prediction
from samplers.noise import DIFFUSIONS, Diffusion, Noise, check_diffusion
from samplers.schedules import Time


class Step(NamedTuple):
    """x at t_next; the prediction made at (x_t, t); and the state that the next step takes."""

    x: Tensor
    prediction: Prediction
    state: Any = None


@dataclass(frozen=True)
class Solver(ABC):
    """A stepper with its name, order of convergence, evaluations per step, and source.

    Your own method is a subclass with a `step`. `bind` is called once before the loop with the field and all times: it
    computes coefficients and raises ValueErrors, so that the loop does neither.
    """

    name: str
    order: int
    evals_per_step: int
    source: str

    @property
    def takes_diffusion(self) -> bool:
        """Whether `sample` may set its diffusion coefficient, a field named `diffusion`."""
        return hasattr(self, "diffusion")

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise with its present fields."""
        return getattr(self, "diffusion", None) is not None

    @property
    def steps_in_place(self) -> bool:
        """Whether a step, or that of its inner solver, may overwrite the x that it takes."""
        inner = getattr(self, "inner", None)
        return getattr(self, "in_place", False) or (isinstance(inner, Solver) and inner.steps_in_place)

    @property
    def draws_once(self) -> bool:
        """Whether a step draws only one increment, its own, which is all that a `BrownianTree` can give."""
        return True

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        """This solver, prepared for these times. Raises ValueError for what it cannot solve."""
        return self

    @abstractmethod
    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Any = None, noise: Noise | None = None
    ) -> Step:
        """From x_t at t to t_next; `state` is None at the first step, `noise(t, t_next)` is a Brownian increment."""


@dataclass(frozen=True)
class NoisySolver(Solver):
    """A stepper that always draws noise."""

    @property
    def stochastic(self) -> bool:
        return True


@dataclass(frozen=True)
class SDESolver(NoisySolver):
    """A stepper of dX = (v - w/2 score) dt + sqrt(w) dW, with its diffusion coefficient w(t).

    w_at: where in a step w is evaluated, from 0 (its start) to 1.
    """

    w_at: ClassVar[float] = 0.0
    diffusion: Diffusion | None = None

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        if self.diffusion is None:
            kinds = ", ".join(map(repr, DIFFUSIONS))
            raise ValueError(f"{self.name!r} solves an SDE: give a diffusion, {kinds}, a number eta or a w(t)")
        if any(t_next > t for t, t_next in pairwise(ts)):
            raise ValueError(f"{self.name!r} solves the SDE from noise to data: give times that fall")
        check_diffusion(self.diffusion, [t + self.w_at * (t_next - t) for t, t_next in pairwise(ts)])
        return self


def with_diffusion(solver: Solver, diffusion: Diffusion | None) -> Solver:
    """The solver with this diffusion coefficient; None leaves its own."""
    return solver if diffusion is None else replace(solver, diffusion=diffusion)  # type: ignore[call-arg]
