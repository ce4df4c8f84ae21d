"""Telemetry against numbers known beforehand, and in runs: what a line says is what happened, and no step waits."""

import errno
import gzip
import importlib.util
import io
import json
import os
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import training
from mmdit.text import Tokens
from tests.training.runs import TRANSFUSION, config_for, metrics, stop_after
from tests.training.test_flops import mmdit, text_and_images, tokens
from training.boards import Wandb
from training.config import load_config
from training.flops import captioned, in_one_row, of_documents, step_flops
from training.objectives import Batch, Loss
from training.run import RunFolder
from training.telemetry import WAIT_WINDOW, Telemetry, bin_names, part_of, shared_state

CPU = torch.device("cpu")


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(*overrides: str, **how):
    """(telemetry of an MMDiT, its clock, its log)."""
    clock, log = Clock(), []
    config = load_config("pixels-tiny", overrides)
    return Telemetry(config, mmdit(), CPU, torch.float32, log.append, clock=clock, **how), clock, log


def batches(clock: Clock, wait: float, count: int = 4, text=None):
    """Batches of `count` pictures of 4 x 6 patches, each after so many seconds."""
    while True:
        clock.now += wait
        yield Batch(torch.zeros(count, 3, 8, 12), tokens(count)[1], text)


def test_speed_use_and_wait_are_what_the_clock_says():
    telemetry, clock, _ = make("training.peak_tflops=1e-5")
    source = batches(clock, 0.5)
    for _ in range(3):
        batch = telemetry.next(source)
        clock.now += 1.5
    line = telemetry.line()
    words = int(batch.tokens.mask.sum())
    assert line["samples_per_second"] == pytest.approx(12 / 6)
    assert line["tokens_per_second"] == pytest.approx(3 * (4 * 24 + words) / 6)
    assert line["data_wait"] == pytest.approx(0.25)
    flops = 3 * step_flops(telemetry.model, captioned(4, 24, 12))
    assert line["mfu"] == pytest.approx(flops / 6 / 1e7)
    telemetry.next(iter([Batch(torch.zeros(2, 3, 8, 8), tokens(2)[1])]))  # of another size
    clock.now += 1.0
    assert telemetry.line()["mfu"] == pytest.approx(step_flops(telemetry.model, captioned(2, 16, 12)) / 1e7)
    clock.now += 50  # validation and checkpoints are no training
    telemetry.next(source)
    clock.now += 0.5
    assert telemetry.line()["samples_per_second"] == pytest.approx(4.0)


def test_padding_that_is_not_computed_is_no_use_of_the_hardware():
    telemetry, clock, _ = make("training.peak_tflops=1e-5")
    telemetry.model.packed = True
    lengths = telemetry.next(batches(clock, 1.0)).tokens.mask.sum(1)
    flops = step_flops(telemetry.model, in_one_row(torch.full((4,), 24), lengths, int(lengths.max())))
    assert telemetry.line()["mfu"] == pytest.approx(flops / 1e7)


@pytest.mark.parametrize("sizes", [0, 8])
def test_documents_are_used_at_their_own_lengths(sizes):
    """Three captioned pictures of 16 patches and two texts; with two tokens more where a picture's size is said."""
    telemetry, clock, _ = make("training.peak_tflops=1e-5")
    telemetry.model, words = text_and_images(size_tokens=sizes)
    text = Tokens(words.ids[[0, 0]], words.mask[[0, 0]])
    telemetry.next(iter([Batch(torch.zeros(3, 3, 8, 8), words, text)]))
    clock.now += 1.0
    lengths = torch.cat([words.mask, text.mask]).sum(1)
    documents = of_documents(torch.tensor([16] * 3 + [0] * 2), lengths, 2 if sizes else 0)
    assert telemetry.line()["mfu"] == pytest.approx(step_flops(telemetry.model, documents) / 1e7)


def test_without_a_known_peak_there_is_no_mfu():
    telemetry, clock, _ = make()
    telemetry.next(batches(clock, 1.0))
    assert "mfu" not in telemetry.line()
    assert make("training.peak_tflops=measure")[0].peak > 0


def test_documents_of_text_count_as_samples_and_their_tokens_too():
    telemetry, clock, _ = make()
    text = tokens(2)[1]
    batch = telemetry.next(batches(clock, 1.0, text=text))
    line = telemetry.line()
    assert line["samples_per_second"] == pytest.approx(6)
    assert line["tokens_per_second"] == pytest.approx(4 * 24 + int(batch.tokens.mask.sum()) + int(text.mask.sum()))


