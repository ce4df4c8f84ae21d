"""The page on samplers: its examples run, and its table is what the solvers say of themselves."""

import re
from pathlib import Path

import torch

import samplers
from samplers import SOLVERS, Adaptive

PAGE = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()


def test_the_examples_run():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, names)
    assert names["edited"].shape == names["filled"].shape == (2, 4)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(names["Bent"]().t_from_log_snr(names["Bent"]().log_snr(t)), t)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs, ours = (samplers.sample(names["bent"], x, solver, 10).x for solver in (names["Thirds"](), "ralston"))
    torch.testing.assert_close(theirs, ours)


def test_the_table_is_complete_and_true():
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].strip("`") in SOLVERS:
            rows[cells[0].strip("`")] = cells[1:4]
    assert list(rows) == list(SOLVERS) or set(rows) == set(SOLVERS)
    for name, (order, evals, kind) in rows.items():
        solver = SOLVERS[name]
        assert int(order) == solver.order
        assert evals == ("adaptive" if isinstance(solver, Adaptive) else str(solver.evals_per_step))
        stochastic = solver.stochastic
        assert kind == ("SDE" if stochastic else "both" if solver.takes_diffusion else "ODE"), name
