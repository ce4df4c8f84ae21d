"""Averages of the weights: their mathematics against written-out weights, and what a run keeps and makes of them."""

import itertools
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import training
from mmdit import TextToImage
from mmdit.mapped import read_metadata
from mmdit.weights_io import read_weights, save_weights
from training.checkpoint import list_checkpoints
from training.config import ConfigError, OptimizerConfig, TrainingConfig, load_config
from training.ema import (
    make_average,
    mixture,
    overlaps,
    power_decay,
    power_of,
    reconstruct,
    remove_snapshots,
    sigma_rel_of,
    snapshots,
    update_ema,
)
from training.optim import make_optimizer
from training.run import RunFolder
from training.trainer import Trainer


def weights_of(power: float, t: int, of: int) -> np.ndarray:
    """What the average after t steps gives each of `of` steps, written out."""
    k = np.minimum(np.arange(of + 1), t) / t
    return np.diff(k ** (power + 1))


# --- the mathematics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_moving_average_is_the_formula(decay):
    ema, net = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = ema.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            net.weight.add_(1)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * net.weight.detach()
        update_ema(ema, net, decay, step)
        torch.testing.assert_close(ema.weight.detach(), expected)
    if decay == 0:
        assert torch.equal(ema.weight, net.weight)


def test_an_average_may_be_wider_than_its_model():
    net, ema = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)
    before = ema.weight.detach().clone()
    update_ema(ema, net, 0.999, 10_000)
    torch.testing.assert_close(ema.weight.detach(), 0.999 * before + 0.001 * net.weight.detach().float())


def test_widths_and_powers_are_those_of_the_paper():
    assert power_of(0.05) == pytest.approx(16.97, abs=0.005) and power_of(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.01, 0.1, 0.25, 0.288):
        assert sigma_rel_of(power_of(width)) == pytest.approx(width)
    assert sigma_rel_of(0) == pytest.approx(12**-0.5)  # a uniform density
    for wrong in (0, -0.1, 0.29):
        with pytest.raises(ValueError, match="sigma_rel is"):
            power_of(wrong)


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_an_average_step_by_step_weighs_as_its_density(width):
    power, given = power_of(width), np.zeros(400)
    for done in range(1, 401):
        decay = power_decay(power, done)
        given *= decay
        given[done - 1] += 1 - decay
    np.testing.assert_allclose(given, weights_of(power, 400, 400), atol=1e-12)
    middle = (np.arange(400) + 0.5) / 400
    spread = math.sqrt((given * middle**2).sum() - (given * middle).sum() ** 2)
    assert spread == pytest.approx(width, rel=1e-2)


def test_overlaps_are_integrals_of_products():
    profiles = [(100, 2.5), (250, 0.7), (250, 16.0)]
    tau = (np.arange(250_000) + 0.5) / 1000

    def density(t, g):
        return np.where(tau < t, (g + 1) * tau**g / t ** (g + 1), 0)

    expected = [[(density(*a) * density(*b)).sum() / 1000 for b in profiles] for a in profiles]
    np.testing.assert_allclose(overlaps(profiles, profiles), expected, rtol=1e-4)


@pytest.mark.parametrize(("width", "error"), [(0.05, 1e-9), (0.1, 1e-9), (0.07, 0.02), (0.15, 0.02), (0.2, 0.03)])
def test_a_mixture_of_snapshots_weighs_as_the_average_itself(width, error):
    """Relative to the weights' own norm; those that were tracked come out as they were."""
    times = range(100, 2001, 100)
    kept = [(t, power_of(w)) for t in times for w in (0.05, 0.1)]
    factors = mixture(kept, (2000, power_of(width)))
    found = sum(x * weights_of(g, t, 2000) for x, (t, g) in zip(factors, kept, strict=True))
    wanted = weights_of(power_of(width), 2000, 2000)
    assert np.linalg.norm(found - wanted) < error * np.linalg.norm(wanted)
    assert found.sum() == pytest.approx(1, abs=error)


# --- what a trainer keeps -----------------------------------------------------------------------------------------


def stepping(config: TrainingConfig, optimizer: OptimizerConfig, steps: int):
    """(the average, the weights of each step, the optimiser) of a small net that learns from noise."""
    torch.manual_seed(0)
    net, ema = nn.Linear(3, 3), nn.Linear(3, 3)
    ema.load_state_dict(net.state_dict())
    steps_of = make_optimizer(net, optimizer)
    average, seen = make_average(ema, net, steps_of, config), []
    for step in range(steps):
        net(torch.randn(4, 3)).sub(torch.randn(4, 3)).square().sum().backward()
        steps_of.step()
        steps_of.zero_grad()
        average.update(net, step)
        seen.append(net.weight.detach().clone())
    return average, seen, steps_of


