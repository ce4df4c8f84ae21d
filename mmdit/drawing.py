"""A batch of pictures about to be drawn: from noise, from pictures, or from pictures but for a part.

Shape letters: B batch, C channels, h w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

import samplers
from mmdit.sampling import Sampling
from samplers.integrate import Callback


def each_seed(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` prompts: seed + i of one number, or a list as it is. Raises ValueError for another."""
    try:
        try:
            seeds = [index(seed) + i for i in range(count)]  # type: ignore[arg-type]
        except TypeError:
            seeds = [index(one) for one in seed]  # type: ignore[union-attr]
    except TypeError as error:
        raise ValueError(f"seed is {seed!r}, expected a whole number, or one a prompt") from error
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} prompts: give one number, or one a prompt")
    if wrong := [one for one in seeds if not -(2**63) <= one < 2**64]:
        raise ValueError(f"seed is {wrong[0]}, expected a number of 64 bits")
    return seeds


@contextmanager
def progress_bar(batches: int, callback: Callback | None = None) -> Iterator[Callback]:
    """A callback that moves a bar of the steps of so many batches, on standard error, and calls another."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("drawing, step"),
        MofNCompleteColumn(),
        *Progress.get_default_columns()[1:3],
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def told(progress: samplers.Progress) -> None:
            bar.update(task, advance=1, total=batches * progress.num_steps)
            if callback is not None:
                callback(progress)

        yield told


@dataclass(frozen=True)
class Drawing:
    """Their guided field, options, the times of the steps, and one seed a picture.

    A picture's own generator draws its start, and then the noise of its steps where the solver takes any.
    """

    field: samplers.Field
    how: Sampling
    ts: Tensor
    seeds: Sequence[int]
    callback: Callable[[samplers.Progress], object] | None = None

    def from_noise(self, like: Tensor) -> Tensor:
        """Scaled latents, from noise in the shape of (C, h, w)."""
        generators = self._generators()
        x = samplers.randn((len(self.seeds), *like.shape), generators, like.dtype, like.device)
        return self._sampled(x, self.ts, self.how.solver, generators)

    def from_latents(self, known: Tensor, strength: float, mask: Tensor | None = None) -> Tensor:
        """Scaled latents, from those of pictures (B, C, h, w); mask (B, 1, h, w): 1 where they are kept."""
        generators, flow = self._generators(), self.field.schedule
        x, ts = samplers.start_from(known, flow, strength, grid=self.ts, generator=generators)
        solver: str | samplers.Solver = self.how.solver
        if mask is not None:
            solver = samplers.Inpaint.of(solver, known, mask, self._generators())  # with the very noise that x has
        return self._sampled(x, ts, solver, generators)

    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def _sampled(
        self, x: Tensor, ts: Tensor, solver: str | samplers.Solver, generators: Sequence[torch.Generator]
    ) -> Tensor:
        given = dict(grid=ts, diffusion=self.how.diffusion, generator=generators, callback=self.callback)
        return samplers.sample(self.field, x, solver, **given).x  # type: ignore[arg-type]
