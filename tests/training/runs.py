"""Short runs of the tiny preset, and what their folders hold, for the tests of training."""

import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import training
from mmdit.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from mmdit.weights_io import read_weights
from training.checkpoint import list_checkpoints
from training.config import load_config
from training.feed import LatentFeed
from training.run import RunFolder
from training.trainer import Trainer


def config_for(out: Path, *overrides: str) -> training.TrainConfig:
    """The tiny preset, without what takes most of its time."""
    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    return load_config("pixels-tiny", [*quiet, "training.precision=fp32", f"training.out={out}", *overrides])


def metrics(run: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in RunFolder(run).metrics() if name in row]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, average, optimiser."""
    folder = list_checkpoints(run)[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in read_weights(file).items()}


def assert_bit_equal(run: Path, other: Path) -> None:
    a, b = last_weights(run), last_weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def make_autoencoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = PatchAutoencoderConfig(channels=4, widths=(8, 8), depth=1, scaling_factor=0.75, shift_factor=0.125)
    PatchAutoencoder(config).save(folder)
    return folder


LONG = ("training.num_steps=10", "training.checkpoint_every=0", "training.log_every=3", "training.precision=auto")


def stop_after(step: int, monkeypatch, sig: int = signal.SIGTERM) -> None:
    """Send ourselves a signal in the middle of that step."""
    real = Trainer._train_step

    def train_step(self, model, batch):
        if self.step == step - 1:
            os.kill(os.getpid(), sig)
        return real(self, model, batch)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


def contents(run: Path) -> dict[str, str]:
    """Digests of all that a run holds but its log."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_pictures(folder: Path, n: int) -> Path:
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    return folder


TRANSFUSION = ("transfusion.enabled=true", "model.positions=rope", "text.vocab_size=400")


def make_tokenizer(folder: Path) -> Path:
    """As transformers saves one: byte pairs with an end and padding of other names and ids than ours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend, bytes_of = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    backend.pre_tokenizer, backend.decoder = bytes_of(), decoders.ByteLevel()
    how = dict(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_of.alphabet())
    backend.train_from_iterator(["a red circle", "two blue stars"], trainers.BpeTrainer(show_progress=False, **how))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<s>").save_pretrained(folder)
    return folder


def spoil(monkeypatch, *steps: int) -> None:
    """Put a NaN (in even steps an infinity) into one number of the batches of these steps."""
    real = LatentFeed.batches

    def batches(self, batch_size, seed, start_step=0, *share):
        for k, batch in enumerate(real(self, batch_size, seed, start_step, *share), start=start_step + 1):
            if k in steps:
                batch.latents[-1, 0, 0, 0] = float("nan") if k % 2 else float("inf")
            yield batch

    monkeypatch.setattr(LatentFeed, "batches", batches)
