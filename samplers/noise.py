"""The noise of SDE solvers: the diffusion coefficient w(t), and Brownian motion.

The SDE has the same marginals for every w >= 0 (SiT, Ma et al. 2024, eq. 4), backwards in time:

    dX = (v - w/2 score) dt + sqrt(w) dW
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import Protocol

import torch
from torch import Generator, Tensor

from samplers.names import lookup
from samplers.schedules import Schedule, Time, expand

Diffusion = Callable[[Time], Tensor | float]
Generators = Generator | Sequence[Generator | int] | None


class Noise(Protocol):
    """Brownian motion W, shaped like x; a call gives the increment W(t_next) - W(t), N(0, |t_next - t|)."""

    def __call__(self, t: Time, t_next: Time) -> Tensor: ...

    def unit(self, t: Time, t_next: Time) -> Tensor:
        """The increment divided by its standard deviation, N(0, 1)."""
        ...


def _kl(schedule: Schedule, t: Time) -> Tensor:
    """w = 2 sigma (sigma' - alpha' sigma / alpha), the forward SDE's g^2; infinite at alpha = 0."""
    c = schedule(t)
    return 2 * c.sigma * (c.d_sigma - c.d_alpha * c.sigma / c.alpha)


DIFFUSIONS: dict[str, Callable[[Schedule, Time], Tensor | float]] = {
    "kl": _kl,
    "sigma": lambda schedule, t: schedule.sigma(t),
    "sin2": lambda schedule, t: torch.sin(math.pi * torch.as_tensor(t, dtype=torch.float64)) ** 2,
    "constant": lambda schedule, t: 1.0,
}


@dataclass(frozen=True)
class Eta:
    """w = eta^2 w_kl: 0 is the ODE, 1 the reversal of the forward SDE (Gao et al. 2024, diffusionflow.github.io)."""

    eta: float
    schedule: Schedule

    def __call__(self, t: Time) -> Tensor | float:
        return self.eta**2 * _kl(self.schedule, t) if self.eta else 0.0


def make_diffusion(diffusion: "str | float | Diffusion", schedule: Schedule) -> Diffusion:
    """w(t) by name ("kl", "sigma", "sin2", "constant"), as eta^2 w_kl from a number eta >= 0, or your own function."""
    if callable(diffusion):
        return diffusion
    if isinstance(diffusion, Real):
        if not 0 <= diffusion < math.inf:
            raise ValueError(f"diffusion = {diffusion}: eta is a number of at least 0; 0 is the ODE, 1 is 'kl'")
        return Eta(float(diffusion), schedule)
    if not isinstance(diffusion, str):
        raise ValueError(f"diffusion is {diffusion!r}: give a name ({', '.join(DIFFUSIONS)}), a number eta or a w(t)")
    w = lookup("diffusion", diffusion, DIFFUSIONS)
    return Eta(1.0, schedule) if diffusion == "kl" else lambda t: w(schedule, t)


def check_diffusion(diffusion: Diffusion, ts: Sequence[float]) -> list[Tensor]:
    """w at these times. Raises ValueError if it is negative or NaN."""
    ws = [torch.as_tensor(diffusion(t)) for t in ts]
    for t, w in zip(ts, ws, strict=True):
        if not (w >= 0).all():
            raise ValueError(f"diffusion is {w.min():g} at t = {t:g}: give a w(t) of at least 0; 0 is the ODE")
    return ws


