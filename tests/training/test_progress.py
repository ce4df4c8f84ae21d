"""What is printed while a run goes on, with a clock of our own."""

import os
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

import samplers
from mmdit_cli.errors import complain
from training.progress import LINE_EVERY, Progress, drawing, duration, say


@pytest.fixture
def clock(monkeypatch):
    """Seconds, moved by hand."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_lines_come_now_and_then_and_at_the_end(clock, capsys):
    with Progress("training", 100, images=64) as progress:
        for step in range(1, 101):
            clock[0] += 1.0
            progress.show(step, loss=1 / step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100 // LINE_EVERY + 1
    assert lines[0] == "training 30/100  loss 0.03333  images/s 64  1.2 min left"
    assert lines[-1] == "training 100/100  loss 0.01  images/s 64"


def test_the_first_step_which_may_hold_compiling_is_left_out_of_the_rate_and_of_the_time_left(clock, capsys):
    with Progress("training", 1000, start=500, images=32) as progress:
        clock[0] += 84.0
        progress.show(501, loss=1.5)
        assert progress.rate == progress.images_per_second == 0
        for step in range(502, 562):
            clock[0] += 0.5
            progress.show(step)
    assert capsys.readouterr().out.splitlines() == [
        "training 501/1000  loss 1.5",
        "training 561/1000  loss 1.5  images/s 64  3.7 min left",
    ]


def test_pauses_are_left_out_of_the_rate(clock):
    with Progress("training", 100) as progress:
        for step in range(1, 11):
            clock[0] += 0.5
            progress.show(step)
            with progress.paused():
                clock[0] += 100.0 * (step == 5)
        assert progress.rate == pytest.approx(2.0)


def test_pictures_are_counted_while_they_are_drawn(clock, capsys):
    """Two full batches and a rest, four solver steps each; another callback hears of every step too."""
    heard = []
    with drawing(20, True, heard.append) as told:
        for size in (8, 8, 4):
            for index in range(4):
                clock[0] += 8.0
                told(samplers.Progress(index, 4, 1.0, 0.0, torch.zeros(size, 1), torch.zeros(size, 1), None, 1))
    assert len(heard) == 12
    assert capsys.readouterr().err.splitlines() == [
        "drawing pictures 8/20  images/s 0.25  48 s left",
        "drawing pictures 16/20  images/s 0.25  16 s left",
        "drawing pictures 20/20  images/s 0.2045",  # as of late: 18 pictures in 11 steps
    ]
    with drawing(1, False) as told:
        told(samplers.Progress(0, 1, 1.0, 0.0, torch.zeros(1, 1), torch.zeros(1, 1), None, 1))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.6, "5 s"),
        (59, "59 s"),
        (59.7, "1.0 min"),
        (3594, "59.9 min"),
        (3600, "1.0 h"),
        (172_000, "47.8 h"),
        (172_800, "2.0 days"),
    ],
)
def test_long_times_are_in_hours_and_days(seconds, text):
    assert duration(seconds) == text


def test_rate_is_that_of_the_last_steps_and_does_not_count_what_was_done_before(clock):
    with Progress("training", 100, start=50) as progress:
        for step in range(51, 61):
            clock[0] += 0.5
            progress.show(step)
        assert progress.rate == pytest.approx(2.0)
        for step in range(61, 91):
            clock[0] += 0.25
            progress.show(step)
        assert progress.rate == pytest.approx(4.0)


def test_images_a_second_are_known_from_the_second_step_on(clock):
    with Progress("training", 100, start=50, images=64) as progress:
        progress.show(51)
        for step in range(52, 55):
            clock[0] += 0.5
            progress.show(step)
            assert progress.images_per_second == pytest.approx(128.0)


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch):
    terminal, inside = pytest.importorskip("pty").openpty()
    with suppress(OSError), open(inside, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with Progress("training", 10) as progress:
            progress.show(1)
            os.close(terminal)
            say("skipped: 7")
            progress.show(2)
        done = progress.done
    assert done == 2


@pytest.mark.parametrize(("tell", "said"), [(say, "a line\n"), (complain, "mmdit: error: a line\n")])
def test_a_line_is_written_in_one_piece(tell, said, monkeypatch):
    """Or those of several processes that write to one place, unbuffered, would run into each other."""
    monkeypatch.delenv("RANK", raising=False)
    pieces: list[str] = []
    stream = SimpleNamespace(write=pieces.append, flush=lambda: None)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    tell("a line")
    assert [piece for piece in pieces if piece] == [said]


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("training", 10) as progress:
        progress.show(3, loss=0.25)
        say("a note [of 3]")
        progress.show(10, loss=0.125)
    out = capsys.readouterr().out
    assert "10/10" in out and "loss 0.125" in out and "\x1b[2Ka note [of 3]\n" in out.replace("\r", "")
