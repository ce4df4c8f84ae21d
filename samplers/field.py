"""Field: a network with its schedule and prediction type, which gives x_0, eps, v and score, on any schedule.

x_t is (B, ...), t a float, a 0-d tensor or (B,), in [0, 1]. One evaluation of the network gives one `Prediction`, whose
views are computed when they are read, so that x_0 and eps together cost one evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.names import lookup
from samplers.schedules import Schedule, Time, as_time, batch_time, expand
from samplers.views import ROWS, View, convert, convert_at, determined, edm_view, row_of


@dataclass(frozen=True, eq=False)
class Prediction:
    """A field's prediction at (x_t, t): `value` is the view `kind`, from which the others follow (see views.py).

    `num_evals`: network evaluations that it took, per sample: one, or two with classifier-free guidance.
    """

    value: Tensor = field(repr=False)
    kind: View
    x_t: Tensor = field(repr=False)
    t: Time
    schedule: Schedule
    num_evals: int = 1
    _views: dict[View, Tensor] = field(default_factory=dict, init=False, repr=False)

    def view(self, kind: View) -> Tensor:
        """The prediction as "velocity", "noise", "data", "ddpm_v", "score" or "edm", like x_t; computed once."""
        if kind not in self._views:
            self._views[kind] = convert_at(self.value, self.kind, kind, self.x_t, self.schedule, self.t)
        return self._views[kind]

    @property
    def x_0(self) -> Tensor:
        return self.view("data")

    @property
    def eps(self) -> Tensor:
        return self.view("noise")

    @property
    def v(self) -> Tensor:
        return self.view("velocity")

    @property
    def ddpm_v(self) -> Tensor:
        return self.view("ddpm_v")

    @property
    def score(self) -> Tensor:
        return self.view("score")


class Field:
    """A network, the schedule it was trained on and what it predicts, as one vector field.

    network: (x_t (B, ...), t (B,)) -> tensor like x_t; prediction: "velocity", "noise", "data", "ddpm_v", "score",
    "edm" (for data of standard deviation 0.5, else `edm_view(sigma_data)`), or your own view (see views.py).
    Each method is one network evaluation; use `predict` to get several views of one.
    """

    def __init__(
        self, network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, prediction: View = "velocity"
    ) -> None:
        if not callable(network):
            raise ValueError(f"network is {network!r}: give a function of (x_t, t)")
        _check_schedule(schedule)
        if callable(prediction):
            row_of(prediction, schedule(0.5))  # raises ValueError if it is not a view
        else:
            lookup("prediction", prediction, ROWS)
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.prediction!r}, {self.schedule!r})"

    def predict(self, x_t: Tensor, t: Time) -> Prediction:
        """One evaluation at (x_t, t), with all its views."""
        value = self.network(x_t, batch_time(t, x_t))
        if not isinstance(value, Tensor) or value.shape != x_t.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"the network gave {found} for x_t {tuple(x_t.shape)}: it must give a tensor like x_t")
        return Prediction(value, self.prediction, x_t, t, self.schedule)

    def x_0(self, x_t: Tensor, t: Time) -> Tensor:
        """The data estimate E[x_0 | x_t]."""
        return self.predict(x_t, t).x_0

    def eps(self, x_t: Tensor, t: Time) -> Tensor:
        """The noise estimate E[eps | x_t]."""
        return self.predict(x_t, t).eps

    def v(self, x_t: Tensor, t: Time) -> Tensor:
        """The velocity dx/dt of the probability-flow ODE."""
        return self.predict(x_t, t).v

    def score(self, x_t: Tensor, t: Time) -> Tensor:
        """The score grad log p_t(x_t) = -eps / sigma.

        Raises ValueError where sigma = 0, unless the network predicts the score; only where t is a number, however: for
        a tensor t it is 0 there.
        """
        if self.prediction != "score" and not isinstance(t, Tensor) and float(self.schedule.sigma(t)) == 0:
            raise ValueError(f"there is no score at t = {t:g}, where sigma = 0: ask for eps, or at a later time")
        return self.predict(x_t, t).score

    def determined(self, t: Time) -> bool:
        """Whether x_t and the network's prediction determine both x_0 and eps at this time (at all times of a tensor).

        False for a data or score prediction where sigma = 0, and for a noise prediction where alpha = 0 (see views.py).
        """
        return bool(determined(self.prediction, self.schedule(t)).all())

    def determines_velocity(self, t: Time) -> bool:
        """Whether a solver may evaluate v at this time: `determined`, and no pole of the schedule."""
        at_pole = any(bool((as_time(t) == pole).any()) for pole in self.schedule.poles)
        return not at_pole and self.determined(t)

    def begin(self) -> None:
        """Reset state of an earlier solution, such as the momentum of `apg`; `integrate` calls this first."""

    def on(self, schedule: Schedule) -> "Field":
        """The same model on another schedule: evaluated at the time of equal log-SNR, with x_t rescaled.

        At equal log-SNR the vectors (alpha, sigma) of both schedules are parallel (Kingma et al. 2021, sec. 5.1), so
        that x_0 and eps are the same. Beyond the log-SNR range of its own schedule the model is evaluated at the nearer
        end, and the view that x_t does not determine is kept: x_0 where noise prevails, eps where data does.
        """
        _check_schedule(schedule)
        if schedule == self.schedule:
            return self

        def own_time(t: Time) -> tuple[Time, Tensor]:
            log_snr = schedule.log_snr(t)
            t_own = self.schedule.t_from_log_snr(log_snr)
            return (t_own if isinstance(t, Tensor) else float(t_own)), log_snr

        def predict(x_t: Tensor, t: Time) -> Prediction:
            c, (t_own, log_snr) = schedule(t), own_time(t)
            own = self.schedule(t_own)
            scale = torch.hypot(own.alpha, own.sigma) / torch.hypot(c.alpha, c.sigma)
            inner = self.predict(expand(scale, x_t) * x_t, t_own)
            if not isinstance(t, Tensor):
                kind = "data" if log_snr < 0 else "noise"
                return Prediction(inner.view(kind), kind, x_t, t, schedule, inner.num_evals)
            noisy, clean = (convert(inner.view(kind), kind, "ddpm_v", x_t, c) for kind in ("data", "noise"))
            value = torch.where(expand(log_snr < 0, x_t) > 0, noisy, clean)
            return Prediction(value, "ddpm_v", x_t, t, schedule, inner.num_evals)

        return DerivedField(predict, schedule, "ddpm_v", lambda t: self.determined(own_time(t)[0]), self.begin)


def _check_schedule(schedule: Schedule) -> None:
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is {schedule!r}: give a samplers.Schedule, such as samplers.RectifiedFlow()")


class DerivedField(Field):
    """A field made of other fields, by guidance or a change of schedule, whose `predict` is the given function.

    determined: the method `determined`, by default that of `prediction` on `schedule`. begin: the method `begin`, which
    should call those of the other fields.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Time], Prediction],
        schedule: Schedule,
        prediction: View,
        determined: Callable[[Time], bool] | None = None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._predict, self.schedule, self.prediction, self._determined = predict, schedule, prediction, determined
        self._begin = begin

    def predict(self, x_t: Tensor, t: Time) -> Prediction:
        return self._predict(x_t, t)

    def determined(self, t: Time) -> bool:
        return super().determined(t) if self._determined is None else self._determined(t)

    def begin(self) -> None:
        if self._begin is not None:
            self._begin()


def edm_network(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    sigma_data: float = 0.5,
    sigma_min: float = 2e-3,
    sigma_max: float = 80.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A raw EDM network F(c_in x, c_noise) as a network of (x_t, t); its Field predicts `edm_view(sigma_data)`.

    c_in = 1 / (sigma^2 + s_d^2)^1/2 and c_noise = log(sigma) / 4 for x = x_t / alpha and sigma = sigma(t) / alpha(t)
    (Karras et al. 2022, table 1); c_noise is clamped to the trained range, `sigma_min` to `sigma_max`.
    """

    def wrapped(x_t: Tensor, t: Tensor) -> Tensor:
        c = schedule(t)
        c_in = 1 / torch.hypot(c.sigma, sigma_data * c.alpha)
        return network(expand(c_in, x_t) * x_t, (c.sigma / c.alpha).clamp(sigma_min, sigma_max).log() / 4)

    edm_view(sigma_data)
    return wrapped
