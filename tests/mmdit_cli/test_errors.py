"""Errors of a command: one line and status 2 where the input is to blame, a traceback where the program is."""

import os
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

import training
from mmdit_cli import errors
from mmdit_cli.main import app
from tests.mmdit_cli.command import assert_one_line_error, run
from training.errors import DataError
from training.settings import ConfigError


def test_of_several_processes_those_after_the_first_say_who_they_are(monkeypatch, capsys):
    for rank, who in (("0", "mmdit: error: x"), ("3", "mmdit (process 3): error: x")):
        monkeypatch.setenv("RANK", rank)
        errors.complain("x")
        assert capsys.readouterr().err == who + "\n"


@pytest.mark.parametrize(("setting", "said"), [("training.batch_size=7", 0), ("data.source=nowhere", 1)])
def test_what_all_processes_of_a_machine_find_its_first_one_says(setting, said, monkeypatch):
    """The third of three, of which the first is on another machine, and the second here."""
    refused = {"training.batch_size=7": ConfigError("no"), "data.source=nowhere": DataError("no")}[setting]

    def train(*args):
        raise refused

    monkeypatch.setattr(training, "train", train, raising=False)
    for rank, times in (("1", 1), ("2", said)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", str(int(rank) - 1))
        result = CliRunner().invoke(app, ["train", "demo", setting])
        assert result.exit_code == 2 and result.stderr == f"mmdit (process {rank}): error: no\n" * times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "which config?"),
        (["train", "dmeo"], 'did you mean the preset "demo"?'),
        (["train", "demo", "demo"], '"demo" is no setting'),
        (["train", "demo", "training.num_step=1"], 'did you mean "training.num_steps"?'),
        (["train", "demo", "optimizer.lr=-1"], "optimizer.lr is -1.0, expected a number > 0"),
        (["train", "."], ". is no run folder, it has no config.toml; pictures are named beside a config: --data ."),
        (["train", "demo", "--lora", "16"], '--lora is "16", expected KEY=VALUE, such as rank=16'),
        (["train", "--resume", "a", "--out", "b"], "leave out --out"),
        (["train", "--resume", "a", "--restart"], "--restart goes with a config"),
        (["train", "demo", "--stpes", "3"], "No such option: --stpes"),
        (["trian", "demo"], "Did you mean 'train'?"),
        (["--what"], "No such option: --what"),
        (["sample", "run"], "Missing argument 'PROMPT'"),
        (["sample", "run", "a star", "--steps", "0"], "--steps"),
        (["sample", "run", "a star", "--size", "8x"], '--size is "8x", expected HEIGHTxWIDTH'),
        (["sample", "run", "a star", "--size", "0x8"], '--size is "0x8", expected HEIGHTxWIDTH'),
        (["sample", "run", "a star", "--out", "picture"], "such as picture.png"),
        (["sample", "run", "a star", "--out", "."], '--out is ".", expected the name of a picture, such as out.png'),
        (["sample", "no-such-run", "a star"], "no-such-run"),
        (["sample", "run", "a star", "--mask", "m.png"], "name the picture with --image"),
        (["sample", "run", "a star", "--strength", "0.5"], "name the picture with --image"),
        (["generate", "run", "a", "--max-images", "0", "--size", "8"], "--size says how pictures are drawn"),
        (["generate", "run", "a", "--top-p", "0"], "--top-p 0 leaves no token"),
        (["generate", "run", "a", "--top-p", "2"], "Invalid value for '--top-p'"),
        (["generate", "run", "a", "--min-p", "-1"], "Invalid value for '--min-p'"),
        (["evaluate", "no-such-run"], "no-such-run"),
        (["evaluate", "--images", "x", "--data", "y"], "--data is for a run"),
        (["evaluate", "--images", "x", "--text", "y"], "--text is for a run"),
        (["ema", "no-such-run", "--sigma-rel", "0.1", "--out", "y"], "no-such-run is not a run folder"),
        (["convert", "x", "y"], "Missing option '--layout'"),
        (["convert", "x", "y", "--layout", "onnx"], "'onnx' is not one of 'mmdit', 'diffusers', 'sd3'"),
        (["convert", "no-such-run", "y", "--layout", "mmdit"], "no-such-run holds no model"),
        (["convert", "x.ckpt", "y", "--layout", "mmdit"], "x.ckpt is a pickle"),
        (["autoencoder", "train", "--data", "x"], "Missing option '--out'"),
        (["autoencoder", "train", "--data", "shapes", "--out", "x", "num_step=3"], 'did you mean "num_steps"?'),
        (["autoencoder", "train", "--data", "shapes", "--out", "x", "num_steps=0"], "num_steps"),
        (["autoencoder", "train", "--data", "no-such-folder", "--out", "x"], "no-such-folder"),
        (["autoencoder", "evaluate", "none", "--data", "shapes"], "is no autoencoder but pixels"),
        (["autoencoder", "evaluate", "no-such-folder", "--data", "shapes"], "no-such-folder"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(words, message):
    assert_one_line_error(run(*words), message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\nlines"), "mmdit: error: two lines\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.tar"),
            "mmdit: error: x.tar: No such file or directory\n",
        ),
        (PermissionError(13, "Permission denied", b"/a/\xff"), "mmdit: error: /a/\\xff: Permission denied\n"),
        (FileExistsError("runs/a exists"), "mmdit: error: runs/a exists\n"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA ..."), "lower training.batch_size"),
        (MemoryError("Unable to allocate 7.11 PiB"), "or fewer steps (Unable to allocate 7.11 PiB)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..."), "out of memory: take fewer"),
    ],
)
def test_expected_errors_of_the_library_become_one_line(monkeypatch, error, message):
    monkeypatch.setattr(
        training, "evaluate_run", lambda run, given, data, **_: (_ for _ in ()).throw(error), raising=False
    )
    result = run("evaluate", "somewhere")
    assert_one_line_error(result, "")
    assert message in result.stderr


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(training, "evaluate_run", lambda run, given, data, **_: {}[run], raising=False)
    assert isinstance(run("evaluate", "somewhere").exception, KeyError)


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback_before_the_line(monkeypatch, how):
    monkeypatch.setenv("MMDIT_DEBUG", "1" if how == "environment" else "0")
    result = run(*(["--debug"] if how == "option" else []), "train", "dmeo")
    assert result.exit_code == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mmdit: error: ")