def test_losses_fall_into_the_bins_of_their_times():
    telemetry, *_ = make()
    telemetry.add(Loss(torch.tensor(0.0), {}, torch.tensor([0.0, 0.1, 0.5, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0])))
    telemetry.add(Loss(torch.tensor(0.0), {}, torch.tensor([0.124]), torch.tensor([5.0])))
    line = {name: value for name, value in telemetry.line().items() if name.startswith("loss")}
    assert line == {"loss_t0.0625": 3.0, "loss_t0.5625": 5.0, "loss_t0.9375": 7.0}
    assert not any(name.startswith("loss") for name in telemetry.line()), "a line forgets what it has said"


def test_parts_may_be_numbers_and_keep_no_graph():
    telemetry, _, _ = make()
    weight = torch.ones((), requires_grad=True)
    telemetry.add(Loss(weight * 2, {"half": weight * 2, "count": 3.0}))
    assert not any(value.requires_grad for values in telemetry._parts.values() for value in values)
    assert telemetry.line().items() >= {"loss_half": 2.0, "loss_count": 3.0}.items()


def test_several_processes_are_one_run():
    """A sum over two alike: twice the samples in the same time, and the same use, wait, and losses."""
    lines = []
    for reduce in (lambda x: x, lambda x: 2 * x):
        telemetry, clock, _ = make("training.peak_tflops=1e-5", reduce=reduce)
        telemetry.next(batches(clock, 0.5))
        clock.now += 1
        telemetry.add(Loss(torch.tensor(0.0), {"text": torch.tensor(2.0)}, torch.tensor([0.3]), torch.tensor([4.0])))
        lines.append(telemetry.line())
    one, two = lines
    for name in ("samples_per_second", "tokens_per_second"):
        assert two[name] == pytest.approx(2 * one[name])
    for name in ("mfu", "data_wait", "loss_text", "loss_t0.3125"):
        assert two[name] == pytest.approx(one[name])


def test_gradients_are_told_once():
    telemetry, *_ = make()
    for parameter in telemetry.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    telemetry.gradients(telemetry.model)
    assert [sum(name.startswith("grad_norm") for name in telemetry.line()) for _ in range(2)] == [4, 0]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 3)])
