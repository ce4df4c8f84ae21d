"""samplers: one mathematics for flows and diffusions. Schedules, views, fields, guidance, solvers; torch alone.

    field = samplers.Field(network, samplers.RectifiedFlow(), "velocity")
    x_0 = samplers.sample(field, eps, solver="heun", num_steps=20).x

t = 0 is data, t = 1 is noise; x_t = alpha(t) x_0 + sigma(t) eps; v = alpha'(t) x_0 + sigma'(t) eps.
"""

from samplers import grids
from samplers.discrete import DiscreteVP
from samplers.edit import Inpaint, start_from
from samplers.exponential import Multistep, SingleStep
from samplers.field import DerivedField, Field, Prediction, edm_network
from samplers.grids import GRIDS, dynamic_shift, resolution_shift, shift_time, time_grid, twice_shifted, uniform
from samplers.guidance import apg, cfg, cfg_batched, cfg_text_image, cfg_zero, classifier_guidance, push_away
from samplers.integrate import Progress, Solution, integrate, sample
from samplers.likelihood import bits_per_dim, invert, log_likelihood
from samplers.names import lookup
from samplers.noise import DIFFUSIONS, Brownian, BrownianTree, randn
from samplers.runge_kutta import Adaptive, RungeKutta
from samplers.schedules import EDM, VE, Coefficients, Cosine, RectifiedFlow, Schedule, Trig, VPLinear
from samplers.solver import SDESolver, Solver, Step
from samplers.solvers import SOLVERS, make_solver, solver_names
from samplers.stochastic import Ancestral, Churn, EulerMaruyama, Langevin, Restart, StochasticHeun
from samplers.views import VIEWS, convert, edm_view

__all__ = [
    "Adaptive",
    "Ancestral",
    "Brownian",
    "BrownianTree",
    "Churn",
    "Coefficients",
    "Cosine",
    "DIFFUSIONS",
    "DerivedField",
    "DiscreteVP",
    "EDM",
    "EulerMaruyama",
    "Field",
    "GRIDS",
    "Inpaint",
    "Langevin",
    "Multistep",
    "Prediction",
    "Progress",
    "RectifiedFlow",
    "Restart",
    "RungeKutta",
    "SDESolver",
    "SOLVERS",
    "Schedule",
    "SingleStep",
    "Solution",
    "Solver",
    "Step",
    "StochasticHeun",
    "Trig",
    "VE",
    "VIEWS",
    "VPLinear",
    "apg",
    "bits_per_dim",
    "cfg",
    "cfg_batched",
    "cfg_text_image",
    "cfg_zero",
    "classifier_guidance",
    "convert",
    "dynamic_shift",
    "edm_network",
    "edm_view",
    "grids",
    "integrate",
    "invert",
    "log_likelihood",
    "lookup",
    "make_solver",
    "push_away",
    "randn",
    "resolution_shift",
    "sample",
    "shift_time",
    "solver_names",
    "start_from",
    "time_grid",
    "twice_shifted",
    "uniform",
]
