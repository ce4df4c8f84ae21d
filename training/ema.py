"""Averages of the weights, which are sampled, validated and exported.

There are three: exponential, with a fixed decay a step; power-function averages (Karras et al. 2023, EDM2, arXiv
2312.02696, section 3), of which snapshots of two give one of any other width after training; and the average of a
schedule-free optimiser.

After step t a power-function average of exponent g weighs the weights of times tau in (0, t] by the density

    p(tau) = (g + 1) tau^g / t^(g + 1),      sigma_rel = sqrt(g + 1) / ((g + 2) sqrt(g + 3))

with sigma_rel its standard deviation divided by t. Time is the number of updates of the weights, which a skipped step
does not make. A profile is such a (t, g).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmdit.mapped import read_metadata
from mmdit.weights_io import gather_in_order, read_weights, save_weights
from training.checkpoint import assign, averaged, load_latest
from training.config import TrainingConfig
from training.sharding import local, shard_like

Profile = tuple[float, float]
WIDEST = 12**-0.5
"""sigma_rel of the exponent 0, which weighs all steps equally."""


# --- the mathematics ----------------------------------------------------------------------------------------------


def power_of(sigma_rel: float) -> float:
    """The exponent g of a relative width in (0, 0.2887). Raises ValueError for another width.

    The positive root of g^3 + 7 g^2 + (16 - s) g + 12 - s with s = sigma_rel^-2 (EDM2, equation 126 and algorithm 2).
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel:g}, expected a number above 0 and below {WIDEST:.4f}")
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def sigma_rel_of(power: float) -> float:
    """The relative width of an exponent (EDM2, equation 123)."""
    return float((power + 1) ** 0.5 / ((power + 2) * (power + 3) ** 0.5))


def power_decay(power: float, done: int, every: int = 1) -> float:
    """The factor on the old average after `done` updates, the last `every` of them taken in at once:
    (1 - every / done)^(g + 1), which is 0 at the first.

    The weight of an update that is taken in is then exactly the density's integral over the `every` updates before it.
    """
    return float((1 - every / done) ** (power + 1))


def exponential_decay(decay: float, done: int, every: int = 1) -> float:
    """The same factor for a fixed decay d: the product of min(d, (1 + k) / (10 + k)) over the last `every` updates k
    (from 0), which forgets early weights fast.
    """
    return math.prod(min(decay, (1 + k) / (10 + k)) for k in range(done - every, done))


