"""Guidance: functions of fields that give a field again.

A guided prediction is a combination of predictions at the same (x_t, t). Where its weights sum to one, as in
classifier-free guidance, it is the same in every view; what is not linear says in which view it works.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samplers.field import DerivedField, Field, Prediction
from samplers.schedules import Time, expand


def cfg(
    cond: Field, uncond: Field, scale: float, interval: tuple[float, float] = (0.0, 1.0), rescale: float = 0.0
) -> Field:
    """Classifier-free guidance: uncond + scale (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    Outside lo <= t <= hi (`interval`, Kynkaanniemi et al. 2024), and everywhere for scale 1, only `cond` is evaluated.
    rescale: phi in [0, 1], the part taken of a prediction that is brought back to the standard deviation of cond's, per
    sample, in the view that cond's network predicts (Lin et al. 2023, sec. 3.4). With a weaker model of the same
    condition as `uncond` this is autoguidance (Karras et al. 2024). A field of another schedule is seen on cond's.
    """
    uncond = uncond.on(cond.schedule)
    return _guided(cond, lambda x_t, t: (cond.predict(x_t, t), uncond.predict(x_t, t)), scale, interval, rescale)


def cfg_batched(
    cond: Field, pair: Field, scale: float, interval: tuple[float, float] = (0.0, 1.0), rescale: float = 0.0
) -> Field:
    """`cfg` with both predictions from one call: pair's network is given (2B, ...), the first half conditional.

    `cond` answers where guidance is off. A call of the pair counts as two evaluations per sample.
    """
    pair = pair.on(cond.schedule)

    def both(x_t: Tensor, t: Time) -> tuple[Prediction, Prediction]:
        twice = torch.cat((t, t)) if isinstance(t, Tensor) and t.ndim else t
        doubled = pair.predict(torch.cat((x_t, x_t)), twice)
        on, off = (replace(doubled, value=half, x_t=x_t, t=t) for half in doubled.value.chunk(2))
        return on, off

    return _guided(cond, both, scale, interval, rescale)


def _guided(
    cond: Field,
    both: Callable[[Tensor, Time], tuple[Prediction, Prediction]],
    scale: float,
    interval: tuple[float, float],
    rescale: float,
) -> Field:
    """The field that guides where `interval` says so; a time per sample is decided per sample, at the price of both."""
    lo, hi = interval
    if not 0 <= lo <= hi <= 1:
        raise ValueError(f"interval = {interval}: give (lo, hi) with 0 <= lo <= hi <= 1, in time; 1 is noise")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale = {rescale}: give a number in [0, 1]; 0 is off")
    if scale == 1:
        return cond

    def predict(x_t: Tensor, t: Time) -> Prediction:
        if not isinstance(t, Tensor) and not lo <= t <= hi:
            return cond.predict(x_t, t)
        on, off = both(x_t, t)
        value, other = on.value, off.view(on.kind)
        guided = rescaled(other + scale * (value - other), value, rescale)
        if isinstance(t, Tensor):
            inside = expand(((lo <= t) & (t <= hi)).to(x_t.dtype), x_t)
            guided = torch.where(inside > 0, guided, value)
        return Prediction(guided, on.kind, x_t, t, cond.schedule, on.num_evals + off.num_evals)

    return DerivedField(predict, cond.schedule, cond.prediction, cond.determined)


def rescaled(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """phi std(cond) / std(guided) guided + (1 - phi) guided, standard deviations over each sample (Lin et al. 2023)."""
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (1 + rescale * (ratio - 1))
