"""The command line: what reaches the library, and what is shown."""

import ast
import io
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

import mmdit
import mmdit_cli.main
import training
from mmdit_cli.generate import _part
from mmdit_cli.train import split_words
from tests.mmdit_cli.command import assert_one_line_error, run
from training.presets import preset_names


@pytest.fixture
def calls(monkeypatch):
    """Records the calls of the trainer instead of training."""
    made = []
    monkeypatch.setattr(training, "train", lambda *asked: made.append(asked), raising=False)
    monkeypatch.setattr(training, "resume", lambda run, overrides: made.append((run, overrides)), raising=False)
    return made


@pytest.fixture
def pipe(monkeypatch):
    """A pipeline that keeps what it is asked and gives grey pictures."""
    asked = types.SimpleNamespace()

    def sample(prompts, **options):
        asked.prompts, asked.options = prompts, options
        return [Image.new("RGB", (8, 6), "grey") for _ in prompts]

    def load(path, **parts):
        asked.run, asked.parts = path, parts
        return sample

    monkeypatch.setattr(mmdit, "TextToImage", types.SimpleNamespace(load=load), raising=False)
    return asked


# --- train ---------------------------------------------------------------------------------------


def test_train_passes_the_config_with_all_settings(calls):
    result = run("train", "demo", "training.num_steps=7", "--data", "pictures=1/", "--out", "2024", "optimizer.lr=3e-4")
    assert result.exit_code == 0, result.output
    [(config, resume, restart)] = calls
    assert (config.training.num_steps, config.optimizer.lr) == (7, 3e-4)
    assert (config.data.source, config.training.out) == ("pictures=1/", "2024")
    assert not resume and not restart
    assert run("train", "demo", "--restart").exit_code == 0 and calls[1][1:] == (False, True)


def test_the_package_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "mmdit_cli", "train"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("mmdit: error: which config?")