def overlaps(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """Inner products of profiles, (len(a), len(b)), the integrals of p_a p_b (EDM2, equation 130)."""
    t, g = (np.array(column, dtype=np.float64)[:, None] for column in zip(*a, strict=True))
    u, h = (np.array(column, dtype=np.float64)[None, :] for column in zip(*b, strict=True))
    first = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (first / t) ** g * (first / u) ** h / np.maximum(t, u)


def mixture(snapshots: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """The factors on the snapshots whose sum is nearest, in least squares, to the wanted profile."""
    found = np.linalg.lstsq(overlaps(snapshots, snapshots), overlaps(snapshots, [wanted])[:, 0], rcond=None)[0]
    return np.asarray(found)


# --- averages that a trainer keeps --------------------------------------------------------------------------------


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, k: int, every: int = 1) -> None:
    """ema += (1 - d) (model - ema) at update k, from 0, with the d of `exponential_decay` for the last `every` updates.

    The average may be wider than the model, float32 of bfloat16. Frozen parameters are left alone, and buffers: copy
    those of a network that changes them, as batch normalisation does.
    """
    averages, weights = _pairs(ema, model)
    torch._foreach_lerp_(averages, weights, 1 - exponential_decay(decay, k + 1, every))


class Exponential:
    """The exponential average, kept in `ema`, a copy of the model; every `every`-th update is taken in."""

    def __init__(self, ema: nn.Module, model: nn.Module, decay: float, every: int = 1) -> None:
        self.ema, self.decay, self.every = ema, decay, every
        self.frozen = {name for name, p in model.named_parameters() if not p.requires_grad}

    def update(self, model: nn.Module, k: int) -> None:
        """Called after update number `k`, from 0: take in the weights, if it is an update that is taken in."""
        if (k + 1) % self.every == 0:
            self._take_in(model, k)

    def _take_in(self, model: nn.Module, k: int) -> None:
        update_ema(self.ema, model, self.decay, k, self.every)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors for a checkpoint, by file; weights that are not trained are the model's (see `averaged`)."""
        return {"ema": {name: x for name, x in self.ema.state_dict().items() if name not in self.frozen}}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
        """Restore what `tensors` gave. Raises ValueError, which names `source`, where it does not fit."""
        assign(self.ema, averaged(tensors), source)

    def snapshot(self, run: Path, step: int, updates: int, write: bool = True) -> None:
        """Write a snapshot of the average after `step` steps into the run's folder, where this average has snapshots.

        updates: number of updates in these steps. Of a sharded average all processes have to call this, and one writes.
        """


class ScheduleFree(Exponential):
    """The optimiser's own average x = y + (1 - 1 / beta) (z - y), in `ema` (Defazio et al. 2024, arXiv 2405.15682).

    The parameters stay y, at which gradients are taken, and z is in the optimiser's state: weights are never swapped.
    """

    def __init__(self, ema: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, beta: float) -> None:
        super().__init__(ema, model, 0.0)
        self.optimizer, self.beta = optimizer, beta

    @torch.no_grad()
    def _take_in(self, model: nn.Module, k: int) -> None:
        averages, weights = _pairs(self.ema, model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # A parameter without gradient has no z.
        ends = [self.optimizer.state[p].get("z", p.detach()) for p in parameters]
        torch._foreach_copy_(averages, weights)
        torch._foreach_lerp_(averages, ends, 1 - 1 / self.beta)


class Power(Exponential):
    """Two power-function averages, the first in `ema`, and their snapshots every so often."""

    def __init__(self, ema: nn.Module, model: nn.Module, config: TrainingConfig) -> None:
        super().__init__(ema, model, 0.0, config.ema_every)
        self.config = config
        self.powers = [power_of(width) for width in config.ema_sigma_rel]
        self.second = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _take_in(self, model: nn.Module, k: int) -> None:
        first, weights = _pairs(self.ema, model)
        second = [local(x) for x in self.second.values()]
        for power, averages in zip(self.powers, (first, second), strict=True):
            torch._foreach_lerp_(averages, weights, 1 - power_decay(power, k + 1, self.every))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return super().tensors() | {"ema_second": self.second}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
        super().load(tensors, source)
        for name, value in self.second.items():
            local(value).copy_(local(shard_like(tensors["ema_second"][name], value)))

    def snapshot(self, run: Path, step: int, updates: int, write: bool = True) -> None:
        updates -= updates % self.every  # those that are taken in
        if not self.config.ema_snapshot_every or not updates:
            return
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.config.ema_snapshot_dtype]
        first: dict[str, Tensor] = {name: self.ema.get_parameter(name).detach() for name in self.second}
        for width, average in zip(self.config.ema_sigma_rel, (first, self.second), strict=True):
            path = run / "ema" / f"step-{step:08d}-sigma-{width!r}.safetensors"
            kept = {name: _narrowed(x, kind) for name, x in average.items() if write or hasattr(x, "full_tensor")}
            if write:
                save_weights(kept, path, {"updates": str(updates)})
            else:
                gather_in_order(kept)


def _narrowed(x: Tensor, kind: torch.dtype) -> Tensor:
    """A tensor in another type, on the CPU; each shard of a sharded one where it is."""
    return x.to(kind) if hasattr(x, "full_tensor") else x.to("cpu", kind)


def make_average(
    ema: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig
) -> Exponential:
    """The average that the config asks for, kept in `ema`, a copy of the model."""
    if "weight_sum" in optimizer.param_groups[0]:
        return ScheduleFree(ema, model, optimizer, optimizer.param_groups[0]["betas"][0])
    if config.ema == "power":
        return Power(ema, model, config)
    return Exponential(ema, model, config.ema_decay, config.ema_every)


def _pairs(ema: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(averages, weights) of the parameters that are trained."""
    pairs = [(e, p.detach()) for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    return [local(e) for e, _ in pairs], [local(p).to(e.device, e.dtype) for e, p in pairs]


# --- afterwards ---------------------------------------------------------------------------------------------------


def snapshots(run: Path) -> list[tuple[int, float, Path]]:
    """(step, sigma_rel, file) of each snapshot of a run, oldest first."""
    found = []
    for path in (run / "ema").glob("step-*.safetensors"):
        match = re.fullmatch(r"step-(\d+)-sigma-([\d.e-]+)\.safetensors", path.name)
        if match:
            found.append((int(match[1]), float(match[2]), path))
    return sorted(found)


def remove_snapshots(run: Path, step: int) -> None:
    """Remove the snapshots past `step`, which a resumed run will write again."""
    for at, _, path in snapshots(run):
        if at > step:
            path.unlink()


def _updates(snapshot: Path, step: int) -> int:
    """The number of updates behind a snapshot; its metadata has it, in older ones it is the number of steps."""
    return int(read_metadata(snapshot).get("updates", step))


def reconstruct(run: str | Path, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of the weights with any relative width, after `step` steps (None: at the last snapshot).

    Returns the state of the whole model, with frozen weights from the newest checkpoint. Raises ValueError where the
    run has no snapshots, or none of that step, FileNotFoundError where it has no checkpoint.
    """
    run, power = Path(run), power_of(sigma_rel)
    found = snapshots(run)
    if not found:
        raise ValueError(
            f'{run} has no snapshots of averages: train with training.ema = "power" and training.ema_snapshot_every > 0'
        )
    steps = sorted({at for at, _, _ in found})
    end = steps[-1] if step is None else step
    if end not in steps:
        raise ValueError(f"{run} has no snapshot of step {end}, it has {', '.join(map(str, steps))}")
    used = [(_updates(path, at), power_of(width), read_weights(path)) for at, width, path in found if at <= end]
    factors = mixture([(t, g) for t, g, _ in used], (used[-1][0], power)).tolist()
    state = averaged(load_latest(run, print)[1])
    for name in used[0][2]:
        total = torch.zeros(state[name].shape, dtype=torch.float64)
        for x, (_, _, weights) in zip(factors, used, strict=True):
            total += x * weights[name].double()
        state[name] = total.to(state[name].dtype)
    return state
