"""The floors of the building: imports never run upward, pull in nothing heavy, and have no side effects."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # of our own packages
    "samplers": {"samplers"},
    "mmdit": {"mmdit", "samplers"},
    "training": {"training", "mmdit", "samplers"},
    "mmdit_cli": {"mmdit_cli", "training", "mmdit", "samplers"},
}
HEAVY = {"transformers", "diffusers", "open_clip", "timm", "torchvision", "tensorboard", "matplotlib"}
HEAVY |= {"torchmetrics", "torch_fidelity", "wandb"}


def imported(path):
    """Top-level names of everything that a source file imports, also within functions, with the lines."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


def run(code, folder):
    """Run Python in an empty folder, as home and temporary folder too, and return what it prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {name: str(folder) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME")}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_package_stands_on_a_floor():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_type_checker_sees_the_types_of_an_installed_package(package):
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / package / "py.typed").is_file() and "py.typed" in data["*"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_import_runs_upward(package):
    files = sorted((ROOT / package).rglob("*.py"))
    upward = set(MAY_IMPORT) - MAY_IMPORT[package]
    bad = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imported(path)
        if name in upward
    ]
    assert files and not bad


def test_samplers_names_only_torch_and_the_standard_library():
    allowed = {"samplers", "torch"} | set(sys.stdlib_module_names)
    files = (ROOT / "samplers").rglob("*.py")
    assert not [f"{path.name}:{line} {name}" for path in files for name, line in imported(path) if name not in allowed]


def test_importing_samplers_loads_nothing_beyond_torch(tmp_path):
    code = "import sys, torch; before = set(sys.modules); import samplers; print(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run(code, tmp_path)}
    assert "samplers" in loaded
    assert not loaded - {"samplers", "torch"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_importing_is_light_and_leaves_no_trace(package, tmp_path):
    code = f"""
import os, sys, torch
def state():
    return dict(os.environ), os.getcwd(), torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed()
before = state()
import {package}
assert state() == before
print(*sys.modules)
"""
    heavy = HEAVY & {name.split(".")[0] for name in run(code, tmp_path)}
    assert not heavy
    assert not list(tmp_path.rglob("*"))


def test_all_that_samplers_names_as_public_is_there():
    import samplers

    assert len(set(samplers.__all__)) == len(samplers.__all__)
    assert all(hasattr(samplers, name) for name in samplers.__all__)


@pytest.mark.parametrize("package", ["mmdit", "training"])
def test_a_name_that_is_fetched_when_used_is_no_module_too(package):
    """Once imported, a module of that name would stand in its place."""
    modules = {path.stem for path in (ROOT / package).iterdir()}
    assert not modules & {*importlib.import_module(package).__all__}
