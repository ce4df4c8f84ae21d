"""Half precision where matrices are multiplied, and float32 where it matters: norms of queries and keys, time, loss,
average and optimiser.
"""

import warnings

import pytest
import torch

import mmdit.embeddings
import training
from tests.training.runs import TRANSFUSION, assert_bit_equal, config_for, metrics
from training.checkpoint import load_latest
from training.precision import LARGEST_SCALE, LossScaler, autocast
from training.run import RunFolder
from training.seeds import generator_for
from training.trainer import Trainer

HALVES = pytest.mark.parametrize("precision", ["bf16", "fp16"])
MODELS = pytest.mark.parametrize("model", [(), TRANSFUSION], ids=["image", "mixed"])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def trainer_of(out, *overrides) -> Trainer:
    config = config_for(out, *overrides)
    return Trainer(config, RunFolder.create(out, config))


@HALVES
@MODELS
def test_a_step_in_half_precision_and_its_islands(tmp_path, monkeypatch, precision, model):
    trainer = trainer_of(tmp_path / "run", f"training.precision={precision}", *model)
    seen: dict[str, set] = {"q_norm": set(), "qkv": set(), "time": set(), "out": set(), "loss": set()}

    def watch(name):
        return lambda module, args, out: seen[name].update(x.dtype for x in (args[0], out))

    for name, module in trainer.model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("q_norm", "k_norm"):
            module.register_forward_hook(watch("q_norm"))
        elif kind in ("fc1", "fc2") and "time_in" in name:
            module.register_forward_hook(watch("time"))
        elif kind == "qkv" and ".blocks." in name:
            module.register_forward_hook(lambda module, args, out: seen["qkv"].add(out.dtype))
    trainer.learner.register_forward_hook(lambda module, args, loss: seen["loss"].add(loss.total.dtype))
    real = mmdit.embeddings.sinusoid
    monkeypatch.setattr(mmdit.embeddings, "sinusoid", lambda x, dim: seen["time"].add(x.dtype) or real(x, dim))
    trainer._train_step(trainer.learner, next(trainer.feed.batches(8, 0)))
    assert seen["qkv"] == {DTYPES[precision]}
    assert seen["q_norm"] == seen["time"] == seen["loss"] == {torch.float32}
    held = [*trainer.model.parameters(), *trainer.ema.parameters()]
    held += [x for state in trainer.optimizer.state.values() for x in state.values()]
    assert {x.dtype for x in held} == {torch.float32}


@HALVES
def test_times_that_half_precision_cannot_tell_apart_still_count(tmp_path, precision):
    trainer = trainer_of(tmp_path / "run", f"training.precision={precision}")
    t = torch.tensor([0.9, 0.9001])
    assert len({*t.to(DTYPES[precision]).tolist()}) == 1
    with autocast(trainer.device, DTYPES[precision]):
        a, b = trainer.model.transformer.time_in(t)
    assert torch.equal(torch.stack([a, b]), trainer.model.transformer.time_in(t)) and not torch.equal(a, b)


@HALVES
def test_an_error_far_below_the_velocity_is_not_rounded_away(tmp_path, precision):
    """The loss of an almost perfect model: v - (eps - x_0) is taken, squared and summed in float32."""
    trainer = trainer_of(tmp_path / "run", f"training.precision={precision}", "objective.caption_dropout=0")
    batch = next(trainer.feed.batches(8, 0))

    class Perfect(torch.nn.Module):
        conditioner = trainer.model.conditioner

        def forward(self, x_t, t, tokens, drop):
            v = (x_t - batch.latents) / t[:, None, None, None]
            return (v * 3).to(DTYPES[precision])

    with autocast(trainer.device, DTYPES[precision]):
        loss = trainer.learner.objective(Perfect(), batch, generator_for(0)).total
    assert loss.dtype == torch.float32 and loss > 1
    exact = Perfect.forward
    Perfect.forward = lambda self, *args: exact(self, *args).double().float()
    torch.testing.assert_close(trainer.learner.objective(Perfect(), batch, generator_for(0)).total, loss)


def test_gradients_below_the_least_number_of_fp16_survive_by_the_scale():
    """A gradient of 1e-8 is zero in fp16; scaled by 2^16 before, and down again in float32, it is right to 1e-3."""
    w = torch.tensor([1.0], requires_grad=True)
    for scaler, expected in ((LossScaler(), 0.0), (LossScaler.for_precision(torch.float16), 1e-8)):
        w.grad = None
        y = w.half() * 1e-4
        (y.float().sum() * 1e-4 * scaler.scale).backward()
        scaler.unscale([w])
        assert w.grad.dtype == torch.float32
        assert w.grad.item() == pytest.approx(expected, rel=2e-2)


def test_a_scale_of_two_may_be_to_blame_and_one_of_one_is_not():
    scaler = LossScaler(2.0)
    assert scaler.update(False) and scaler.scale == 1
    assert not scaler.update(False) and scaler.scale == 1


def test_in_single_precision_nothing_is_said_or_cast():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with autocast(torch.device("cpu"), torch.float32):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_where_nothing_has_a_gradient_there_is_nothing_to_unscale():
    LossScaler.for_precision(torch.float16).unscale([torch.nn.Parameter(torch.zeros(3))])


def test_a_scale_falls_with_an_overflow_and_grows_after_good_steps():
    scaler = LossScaler(8.0, grow_every=3)
    assert scaler.update(False) and scaler.scale == 4
    assert [scaler.update(True) or scaler.scale for _ in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert scaler.update(False) and (scaler.scale, scaler.good) == (8, 0)
    largest = LossScaler(LARGEST_SCALE, grow_every=1)
    assert not largest.update(True) and largest.scale == LARGEST_SCALE
    scaler.scale = 1.0
    assert not scaler.update(False) and scaler.scale == 1  # nothing is left to blame on the scale
    assert LossScaler.for_precision(torch.float16).enabled and not LossScaler.for_precision(torch.bfloat16).enabled


def test_an_overflow_in_fp16_leaves_the_step_out_and_halves_the_scale(tmp_path, monkeypatch):
    """From a scale far too large down to one that fits, with no step lost to training; and on after a resume."""
    monkeypatch.setattr("training.precision.LARGEST_SCALE", 2.0**40)
    monkeypatch.setattr(LossScaler, "for_precision", lambda precision: LossScaler(2.0**33, grow_every=3))
    how = ("training.precision=fp16", "training.num_steps=24", "training.max_bad_steps=2")
    out = training.train(config_for(tmp_path / "run", *how, "training.checkpoint_every=0"))
    scales = [scale for _, scale in metrics(out, "loss_scale")]
    fell = [k for k, (a, b) in enumerate(zip(scales, scales[1:], strict=False)) if b < a]
    assert scales[0] == 2.0**32 and len(fell) >= 4
    assert any(b == 2 * a for a, b in zip(scales, scales[1:], strict=False))
    assert not metrics(out, "skipped_steps")  # that was the scale's doing
    state, weights = load_latest(out, print)
    assert state["loss_scale"][0] == scales[-1]
    assert {x.dtype for group in weights.values() for x in group.values()} == {torch.float32}
    part = training.train(config_for(tmp_path / "part", *how, "training.checkpoint_every=0", "training.num_steps=11"))
    assert_bit_equal(training.resume(part, ["training.num_steps=24"]), out)


def test_fp16_learns_as_fp32_does(tmp_path):
    runs = [training.train(config_for(tmp_path / name, f"training.precision={name}")) for name in ("fp16", "fp32")]
    half, full = (dict(metrics(run, "loss")) for run in runs)
    assert half != full and half == pytest.approx(full, rel=2e-3)
