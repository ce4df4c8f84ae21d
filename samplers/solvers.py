"""All solvers by name. A new method is a new entry, or your own Solver given to `sample`."""

from samplers import exponential, runge_kutta
from samplers.names import lookup
from samplers.noise import Diffusion, make_diffusion
from samplers.schedules import Schedule
from samplers.solver import Solver, with_diffusion
from samplers.stochastic import Ancestral, Churn, EulerMaruyama, Langevin, Restart, StochasticHeun

_ALL: tuple[Solver, ...] = (
    runge_kutta.EULER,
    runge_kutta.MIDPOINT,
    runge_kutta.HEUN,
    runge_kutta.RALSTON,
    runge_kutta.RALSTON3,
    runge_kutta.RK4,
    runge_kutta.DOPRI5,
    *exponential.METHODS,
    EulerMaruyama("euler-maruyama", 1, 1, "Maruyama 1955; SiT, Ma et al. 2024"),
    StochasticHeun("stochastic-heun", 2, 2, "Kloeden & Platen 1992; SiT, Ma et al. 2024"),
    Ancestral("dpm-2-ancestral", 2, 2, "k-diffusion, with DPM-Solver-2", inner=exponential.DPM_2),
    Ancestral("dpmpp-2s-ancestral", 2, 2, "k-diffusion, with DPM-Solver++(2S)"),
    Churn("edm-churn", 2, 2, "EDM, Karras et al. 2022, alg. 2"),
    Langevin("langevin", 1, 2, "Predictor-corrector, Song et al. 2021, alg. 5"),
    Restart("restart", 2, 2, "Restart, Xu et al. 2023, alg. 1"),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in _ALL}


def solver_names() -> list[str]:
    """The names that `sample` takes; `SOLVERS[name]` has order, evaluations per step and source."""
    return list(SOLVERS)


def make_solver(solver: str | Solver, schedule: Schedule, diffusion: str | float | Diffusion | None = None) -> Solver:
    """A solver by name, or your own, with its diffusion coefficient. ValueError if the solver does not take one."""
    solver = solver if isinstance(solver, Solver) else lookup("solver", solver, SOLVERS)
    if not solver.takes_diffusion:
        if diffusion is not None:
            why = "draws noise of its own" if solver.stochastic else "solves the ODE"
            raise ValueError(
                f"{solver.name!r} {why} and takes no diffusion: leave it out, or take the solver 'euler-maruyama'"
            )
        return solver
    diffusion = getattr(solver, "diffusion", None) if diffusion is None else diffusion
    if diffusion is None:
        return solver  # an SDE solver without one says so when it is bound
    return with_diffusion(solver, make_diffusion(diffusion, schedule))
