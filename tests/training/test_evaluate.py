"""Validation loss at fixed times against the numbers it should be, over whole data and with fixed noise."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdit.config import TransfusionConfig
from mmdit.text import TextConfig, Tokenizer, Tokens
from mmdit.text_and_images import CaptionedTransfusion, Words
from mmdit.transfusion import Transfusion
from training.config import load_config
from training.evaluate import caption_score, evaluate_run, fixed_times, validation_loss
from training.objectives import Batch, documents, noise_for
from training.order import Layout
from training.run import RunFolder
from training.seeds import generator_for
from training.shapes import ShapesWorld
from training.share import WHOLE


class Constant(nn.Module):
    """Predicts one number everywhere, and keeps what it was asked."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value, self.calls = value, []
        self.conditioner = SimpleNamespace(num_encoders=1)

    def forward(self, x_t, t, tokens, drop=None):
        self.calls.append((x_t, t, tokens, drop))
        return torch.full_like(x_t, self.value)


class Rows:
    """Latents in memory, as a feed."""

    layout = Layout(((4, 4),))

    def __init__(self, n: int) -> None:
        self.latents = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 2, 4, 4)

    def __len__(self):
        return len(self.latents)

    def at(self, rows):
        rows = list(rows)
        ids = torch.tensor(rows)[:, None]
        return Batch(self.latents[rows], Tokens(ids, ids >= 0))


def config(**changes):
    return load_config("pixels-tiny", [f"evaluation.{key}={value}" for key, value in changes.items()])


def test_times_are_the_middles_of_equal_parts():
    assert fixed_times(1) == [0.5]
    assert fixed_times(8) == [1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16]


@pytest.mark.parametrize("batch_size", [2, 3, 5, 64])
def test_loss_is_the_mean_over_all_samples_at_each_time(batch_size):
    """A model that predicts 2 has the loss mean (eps - x_0 - 2)^2, each sample with noise of its own whatever the size
    of the batches; the last one is smaller and counts by its size.
    """
    model, feed = Constant(2.0), Rows(5)
    losses = validation_loss(model, feed, config(batch_size=batch_size, validation_times=4))
    eps = torch.stack(noise_for(5, feed.latents, generator_for(0), WHOLE))
    expected = (eps - feed.latents - 2).square().mean().item()
    assert list(losses) == ["validation_loss", *(f"validation_loss_t{t:.4f}" for t in (0.125, 0.375, 0.625, 0.875))]
    assert list(losses.values()) == pytest.approx([expected] * 5, rel=1e-5)


def test_every_sample_is_asked_at_every_time_with_its_caption_and_one_noise():
    model, feed = Constant(), Rows(5)
    validation_loss(model, feed, config(batch_size=2, validation_times=3))
    asked = [(round(t[k].item(), 4), int(tokens.ids[k])) for _, t, tokens, _ in model.calls for k in range(len(t))]
    assert sorted(asked) == sorted((round(t, 4), i) for t in fixed_times(3) for i in range(5))
    assert not any(drop.any() for *_, drop in model.calls)
    noise = [(x_t - (1 - t[0]) * feed.latents[tokens.ids[:, 0]]) / t[0] for x_t, t, tokens, _ in model.calls[:3]]
    torch.testing.assert_close(noise[0], noise[2], rtol=1e-4, atol=1e-4)


def test_it_repeats_and_only_its_seed_changes_it():
    feed = Rows(5)
    losses = [validation_loss(Constant(), feed, config(seed=seed))["validation_loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == validation_loss(Constant(), feed, load_config("pixels-tiny", ["seed=9"]))["validation_loss"]


def test_no_gradient_is_kept():
    model = Constant()
    model.gain = nn.Parameter(torch.ones(()))
    model.forward = lambda x_t, t, tokens, drop=None: model.calls.append(torch.is_grad_enabled()) or model.gain * x_t
    validation_loss(model, Rows(2), config())
    assert model.calls and not any(model.calls)


def mixed(count: int):
    """(a small model of text and images, a feed of `count` pictures with captions of one to three words)."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red circle", "a star"], 300, 12, images=True)
    special = dict(zip(("pad", "eos", "boi", "eoi"), tokenizer.special, strict=True))
    shape = TransfusionConfig(320, 2, patch_size=2, depth=1, num_heads=2, head_dim=16, sample_size=4, **special)
    model = CaptionedTransfusion(Transfusion(shape), Words(TextConfig(300, 12), tokenizer))
    feed, words = Rows(count), tokenizer((["a red circle", "star", "a star"] * count)[:count])
    feed.at = lambda rows: Batch(feed.latents[list(rows)], Tokens(*(x[list(rows)] for x in words)))
    return model, feed


@pytest.mark.parametrize("batch_size", [2, 64])
def test_words_are_asked_for_before_their_picture_and_after_it_each_word_alike(batch_size):
    model, feed = mixed(5)
    settings = ["transfusion.enabled=true", "model.positions=rope", f"evaluation.batch_size={batch_size}"]
    losses = validation_loss(model, feed, load_config("pixels-tiny", settings))
    for name, image_first in (("validation_text", False), ("validation_caption", True)):
        batch = documents(feed.at(range(5)), torch.full((5,), image_first), pack=model.pack)
        with torch.no_grad():
            out = model(batch, torch.zeros(5))
        logits, wanted = out.logits[batch.predicting], batch.ids[batch.predicting + 1]
        assert losses[name] == pytest.approx(nn.functional.cross_entropy(logits, wanted).item(), rel=1e-5)
    assert losses["validation_text"] != losses["validation_caption"]
    whole = validation_loss(model, feed, load_config("pixels-tiny", [*settings[:2], "evaluation.batch_size=5"]))
    assert losses["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-5)


def test_captions_that_are_right_are_counted():
    """A model that says of every other picture what is there, and of the rest nothing that is a caption."""
    settings = load_config("pixels-tiny", ["evaluation.prompts_per_question=2", "evaluation.batch_size=5"])
    world = ShapesWorld((64, 64), settings.evaluation.seed, split="held-out")
    captions = iter([world[i][1] if i % 3 == 0 else "no words" for i in range(12)])

    class Writer:
        size = (64, 64)

        def generate(self, prompts, **how):
            return [SimpleNamespace(parts=[next(captions)]) for _ in prompts]

    assert caption_score(Writer(), settings) == pytest.approx(4 / 12)


def test_a_network_that_is_not_there_is_missed_before_the_model_is_read(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", load_config("pixels-tiny"))
    monkeypatch.setattr("training.evaluate.TextToImage.load", None)
    with pytest.raises(ValueError, match="no weights at nowhere"):
        evaluate_run(run.path, {"metrics": ("precision-recall",), "features": "nowhere"})


def test_a_run_that_cannot_be_written_to_is_refused_before_the_model_is_read(tmp_path, monkeypatch):
    """As on a file system to be read alone: its scores would be lost after all pictures were drawn."""
    run = RunFolder.create(tmp_path / "run", load_config("pixels-tiny"))
    monkeypatch.setattr("training.evaluate.TextToImage.load", None)
    monkeypatch.setattr("os.access", lambda path, how: False)
    with pytest.raises(PermissionError, match=f"scores cannot be written here: '{run.path}'"):
        evaluate_run(run.path)
