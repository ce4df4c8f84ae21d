"""Sampling a batch of pictures: from noise, from pictures (image-to-image), or with known parts (inpainting).

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
    """A seed for each of `count` prompts: seed + i for a number, or the given list. ValueError for anything else."""
    try:
        try:
            seeds = [index(seed) + i for i in range(count)]  # type: ignore[arg-type]
        except TypeError:
            seeds = [index(one) for one in seed]  # type: ignore[union-attr]
    except TypeError as error:
        raise ValueError(f"seed is {seed!r}, expected a whole number, or one per prompt") from error
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} prompts: give one number, or one per prompt")
    if wrong := [one for one in seeds if not -(2**63) <= one < 2**64]:
        raise ValueError(f"seed is {wrong[0]}, expected a number of 64 bits")
    return seeds


@contextmanager
def progress_bar(batches: int, callback: Callback | None = None) -> Iterator[Callback]:
    """A callback that shows the steps of all batches as a progress bar on standard error, and calls `callback`."""
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

        def advance(progress: samplers.Progress) -> None:
            bar.update(task, advance=1, total=batches * progress.num_steps)
            if callback is not None:
                callback(progress)

        yield advance


@dataclass(frozen=True)
class Drawing:
    """A batch of pictures to sample: the guided field, options, times of the steps, and one seed per picture.

    A picture's generator draws its initial noise, and then that of each step if the solver is stochastic.
    """

    field: samplers.Field
    sampling: Sampling
    ts: Tensor
    seeds: Sequence[int]
    callback: Callable[[samplers.Progress], object] | None = None

    def from_noise(self, like: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), sampled from noise; like: a tensor of shape (C, h, w)."""
        generators = self._generators()
        x = samplers.randn((len(self.seeds), *like.shape), generators, like.dtype, like.device)
        return self._sample(x, self.ts, self.sampling.solver, generators)

    def from_latents(self, known: Tensor, strength: float, mask: Tensor | None = None) -> Tensor:
        """Scaled latents, sampled from noised `known` ones (B, C, h, w); mask (B, 1, h, w): 1 where these are kept."""
        generators, flow = self._generators(), self.field.schedule
        x, ts = samplers.start_from(known, flow, strength, grid=self.ts, generator=generators)
        solver: str | samplers.Solver = self.sampling.solver
        if mask is not None:
            solver = samplers.Inpaint.of(solver, known, mask, self._generators())  # the same noise as in x
        return self._sample(x, ts, solver, generators)

    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def _sample(
        self, x: Tensor, ts: Tensor, solver: str | samplers.Solver, generators: Sequence[torch.Generator]
    ) -> Tensor:
        diffusion = self.sampling.diffusion
        out = samplers.sample(
            self.field, x, solver, grid=ts, diffusion=diffusion, generator=generators, callback=self.callback
        )
        return out.x