def test_losses_by_time_go_on_with_another_number_of_processes(before, after):
    """Two steps of six images, between which a run stops: each counts half in the line that follows."""

    def step(processes: int, error: float):
        telemetry, *_ = make(reduce=lambda totals: processes * totals)
        images = torch.full((6 // processes,), 0.3)
        return telemetry, Loss(
            torch.tensor(error), {"text": torch.tensor(error)}, images, torch.full_like(images, error)
        )

    first, loss = step(before, 1.0)
    first.add(loss)
    second, loss = step(after, 4.0)
    second.load(shared_state([first.state()] * before), after)
    second.add(loss)
    line = second.line()
    assert line["loss_t0.3125"] == line["loss_text"] == 2.5


def test_no_step_waits_for_the_device(monkeypatch):
    """Until a line is written no number is read."""
    telemetry, clock, _ = make()
    source, model = batches(clock, 0.1), telemetry.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = next(source)

    def read(*_):
        raise AssertionError("a number was read")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "numpy"):
            patch.setattr(torch.Tensor, name, read)
        telemetry.next(iter([first]))
        telemetry.add(Loss(torch.tensor(0.0), {"text": torch.tensor(2.0)}, torch.tensor([0.3]), torch.tensor([4.0])))
        telemetry.gradients(model)
    line = telemetry.line()
    assert line["loss_text"] == 2 and line["loss_t0.3125"] == 4
    count = sum(p.numel() for p in model.transformer.blocks.parameters())
    assert line["grad_norm_blocks"] == pytest.approx(count**0.5, rel=1e-5)


def test_every_parameter_is_of_a_part():
    names = {part: [n for n, _ in mmdit().named_parameters() if part_of(n) == part] for part in ("in", "out")}
    assert {name.split(".")[1] for name in names["in"]} == {"patch_in", "context_in", "time_in", "pooled_in"}
    assert {name.split(".")[1] for name in names["out"]} == {"modulation_out", "patch_out"}
    assert (
        part_of("conditioner.embed.weight") == "text" and part_of("transformer.blocks.0.img.mlp.fc1.bias") == "blocks"
    )
    assert part_of("transformer.embed.weight") == "in" and part_of("transformer.head.weight") == "out"


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["data.cache_latents=false", "data.num_workers=2"], "raise data.num_workers (it is 2), or keep the latents"),
        (["data.cache_latents=false", "data.source=hf-stream:x"], "(it is 0), or train from a copy of the data"),
        (["data.source=cache"], "put cache on a faster disk"),
        (["data.source=s3://bucket/cache.json"], "put s3://bucket/cache.json on a disk"),
        ([], "more of a core"),
    ],
)
def test_a_run_that_waits_for_its_data_is_told(overrides, remedy, tmp_path, monkeypatch):
    """Of two processes alike; and not again when it waits no longer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").touch()
    telemetry, clock, log = make(*overrides, reduce=lambda totals: 2 * totals)
    for wait in (0.3, 0.05, 0.05):
        source = batches(clock, wait)
        for _ in range(int(WAIT_WINDOW)):
            telemetry.next(source)
            clock.now += 1 - wait
            assert telemetry.line()["data_wait"] == pytest.approx(wait)
    assert len(log) == 1 and log[0].startswith("warning: 30% of the last minute") and remedy in log[0]


def test_a_run_that_waits_little_is_not():
    telemetry, clock, log = make()
    source = batches(clock, 0.05)
    for _ in range(200):
        telemetry.next(source)
        clock.now += 0.95
        telemetry.line()
    assert not log


# --- in runs ---------------------------------------------------------------------------------------------------------

ONE_BY_ONE = "training.log_every=1"


def rows(run):
    return [row for row in RunFolder(run).metrics() if "loss" in row]


def test_a_run_writes_it_all(tmp_path):
    run = training.train(config_for(tmp_path / "run", ONE_BY_ONE, "training.peak_tflops=0.5", "training.batch_size=16"))
    for row in rows(run):
        parts = [row[f"grad_norm_{part}"] for part in ("blocks", "text", "in", "out")]
        assert row["grad_norm"] == pytest.approx(sum(x**2 for x in parts) ** 0.5, rel=1e-4)
        by_time = [row[name] for name in bin_names() if name in row]
        assert min(by_time) <= row["loss"] <= max(by_time)
        assert row["samples_per_second"] > 0 and 0 <= row["data_wait"] < 1 and 0 < row["mfu"] < 1
        # 16 pictures of 16 patches and their captions
        assert 17 < row["tokens_per_second"] / row["samples_per_second"] < 16 + 32
        assert 0.05 < row["memory_gib"] < 100
    later = [row["loss_t0.9375"] for row in rows(run) if "loss_t0.9375" in row]
    assert later, "no time near 1 in six steps of sixteen"


def test_validation_between_two_lines_is_no_training(tmp_path, monkeypatch):
    """A validation loss that takes an hour, after the second of four steps, and after the last."""
    hours = []

    def validate(trainer):
        hours.append(trainer.step)
        trainer.telemetry.clock = lambda: time.perf_counter() + 3600 * len(hours)

    monkeypatch.setattr("training.trainer.Trainer._validate", validate)
    how = ("training.num_steps=4", "training.log_every=4", "training.validate_every=2")
    run = training.train(config_for(tmp_path / "run", *how))
    assert hours == [2, 4]
    assert metrics(run, "samples_per_second")[0][1] > 32 / 3600


def test_text_and_images_have_a_loss_each(tmp_path):
    run = training.train(config_for(tmp_path / "run", *TRANSFUSION, ONE_BY_ONE, "training.grad_accumulation=2"))
    for row in rows(run):
        assert row["loss"] == pytest.approx(row["loss_text"] + 5 * row["loss_image"], rel=1e-5)
        assert row["grad_norm_blocks"] > 0 and "grad_norm_text" not in row


def test_a_resumed_run_says_what_the_whole_one_does(tmp_path, monkeypatch):
    """Stopped between two lines: the line after holds the losses by time from before the stop too."""
    settings = (*TRANSFUSION, "training.log_every=4", "training.checkpoint_every=0")
    whole = training.train(config_for(tmp_path / "whole", *settings))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        part = training.train(config_for(tmp_path / "part", *settings))
    training.resume(part)
    for name in (*bin_names(), "loss_text", "loss_image"):
        assert metrics(part, name) == [(step, pytest.approx(value)) for step, value in metrics(whole, name)]


def test_the_steps_that_are_named_are_profiled(tmp_path):
    run = training.train(config_for(tmp_path / "run", "training.profile=2:3"))
    assert {path.name for path in (run / "profile").iterdir()} == {"steps-2-3.json.gz", "steps-2-3.txt"}
    trace = json.loads(gzip.decompress((run / "profile" / "steps-2-3.json.gz").read_bytes()))
    steps = [event["name"] for event in trace["traceEvents"] if event["name"].startswith("Optimizer.step")]
    assert len(steps) == 2
    assert "profile: " in (run / "log.txt").read_text()


def test_a_run_that_ends_while_it_is_profiled_writes_what_there_is(tmp_path):
    run = training.train(config_for(tmp_path / "run", "training.profile=5:99"))
    assert (run / "profile" / "steps-5-99.json.gz").exists()


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    """What there is of it would fill the disk, on which the run has to save."""

    def full(self, path):
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full)
    run = training.train(config_for(tmp_path / "run", "training.profile=2:3"))
    assert "warning: the profile is not written: [Errno 28] No space" in (run / "log.txt").read_text()
    assert metrics(run, "loss")[-1][0] == 6 and not (run / "profile" / "steps-2-3.json.gz").exists()


def test_a_run_that_goes_on_after_the_steps_to_profile_says_so(tmp_path):
    run = training.train(config_for(tmp_path / "run", "training.profile=2:3", "training.num_steps=4"))
    training.resume(run)
    assert "takes no effect" not in (run / "log.txt").read_text(), "they are there"
    training.resume(run, ["training.profile=4:5", "training.num_steps=5"])
    assert 'training.profile = "4:5" takes no effect: the run goes on with step 5' in (run / "log.txt").read_text()
    training.resume(run, ["training.profile=6:6", "training.num_steps=6"])
    assert {path.name for path in (run / "profile").glob("*.gz")} == {"steps-2-3.json.gz", "steps-6-6.json.gz"}


@pytest.mark.parametrize("text", ["5", "3:2", "0:1", "a:b", "1:2:3", ":4", "-1:4"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="expected steps FIRST:LAST from 1, such as 10:15"):
        load_config("demo", [f"training.profile={text}"])


def test_tensorboard_gets_the_pictures_of_a_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = training.train(config_for(tmp_path / "run", "training.num_steps=4", "training.sample_every=3"))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for name, step, file in (("samples", 3, "samples/step-00000003.png"), ("samples_at_the_end", 4, "samples.png")):
        [event] = board.Images(name)
        assert event.step == step
        assert np.array_equal(Image.open(io.BytesIO(event.encoded_image_string)), Image.open(run / file))


def test_wandb_gets_the_metrics_and_pictures_offline(tmp_path, monkeypatch):
    """What it would send: every line of metrics and every grid, in one run for one folder, resumed too."""
    pytest.importorskip("wandb")
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    sent, ids = [], []
    init = wandb.init

    def kept(**how):
        made = init(**how)
        ids.append(how["id"])
        log = made.log
        monkeypatch.setattr(made, "log", lambda values: (sent.append(values), log(values)))
        return made

    monkeypatch.setattr(wandb, "init", kept)
    how = ("training.wandb=tests", "training.num_steps=2", "training.sample_every=3")
    run = training.train(config_for(tmp_path / "run", *how))
    training.resume(run, ["training.num_steps=3"])
    pictures = [values for values in sent if {"samples", "samples_at_the_end"} & {*values}]
    assert [values for values in sent if values not in pictures] == RunFolder(run).metrics()
    assert [values.pop("step") for values in pictures] == [2, 3, 3]
    assert [*map(list, pictures)] == [["samples_at_the_end"], ["samples"], ["samples_at_the_end"]]
    grid = Image.open(run / "samples" / "step-00000003.png")
    assert np.array_equal(pictures[1]["samples"].image, grid)
    assert len(ids) == 2 and len(set(ids)) == 1
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 2


def test_a_run_of_wandb_moves_with_its_folder_and_a_copy_has_its_own(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **how: ids.append(how["id"]) or Mock())
    ids: list[str] = []

    def written(path):
        Wandb(config_for(path, "training.wandb=tests"), path).write(1, {"loss": 1.0})
        return path

    (tmp_path / "run").mkdir()
    moved = written(tmp_path / "run").rename(tmp_path / "moved")
    written(moved)
    copy = shutil.copytree(moved, tmp_path / "copy")
    for folder in (copy, moved, copy):
        written(folder)
    (tmp_path / "run").mkdir()
    written(tmp_path / "run")
    first, second, third = ids[0], ids[2], ids[5]
    assert len({first, second, third}) == 3, "a new run in the old place is another"
    assert ids == [first, first, second, first, second, third]


def test_what_wandb_refuses_is_said_in_one_line_before_a_run_begins(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "setup", lambda: Mock(settings=Mock(mode="online")))
    monkeypatch.setattr(wandb, "login", refuse)
    with pytest.raises(ValueError, match="training.wandb: No API key configured; .*WANDB_MODE=offline"):
        training.train(config_for(tmp_path / "run", "training.wandb=tests"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="training.wandb: No API key configured."):
        Wandb(config_for(tmp_path, "training.wandb=tests"), tmp_path).write(1, {"loss": 1.0})


def test_without_wandb_it_is_said_how_to_have_it(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("training.boards.find_spec", lambda name: None if name == "wandb" else there(name))
    with pytest.raises(ValueError, match=r"pip install 'mmdit\[wandb\]'"):
        training.train(config_for(tmp_path / "run", "training.wandb=tests"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="training.wandb is empty"):
        load_config("demo", ["training.wandb="])
