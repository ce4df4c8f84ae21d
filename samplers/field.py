"""Field: a network adapted once, at the edge; what it predicts at (x_t, t) in every view, on any schedule.

x_t is (B, ...), t a float, a 0-d tensor or (B,), in [0, 1]. One evaluation of the network is one `Prediction`, whose
views are computed when they are read, so that a stepper or a guidance rule that wants both x_0 and eps pays once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.names import lookup
from samplers.schedules import Schedule, Time, batch_time, expand
from samplers.views import ROWS, convert


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a field says at (x_t, t): `value` is the view called `kind`; the others follow from it (see views.py).

    `num_evals` counts the network evaluations that it took, per sample: one, or two under classifier-free guidance.
    """

    value: Tensor
    kind: str
    x_t: Tensor
    t: Time
    schedule: Schedule
    num_evals: int = 1
    _views: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def view(self, kind: str) -> Tensor:
        """The prediction as "velocity", "noise", "data", "ddpm_v" or "score", shaped like x_t; computed once."""
        if kind not in self._views:
            self._views[kind] = convert(self.value, self.kind, kind, self.x_t, self.schedule(self.t))
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

    network: (x_t (B, ...), t (B,)) -> tensor like x_t; prediction: "velocity", "noise", "data", "ddpm_v" or "score".
    Each view is one network evaluation; take `predict` where several are wanted.
    """

    def __init__(
        self, network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, prediction: str = "velocity"
    ) -> None:
        lookup("prediction", prediction, ROWS)
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule is {schedule!r}: give a samplers.Schedule, such as samplers.RectifiedFlow()")
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def predict(self, x_t: Tensor, t: Time) -> Prediction:
        """One evaluation at (x_t, t), with all its views."""
        value = self.network(x_t, batch_time(t, x_t))
        if value.shape != x_t.shape:
            raise ValueError(f"the network gave {tuple(value.shape)} for x_t {tuple(x_t.shape)}: they must be the same")
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
        """The score grad log p_t(x_t) = -eps / sigma; 0 where sigma = 0 and the network predicts something else."""
        return self.predict(x_t, t).score

    def on(self, schedule: Schedule) -> "Field":
        """The same model seen on another schedule: asked at the time of equal log-SNR, with x_t rescaled to it.

        With log-SNR matched the rows (alpha, sigma) of both schedules are parallel (Kingma et al. 2021, sec. 5.1), so
        that ddpm_v = alpha eps - sigma x_0 is the same but for that scale, and at both ends it determines x_0 and eps.
        Beyond the log-SNR range of its own schedule the model is asked at the nearer end.
        """
        if schedule == self.schedule:
            return self

        def predict(x_t: Tensor, t: Time) -> Prediction:
            here = schedule(t)
            t_there = self.schedule.t_from_log_snr(schedule.log_snr(t))
            there = self.schedule(t_there)
            scale = torch.hypot(there.alpha, there.sigma) / torch.hypot(here.alpha, here.sigma)
            inner = self.predict(expand(scale, x_t) * x_t, t_there if isinstance(t, Tensor) else float(t_there))
            return Prediction(inner.ddpm_v / expand(scale, x_t), "ddpm_v", x_t, t, schedule, inner.num_evals)

        return DerivedField(predict, schedule, "ddpm_v")


class DerivedField(Field):
    """A field made of other fields: guidance, a change of schedule, a count. `predict` is given as a function."""

    def __init__(self, predict: Callable[[Tensor, Time], Prediction], schedule: Schedule, prediction: str) -> None:
        self._predict, self.schedule, self.prediction = predict, schedule, prediction

    def predict(self, x_t: Tensor, t: Time) -> Prediction:
        return self._predict(x_t, t)