def test_a_reader_who_leaves_ends_help_in_silence():
    command = [sys.executable, "-m", "mmdit_cli", "train", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE)
    assert (done.stderr, done.returncode) == (b"", 1)


def test_another_broken_pipe_is_said(monkeypatch):
    def broken(*args, **how):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(training, "train", broken)
    result = CliRunner().invoke(app, ["train", "demo"])
    assert result.exit_code == 2 and "Broken pipe" in result.output


@pytest.mark.parametrize("debug, printed", [("0", False), ("1", True)])
def test_a_thread_that_finds_no_room_leaves_the_line_to_the_command(debug, printed, monkeypatch, capsys):
    """Whoever hands it something to write gets the error raised; a mistake in the program keeps its traceback."""
    monkeypatch.setenv(errors.DEBUG, debug)
    monkeypatch.setattr(threading, "excepthook", errors.of_thread)

    def dies(error):
        raise error

    for found, seen in ((OSError(28, "No space"), printed), (TypeError("a mistake"), True)):
        thread = threading.Thread(target=dies, args=(found,))
        thread.start()
        thread.join()
        assert ("Traceback" in capsys.readouterr().err) == seen


@pytest.mark.parametrize(
    ("rank", "processes", "torn_down"), [("0", "1", True), ("0", "2", False), (None, "2", True), (None, "", True)]
)
def test_one_process_of_several_that_failed_ends_at_once(rank, processes, torn_down, monkeypatch):
    """And no other, whatever a scheduler has left in the environment of a command."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    code = "import atexit, sys; from mmdit_cli.main import main; atexit.register(print, 'torn down'); main()"
    ended = subprocess.run([sys.executable, "-c", code, "train", "none.toml"], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("mmdit: error: ")
    assert ("torn down" in ended.stdout) == torn_down
