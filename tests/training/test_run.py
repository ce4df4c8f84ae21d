"""The run folder: taken or free, its config, and metrics that survive a kill and a resume."""

import errno
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.config import load_config
from training.errors import named
from training.run import RunFolder


@pytest.fixture
def config():
    return load_config("pixels-tiny", ["optimizer.lr=0.0123", "sampling.prompts=['a red circle', 'größe']"])


@pytest.fixture
def run(tmp_path, config):
    made = RunFolder.create(tmp_path / "deep" / "run", config)
    yield made
    made.close()


def test_the_config_as_used_comes_back(run, config, monkeypatch):
    """Whatever the encoding of files is where none is named."""
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    run.write_config(config)
    assert RunFolder.open(run.path).config() == config
    changed = load_config("pixels-tiny", ["training.num_steps=99"])
    run.write_config(changed)
    assert run.config() == changed


def test_a_folder_that_holds_something_is_not_taken(run, config, tmp_path):
    with pytest.raises(FileExistsError, match="--resume .*run`, or name another folder with --out"):
        RunFolder.create(run.path, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        RunFolder.create(tmp_path / "file", config)
    assert (tmp_path / "file").read_text() == ""
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", config).config() == config


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_what_is_logged_is_printed_and_kept(run, capsys):
    run.log("one")
    run.log("zwei ü")
    assert capsys.readouterr().out == "one\nzwei ü\n"
    lines = (run.path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["one", "zwei ü"]


@pytest.mark.parametrize("kind", [RunFolder, lambda path: RunFolder(path, 1)])
def test_names_that_the_terminal_cannot_show_end_no_run(tmp_path, monkeypatch, kind):
    """As of samples, where stdout or the locale is of another encoding than UTF-8."""
    terminal = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")  # of files of no named encoding
    kind(tmp_path).log_skipped("\u65e5 \u00fc \udcff", "no image")
    assert rb"\u65e5 " + b"\xfc" + rb" \udcff: no image" in terminal.buffer.getvalue()
    if kind is RunFolder:
        assert "\u65e5 \u00fc \\udcff: no image" in (tmp_path / "log.txt").read_bytes().decode()


def test_a_sample_that_cannot_be_used_is_named_once(run, capsys):
    for key, reason in (("a", "no image"), ("b", "missing caption"), ("a", "no image")):
        run.log_skipped(key, reason)
    assert capsys.readouterr().out == "skipped (1 so far): a: no image\nskipped (2 so far): b: missing caption\n"


def test_metrics_are_lines_that_come_back_exactly(run):
    assert run.metrics() == []
    run.write_metrics(1, loss=1 / 3, lr=1e-4)
    run.write_metrics(2, validation_loss=0.5)
    assert run.metrics() == [{"step": 1, "loss": 1 / 3, "lr": 1e-4}, {"step": 2, "validation_loss": 0.5}]


def test_a_line_that_a_kill_cut_is_left_out_and_does_not_spoil_the_next(run):
    run.write_metrics(1, loss=1.0)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in run.metrics()] == [1]
    run.rewind_metrics(1)
    run.write_metrics(2, loss=2.0)
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_rewinding_forgets_the_steps_after(run):
    for step in range(1, 6):
        run.write_metrics(step, loss=float(step))
    run.rewind_metrics(3)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    run.write_metrics(3, fid=0.5)
    run.rewind_metrics(3, ["fid", "kid"])  # what is measured again at this step
    assert run.metrics() == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]


def test_rewinding_needs_no_memory_for_the_lines(run):
    lines = [json.dumps({"step": step, **{f"loss_{i}": step / 7 for i in range(20)}}) + "\n" for step in range(3000)]
    (run.path / "metrics.jsonl").write_text("".join(lines))
    tracemalloc.start()
    try:
        run.rewind_metrics(2989)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (run.path / "metrics.jsonl").read_text() == "".join(lines[:2990])
    assert peak < 0.3 * len("".join(lines))


def test_a_disk_that_is_full_takes_neither_metrics_nor_config(run, config, monkeypatch):
    """What is written anew stands aside until it is whole."""
    run.write_metrics(1, loss=1.0)

    def full(self, text, **how):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("training.run.json.dumps", lambda row: full(run.path / "a row", "{"))  # while lines are written
    for write in (lambda: run.rewind_metrics(1), lambda: run.write_config(config)):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert run.metrics() == [{"step": 1, "loss": 1.0}] and run.config() == config


def test_all_but_the_first_process_write_nothing(run, config, capsys):
    run.write_metrics(1, loss=1.0)
    run.close()  # else tensorboard's thread may still write
    (run.path / ".metrics.jsonl.9.part").write_text("{")  # being written by the first
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    quiet = RunFolder(run.path, 1)
    quiet.write_config(load_config("demo"))
    quiet.log("a line")
    quiet.write_metrics(2, loss=2.0)
    quiet.rewind_metrics(0)
    quiet.remove_leftovers()
    for _ in range(2):
        quiet.log_skipped("a", "no image")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out == "process 1 skipped a: no image\n"


def test_tensorboard_has_the_same_numbers_also_after_rewinding(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in range(1, 5):
        run.write_metrics(step, loss=float(step))
    run.close()
    again = RunFolder.open(run.path)
    again.rewind_metrics(2)
    for step in (3, 4):
        again.write_metrics(step, loss=10.0 * step)
    again.close()
    again.write_metrics(5, loss=50.0)  # after a close, past which nothing is rewound
    again.close()
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_tensorboard_has_the_pictures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pictures = [Image.new("RGB", (4, 3), "red"), Image.new("L", (2, 2), 7)]
    for step, picture in enumerate(pictures):
        run.show(step, "samples", picture)
    run.close()
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    for step, (event, picture) in enumerate(zip(board.Images("samples"), pictures, strict=True)):
        assert event.step == step
        assert np.array_equal(Image.open(io.BytesIO(event.encoded_image_string)), picture.convert("RGB"))


def test_what_a_kill_left_in_the_middle_is_removed(run):
    """Files and folders that were being written, wherever they lie; nothing else."""
    (run.path / "pipeline" / ".text.12.part").mkdir(parents=True)
    for name in (".metrics.jsonl.9.part", "pipeline/.model.safetensors.7.part", "pipeline/.text.12.part/.a.8.part"):
        (run.path / name).write_text("{")
    (run.path / "pipeline" / "my.part").write_text("a user's")
    run.remove_leftovers()
    assert sorted(path.name for path in run.path.rglob("*")) == ["config.toml", "my.part", "pipeline"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_named_with_the_file(run, name, monkeypatch):
    """Also where the file was open already, when the system says no name."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        def full(*words):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    else:
        (run.path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*run/" + name) as caught:
        run.log("a line") if name == "log.txt" else run.write_metrics(1, loss=0.5)
    assert caught.value.filename == str(run.path / name)


@pytest.mark.parametrize("error", [OSError("no room"), FileNotFoundError(errno.ENOENT, "gone", "there")])
def test_an_error_that_says_where_or_has_no_number_stays_as_it_is(tmp_path, error):
    with pytest.raises(OSError) as caught, named(tmp_path):
        raise error
    assert caught.value is error


def test_damaged_lines_of_metrics_are_passed_over(run):
    run.write_metrics(1, loss=2.0)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xdb\n[3]\n{"loss": 1}\n{"step": "x"}\n{"step": 2, "lo\n')
    run.write_metrics(3, loss=1.0)
    assert [row["step"] for row in run.metrics()] == [1, 3]
    run.rewind_metrics(2)
    assert [row["step"] for row in run.metrics()] == [1]
