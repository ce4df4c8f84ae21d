"""Guidance: functions of fields that give a field again.

A guided prediction is a combination of predictions at the same (x_t, t). Where its weights sum to one, as in
classifier-free guidance, it is the same in every view; what is not linear says in which view it works. A scale of 1 is
the conditional field itself; `interval` is where in time guidance is on, both ends included (Kynkaanniemi et al. 2024),
and outside of it only the conditional field is evaluated. Fields of other schedules are seen on the first one's.

The second field of `cfg`, `apg` and `cfg_zero` may be the model without a condition, with a negative one, or a weaker
model with the same condition, which is autoguidance (Karras et al. 2024).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor

from samplers.field import DerivedField, Field, Prediction
from samplers.names import lookup
from samplers.schedules import Time, expand
from samplers.views import View

Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, 1.0)


def cfg(cond: Field, uncond: Field, scale: float, interval: Interval = EVERYWHERE, rescale: float = 0.0) -> Field:
    """Classifier-free guidance: uncond + scale (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    rescale: phi in [0, 1], the part taken of a prediction that is brought back to the standard deviation of cond's, per
    sample, in the view that cond's network predicts (Lin et al. 2023, sec. 3.4).
    """
    _check_numbers(scale=scale)
    _check_unit("rescale", rescale)
    return _guided([cond, uncond], lambda on, off: _plain(on, off, scale, rescale), interval, off=scale == 1)


def cfg_batched(cond: Field, pair: Field, scale: float, interval: Interval = EVERYWHERE, rescale: float = 0.0) -> Field:
    """`cfg` with both predictions from one call: pair's network is given (2B, ...), the first half conditional.

    `cond` answers where guidance is off. A call of the pair counts as two evaluations per sample.
    """
    _check_numbers(scale=scale)
    _check_unit("rescale", rescale)
    _check_fields(cond, pair)
    both = _halves(pair.on(cond.schedule))
    return _guided([cond, pair], lambda on, off: _plain(on, off, scale, rescale), interval, scale == 1, predict=both)


def _halves(pair: Field) -> Callable[[Tensor, Time], list[Prediction]]:
    """Both predictions of a field that is given each sample twice."""

    def both(x_t: Tensor, t: Time) -> list[Prediction]:
        twice = torch.cat((t, t)) if isinstance(t, Tensor) and t.ndim else t
        doubled = pair.predict(torch.cat((x_t, x_t)), twice)
        return [replace(doubled, value=half, x_t=x_t, t=t) for half in doubled.value.chunk(2)]

    return both


def push_away(
    cond: Field,
    pair: Field,
    weak: Field,
    scale: float,
    weak_scale: float,
    interval: Interval = EVERYWHERE,
    weak_interval: Interval = EVERYWHERE,
) -> Field:
    """Guidance by two weaker models: uncond + scale (cond - uncond) + weak_scale (cond - weak).

    pair as for `cfg_batched`, whose field this is outside of `weak_interval`; weak: with the same condition as cond. A
    model that skips some of its layers for `weak` makes it the skip-layer guidance of SD3.5-medium. At a time that is a
    number only what counts there is evaluated.
    """
    _check_numbers(scale=scale, weak_scale=weak_scale)
    _check_fields(cond, pair, weak)
    both, weak = _halves(pair.on(cond.schedule)), weak.on(cond.schedule)
    (lo, hi), (weak_lo, weak_hi) = _checked(interval), _checked(weak_interval)
    outside = cfg_batched(cond, pair, scale, interval)
    if weak_scale == 0:
        return outside

    def all_three(x_t: Tensor, t: Time) -> list[Prediction]:
        if scale != 1 and (isinstance(t, Tensor) or lo <= t <= hi):
            return [*both(x_t, t), weak.predict(x_t, t)]
        on = cond.predict(x_t, t)
        return [on, replace(on, num_evals=0), weak.predict(x_t, t)]

    def combine(on: Tensor, off: Tensor, less: Tensor, t: Time) -> Tensor:
        guided = _chosen((lo, hi), t, _plain(on, off, scale, 0), on)
        return _chosen((weak_lo, weak_hi), t, guided + weak_scale * (on - less), guided)

    asked = [cond, weak] if scale == 1 else [cond, pair, weak]
    within = _guided(asked, combine, EVERYWHERE, timed=True, predict=all_three)

    def predict(x_t: Tensor, t: Time) -> Prediction:
        return (within if isinstance(t, Tensor) or weak_lo <= t <= weak_hi else outside).predict(x_t, t)

    return DerivedField(predict, cond.schedule, cond.prediction, within.determined, within.begin)


def apg(
    cond: Field,
    uncond: Field,
    scale: float,
    interval: Interval = EVERYWHERE,
    parallel: float = 0.0,
    norm: float | None = None,
    momentum: float = 0.0,
) -> Field:
    """Adaptive projected guidance, which guides without oversaturation (Sadat et al. 2024, alg. 1), in the data view.

    x_0 = cond + (scale - 1) u: of cond - uncond, u keeps the part orthogonal to cond, and `parallel` times the rest
    (1 is classifier-free guidance). norm: the difference is shortened to this length per sample. momentum: so much of
    the difference at the time before is added, below 0 to push away from it; it starts anew with each solution and
    where time rises.
    """
    _check_numbers(scale=scale, parallel=parallel, momentum=momentum)
    at: float = math.inf
    before: Tensor | None = None  # the difference at the time before `at`
    newest: Tensor | None = None  # that at `at`
    if norm is not None and not norm > 0:
        raise ValueError(f"norm = {norm}: give a positive length, or None for none")

    def begin() -> None:
        nonlocal at, before, newest
        at, before, newest = math.inf, None, None

    def combine(on: Tensor, off: Tensor, t: Time) -> Tensor:
        nonlocal at, before, newest
        difference = on - off
        if momentum:
            now = float(t.max()) if isinstance(t, Tensor) else t
            if now != at:
                at, before = now, newest if now < at else None
            if before is not None and before.shape == on.shape:
                difference = difference + momentum * before
            newest = difference
        dims = tuple(range(1, on.ndim))
        if norm is not None:
            difference = difference * (norm / _norm(difference, dims)).clamp(max=1)
        along = _sum(difference * on, dims) / _sum(on.square(), dims).clamp(min=1e-12) * on
        return on + (scale - 1) * (difference - (1 - parallel) * along)

    return _guided([cond, uncond], combine, interval, off=scale == 1, kind="data", timed=True, begin=begin)


def cfg_zero(
    cond: Field, uncond: Field, scale: float, interval: Interval = EVERYWHERE, zero_from: float | None = 1.0
) -> Field:
    """CFG-Zero*: s uncond + scale (cond - s uncond) with the s that fits uncond to cond best (Fan et al. 2025, alg. 1).

    s = <cond, uncond> / |uncond|^2 per sample, in the velocity. At times t >= zero_from the guided velocity is 0, which
    skips the first step where it is 1; None for never.
    """

    _check_numbers(scale=scale)

    def combine(on: Tensor, off: Tensor, t: Time) -> Tensor:
        dims = tuple(range(1, on.ndim))
        fit = _sum(on * off, dims) / _sum(off.square(), dims).clamp(min=1e-12)
        guided = fit * off + scale * (on - fit * off)
        if zero_from is None:
            return guided
        return _chosen((zero_from, math.inf), t, torch.zeros_like(on), guided)

    return _guided([cond, uncond], combine, interval, kind="velocity", timed=True)


def cfg_text_image(
    full: Field,
    without_text: Field,
    without_image: Field,
    text_scale: float,
    image_scale: float,
    interval: Interval = EVERYWHERE,
    renorm: str = "global",
    renorm_min: float = 0.0,
) -> Field:
    """Guidance by two conditions, first the text and then the image, brought back to length (BAGEL, Deng et al. 2025).

    v_text = without_text + text_scale (full - without_text); v = without_image + image_scale (v_text - without_image).
    renorm: v is scaled by |full| / |v| within [renorm_min, 1], with norms per sample ("global"), per position over the
    channels, dimension 1 ("channel"), or so for v_text alone ("text-channel"); "none" for not at all.
    A scale of 1 costs no evaluation of its field.
    """
    _check_numbers(text_scale=text_scale, image_scale=image_scale)
    lookup("renorm", renorm, dict.fromkeys(("global", "channel", "text-channel", "none")))
    _check_unit("renorm_min", renorm_min)
    scales = [(field, s) for field, s in ((without_text, text_scale), (without_image, image_scale)) if s != 1]

    def back(v: Tensor, on: Tensor) -> Tensor:
        dims = tuple(range(1, on.ndim)) if renorm == "global" else (1,)
        return v * (_norm(on, dims) / _norm(v, dims)).clamp(renorm_min, 1)

    def combine(on: Tensor, *offs: Tensor) -> Tensor:
        v = on
        for (field, s), off in zip(scales, offs, strict=True):
            v = off + s * (v - off)
            if renorm == "text-channel" and field is without_text:
                v = back(v, on)
        return back(v, on) if renorm in ("global", "channel") else v

    return _guided([full, *(field for field, _ in scales)], combine, interval, off=not scales, kind="velocity")


def _guided(
    fields: Sequence[Field],
    combine: Callable[..., Tensor],
    interval: Interval,
    off: bool = False,
    kind: View | None = None,
    timed: bool = False,
    predict: Callable[[Tensor, Time], list[Prediction]] | None = None,
    begin: Callable[[], None] = lambda: None,
) -> Field:
    """The field that `combine`s the fields' values in the view `kind` (the first one's own) where `interval` says so.

    off: guidance changes nothing. timed: `combine` is given the time too. A time per sample is decided per sample, at
    the price of all evaluations. `predict` gives all predictions at once, the first field's first. begin: that of the
    guidance itself. In half precision the combination is made in float32, where the length of a large picture does not
    overflow.
    """
    lo, hi = _checked(interval)
    _check_fields(*fields)
    cond, *others = fields
    if off:
        return cond
    others = [field.on(cond.schedule) for field in others]

    def guided(x_t: Tensor, t: Time) -> Prediction:
        if not isinstance(t, Tensor) and not lo <= t <= hi:
            return cond.predict(x_t, t)
        on, *rest = predict(x_t, t) if predict else [cond.predict(x_t, t), *(other.predict(x_t, t) for other in others)]
        view = on.kind if kind is None else kind
        value, values = on.view(view), [prediction.view(view) for prediction in rest]
        wide = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in (value, *values)]
        out = (combine(*wide, t) if timed else combine(*wide)).to(value.dtype)
        out = _chosen((lo, hi), t, out, value)
        return Prediction(out, view, x_t, t, cond.schedule, sum(p.num_evals for p in (on, *rest)))

    def determined(t: Time) -> bool:
        return all(field.determined(t) for field in (cond, *others))

    def begin_all() -> None:
        begin()
        for field in (cond, *others):
            field.begin()

    return DerivedField(guided, cond.schedule, cond.prediction, determined, begin_all)


def _check_fields(*fields: Field) -> None:
    if wrong := [field for field in fields if not isinstance(field, Field)]:
        raise ValueError(f"guidance by {wrong[0]!r}: give samplers.Field(network, schedule, prediction)")


def _checked(interval: Interval) -> Interval:
    """The interval, a little wider: a time of a grid or in float32 is an end of it to rounding."""
    if not isinstance(interval, Sequence) or len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval = {interval}: give (lo, hi) with 0 <= lo <= hi <= 1, in time; 1 is noise")
    return interval[0] - 1e-6, interval[1] + 1e-6


def _chosen(interval: Interval, t: Time, inside: Tensor, outside: Tensor) -> Tensor:
    """`inside` where the time is within the interval, both ends included, else `outside`; per sample for (B,) times."""
    lo, hi = interval
    if not isinstance(t, Tensor):
        return inside if lo <= t <= hi else outside
    return torch.where(expand(((lo <= t) & (t <= hi)).to(inside.dtype), inside) > 0, inside, outside)


def _plain(on: Tensor, off: Tensor, scale: float, rescale: float) -> Tensor:
    return rescaled(off + scale * (on - off), on, rescale)


def rescaled(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """phi std(cond) / std(guided) guided + (1 - phi) guided, standard deviations over each sample (Lin et al. 2023)."""
    if rescale == 0 or guided[0].numel() == 1:  # one number has no deviation
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-12)
    return guided * (1 + rescale * (ratio - 1))


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Over these dimensions, which stay as 1; over none of them x itself, where torch would sum over all."""
    return x.sum(dims, keepdim=True) if dims else x


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _sum(x.square(), dims).sqrt().clamp(min=1e-12)


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        scalar = number.ndim == 0 if isinstance(number, Tensor) else isinstance(number, Real) and math.isfinite(number)
        if not scalar:
            raise ValueError(f"{name} = {number!r}: give a finite number, the same for all samples")


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}: give a number in [0, 1]; 0 is off")