def test_torchrun_is_for_train_alone(monkeypatch, calls):
    """Processes that do all the same work into the same files are refused, not started."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert run("train", "demo").exit_code == 0
        done = run("cache", "demo")  # which lacks --out
        assert done.exit_code == 2 and ("torchrun started several" in done.output) == (processes == "2")
    assert "--part" in done.output


def test_train_resume_alone_takes_the_run_and_settings(calls, tmp_path):
    assert run("train", "--resume", tmp_path, "training.num_steps=9").exit_code == 0
    assert calls == [(tmp_path, ["training.num_steps=9"])]


def test_train_resume_with_a_config_asks_for_that_config_in_that_run(calls, tmp_path):
    assert run("train", "demo", "--resume", tmp_path).exit_code == 0
    [(config, resume, _)] = calls
    assert resume and config.training.out == str(tmp_path)


def test_split_words_keeps_a_file_with_an_equals_sign(tmp_path):
    path = tmp_path / "lr=1.toml"
    path.touch()
    assert split_words([str(path), "seed=1"]) == (str(path), ["seed=1"])
    assert split_words(["seed=1"]) == (None, ["seed=1"])
    many = f'sampling.prompts=["{"a red circle" * 30}"]'  # no file can have that name
    assert split_words(["demo", many]) == ("demo", [many])


# --- sample and evaluate ---------------------------------------------------------------------------


def test_sample_writes_one_picture_where_told(pipe, tmp_path):
    out = tmp_path / "new" / "a.png"
    words = ["--solver", "heun", "--steps", 20, "--guidance", 4, "--seed", 1, "--size", "64x96", "--out", out]
    result = run("sample", "runs/x", "a red circle", *words)
    assert result.exit_code == 0, result.output
    assert pipe.prompts == ["a red circle"] and str(pipe.run) == "runs/x"
    assert pipe.options == {
        "num_steps": 20, "solver": "heun", "guidance": 4.0, "height": 64, "width": 96, "seed": 1, "diffusion": None,
        "negative_prompts": None, "edit": None, "progress": False,
    }  # fmt: skip
    assert Image.open(out).size == (8, 6)
    assert str(out) in result.stdout


def test_sample_passes_the_parts_of_a_single_file(pipe, tmp_path):
    words = ["--text", "folder", "--autoencoder", "sd3:ae.safetensors", "--without", "t5", "--dtype", "bfloat16"]
    words += ["--device", "cpu"]
    result = run("sample", "sd3.safetensors", "a", "--out", tmp_path / "a.png", *words)
    assert result.exit_code == 0, result.output
    assert str(pipe.run) == "sd3.safetensors"
    parts = {"text": "folder", "autoencoder": "sd3:ae.safetensors", "without": ["t5"], "dtype": torch.bfloat16}
    assert pipe.parts == parts | {"device": torch.device("cpu")}
    run("sample", "runs/x", "a", "--out", tmp_path / "a.png")
    assert pipe.parts == {}


def test_sample_numbers_several_pictures_and_leaves_the_rest_to_the_run(pipe, tmp_path):
    assert run("sample", "r", "one", "two", "--out", tmp_path / "a.jpg").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.jpg", "a-1.jpg"]
    assert pipe.options == {
        "num_steps": None, "solver": None, "guidance": None, "height": None, "width": None, "seed": 0,
        "negative_prompts": None, "edit": None, "diffusion": None, "progress": False,
    }  # fmt: skip


def test_sample_starts_from_a_picture_and_leads_away_from_a_prompt(pipe, tmp_path):
    for name, colour in (("old", "red"), ("mask", "white")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{name}.png")
    words = ["--image", tmp_path / "old.png", "--mask", tmp_path / "mask.png", "--strength", 0.9, "--negative", "grey"]
    assert run("sample", "r", "one", *words, "--out", tmp_path / "a.png").exit_code == 0
    assert pipe.options["negative_prompts"] == "grey"
    edit = pipe.options["edit"]
    assert (edit.strength, edit.image.getpixel((0, 0)), edit.mask.getpixel((7, 5))) == (0.9, (255, 0, 0), (255,) * 3)


def test_sample_fits_a_picture_and_its_mask_to_the_size_asked_for(pipe, tmp_path):
    """Scaled to cover it and cropped at the centre, as training fits pictures: a photograph has any size."""
    for name, left, right in (("old", "red", "blue"), ("mask", "black", "white")):
        image = Image.new("RGB", (50, 20), left)
        image.paste(right, (25, 0, 50, 20))
        image.save(tmp_path / f"{name}.png")
    words = ["--image", tmp_path / "old.png", "--mask", tmp_path / "mask.png", "--size", "16x32"]
    assert run("sample", "r", "one", *words, "--out", tmp_path / "a.png").exit_code == 0
    edit = pipe.options["edit"]
    assert (pipe.options["height"], pipe.options["width"]) == (16, 32)
    assert edit.image.size == edit.mask.size == (32, 16)
    assert [edit.image.getpixel((x, 8)) for x in (8, 24)] == [(255, 0, 0), (0, 0, 255)]
    assert [edit.mask.getpixel((x, 8)) for x in (8, 24)] == [(0, 0, 0), (255, 255, 255)]


def test_evaluate_prints_every_number(monkeypatch):
    scores = {"validation": {"loss": 0.25, "t=0.1": 1.0}, "counting": 0.5, "prompts": 3}
    monkeypatch.setattr(training, "evaluate_run", lambda run, given, data, **_: scores | {"data": data}, raising=False)
    lines = [line.split() for line in run("evaluate", "somewhere", "--data", "moved").stdout.splitlines()]
    assert lines == [
        ["validation", "/", "loss", "0.2500"],
        ["validation", "/", "t=0.1", "1.0000"],
        ["counting", "0.5000"],
        ["prompts", "3"],
        ["data", "moved"],
    ]


# --- generate --------------------------------------------------------------------------------------


def test_generate_prints_text_and_writes_pictures(tmp_path, monkeypatch):
    from mmdit.generate import Written
    from mmdit.text_and_images import TransfusionPipeline

    asked, devices = [], []
    picture = Image.new("RGB", (8, 8), "red")
    pipe = TransfusionPipeline.__new__(TransfusionPipeline)

    def generate(prompts, seed, told, **how):
        asked.append((prompts, seed, how))
        for part in ("two ", "words", picture, picture, "and more"):
            told(0, part)
        return [Written(["two words", picture, picture, "and more"], "length")]

    monkeypatch.setattr(mmdit.TextToImage, "load", lambda run, device: devices.append(device) or pipe)
    pipe.generate, pipe.image_sampling = generate, lambda *how, free: (how, free)
    pipe.fitted = lambda given: given.resize((6, 4))
    picture.save(tmp_path / "given.png")
    words = (
        "--top-k",
        "5",
        "--temperature",
        "0.5",
        "--max-images",
        "2",
        "--seed",
        "3",
        "--draw",
        "--size",
        "16x8",
        "--device",
        "cpu",
    )
    result = run("generate", "r", tmp_path / "given.png", "and then", *words, "--out", tmp_path / "o.png")
    assert result.exit_code == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[0] == "two words" and "o-0.png" in said[1] and "o-1.png" in said[2] and said[3] == "and more"
    assert said[4].startswith("stopped at a limit, not at an end: 64 tokens")
    assert (tmp_path / "o-0.png").exists() and (tmp_path / "o-1.png").exists()
    [([prompt], seed, options)] = asked
    assert devices == [torch.device("cpu")]
    assert prompt[0].size == (6, 4) and prompt[1] == "and then" and seed == 3
    assert options["text"].top_k == 5 and options["text"].temperature == 0.5 and options["begin"] == "image"
    assert options["max_images"] == 2 and options["max_tokens"] == 64
    assert options["image"] == ((None, None, None, 16, 8, None), True)


def test_generate_says_that_nothing_was_written(monkeypatch):
    from mmdit.generate import Written
    from mmdit.text_and_images import TransfusionPipeline

    pipe = TransfusionPipeline.__new__(TransfusionPipeline)
    monkeypatch.setattr(mmdit.TextToImage, "load", lambda run, device: pipe)
    pipe.generate, pipe.image_sampling = lambda *_, **how: [Written([], "end")], lambda *how, free: how
    result = run("generate", "r", "a star")
    assert (result.exit_code, result.stdout) == (
        0,
        "",
    ) and result.stderr == "the model wrote nothing: it ended at once\n"


def test_generate_wants_a_model_of_both(pipe):
    result = run("generate", "r", "a star")
    assert result.exit_code == 2 and "writes no text: draw with" in result.stderr


# --- convert ---------------------------------------------------------------------------------------


def test_convert_writes_the_layout_and_type_that_are_asked_for(tmp_path):
    import torch

    model = mmdit.MMDiT(mmdit.MMDiTConfig(depth=1, num_heads=1, context_dim=8, pooled_dim=8, pos_embed_max_size=64))
    mmdit.save(model, tmp_path / "ours")
    words = ["convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "diffusers", "--dtype", "bfloat16"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "diffusers, 0.1 M parameters, bfloat16" in result.stdout
    result = run("convert", tmp_path / "theirs", tmp_path / "x.safetensors", "--layout", "sd3")
    assert result.exit_code == 0 and "sd3, 0.1 M parameters, bfloat16" in result.stdout, result.output
    state, expected = mmdit.load(tmp_path / "x.safetensors").state_dict(), model.bfloat16().state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert_one_line_error(run("convert", tmp_path / "ours", tmp_path / "y", "--layout", "sd3"), "ends in .safetensors")
    assert not (tmp_path / "y").exists()
    for place, layout in ((tmp_path / "theirs", "mmdit"), (tmp_path / "x.safetensors", "sd3")):
        before = (place / "config.json" if place.is_dir() else place).read_bytes()
        assert_one_line_error(run("convert", tmp_path / "ours", place, "--layout", layout), "exists already")
        assert before == (place / "config.json" if place.is_dir() else place).read_bytes()


def test_a_picture_that_cannot_be_read_is_named(pipe, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name in ("none.png", "text.png"):
        assert_one_line_error(run("sample", "r", "one", "--image", tmp_path / name, "--out", tmp_path / "a.png"), name)
    assert_one_line_error(run("generate", "r", tmp_path / "text.png"), "text.png")
    assert_one_line_error(run("generate", "r", tmp_path / "none.png"), "there is no picture")


def test_a_text_of_any_length_is_no_picture(tmp_path):
    for text in ("Красный круг. " * 15, "one. " * 99, "drawn as none.png is", "a. b", "v1.5"):
        assert _part(text) == text
    deep = tmp_path.joinpath(*["folder" * 30] * 2)
    deep.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(deep / "a.png")
    assert _part(str(deep / "a.png")).size == (3, 2)


def test_diffusion_is_a_name_or_a_number(pipe, tmp_path):
    for given, taken in (("0.5", 0.5), ("kl", "kl")):
        assert run("sample", "r", "one", "--diffusion", given, "--out", tmp_path / "a.png").exit_code == 0
        assert pipe.options["diffusion"] == taken


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "sample",
        "generate",
        "evaluate",
        "convert",
        "ema",
        "cache",
        "autoencoder train",
        "autoencoder evaluate",
        "autoencoder",
        "",
    ],
)
def test_help_shows_examples(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)  # colours, which some CI's environment asks for
    shown = " ".join(plain.split())
    assert f"mmdit {command}".strip() in shown or command in ("", "autoencoder")
    if command == "evaluate":
        assert "taken from the run's config ([evaluation])" in shown
    if command == "train":
        assert f"Presets: {', '.join(preset_names())}" in shown


def test_what_stdout_cannot_show_ends_no_command(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(mmdit_cli.main, "app", lambda: print("a \u65e5 picture", flush=True))
    mmdit_cli.main.main()
    assert terminal.buffer.getvalue() == b"a \\u65e5 picture\n"


def test_version_names_the_package():
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("mmdit")


def test_the_command_starts_without_heavy_imports():
    code = (
        "import sys, mmdit_cli.main\n"
        "print(*sorted({'torch', 'numpy', 'diffusers', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env())
    assert out.stdout.strip() == ""


def _env() -> dict[str, str]:
    """The environment with the repository's packages importable, installed or not."""
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize(
    "given, spins", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_soon_leave_their_core_to_others(given, spins):
    """It is said before torch is loaded, which reads it once; the user's own word stands."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import os, sys, mmdit_cli.main as m; m.app = lambda: print('torch' in sys.modules, dict(os.environ)); m.main()"
    )
    out = subprocess.run([sys.executable, "-c", code], env=env | given, capture_output=True, text=True, check=True)
    loaded, found = out.stdout.split(maxsplit=1)
    assert loaded == "False" and ast.literal_eval(found).get("GOMP_SPINCOUNT") == spins


@pytest.mark.skipif(not torch.version.cuda, reason="this torch is built without CUDA")
@pytest.mark.parametrize("given", [{}, {"TORCH_LOGS": "+dynamo"}])
def test_a_cuda_toolkit_without_a_gpu_is_no_warning(given, tmp_path):
    code = (
        "import mmdit_cli.main as m\ndef app(): import torch._dynamo, torch.utils.cpp_extension\nm.app = app; m.main()"
    )
    env = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    env |= {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env | given, capture_output=True, text=True, check=True)
    assert ("No CUDA runtime" in done.stderr) is bool(given)  # the user's own word stands


@pytest.mark.parametrize("rank, shown", [("0", True), ("1", False)])
def test_of_several_processes_the_first_alone_shows_bars_of_what_is_loaded(rank, shown):
    code = (
        "import os, sys; from mmdit_cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        "from transformers.utils import logging; from datasets import are_progress_bars_disabled\n"
        "print(logging.is_progress_bar_enabled(), not are_progress_bars_disabled())"
    )
    env = {name: value for name, value in os.environ.items() if not name.endswith("_DISABLE_PROGRESS_BARS")}
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, env={**env, "RANK": rank}, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == [str(shown)] * 2
