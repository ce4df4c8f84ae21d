"""What the tests of the samplers share: states to start from, and how an order of convergence is measured."""

import math
from functools import cache

import torch

from samplers import EDM, VE, Cosine, DiscreteVP, RectifiedFlow, Trig, VPLinear, sample
from tests.oracles import MIXTURE

FLOW = RectifiedFlow()
SMOOTH = [FLOW, Cosine(), Cosine(0.008), Trig(0.5), VPLinear(), VE(0.05, 20.0), EDM(10.0)]
DISCRETE = DiscreteVP.scaled_linear()


def normal(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def measured_order(error, coarse):
    """The slope of log error over log step size, between `coarse` and twice as many steps."""
    return math.log2(error(coarse) / error(2 * coarse))


def log_snr_grid(schedule, n, ends=2.0):
    """Uniform in log-SNR."""
    return schedule.t_from_log_snr(torch.linspace(-ends, ends, n + 1, dtype=torch.float64))


def own_grid(schedule, n):
    """Uniform in the schedule's own time, between the same ends."""
    start, end = log_snr_grid(schedule, 1).tolist()
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


@cache
def path_end():
    """x / alpha at log-SNR 2 from x = sigma X at -2, on the rectified flow: it is the same on every schedule."""
    grid = log_snr_grid(FLOW, 2000)
    return sample(MIXTURE.field(FLOW), FLOW.sigma(grid[0]) * normal(4, 2), "rk4", grid=grid).x / FLOW.alpha(grid[-1])


def path_error(solver, schedule, grid):
    """How far a solver ends from there, on any schedule and grid between these ends."""
    x = sample(MIXTURE.field(schedule), schedule.sigma(grid[0]) * normal(4, 2), solver, grid=grid).x
    return (x / schedule.alpha(grid[-1]) - path_end()).norm().item()
