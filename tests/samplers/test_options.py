"""No option is inert: each one, of everything that is public, changes what comes out, and none is missing below."""

import dataclasses
import inspect

import pytest
import torch

import samplers
from samplers import SOLVERS, Brownian, Cosine, DiscreteVP, Field, Solver, grids, sample
from samplers.noise import make_diffusion
from tests.oracles import GAUSSIAN, MIXTURE
from tests.samplers.common import FLOW, normal

X, Z, T = normal(4, 2), normal(3, 2, 4, 4, seed=1), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
FIELD, SEEDS, OTHERS = MIXTURE.field(FLOW), [1, 2, 3, 4], [5, 6, 7, 8]
SEEN: list = []
HEUN, DDPM = SOLVERS["heun"], SOLVERS["ddpm"]


def straight(seed):
    """A field whose velocity is a fixed random one, plus a little of x_t."""
    v = normal(3, 2, 4, 4, seed=seed)
    return Field(lambda x_t, t: v[: len(x_t)] + 0.1 * x_t, FLOW)


A, B, C = (straight(seed) for seed in (2, 3, 4))
PAIR = Field(lambda x_t, t: torch.cat([f.v(x, 0.5) for f, x in zip((A, B), x_t.chunk(2), strict=True)]), FLOW)


def at_falling_times(field):
    return torch.stack([field.v(Z, t) for t in (1.0, 0.8, 0.5, 0.2)])


def edm_at_both_ends(**options):
    network = samplers.edm_network(lambda x, c_noise: x + c_noise[:, None], FLOW, **options)
    return torch.stack([network(X, torch.full((4,), t, dtype=torch.float64)) for t in (0.0, 0.5, 1.0)])


def sampled(**options):
    SEEN.clear()
    out = sample(FIELD, X, **options)
    return out.x, out.num_evals, out.trajectory is None, len(SEEN)


def integrated(**options):
    SEEN.clear()
    out = samplers.integrate(FIELD, X, HEUN, samplers.uniform(4), **options)
    return out.x, out.trajectory is None, len(SEEN)


def begun(**options):
    SEEN.clear()
    samplers.DerivedField(FIELD.predict, FLOW, "velocity", **options).begin()
    return len(SEEN)