def decay(diffusion: Diffusion | None, schedule: Schedule, t: float, t_next: float) -> float:
    """D = exp(-int tau^2 dl) from t to t_next, tau^2 = w / w_kl, l = log(alpha / sigma): the decay factor of eps.

    As w_kl = -2 sigma^2 l', this is exp(-int w / (2 sigma^2) |dt|). For eta <= 1 it is DDIM's with that eta instead,
    D^2 = 1 - eta^2 (1 - e^-2h) (Song et al. 2021, eq. 16), which equals the integral for eta = 1.
    """
    if diffusion is None or t_next >= t:
        return 1.0
    if isinstance(diffusion, Eta):
        log_ratio = float(schedule.log_snr(t) - schedule.log_snr(t_next))  # -2h
        if diffusion.eta <= 1:
            return math.sqrt(1 - diffusion.eta**2 * -math.expm1(log_ratio))
        return math.exp(diffusion.eta**2 * log_ratio / 2)
    times = (t_next + (t - t_next) * (torch.arange(64, dtype=torch.float64) + 0.5) / 64).tolist()
    ws = check_diffusion(diffusion, times)
    rates = [float(w) / (2 * float(schedule.sigma(s)) ** 2) for s, w in zip(times, ws, strict=True)]
    return math.exp(-sum(rates) / 64 * (t - t_next))


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise; with a list of generators, one per sample, a sample does not depend on its batch.

    Seeds may replace generators. The noise of a seed depends on the dtype: float64 draws other numbers than float32.
    Raises ValueError for a list of another length than the batch.
    """
    if generator is not None and not isinstance(generator, Generator):
        return torch.stack([randn(shape[1:], own, dtype, device) for own in _generators(generator, shape[0])])
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=drawn_on).to(device)


def seeded(generator: Generators, batch: int) -> Generators:
    """Seeds replaced by generators. Raises ValueError unless there is one per sample, or one generator for all."""
    return generator if generator is None or isinstance(generator, Generator) else _generators(generator, batch)


def _generators(generators: Sequence[Generator | int], batch: int) -> list[Generator]:
    try:
        listed = [g if isinstance(g, Generator) else Generator().manual_seed(index(g)) for g in generators]
    except TypeError as error:
        raise ValueError(
            f"generator is {generators!r}: give a torch.Generator, or a list with one or a seed per sample"
        ) from error
    if len(listed) != batch:
        raise ValueError(f"{len(listed)} generators for a batch of {batch}: give one per sample")
    return listed


class Brownian:
    """Brownian motion shaped like x, whose increments are drawn anew at each call."""

    def __init__(self, x: Tensor, generator: Generators = None) -> None:
        self.generator = seeded(generator, len(x))
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device

    def __call__(self, t: Time, t_next: Time) -> Tensor:
        z = self.unit(t, t_next)
        return expand(torch.as_tensor(t_next - t, dtype=torch.float64).abs().sqrt(), z) * z

    def unit(self, t: Time, t_next: Time) -> Tensor:
        """Standard normal noise."""
        return randn(self.shape, self.generator, self.dtype, self.device)


class BrownianTree:
    """One Brownian path on [0, 1] per seed, the same on every grid: a step's increment is the sum over any substeps.

    seeds: one number for the batch, or one per sample, whose path then does not depend on the batch. The path is built
    from coarse to fine by Brownian bridges (Levy's construction), each draw seeded by its time, so that times may come
    in any order. Times are rounded to 2^-depth. Noise is drawn on the CPU: a new time costs up to `depth` draws,
    most of them shared with nearby times.
    """

    def __init__(self, x: Tensor, seeds: int | Sequence[int] = 0, depth: int = 20) -> None:
        try:
            seeds = int(seeds) if isinstance(seeds, int | Integral) else [index(seed) for seed in seeds]
        except TypeError as error:
            raise ValueError(f"seeds is {seeds!r}: give a whole number, or a list with one per sample") from error
        if not isinstance(seeds, int) and len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds for a batch of {len(x)}: give one per sample, or one for all")
        if not 1 <= depth <= 30:
            raise ValueError(f"depth = {depth}: give a number of halvings from 1 to 30")
        self.shape, self.dtype, self.device, self.seeds, self.depth = x.shape, x.dtype, x.device, seeds, depth
        self._path_dtype = torch.promote_types(x.dtype, torch.float32)  # increments are small differences of the path
        self._cache: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, t: Time, t_next: Time) -> Tensor:
        return (self.at(t_next) - self.at(t)).to(self.device, self.dtype)

    def unit(self, t: Time, t_next: Time) -> Tensor:
        """The increment from t to t_next over its standard deviation. Raises ValueError if they round to one time."""
        places = abs(self._place(t_next) - self._place(t))
        if not places:
            raise ValueError(f"t = {t} and {t_next} are nearer than 2^-{self.depth}: give the tree a larger depth")
        return self(t, t_next) / math.sqrt(places / 2**self.depth)

    def at(self, t: Time) -> Tensor:
        """W(t), on the CPU, at least in float32; W(0) = 0."""
        return self._at(self._place(t))

    def _place(self, t: Time) -> int:
        return round(float(t) * 2**self.depth)

    def _at(self, place: int) -> Tensor:
        if place == 0:
            return torch.zeros(self.shape, dtype=self._path_dtype)
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        half = place & -place  # the distance to both ends of the bridge that this time bisects
        if half == 2**self.depth:
            value = self._draw(place)
        else:
            scale = math.sqrt(half / 2**self.depth / 2)
            value = (self._at(place - half) + self._at(place + half)) / 2 + scale * self._draw(place)
        self._cache[place] = value
        if len(self._cache) > 4 * self.depth:
            self._cache.popitem(last=False)
        return value

    def _draw(self, place: int) -> Tensor:
        if isinstance(self.seeds, int):
            return randn(self.shape, _place_generator(self.seeds, place), self._path_dtype)
        return torch.stack([randn(self.shape[1:], _place_generator(s, place), self._path_dtype) for s in self.seeds])


def _place_generator(seed: int, place: int) -> Generator:
    """A generator for each seed and time, seeded by a hash of both (the finaliser of splitmix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + place) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return Generator().manual_seed((mixed ^ (mixed >> 31)) % 2**63)
