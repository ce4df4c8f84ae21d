"""What trains and samples on a GPU, on a device that stands for one: no tensor of it meets one of the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.second_device import COMPARED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this version of torch takes no device written in Python",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each gave on the CPU and on the other device."""
    command = [sys.executable, "-m", "tests.second_device", str(tmp_path_factory.mktemp("second"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {name: both for line in lines for name, both in line.items()}


def alike(here, there):
    """Whether two JSON values have the same form and text, and numbers to rounding."""
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(alike(here[name], there[name]) for name in here)
    if isinstance(here, list):
        return len(here) == len(there) and all(map(alike, here, there))
    return here == (there if isinstance(here, str) else pytest.approx(there, rel=1e-4, nan_ok=True))


@pytest.mark.parametrize("name", COMPARED)
def test_a_second_device_gives_what_the_cpu_gives(found, name):
    assert set(found) == set(COMPARED)
    here, there = found[name]
    assert alike(here, there), (here, there)


def test_what_a_gpu_refuses_is_refused():
    """Tensors of both devices, and a generator of the CPU; else the tests above could not fail."""
    code = (
        "import torch; from tests.second_device import *; kept = register()\n"
        "with Operators(), Functions():\n"
        "    x = torch.ones(3, device=NAME)\n"
        "    drawn = lambda: torch.randn(3, device=NAME, generator=torch.Generator())\n"
        "    for wrong in (lambda: x + torch.ones(3), drawn,\n"
        "                  lambda: x.numpy(), lambda: x[torch.zeros(3)], lambda: torch.cat([x, torch.ones(1)])):\n"
        "        try: print('taken', wrong())\n"
        "        except (RuntimeError, TypeError) as error: print('refused', error)\n"
        "    print((x * torch.tensor(2.0)).tolist(), x[torch.tensor([0])].device, x.cpu() + torch.ones(3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused"] * 5 + ["[2.0,"], done.stderr
