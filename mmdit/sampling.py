"""The options of sampling: solver, times and guidance, as one documented dataclass.

A pipeline keeps its defaults as a table of these fields; the arguments of a call override them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal

from torch import Tensor

import samplers

DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Sampling:
    """Solver, times and guidance."""

    solver: str = "ab2"
    """One of `samplers.solver_names()`."""
    num_steps: int = 28
    """Steps of the solver; heun and midpoint evaluate the network twice a step."""
    guidance: float = 4.0
    """Scale of guidance; 1 is none, 0 ignores the prompt."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times [low, high] between which guidance acts; outside, only the prompt's velocity is used."""
    rule: Literal["cfg", "apg", "cfg-zero"] = "cfg"
    """Classifier-free guidance, adaptive projected guidance, or CFG-Zero*."""
    rescale: float = 0.0
    """In [0, 1]: how far a guided velocity is rescaled to the standard deviation of the prompt's (rule "cfg")."""
    grid: str = "uniform"
    """Times by name, of `samplers.GRIDS`, shifted for the picture's size; or "diffusers", its pipeline's."""
    diffusion: str | float | None = None
    """Noise of an SDE solver: "kl", "sigma", "sin2", "constant" or a number; None is the solver's own."""
    skip_layers: tuple[int, ...] = ()
    """Blocks, from 0, that skip-layer guidance leaves out in an additional pass ((7, 8, 9) for SD3.5-medium)."""
    skip_scale: float = 2.8
    """Scale of skip-layer guidance."""
    skip_steps: tuple[float, float] = (0.01, 0.2)
    """Skip-layer guidance acts after the first and before the second of these fractions of the steps."""

    def __post_init__(self) -> None:
        for name in ("interval", "skip_steps"):
            object.__setattr__(self, name, pair_of_numbers(name, getattr(self, name)))
        check_finite(self, ("guidance", "rescale", "skip_scale"))
        layers = self.skip_layers
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(type(i) is int for i in layers):
            raise ValueError(f"skip_layers is {layers!r}, expected a list of whole numbers, blocks from 0")
        object.__setattr__(self, "skip_layers", tuple(layers))  # JSON has lists only
        if not isinstance(self.solver, str | samplers.Solver):
            raise ValueError(f"solver is {self.solver!r}, expected one of samplers.solver_names()")
        if self.rule not in [*RULES]:
            raise ValueError(f"rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        if self.rule != "cfg" and (self.skip_layers or self.rescale):
            raise ValueError(f"rule {self.rule!r} goes with neither skip_layers nor rescale: take rule 'cfg'")
        if self.skip_layers and self.rescale:
            raise ValueError("skip_layers and rescale do not go together: leave one out")
        if not 0 <= self.skip_steps[0] <= self.skip_steps[1] <= 1:
            raise ValueError(f"skip_steps is {self.skip_steps}, expected (start, stop) with 0 <= start <= stop <= 1")

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
        """The defaults, overridden by the given values that are not None. ValueError for an unknown name.

        The defaults' diffusion belongs to their solver: it is dropped if the given solver takes none.
        """
        known = [field.name for field in fields(cls)]
        for name in {**defaults, **given}:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"no option {name!r} of sampling; {hint}")
        given = {name: value for name, value in given.items() if value is not None}
        if "solver" in given and "diffusion" not in given and not _takes_diffusion(given["solver"]):
            given["diffusion"] = None
        return cls(**{**defaults, **given})

    def times(self, shift: float, resolution_shift: float) -> Tensor:
        """The times of the steps, from 1 to 0. shift: the model's; resolution_shift: the picture size's, on top."""
        if self.grid == DIFFUSERS:
            samplers.time_grid("uniform", self.num_steps)  # checks the number
            return samplers.grids.twice_shifted(self.num_steps, shift)
        return samplers.time_grid(self.grid, self.num_steps, shift * resolution_shift)

    def guided(
        self, cond: samplers.Field, uncond: samplers.Field, pair: samplers.Field, weak: samplers.Field, ts: Tensor
    ) -> samplers.Field:
        """The guided field. pair: cond and uncond in one call (`samplers.cfg_batched`); weak: cond with `skip_layers`
        left out; ts: the times of the steps.
        """
        on = (self.interval[0], self.interval[1])
        if self.rule != "cfg":
            return RULES[self.rule](cond, uncond, self.guidance, on)
        within = self._skip_interval(ts.tolist())
        if within is None:
            return samplers.cfg_batched(cond, pair, self.guidance, on, self.rescale)
        return samplers.push_away(cond, pair, weak, self.guidance, self.skip_scale, on, within)

    def _skip_interval(self, ts: list[float]) -> tuple[float, float] | None:
        """The times between which skip-layer guidance acts, None without it. ValueError if no step falls between."""
        steps, (start, stop) = len(ts) - 1, self.skip_steps
        if not self.skip_layers:
            return None
        skipping = [t for i, t in enumerate(ts[:-1]) if steps * start < i < steps * stop]
        if not skipping:
            raise ValueError(
                f"skip_layers acts in none of {steps} steps with skip_steps = {self.skip_steps}: widen it, or take "
                "more steps"
            )
        return skipping[-1], skipping[0]


def _takes_diffusion(solver: object) -> bool:
    """Whether a solver takes a diffusion; True for what is no solver, which is refused elsewhere."""
    known = samplers.SOLVERS.get(solver) if isinstance(solver, str) else solver
    return not isinstance(known, samplers.Solver) or known.takes_diffusion


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_finite(config: object, names: Sequence[str]) -> None:
    """Raises ValueError if one of these fields is not a finite number."""
    for name in names:
        if not is_number(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}, expected a finite number")


def pair_of_numbers(name: str, value: object) -> tuple[float, float]:
    """Two finite numbers; ValueError for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2 or not all(map(is_number, value)):
        raise ValueError(f"{name} is {value!r}, expected two finite numbers")
    return value[0], value[1]


def check_solver(solver: str, ts: Tensor, diffusion: str | float | None = None) -> None:
    """Raises ValueError, before anything is drawn, for an unknown solver or one that cannot take these times."""
    flow = samplers.RectifiedFlow()
    samplers.make_solver(solver, flow, diffusion).bind(samplers.Field(lambda x, t: x, flow, "velocity"), ts.tolist())


RULES: dict[str, Callable[..., samplers.Field]] = {
    "cfg": samplers.cfg,
    "apg": samplers.apg,
    "cfg-zero": samplers.cfg_zero,
}
