"""samplers: one mathematics for flows and diffusions. Schedules, views, fields, guidance, solvers; torch alone.

    field = samplers.Field(network, samplers.RectifiedFlow(), "velocity")
    x_0 = samplers.sample(field, eps, solver="heun", num_steps=20).x

t = 0 is data, t = 1 is noise; x_t = alpha(t) x_0 + sigma(t) eps; v = alpha'(t) x_0 + sigma'(t) eps.
"""

from samplers.field import DerivedField, Field, Prediction
from samplers.grids import GRIDS, resolution_shift, shift_time, time_grid, uniform
from samplers.guidance import cfg, cfg_batched
from samplers.integrate import Progress, Solution, integrate, sample
from samplers.names import lookup
from samplers.noise import DIFFUSIONS, Brownian, randn
from samplers.schedules import Coefficients, Cosine, RectifiedFlow, Schedule
from samplers.solvers import SOLVERS, EulerMaruyama, RungeKutta, SDESolver, Solver, Step, solver_names
from samplers.views import VIEWS, convert

__all__ = [
    "DIFFUSIONS",
    "GRIDS",
    "SOLVERS",
    "VIEWS",
    "Brownian",
    "Coefficients",
    "Cosine",
    "DerivedField",
    "EulerMaruyama",
    "Field",
    "Prediction",
    "Progress",
    "RectifiedFlow",
    "RungeKutta",
    "SDESolver",
    "Schedule",
    "Solution",
    "Solver",
    "Step",
    "cfg",
    "cfg_batched",
    "convert",
    "integrate",
    "lookup",
    "randn",
    "resolution_shift",
    "sample",
    "shift_time",
    "solver_names",
    "time_grid",
    "uniform",
]
