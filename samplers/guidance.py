"""Guidance: functions of fields that give a field again.

A guided prediction is a combination of predictions at the same (x_t, t). If its weights sum to one, as in
classifier-free guidance, it is the same in every view; rules that are not linear state the view that they work in. A
scale of 1 is the conditional field itself. `interval` is the range of times with guidance, both ends included
(Kynkaanniemi et al. 2024); outside, only the conditional field is evaluated. Fields of other schedules are converted to
the first one's.

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
from samplers.schedules import Time, batch_time, expand
from samplers.views import View

Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, 1.0)


def cfg(cond: Field, uncond: Field, scale: float, interval: Interval = EVERYWHERE, rescale: float = 0.0) -> Field:
    """Classifier-free guidance: uncond + scale (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    rescale: phi in [0, 1], how far the guided prediction is rescaled to the standard deviation of cond's, per sample,
    in the view that cond's network predicts (Lin et al. 2023, sec. 3.4).
    """
    _check_numbers(scale=scale)
    _check_unit("rescale", rescale)
    return _guided([cond, uncond], lambda on, off: _cfg(on, off, scale, rescale), interval, disabled=scale == 1)


def cfg_batched(cond: Field, pair: Field, scale: float, interval: Interval = EVERYWHERE, rescale: float = 0.0) -> Field:
    """`cfg` with both predictions from one call: pair's network takes (2B, ...), the first half conditional.

    Without guidance, `cond` is evaluated. A call of the pair counts as two evaluations per sample.
    """
    _check_numbers(scale=scale)
    _check_unit("rescale", rescale)
    _check_fields(cond, pair)
    both = _split_pair(pair.on(cond.schedule))
    return _guided(
        [cond, pair], lambda on, off: _cfg(on, off, scale, rescale), interval, disabled=scale == 1, predict=both
    )


def _split_pair(pair: Field) -> Callable[[Tensor, Time], list[Prediction]]:
    """A function that evaluates a pair on each sample twice, and gives its two predictions."""

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

    pair: as in `cfg_batched`, whose field this is outside of `weak_interval`; weak: with cond's condition. If weak is
    the model without some of its layers, this is the skip-layer guidance of SD3.5-medium. At a time that is a number
    only the fields that have an effect there are evaluated.
    """
    _check_numbers(scale=scale, weak_scale=weak_scale)
    _check_fields(cond, pair, weak)
    both, weak = _split_pair(pair.on(cond.schedule)), weak.on(cond.schedule)
    (lo, hi), (weak_lo, weak_hi) = _widened(interval), _widened(weak_interval)
    outside = cfg_batched(cond, pair, scale, interval)
    if weak_scale == 0:
        return outside

    def all_three(x_t: Tensor, t: Time) -> list[Prediction]:
        if scale != 1 and (isinstance(t, Tensor) or lo <= t <= hi):
            return [*both(x_t, t), weak.predict(x_t, t)]
        on = cond.predict(x_t, t)
        return [on, replace(on, num_evals=0), weak.predict(x_t, t)]

    def combine(on: Tensor, off: Tensor, weaker: Tensor, t: Time) -> Tensor:
        guided = _where((lo, hi), t, _cfg(on, off, scale, 0), on)
        return _where((weak_lo, weak_hi), t, guided + weak_scale * (on - weaker), guided)

    fields = [cond, weak] if scale == 1 else [cond, pair, weak]
    within = _guided(fields, combine, EVERYWHERE, timed=True, predict=all_three)

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
    """Adaptive projected guidance, which avoids oversaturation (Sadat et al. 2024, alg. 1), in the data view.

    x_0 = cond + (scale - 1) u, where u is the part of cond - uncond orthogonal to cond, plus `parallel` times the part
    parallel to it (1 is classifier-free guidance). norm: the difference is clipped to this length per sample. momentum:
    the factor with which the difference at the previous time is added, usually negative; it is reset with each solution
    and when time increases.
    """
    _check_numbers(scale=scale, parallel=parallel, momentum=momentum)
    at: float = math.inf
    before: Tensor | None = None  # the difference at the time before `at`
    newest: Tensor | None = None  # the difference at `at`
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

    return _guided([cond, uncond], combine, interval, disabled=scale == 1, kind="data", timed=True, begin=begin)


def cfg_zero(
    cond: Field, uncond: Field, scale: float, interval: Interval = EVERYWHERE, zero_from: float | None = 1.0
) -> Field:
    """CFG-Zero*: s uncond + scale (cond - s uncond), with s uncond the best fit to cond (Fan et al. 2025, alg. 1).

    s = <cond, uncond> / |uncond|^2 per sample, in the velocity. The guided velocity is 0 at times t >= zero_from: 1
    skips the first step, None is never.
    """
    _check_numbers(scale=scale)

    def combine(on: Tensor, off: Tensor, t: Time) -> Tensor:
        dims = tuple(range(1, on.ndim))
        fit = _sum(on * off, dims) / _sum(off.square(), dims).clamp(min=1e-12)
        guided = fit * off + scale * (on - fit * off)
        if zero_from is None:
            return guided
        return _where((zero_from, math.inf), t, torch.zeros_like(on), guided)

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
    """Guidance by two conditions, first the text and then the image, with renormalisation (BAGEL, Deng et al. 2025).

    v_text = without_text + text_scale (full - without_text); v = without_image + image_scale (v_text - without_image).
    renorm: v is multiplied by |full| / |v|, clamped to [renorm_min, 1], with norms per sample ("global") or over the
    channels, dimension 1 ("channel"); "text-channel" does the latter for v_text instead; "none" does nothing.
    A field whose scale is 1 is not evaluated.
    """
    _check_numbers(text_scale=text_scale, image_scale=image_scale)
    lookup("renorm", renorm, dict.fromkeys(("global", "channel", "text-channel", "none")))
    _check_unit("renorm_min", renorm_min)
    scales = [(field, s) for field, s in ((without_text, text_scale), (without_image, image_scale)) if s != 1]

    def renormalised(v: Tensor, on: Tensor) -> Tensor:
        dims = tuple(range(1, on.ndim)) if renorm == "global" else (1,)
        return v * (_norm(on, dims) / _norm(v, dims)).clamp(renorm_min, 1)

    def combine(on: Tensor, *offs: Tensor) -> Tensor:
        v = on
        for (field, s), off in zip(scales, offs, strict=True):
            v = off + s * (v - off)
            if renorm == "text-channel" and field is without_text:
                v = renormalised(v, on)
        return renormalised(v, on) if renorm in ("global", "channel") else v

    return _guided([full, *(field for field, _ in scales)], combine, interval, disabled=not scales, kind="velocity")


def classifier_guidance(
    field: Field,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
    interval: Interval = EVERYWHERE,
) -> Field:
    """Guidance by a classifier: score + scale grad log p(y | x_t) (Dhariwal & Nichol 2021, sec. 4.1).

    log_prob: (x_t (B, ...), t (B,)) -> log p(y | x_t), (B,), of noised data, or another reward with a gradient. It is
    not counted as an evaluation, and gradients through `integrate` take the guidance as constant. Where alpha = 0, and
    x_t says nothing of y, nothing is added. Raises ValueError if log_prob gives another shape or no gradient.
    """
    _check_numbers(scale=scale)
    _check_fields(field)
    lo, hi = _widened(interval)

    def predict(x_t: Tensor, t: Time) -> Prediction:
        found, (alpha, sigma, *_) = field.predict(x_t, t), field.schedule(t)
        if scale == 0 or not isinstance(t, Tensor) and (alpha == 0 or not lo <= t <= hi):
            return found
        step = sigma * (alpha**2 + sigma**2) / alpha  # eps - sigma grad, in the view that is determined at both ends
        step = torch.where(alpha == 0, 0.0, step)
        guided = found.ddpm_v - scale * expand(step, x_t) * _gradient(log_prob, x_t, t)
        return replace(found, value=_where((lo, hi), t, guided, found.ddpm_v), kind="ddpm_v")

    return DerivedField(predict, field.schedule, field.prediction, field.determined, field.begin)


def _gradient(log_prob: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Time) -> Tensor:
    """The gradient of log_prob (B,) at x_t (B, ...), like x_t."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        value = log_prob(x, batch_time(t, x))
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"log_prob gave {found} for x_t {tuple(x.shape)}: it must give a number per sample, (B,)")
        if not value.requires_grad:
            raise ValueError("log_prob gives no gradient: let it run without torch.no_grad and detach")
        return torch.autograd.grad(value.sum(), x)[0]


def _guided(
    fields: Sequence[Field],
    combine: Callable[..., Tensor],
    interval: Interval,
    disabled: bool = False,
    kind: View | None = None,
    timed: bool = False,
    predict: Callable[[Tensor, Time], list[Prediction]] | None = None,
    begin: Callable[[], None] = lambda: None,
) -> Field:
    """The field that `combine`s the fields' values in the view `kind` (by default the first one's own) in `interval`.

    combine takes the values of all fields, the first one's first. disabled: guidance has no effect. timed: combine
    takes the time as well. For a tensor of times all fields are evaluated, and `interval` is applied per sample.
    predict: gives all predictions at once. begin: resets the state of the guidance itself. Half-precision values are
    combined in float32, where norms do not overflow.
    """
    lo, hi = _widened(interval)
    _check_fields(*fields)
    cond, *others = fields
    if disabled:
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
        out = _where((lo, hi), t, out, value)
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


def _widened(interval: Interval) -> Interval:
    """The interval, after a check, widened for times that equal one of its ends only up to rounding."""
    if not isinstance(interval, Sequence) or len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval = {interval}: give (lo, hi) with 0 <= lo <= hi <= 1, in time; 1 is noise")
    return interval[0] - 1e-6, interval[1] + 1e-6


def _where(interval: Interval, t: Time, inside: Tensor, outside: Tensor) -> Tensor:
    """`inside` where the time is within the interval, both ends included, else `outside`; per sample for (B,) times."""
    lo, hi = interval
    if not isinstance(t, Tensor):
        return inside if lo <= t <= hi else outside
    return torch.where(expand(((lo <= t) & (t <= hi)).to(inside.dtype), inside) > 0, inside, outside)


def _cfg(on: Tensor, off: Tensor, scale: float, rescale: float) -> Tensor:
    return rescaled(off + scale * (on - off), on, rescale)


def rescaled(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """phi std(cond) / std(guided) guided + (1 - phi) guided, standard deviations over each sample (Lin et al. 2023)."""
    if rescale == 0 or guided[0].numel() == 1:  # one number has no deviation
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-12)
    return guided * (1 + rescale * (ratio - 1))


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over these dimensions, kept as 1; with no dimensions x itself, where torch would sum over all."""
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