LIKELIHOOD = {"solver": "rk4", "num_steps": 4}
FUNCTIONS = [  # name, call, what is always given, options with another value than the default or the one given
    ("Cosine", lambda **o: Cosine(**o).sigma(T), {}, {"offset": 0.1}),
    ("VPLinear", lambda **o: samplers.VPLinear(**o).alpha(T), {}, {"beta_min": 1.0, "beta_max": 9.0}),
    ("VE", lambda **o: samplers.VE(**o).sigma(T), {}, {"sigma_min": 0.1, "sigma_max": 9.0}),
    ("EDM", lambda **o: samplers.EDM(**o).sigma(T), {}, {"sigma_max": 9.0}),
    ("Trig", lambda **o: samplers.Trig(**o).sigma(T), {}, {"sigma_data": 0.5}),
    ("DiscreteVP.linear", lambda **o: DiscreteVP.linear(**o).alpha(T), {}, {"num": 50, "first": 1e-3, "last": 0.03}),
    (
        "DiscreteVP.scaled_linear",
        lambda **o: DiscreteVP.scaled_linear(**o).alpha(T),
        {},
        {"num": 50, "first": 1e-3, "last": 0.03},
    ),
    (
        "DiscreteVP.cosine",
        lambda **o: DiscreteVP.cosine(**o).alpha_bar,
        {"num": 20},
        {"num": 50, "offset": 0.1, "max_beta": 0.5},
    ),
    (
        "edm_view",
        lambda **o: samplers.convert(X, samplers.edm_view(**o), "data", X, FLOW(0.5)),
        {},
        {"sigma_data": 0.9},
    ),
    ("edm_network", edm_at_both_ends, {}, {"sigma_data": 0.9, "sigma_min": 0.1, "sigma_max": 9.0}),
    ("Field", lambda **o: Field(lambda x_t, t: 0.3 * x_t, FLOW, **o).v(X, 0.4), {}, {"prediction": "data"}),
    (
        "DerivedField",
        lambda **o: samplers.DerivedField(FIELD.predict, FLOW, "velocity", **o).determined(0.5),
        {},
        {"determined": lambda t: False},
    ),
    ("DerivedField", begun, {}, {"begin": lambda: SEEN.append(1)}),
    ("cfg", lambda **o: at_falling_times(samplers.cfg(A, B, 3.0, **o)), {}, {"interval": (0.3, 0.9), "rescale": 0.5}),
    (
        "cfg_batched",
        lambda **o: at_falling_times(samplers.cfg_batched(A, PAIR, 3.0, **o)),
        {},
        {"interval": (0.3, 0.9), "rescale": 0.5},
    ),
    (
        "push_away",
        lambda **o: at_falling_times(samplers.push_away(A, PAIR, C, 3.0, 2.0, **o)),
        {},
        {"interval": (0.3, 0.9), "weak_interval": (0.3, 0.9)},
    ),
    (
        "make_solver",
        lambda **o: sample(FIELD, X, samplers.make_solver("euler-maruyama", FLOW, **o), 4, generator=SEEDS).x,
        {"diffusion": "kl"},
        {"diffusion": "sigma"},
    ),
    (
        "apg",
        lambda **o: at_falling_times(samplers.apg(A, B, 3.0, **o)),
        {},
        {"interval": (0.3, 0.9), "parallel": 0.5, "norm": 0.2, "momentum": -0.5},
    ),
    (
        "classifier_guidance",
        lambda **o: at_falling_times(samplers.classifier_guidance(A, lambda x, t: -x.square().flatten(1).sum(1), **o)),
        {},
        {"interval": (0.3, 0.9), "scale": 0.5},
    ),
    (
        "cfg_zero",
        lambda **o: at_falling_times(samplers.cfg_zero(A, B, 3.0, **o)),
        {},
        {"interval": (0.3, 0.9), "zero_from": 0.7},
    ),
    (
        "cfg_text_image",
        lambda **o: at_falling_times(samplers.cfg_text_image(A, B, C, 3.0, 2.0, **o)),
        {},
        {"interval": (0.3, 0.9), "renorm": "channel", "renorm_min": 0.9},
    ),
    ("cfg_text_image", lambda **o: samplers.cfg_text_image(A, B, C, 3.0, 2.0, **o).v(Z, 0.5), {}, {"renorm": "none"}),
    (
        "cfg_text_image",
        lambda **o: samplers.cfg_text_image(A, B, C, 3.0, 2.0, **o).v(Z, 0.5),
        {"renorm": "channel"},
        {"renorm": "text-channel"},
    ),
    (
        "dynamic_shift",
        lambda **o: samplers.dynamic_shift(1000, **o),
        {},
        {"base_tokens": 100, "max_tokens": 2000, "base_mu": 0.1, "max_mu": 2.0},
    ),
    (
        "time_grid",
        lambda **o: samplers.time_grid("karras", 6, **o),
        {},
        {"shift": 2.0, "schedule": Cosine()},
    ),
    ("twice_shifted", lambda **o: samplers.twice_shifted(6, 3.0, **o), {}, {"num_train": 100}),
    ("grids.log_snr_uniform", lambda **o: grids.log_snr_uniform(6, FLOW, **o), {}, {"margin": 0.1}),
    ("grids.exponential", lambda **o: grids.exponential(6, FLOW, **o), {}, {"sigma_min": 0.1, "sigma_max": 9.0}),
    ("grids.karras", lambda **o: grids.karras(6, FLOW, **o), {}, {"sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0}),
    ("grids.karras_between", lambda **o: grids.karras_between(0.8, 0.2, 4, FLOW, **o), {}, {"rho": 3.0}),
    ("grids.beta", lambda **o: grids.beta(6, **o), {}, {"a": 2.0, "b": 2.0}),
    (
        "grids.ddpm",
        lambda **o: grids.ddpm(6, DiscreteVP.linear(), **o),
        {},
        {"spacing": "trailing", "offset": 1, "to_data": False},
    ),
    ("sample", sampled, {}, {"solver": "rk4", "num_steps": 7, "grid": "cosine"}),
    ("sample", sampled, {}, {"callback": SEEN.append, "trajectory": True}),
    ("sample", sampled, {"solver": "ddim", "generator": SEEDS}, {"diffusion": 0.5}),
    ("sample", sampled, {"solver": "ddpm", "generator": SEEDS}, {"generator": OTHERS}),
    ("integrate", integrated, {}, {"callback": SEEN.append, "trajectory": True}),
    (
        "integrate",
        lambda noise: samplers.integrate(FIELD, X, DDPM, samplers.uniform(4), Brownian(X, noise)).x,
        {"noise": SEEDS},
        {"noise": OTHERS},
    ),
    ("log_likelihood", lambda **o: samplers.log_likelihood(FIELD, X, **LIKELIHOOD | o), {}, {"solver": "heun"}),
    (
        "log_likelihood",
        lambda **o: samplers.log_likelihood(FIELD, X, **LIKELIHOOD | o),
        {"divergence": "rademacher", "generator": SEEDS},
        {"num_steps": 5, "grid": "cosine", "divergence": "gaussian", "num_probes": 3, "generator": OTHERS},
    ),
    ("bits_per_dim", lambda **o: samplers.bits_per_dim(X[:, 0], 2, **o), {}, {"bin_width": 0.1}),
    (
        "invert",
        lambda **o: samplers.invert(FIELD, X, **o).x,
        {"num_steps": 4},
        {"solver": "rk4", "num_steps": 5, "grid": "cosine"},
    ),
    (
        "start_from",
        lambda **o: samplers.start_from(X, FLOW, 0.5, **o),
        {"generator": SEEDS},
        {"num_steps": 5, "grid": "cosine", "generator": OTHERS},
    ),
    (
        "Inpaint.of",
        lambda **o: samplers.Inpaint.of(HEUN, X, torch.ones(4, 1), **o).eps,
        {"generator": SEEDS},
        {"generator": OTHERS},
    ),
    (
        "randn",
        lambda **o: samplers.randn((4, 2), **o),
        {"generator": SEEDS},
        {"generator": OTHERS, "dtype": torch.float64, "device": torch.device("meta")},
    ),
    ("Brownian", lambda **o: Brownian(X, **o)(0.9, 0.3), {"generator": SEEDS}, {"generator": OTHERS}),
    ("BrownianTree", lambda **o: samplers.BrownianTree(X, **o)(0.9, 0.3337), {}, {"seeds": SEEDS, "depth": 5}),
]

SOLVER_OPTIONS = [  # a solver, and fields with another value than its own
    (
        SOLVERS["dpmpp-2m"],
        {
            "view": "noise",
            "variable": "flow",
            "rule": "exact",
            "num_nodes": 3,
            "corrector": 3,
            "start": HEUN,
            "diffusion": 0.5,
        },
    ),
    (SOLVERS["dpmpp-2m"], {"variable": "rho", "rule": "bh1"}),
    (SOLVERS["dpmpp-3m"], {"rule": "third-halved", "lower_order_final": True}),
    (SOLVERS["dpm-2"], {"rule": "exact", "view": "data", "variable": "flow", "nodes": (0.0, 0.6)}),
    (SOLVERS["dpm-3"], {"uses": ((0,), (0, 1), (0, 1, 2)), "variable": "rho"}),
    (HEUN, {"c": (0.0, 0.9), "a": ((), (0.9,)), "b": (0.4, 0.6)}),
    (
        SOLVERS["dopri5"],
        {"atol": 1e-2, "rtol": 1e-2, "first_step": 0.3, "safety": 0.5, "max_attempts": 2},
    ),
    *(
        (dataclasses.replace(SOLVERS[name], diffusion=make_diffusion("sigma", FLOW)), {"diffusion": lambda t: 1.0})
        for name in ("euler-maruyama", "stochastic-heun")
    ),
    (SOLVERS["dpmpp-2s-ancestral"], {"eta": 0.5, "noise_scale": 1.1, "inner": SOLVERS["dpm-1"]}),
    (
        SOLVERS["edm-churn"],
        {"churn": 2.0, "sigma_min": 1.0, "sigma_max": 1.0, "noise_scale": 1.1, "inner": SOLVERS["dpm-1"]},
    ),
    (
        SOLVERS["langevin"],
        {"snr": 0.05, "num_corrections": 2, "inner": HEUN, "diffusion": make_diffusion(1.0, FLOW)},
    ),
    (SOLVERS["restart"], {"inner": SOLVERS["ddim"], "intervals": ((0.1, 0.6, 1, 4),)}),
    (SOLVERS["restart"], {"intervals": ((0.2, 0.5, 1, 4),)}),
    (SOLVERS["restart"], {"intervals": ((0.2, 0.6, 2, 4),)}),
    (SOLVERS["restart"], {"intervals": ((0.2, 0.6, 1, 5),)}),
]


def same(one, other):
    """Whether two results are equal: tensors to rounding, and everything else."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize(
    ("call", "given", "option", "value"),
    [
        pytest.param(call, given, option, value, id=f"{name}-{option}-{i}")
        for i, (name, call, given, options) in enumerate(FUNCTIONS)
        for option, value in options.items()
    ],
)
def test_every_option_of_a_function_counts(call, given, option, value):
    first = call(**given)
    assert same(first, call(**given)) and not same(first, call(**given | {option: value}))


@pytest.mark.parametrize(
    ("solver", "option", "value"),
    [
        pytest.param(solver, option, value, id=f"{solver.name}-{option}-{i}")
        for i, (solver, options) in enumerate(SOLVER_OPTIONS)
        for option, value in options.items()
    ],
)
def test_every_option_of_a_solver_counts(solver, option, value):
    def run(changed):
        try:
            num_steps = 1 if isinstance(changed, samplers.Adaptive) else 12  # what it then chooses is all its own
            out = sample(FIELD, X, changed, num_steps, generator=SEEDS)
            return out.x, out.num_evals
        except ValueError as error:
            return str(error)

    base = run(solver)
    assert not isinstance(base, str)
    assert same(base, run(solver)) and not same(base, run(dataclasses.replace(solver, **{option: value})))


def with_defaults(call):
    return {p.name for p in inspect.signature(call).parameters.values() if p.default is not p.empty}


RESULTS = {"Solution", "Prediction", "Progress", "Step", "Coefficients"}
BOUND = {"predict", "correct", "plans", "loops", "undetermined"}  # what `bind` computes
WITHOUT_EFFECT = {(samplers.RungeKutta, "in_place")}  # on the result: test_solvers.py tells


def test_no_function_is_missing():
    public = {name: getattr(samplers, name) for name in samplers.__all__ if name not in RESULTS}
    functions = {
        name: call
        for name, call in public.items()
        if callable(call) and not (inspect.isclass(call) and issubclass(call, Solver))
    }
    functions |= {
        f"grids.{name}": call
        for name, call in vars(grids).items()
        if inspect.isfunction(call) and call.__module__ == grids.__name__ and name[0] != "_" and name not in functions
    }
    for cls in (DiscreteVP, samplers.Inpaint):
        made = {name for name, value in vars(cls).items() if isinstance(value, classmethod)}
        functions |= {f"{cls.__name__}.{name}": getattr(cls, name) for name in made}
    expected = {(name, option) for name, call in functions.items() for option in with_defaults(call)}
    assert expected <= {(name, option) for name, _, _, options in FUNCTIONS for option in options}


def test_no_solver_option_is_missing():
    classes = {type(solver) for solver in SOLVERS.values()}
    expected = {(cls, option) for cls in classes for option in with_defaults(cls) - BOUND} - WITHOUT_EFFECT
    assert expected <= {(type(solver), option) for solver, options in SOLVER_OPTIONS for option in options}
    assert {c for c in vars(samplers).values() if inspect.isclass(c) and issubclass(c, Solver)} - classes == {
        Solver,
        samplers.SDESolver,
        samplers.Inpaint,
    }


def test_a_likelihood_needs_no_generator_where_it_is_exact():
    one, other = (samplers.log_likelihood(FIELD, X, **LIKELIHOOD, generator=seeds) for seeds in (SEEDS, OTHERS))
    assert same(one, other) and not same(one, samplers.log_likelihood(GAUSSIAN.field(FLOW), X, **LIKELIHOOD))
