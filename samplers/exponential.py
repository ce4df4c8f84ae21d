"""Exponential integrators: DDIM, DPM-Solver (++), DEIS, UniPC, SA-Solver, DDPM, ... as coefficients of one step.

With l = log(alpha / sigma) the probability-flow ODE has, between the times t and s, the exact solutions

    x_s = (sigma_s / sigma_t) x_t + sigma_s int e^l x_0(l) dl        in the data prediction (Lu et al. 2022b, eq. 8)
    x_s = (alpha_s / alpha_t) x_t - alpha_s int e^-l eps(l) dl       in the noise prediction (Lu et al. 2022a, eq. 3.4)

With a polynomial through known predictions m_j in place of x_0 or eps, each becomes a linear combination

    x_s = A x_t + T sum_j w_j m_j,      sum_j w_j = 1,      T = alpha_s - A alpha_t   (or sigma_s - A sigma_t for eps)

whose weights w_j integrate the polynomial under the kernel. With one node the step is DDIM, in either prediction. A
method is a choice of
  - the prediction, `view`: "data" (the ++ family, SA-Solver) or "noise" (DPM-Solver, DEIS, LMS, EDM's Heun), or the
    "velocity", for which A = 1, T = dt and the polynomial is in t: Adams and Bashforth's methods;
  - the `variable` of the polynomial: "log-snr", l itself; "rho", sigma / alpha; "flow", sigma / (alpha + sigma), the
    time of a rectified flow, which is finite at both ends;
  - the nodes: previous steps (`Multistep`), stages within the step (`SingleStep`), the end of the step (a corrector);
  - the `rule`: "exact" integration, or for two nodes one of its published approximations, E[tau] = 1/2 ("half":
    DPM-Solver, UniPC's B(h) = e^h - 1) or its value for small h ("bh1": UniPC's B(h) = h, SA-Solver), which grows
    without bound with tau^2 h (below), so that "half" replaces it where tau > 1; "third-halved" is "half", and with
    three nodes it halves the second difference, as diffusers and k-diffusion do in DPM-Solver++(3M), which makes its
    order 2: it is for compatibility only.

**Noise.** With a diffusion coefficient w = tau^2 w_kl, data prediction and the decay D = exp(-int tau^2 dl) (Xue et al.
2023, prop. 4.2), A = (sigma_s / sigma_t) D, the kernel is e^((1 + tau^2) l), and independent noise of deviation
(sigma_s^2 - A^2 sigma_t^2)^1/2 is added: x_s has the right variance for every D. tau = 1 with one node is DDPM's
ancestral step; DDIM's eta is D^2 = 1 - eta^2 (1 - e^-2h) (Song et al. 2021, eq. 16).
A polynomial through past predictions does not know how the noise was distributed within each step: for any number of
nodes the variance has an error of tau^2 h^2, so that a third node gives order 3 only where tau^2 is as small as h.

All coefficients are computed in float64 before the loop, in which they are Python numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from samplers.field import Field
from samplers.names import lookup
from samplers.noise import Diffusion, Noise, decay, make_diffusion
from samplers.schedules import Schedule, Time
from samplers.solver import Solver, Step
from samplers.views import plus

VARIABLES = {
    "log-snr": (lambda x: x, lambda p: p),
    "rho": (lambda x: (-x).exp(), lambda p: -p.log()),
    "flow": (lambda x: torch.sigmoid(-x), lambda p: -torch.logit(p)),
}
RULES = ("exact", "half", "bh1", "third-halved")
MAX_RHO = 1e3  # at the start of a step in "rho", which multiplies the errors of the noise at its later stages
BH1_MAX_RATE = 2 + 1e-6  # the kernel's rate 1 + tau^2 at tau = 1, above which "bh1" becomes "half"


class Point(NamedTuple):
    """The schedule at one time; l = log(alpha / sigma), infinite where alpha or sigma is 0."""

    t: float
    alpha: float
    sigma: float
    l: float  # noqa: E741


class Linear(NamedTuple):
    """x_next = a x + sum_j b_j m_j + noise * z, with predictions m_j of one view at known nodes."""

    view: str
    a: float
    b: tuple[float, ...]
    noise: float = 0.0

    def __call__(self, x: Tensor, ms: Sequence[Tensor], z: Tensor | None = None) -> Tensor:
        out = x * self.a if self.a != 0 else torch.zeros_like(x)
        for b, m in zip(self.b, ms, strict=False):
            if b != 0:
                out = plus(out, m, b, owned=True)
        return out if z is None else plus(out, z, self.noise, owned=True)


def points(schedule: Schedule, ts: Sequence[float]) -> list[Point]:
    """The schedule at these times."""
    c = schedule(torch.tensor(ts, dtype=torch.float64))
    log_snr = schedule.log_snr(torch.tensor(ts, dtype=torch.float64))
    return [Point(*row) for row in zip(ts, c.alpha.tolist(), c.sigma.tolist(), (log_snr / 2).tolist(), strict=True)]


def linear(
    view: str, start: Point, end: Point, nodes: Sequence[float], variable: str, rule: str, damping: float = 1.0
) -> Linear:
    """The step from `start` to `end` with predictions at `nodes`: values of l (or t), that of `start` first.

    damping: D above, 1 without noise. Nodes at infinite l cannot be used: their weights are 0.
    """
    if view == "velocity":
        dt, ts = end.t - start.t, tuple(nodes)
        return Linear(view, 1.0, tuple(dt * w for w in weights(start.t, end.t, ts, "log-snr", rule, 0.0)))
    if start.alpha == 0 and view == "noise":
        view, nodes = ("data", nodes[:1])  # DDIM's step, which is the same in both predictions, but finite in this one
    if view == "data":
        if start.sigma == 0:
            raise ValueError("a step in the data prediction cannot leave t = 0, where sigma = 0: take a solver of v")
        a = end.sigma / start.sigma * damping
        total = end.alpha - a * start.alpha
        noise = end.sigma * math.sqrt(max(1 - damping**2, 0.0))
    else:
        a = end.alpha / start.alpha
        total, noise = end.sigma - a * start.sigma, 0.0
    h = end.l - start.l
    rate = 1 - math.log(max(damping, 1e-300)) / h if damping < 1 else 1.0
    w = weights(start.l, end.l, tuple(nodes), variable, rule, rate if view == "data" else -1.0)
    return Linear(view, a, tuple(total * w_j for w_j in w), noise)


@lru_cache(maxsize=4096)
def weights(
    start: float, end: float, nodes: tuple[float, ...], variable: str, rule: str, rate: float
) -> tuple[float, ...]:
    """Weights, of sum 1, that integrate the polynomial through `nodes` from l = start to end under e^(rate l).

    The polynomial is in tau = (p - p_start) / (p_end - p_start), and the weights solve sum_j w_j tau_j^k = E[tau^k].
    """
    if len(nodes) == 1:
        return (1.0,)
    value = VARIABLES[variable][0]
    p_start, p_end = (value(torch.tensor(at, dtype=torch.float64)) for at in (start, end))
    p = value(torch.tensor(nodes, dtype=torch.float64))
    usable = p.isfinite()
    if not (p_start.isfinite() and p_end.isfinite()):
        return (1.0,) + (0.0,) * (len(nodes) - 1)
    tau = ((p - p_start) / (p_end - p_start))[usable]
    moments = _moments(start, end, len(tau), variable, rate)
    if len(tau) == 2 and rule != "exact":
        small_h = rule == "bh1" and rate < BH1_MAX_RATE
        moments[1] = 0.5 * rate * (end - start) / -math.expm1(rate * (start - end)) if small_h else 0.5
    if len(tau) == 3 and rule == "third-halved":
        moments[2] /= 2
    powers = tau ** torch.arange(len(tau), dtype=torch.float64)[:, None]
    try:
        solved = iter(torch.linalg.solve(powers, moments).tolist())
    except torch.linalg.LinAlgError as error:
        raise ValueError("the times of some steps are too near each other for a polynomial through them") from error
    return tuple(next(solved) if ok else 0.0 for ok in usable.tolist())


def _moments(start: float, end: float, num: int, variable: str, rate: float) -> Tensor:
    """E[tau^k] for k < num, under the density e^(rate l) between l = start and end; either may be infinite."""
    value = VARIABLES[variable][0]
    heavy, light = (end, start) if rate * (end - start) > 0 else (start, end)
    k = torch.arange(num, dtype=torch.float64)
    if rate == 0 or (rate == -1 and variable == "rho"):  # the density is flat in the variable itself
        return 1 / (k + 1)
    p_start, p_end = (value(torch.tensor(at, dtype=torch.float64)) for at in (start, end))
    if math.isinf(heavy):  # all mass is there
        l = torch.full((1,), heavy, dtype=torch.float64)  # noqa: E741
        mass = torch.ones(1, dtype=torch.float64)
    else:
        s, mass = _gauss_legendre(48)
        length = min(abs(rate * (light - heavy)), 40.0)  # beyond it there is only e^-40 of the mass
        l = heavy + math.copysign(length / abs(rate), light - heavy) * s  # noqa: E741
        mass = mass * torch.exp(-length * s)
    tau = (value(l) - p_start) / (p_end - p_start)
    return (mass * tau ** k[:, None]).sum(1) / mass.sum()


@lru_cache
def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


class Past(NamedTuple):
    """The state of a multistep method: number of the last step, predictions from the newest on, the x and noise of the
    last step, and the state of the starting solver."""

    step: int
    outputs: tuple[Tensor, ...]
    x: Tensor
    z: Tensor | None
    starter: Any = None


@dataclass(frozen=True)
class Exponential(Solver):
    """The base of `Multistep` and `SingleStep`."""

    view: str = "data"
    variable: str = "log-snr"
    rule: str = "exact"

    def __post_init__(self) -> None:
        lookup("view of an integrator", self.view, dict.fromkeys(("data", "noise", "velocity")))
        lookup("variable", self.variable, VARIABLES)
        lookup("rule", self.rule, dict.fromkeys(RULES))


@dataclass(frozen=True)
class Multistep(Exponential):
    """A multistep method: a polynomial through the predictions of this step and previous ones, `num_nodes` in all; one
    evaluation per step.

    corrector: if k > 0, each step is redone once the prediction at its end is known, with k predictions including that
    one (UniPC, Zhao et al. 2023; SA-Solver), which gives one more order for no further evaluation. The first steps have
    fewer predictions, whose lower order limits the whole for more than two nodes; `start`, a one-step solver, makes
    these steps instead, and the method has its nominal order. lower_order_final: the last steps use no more nodes than
    there are steps left, as diffusers does below 15 steps. diffusion: of the noise, see above.
    """

    num_nodes: int = 1
    corrector: int = 0
    start: Solver | None = None
    lower_order_final: bool = False
    diffusion: Diffusion | float | None = None
    predict: tuple[Linear, ...] = field(default=(), repr=False)
    correct: tuple[Linear | None, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_nodes < 1 or self.corrector < 0 or self.corrector == 1:
            raise ValueError(
                f"num_nodes = {self.num_nodes}, corrector = {self.corrector}: give 1 or more nodes, and 0 or 2 or more"
            )
        if self.start is not None and (self.start.stochastic or self.start.steps_in_place):
            why = "draws noise" if self.start.stochastic else "steps in place"
            raise ValueError(f"start = {self.start.name!r} {why}: give a one-step solver of the ODE that does not")

    @property
    def takes_diffusion(self) -> bool:
        return self.view == "data"

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        path, num = points(field.schedule, ts), len(ts) - 1
        diffusion = None if self.diffusion is None else make_diffusion(self.diffusion, field.schedule)
        places = [point.t if self.view == "velocity" else point.l for point in path]
        predict: list[Linear] = []
        correct: list[Linear | None] = []
        for i, (start, end) in enumerate(zip(path, path[1:], strict=False)):
            used = min(self.num_nodes, i + 1, num - i if self.lower_order_final else num)
            damping = decay(diffusion, field.schedule, start.t, end.t)
            nodes = [places[i - j] for j in range(used)]
            predict.append(linear(self.view, start, end, nodes, self.variable, self.rule, damping))
            correct.append(None)
            started = self.start is not None and i < self.num_nodes - 1
            correctable = i + 1 < num and not started and predict[i].view == self.view
            if self.corrector and correctable:
                used = min(self.corrector, used + 1 if self.lower_order_final else i + 2)
                nodes = [places[i], places[i + 1], *(places[i - j] for j in range(1, used - 1))]
                correct[i] = linear(self.view, start, end, nodes, self.variable, self.rule, damping)
        starter = self.start.bind(field, ts) if self.start else None
        return replace(self, predict=tuple(predict), correct=tuple(correct), start=starter)

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: Past | None = None, noise: Noise | None = None
    ) -> Step:
        index = state.step + 1 if state else 0
        plan, past = self.predict[index], state.outputs if state else ()
        if self.start and index < self.num_nodes - 1:
            x, prediction, own = self.start.step(field, x_t, t, t_next, state.starter if state else None)
            return Step(x, prediction, Past(index, (prediction.view(self.view), *past), x_t, None, own))
        prediction = field.predict(x_t, t)
        output = prediction.view(self.view)
        if state is not None and (corrector := self.correct[index - 1]) is not None:
            x_t = corrector(state.x, (past[0], output, *past[1:]), state.z)
        outputs = (output, *past)[: max(self.num_nodes, self.corrector - 1)]
        z = noise.unit(t, t_next) if noise is not None and plan.noise > 0 else None
        used = outputs if plan.view == self.view else (prediction.view(plan.view),)
        return Step(plan(x_t, used, z), prediction, Past(index, outputs, x_t, z))


@dataclass(frozen=True)
class SingleStep(Exponential):
    """An exponential Runge-Kutta method, with stages within the step.

    nodes: where the stages are in `variable`, from 0 (the start) to 1 (the end); uses[i]: the stages whose predictions
    lead to stage i + 1, and the last of these to the end. A step from or to an infinite value of `variable`, from a
    "rho" above `MAX_RHO`, or to sigma = 0 if there is a stage at the end, is replaced by DDIM's.
    """

    nodes: tuple[float, ...] = (0.0,)
    uses: tuple[tuple[int, ...], ...] = ((0,),)
    plans: tuple[tuple[tuple[float, Linear], ...], ...] = field(default=(), repr=False)

    def bind(self, field: Field, ts: Sequence[float]) -> Self:
        path = points(field.schedule, ts)
        plans = tuple(self._plan(field.schedule, *ends) for ends in zip(path, path[1:], strict=False))
        return replace(self, plans=plans)

    def _plan(self, schedule: Schedule, start: Point, end: Point) -> tuple[tuple[float, Linear], ...]:
        """For each stage the time of its evaluation, and the linear step that follows."""
        value, inverse = VARIABLES[self.variable]
        p_start, p_end = (value(torch.tensor(point.l, dtype=torch.float64)) for point in (start, end))
        stage_at_0 = 1.0 in self.nodes and end.sigma == 0
        nearly_pure = self.variable == "rho" and p_start > MAX_RHO
        if stage_at_0 or nearly_pure or not (p_start.isfinite() and p_end.isfinite()):
            return ((start.t, linear(self.view, start, end, [start.l], self.variable, self.rule)),)
        places = inverse(p_start + torch.tensor(self.nodes, dtype=torch.float64) * (p_end - p_start))
        times = schedule.t_from_log_snr(2 * places).tolist()
        times[0] = start.t
        stages = [end if node == 1 else point for node, point in zip(self.nodes, points(schedule, times), strict=True)]
        plan = []
        for i, used in enumerate(self.uses):
            target = stages[i + 1] if i + 1 < len(stages) else end
            step = linear(self.view, start, target, [stages[j].l for j in used], self.variable, self.rule)
            weight_of = dict(zip(used, step.b, strict=False))
            plan.append((stages[i].t, step._replace(b=tuple(weight_of.get(j, 0.0) for j in range(i + 1)))))
        return tuple(plan)

    def step(
        self, field: Field, x_t: Tensor, t: Time, t_next: Time, state: int | None = None, noise: Noise | None = None
    ) -> Step:
        index = 0 if state is None else state + 1
        x, outputs, first = x_t, [], None
        for time, plan in self.plans[index]:
            prediction = field.predict(x, time)
            first = first or prediction
            outputs.append(prediction.view(plan.view))
            x = plan(x_t, outputs)
        assert first is not None
        return Step(x, first, index)


_DPM, _DPMPP, _UNIPC = "DPM-Solver, Lu et al. 2022a", "DPM-Solver++, Lu et al. 2022b", "UniPC, Zhao et al. 2023"

DDIM = Multistep("ddim", 1, 1, "DDIM, Song et al. 2021, eq. 12 and 16")
DPM_2 = SingleStep("dpm-2", 2, 2, f"{_DPM}, alg. 1", view="noise", rule="half", nodes=(0.0, 0.5), uses=((0,), (0, 1)))
DPMPP_2S = SingleStep("dpmpp-2s", 2, 2, f"{_DPMPP}, alg. 1", rule="half", nodes=(0.0, 0.5), uses=((0,), (0, 1)))
EDM_HEUN = SingleStep(
    "edm-heun",
    2,
    2,
    "EDM, Karras et al. 2022, alg. 1",
    view="noise",
    variable="rho",
    nodes=(0.0, 1.0),
    uses=((0,), (0, 1)),
)
METHODS: tuple[Solver, ...] = (
    DDIM,
    SingleStep("dpm-1", 1, 1, f"{_DPM}, eq. 3.7: DDIM", view="noise"),
    DPM_2,
    SingleStep(
        "dpm-3",
        3,
        3,
        f"{_DPM}, alg. 2",
        view="noise",
        nodes=(0.0, 1 / 3, 2 / 3),
        uses=((0,), (0, 1), (0, 2)),
    ),
    DPMPP_2S,
    SingleStep("dpmpp-3s", 3, 3, f"{_DPMPP}, app. B", nodes=(0.0, 1 / 3, 2 / 3), uses=((0,), (0, 1), (0, 2))),
    Multistep("dpmpp-2m", 2, 1, f"{_DPMPP}, alg. 2", rule="half", num_nodes=2),
    Multistep("dpmpp-3m", 3, 1, f"{_DPMPP}, eq. 10 with k = 3", num_nodes=3),
    Multistep("deis", 3, 1, "DEIS, Zhang & Chen 2023, log-rho AB", view="noise", num_nodes=3),
    Multistep("lms", 4, 1, "DEIS, Zhang & Chen 2023, rho AB", view="noise", variable="rho", num_nodes=4),
    Multistep("unipc-1", 2, 1, _UNIPC, rule="half", num_nodes=1, corrector=2),
    Multistep("unipc", 3, 1, _UNIPC, rule="half", num_nodes=2, corrector=3),
    Multistep("unipc-bh1", 3, 1, _UNIPC, rule="bh1", num_nodes=2, corrector=3),
    Multistep("unipc-3", 4, 1, _UNIPC, rule="half", num_nodes=3, corrector=4),
    Multistep("ab2", 2, 1, "Bashforth & Adams 1883", view="velocity", num_nodes=2),
    Multistep("ab3", 3, 1, "Bashforth & Adams 1883", view="velocity", num_nodes=3),
    Multistep("ab4", 4, 1, "Bashforth & Adams 1883", view="velocity", num_nodes=4),
    Multistep("abm", 3, 1, "Moulton 1926", view="velocity", num_nodes=2, corrector=3),
    Multistep("abm4", 4, 1, "Moulton 1926", view="velocity", num_nodes=3, corrector=4),
    Multistep("abm5", 5, 1, "Moulton 1926", view="velocity", num_nodes=4, corrector=5),
    Multistep("ddpm", 1, 1, "DDPM, Ho et al. 2020, alg. 2: the posterior's variance", diffusion=1.0),
    Multistep("euler-ancestral", 1, 1, "k-diffusion; DDPM's step on any schedule", diffusion=1.0),
    Multistep("dpmpp-2m-sde", 2, 1, f"{_DPMPP}, app. D", rule="half", num_nodes=2, diffusion=1.0),
    Multistep("dpmpp-3m-sde", 2, 1, "SA-Solver, Xue et al. 2023, eq. 14", num_nodes=3, diffusion=1.0),
    Multistep(
        "sa-solver", 2, 1, "SA-Solver, Xue et al. 2023, alg. 1", rule="bh1", num_nodes=2, corrector=2, diffusion=1.0
    ),
    EDM_HEUN,
)
