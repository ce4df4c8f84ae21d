"""Commands that pages, help and modules show parse, with settings that there are; the examples of README run."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

import mmdit
import training
from mmdit_cli.main import app
from mmdit_cli.train import split_words
from tests.mmdit.test_text_to_image import make_model
from training.autoencoder import AutoencoderTrainConfig
from training.config import TrainConfig
from training.presets import preset, preset_names
from training.settings import overridden

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(path for folder in ("benchmarks", "training") for path in (ROOT / folder).rglob("*.py"))
PROGRAM = typer.main.get_command(app)


def helps(command, name=""):
    """(name, help) of a command and of those below it."""
    yield name, command.help or ""
    for below, one in getattr(command, "commands", {}).items():
        yield from helps(one, f"{name} {below}".strip())


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def commands(pattern):
    """The words after what matches in code, in blocks and `inline`, of the pages, the help and the modules' docstrings;
    continued lines joined.
    """
    texts = {path.name: path.read_text() for path in PAGES} | dict(helps(PROGRAM))
    texts |= {f"{path.parent.name}/{path.name}": doc for path in MODULES if (doc := docstring(path))}
    for where, text in texts.items():
        text = text.replace("\\\n", " ")
        lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
        lines += re.findall(r"^ {2,}(\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]*)`", text)
        for line in lines:
            if found := re.search(rf"(?:^|[ /]){pattern}(.*)", line):
                yield pytest.param(shlex.split(found[1], comments=True), id=f"{where}: {found[0].strip()}")


@pytest.mark.parametrize("words", [*commands("mmdit "), *commands("-m mmdit_cli ")])
def test_a_command_parses(words):
    if not words or words[0] not in PROGRAM.commands or len(words) < 2:
        return  # prose, or the name of a command alone
    command, name, *rest = PROGRAM.commands[words[0]], *words
    if hasattr(command, "commands"):
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    if not rest or rest == ["FOLDER"]:
        return
    given = command.make_context(name, rest).params
    config, settings = split_words(given.get("words") or given.get("settings") or [])
    if name.startswith("autoencoder"):
        overridden(AutoencoderTrainConfig(), settings)
    elif config is not None:
        assert config in (*preset_names(), "my.toml", "CONFIG") or (ROOT / config).is_file()
        settings += [f"init={given['init']}"] if given.get("init") else []
        settings += [f"lora.{word}" for word in given.get("lora") or []]
        both = any(word.startswith("transfusion.") for word in settings)
        mine = preset("transfusion-demo") if both else TrainConfig()
        overridden(preset(config) if config in preset_names() else mine, settings)


@pytest.mark.parametrize("words", [*commands(r"python -m benchmarks\.")])
def test_a_benchmark_is_there_with_its_options(words):
    name = words[0]
    assert importlib.util.find_spec(f"benchmarks.{name}") is not None
    place = ROOT / "benchmarks"
    source = (place / name / "__main__.py" if (place / name).is_dir() else place / f"{name}.py").read_text()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    """On models in miniature, in the places that the page names."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/demo/pipeline", "path/to/stable-diffusion-3.5-medium"):
        mmdit.TextToImage(make_model(3, 4), mmdit.PixelSpace(), (16, 24)).save(name)
    monkeypatch.setattr(training, "train", lambda config: config)
    [block] = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert [image.size for image in names["images"]] == [(24, 16)] * 2 and isinstance(names["model"], mmdit.MMDiT)
    assert names["x_0"].shape == (2, 16, 8, 8) and names["run"].training.num_steps == 500