@pytest.mark.parametrize("ema", ["exponential", "power"])
def test_updates_taken_in_at_once_weigh_as_each_would(ema):
    """The average that sees each third update's weights in the place of the two before it."""
    rare, seen, _ = stepping(TrainingConfig(ema=ema, ema_decay=0.8, ema_every=3), OptimizerConfig(lr=0.01), 31)
    held = [seen[min(i // 3 * 3 + 2, 29)] for i in range(30)]
    if ema == "power":
        shares = weights_of(power_of(0.05), 30, 30)
    else:
        stay = [min(0.8, (1 + k) / (10 + k)) for k in range(30)]
        shares = np.array([(1 - stay[k]) * np.prod(stay[k + 1 :]) for k in range(30)])
        held, shares = [first_weights(), *held], np.array([np.prod(stay), *shares])
    expected = sum(float(share) * weight for share, weight in zip(shares, held, strict=True))
    torch.testing.assert_close(rare.ema.weight.detach(), expected)


def first_weights() -> torch.Tensor:
    """The weights that `stepping` begins with."""
    torch.manual_seed(0)
    return nn.Linear(3, 3).weight.detach()


def test_both_powers_are_tracked():
    average, seen, _ = stepping(TrainingConfig(ema="power", ema_sigma_rel=(0.07, 0.2)), OptimizerConfig(lr=0.01), 30)
    for width, found in ((0.07, average.ema.weight), (0.2, average.second["weight"])):
        weights = weights_of(power_of(width), 30, 30)
        torch.testing.assert_close(found.detach(), sum(float(x) * w for x, w in zip(weights, seen, strict=True)))


def test_the_average_of_schedule_free_is_its_libraries():
    pytest.importorskip("schedulefree")
    average, seen, optimizer = stepping(
        TrainingConfig(ema_decay=0), OptimizerConfig(name="schedule-free", lr=0.01, betas=(0.8, 0.9)), 12
    )
    ours = average.ema.weight.detach().clone()
    net = optimizer.param_groups[0]["params"][0]
    assert torch.equal(net, seen[-1])
    optimizer.eval()
    torch.testing.assert_close(ours, net.detach())
    assert (ours - seen[-1]).abs().max() > 1e-4


def test_snapshots_past_a_step_are_forgotten_and_that_of_it_stays(tmp_path):
    average, _, _ = stepping(TrainingConfig(ema="power"), OptimizerConfig(lr=0.01), 1)
    for step in (2, 4, 6):
        average.snapshot(tmp_path, step, step)
    remove_snapshots(tmp_path, 4)
    assert [step for step, _, _ in snapshots(tmp_path)] == [2, 2, 4, 4]


def test_schedule_free_leaves_a_weight_that_nothing_uses_where_it_is():
    pytest.importorskip("schedulefree")
    net, ema = (nn.ModuleDict({name: nn.Linear(2, 2) for name in ("frozen", "used", "idle")}) for _ in range(2))
    ema.load_state_dict(net.state_dict())
    net["frozen"].requires_grad_(False)
    optimizer = make_optimizer(net, OptimizerConfig(name="schedule-free", lr=0.01))
    average = make_average(ema, net, optimizer, TrainingConfig(ema_decay=0))
    net["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    average.update(net, 0)
    assert torch.equal(ema["idle"].weight, net["idle"].weight) and not torch.equal(ema["used"].bias, torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_snapshot_is_of_what_is_trained_in_the_type_asked_for(name, dtype, tmp_path):
    net, ema = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)) for _ in range(2))
    config = TrainingConfig(ema="power", ema_snapshot_every=1, ema_snapshot_dtype=name)
    average = make_average(ema, net, torch.optim.SGD(net.parameters()), config)
    average.update(net, 0)  # forgets the weights that it began with
    average.snapshot(tmp_path, 1, 1)
    for _, _, path in snapshots(tmp_path):
        found = read_weights(path)
        assert {key: x.dtype for key, x in found.items()} == {"0.weight": dtype, "0.bias": dtype}
        assert torch.equal(found["0.weight"], net[0].weight.detach().to(dtype))


def test_a_snapshot_says_how_many_updates_it_has_taken_in(tmp_path):
    config = TrainingConfig(ema="power", ema_every=4, ema_snapshot_every=1)
    average, _, _ = stepping(config, OptimizerConfig(lr=0.01), 11)
    for updates in (3, 11):
        average.snapshot(tmp_path, updates, updates)
    assert [(step, read_metadata(path)["updates"]) for step, _, path in snapshots(tmp_path)] == [(11, "8")] * 2


# --- runs ---------------------------------------------------------------------------------------------------------

POWER = ("training.ema=power", "training.ema_sigma_rel=[0.1, 0.25]", "training.ema_snapshot_dtype=fp32")


def tiny(out, *overrides: str) -> training.TrainConfig:
    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    some = ("training.num_steps=8", "training.checkpoint_every=0", "training.precision=fp32", f"training.out={out}")
    return load_config("pixels-tiny", [*quiet, *some, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("ema") / "run"
    return training.train(tiny(out, *POWER, "training.ema_snapshot_every=2"))


def test_snapshots_are_files_of_what_is_trained(run):
    assert [(step, width) for step, width, _ in snapshots(run)] == list(itertools.product((2, 4, 6, 8), (0.1, 0.25)))
    checkpoint = list_checkpoints(run)[-1]
    for (_, _, path), name in zip(snapshots(run)[-2:], ("ema", "ema_second"), strict=True):
        found, kept = read_weights(path), read_weights(checkpoint / f"{name}.safetensors")
        assert all(torch.equal(value, kept[name]) for name, value in found.items())
        assert "transformer.pos_embed" not in found and "conditioner.embed.weight" in found


def test_processes_that_write_no_snapshot_keep_nothing_for_one(tmp_path):
    """They only take part in gathering each weight of a sharded average."""
    config = tiny(tmp_path / "run", *POWER, "training.ema_snapshot_every=2", "training.ema_snapshot_dtype=fp16")
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as told:
        trainer.average.snapshot(config.run_folder, 2, 2, write=False)
    assert not snapshots(config.run_folder) and not [event for event in told.events() if "copy" in event.name]


def test_a_tracked_width_is_reconstructed_as_it_was_and_others_lie_beside_it(run):
    ema = read_weights(list_checkpoints(run)[-1] / "ema.safetensors")
    names = [name for name, _ in TextToImage.load(run, "cpu").model.named_parameters()]
    flat = {width: torch.cat([reconstruct(run, width)[name].flatten() for name in names]) for width in (0.1, 0.15)}
    exact = torch.cat([ema[name].flatten() for name in names])
    assert (flat[0.1] - exact).abs().max() < 1e-6
    assert (flat[0.15] - exact).abs().max() > 1e-5
    early = {step: reconstruct(run, 0.1, step) for step in (4, 8)}
    assert not torch.equal(early[4][names[0]], early[8][names[0]])
    with pytest.raises(ValueError, match="no snapshot of step 3, it has 2, 4, 6, 8"):
        reconstruct(run, 0.1, 3)


def test_time_in_a_reconstruction_is_updates(run, tmp_path):
    """A weight that is k after update k, in a run that leaves out 90 steps in its middle."""
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "ema")
    trained = {name: value.shape for name, value in read_weights(snapshots(run)[0][2]).items()}
    truth = {
        (t, w): weights_of(power_of(w), t, t) @ np.arange(1, t + 1) for t in range(5, 61, 5) for w in (0.1, 0.15, 0.25)
    }
    for (t, width), value in truth.items():
        tensors = {name: torch.full(shape, value) for name, shape in trained.items()}
        path = copy / "ema" / f"step-{t + 90 * (t > 30):08d}-sigma-{width}.safetensors"
        if width != 0.15:
            save_weights(tensors, path, {"updates": str(t)} if t > 30 else {})  # else as many as steps
    for t, step in ((30, 30), (60, 150)):
        for width in (0.1, 0.15, 0.25):
            found = reconstruct(copy, width, step)
            assert all(found[name].flatten()[0].item() == pytest.approx(truth[t, width], rel=1e-3) for name in trained)


def test_a_reconstruction_is_the_average_that_another_run_tracked(tmp_path):
    """The same training with other widths kept: one of them, from snapshots of the first two."""
    long = ("training.num_steps=64", "training.ema_snapshot_every=8", "training.log_every=64")
    run = training.train(tiny(tmp_path / "run", *POWER, *long))
    direct = training.train(tiny(tmp_path / "direct", *POWER, "training.ema_sigma_rel=[0.15, 0.2]", *long))
    state, mine = reconstruct(run, 0.15), read_weights(list_checkpoints(run)[-1] / "ema.safetensors")
    theirs = read_weights(list_checkpoints(direct)[-1] / "ema.safetensors")
    assert torch.equal(mine["transformer.pos_embed"], theirs["transformer.pos_embed"])
    distance = sum((state[name] - theirs[name]).square().sum() for name in theirs).sqrt()
    between = sum((mine[name] - theirs[name]).square().sum() for name in theirs).sqrt()
    assert distance < 0.02 * between


def test_a_stopped_run_forgets_later_snapshots_and_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == 7:
            raise Killed
        return real(self, model, batch)

    config = tiny(tmp_path / "run", *POWER, "training.ema_snapshot_every=2", "training.checkpoint_every=5")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_train_step", train_step)
        training.train(config)
    assert {step for step, _, _ in snapshots(tmp_path / "run")} == {2, 4, 6}
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self, interrupts: seen.extend(s for s, _, _ in snapshots(self.run.path)))
        training.resume(tmp_path / "run")
    assert set(seen) == {2, 4}
    training.resume(tmp_path / "run")
    for (_, _, ours), (_, _, theirs) in zip(snapshots(tmp_path / "run"), snapshots(run), strict=True):
        assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()


def test_snapshots_can_be_small_and_few(run, tmp_path):
    out = training.train(tiny(tmp_path / "half", *POWER[:2], "training.ema_snapshot_every=100"))
    (_, _, half), _ = snapshots(out)  # at the end
    assert {value.dtype for value in read_weights(half).values()} == {torch.float16}
    assert half.stat().st_size < 0.7 * snapshots(run)[0][2].stat().st_size
    none = training.train(tiny(tmp_path / "none", *POWER[:2], "training.ema_snapshot_every=0"))
    with pytest.raises(ValueError, match="no snapshots of averages: train with training.ema"):
        reconstruct(none, 0.1)


def test_the_command_writes_a_pipeline_that_draws(run, tmp_path):
    from typer.testing import CliRunner

    from mmdit_cli.main import app

    words = ["ema", str(run), "--sigma-rel", "0.2", "--out", str(tmp_path / "wide")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    pipe, state = TextToImage.load(tmp_path / "wide", "cpu"), reconstruct(run, 0.2)
    assert all(torch.equal(value, state[name]) for name, value in pipe.model.state_dict().items())
    assert pipe("a star", num_steps=1)[0].size == (32, 32)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "exists already" in again.output
    wrong = CliRunner().invoke(app, [*words[:3], "0.4", "--out", str(tmp_path / "x")])
    assert wrong.exit_code == 2 and "sigma_rel is 0.4, expected" in wrong.output


def test_a_resumed_run_keeps_its_average(run):
    with pytest.raises(ValueError, match="trained with another training.ema_sigma_rel"):
        training.resume(run, ["training.ema_sigma_rel=[0.05, 0.1]"])


def test_what_does_not_go_together_is_refused():
    config = load_config("pixels-tiny")
    with pytest.raises(ConfigError, match="two different widths"):
        replace(config.training, ema="power", ema_sigma_rel=(0.1, 0.1))
    with pytest.raises(ConfigError, match="ema_sigma_rel.* is 0.3, expected a number in"):
        TrainingConfig(ema_sigma_rel=(0.1, 0.3))
    with pytest.raises(ConfigError, match="a run of 20 steps has no average"):
        replace(config.training, num_steps=20, ema_every=21)
    with pytest.raises(ConfigError, match="ema_decay = 0 keeps no average"):
        replace(config.training, ema_decay=0.0, ema_every=2)
    with pytest.raises(ConfigError, match="averages its weights itself: set training.ema_decay=0"):
        load_config("pixels-tiny", ["optimizer.name=schedule-free"])


@pytest.mark.parametrize("name", ["schedule-free", "adamw-8bit", "muon"])
def test_a_stopped_run_of_any_optimiser_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    library = {"schedule-free": "schedulefree", "adamw-8bit": "bitsandbytes"}.get(name)
    if library:
        pytest.importorskip(library)
    changes = [f"optimizer.name={name}", f"training.ema_decay={0 if name == 'schedule-free' else 0.9}"]
    whole = training.train(tiny(tmp_path / "whole", *changes, "training.validate_every=2"))
    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        out = training.train(tiny(tmp_path / "run", *changes))
    assert [path.name for path in list_checkpoints(out)] == ["step-00000005"]
    kept = read_weights(list_checkpoints(out)[-1] / "optimizer.safetensors").values()
    assert any(x.dtype == torch.uint8 for x in kept) == (name == "adamw-8bit")
    training.resume(out)
    for path in list_checkpoints(whole)[-1].glob("*.safetensors"):
        ours, theirs = read_weights(list_checkpoints(out)[-1] / path.name), read_weights(path)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    with pytest.raises(ValueError, match="trained with another optimizer.name"):
        training.resume(out, ["optimizer.name=adamw"])
    if name == "schedule-free":  # the weights are where betas[0] puts them, between z and the average
        with pytest.raises(ValueError, match="trained with another optimizer.betas"):
            training.resume(out, ["optimizer.betas=[0.5, 0.99]"])
