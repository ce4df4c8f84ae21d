"""What a cache saves and loses: the time of training steps with a frozen text encoder, and the precision of latents.

    OMP_NUM_THREADS=1 python -m benchmarks.caching            # tables on standard output
    OMP_NUM_THREADS=1 python -m benchmarks.caching --steps 20

Text encoders with random weights in the shapes of T5-small and CLIP-L (time does not depend on the weights) encode
captions of the drawn world; the trunk is the demo's, with 32 images a step. Steps from images and from the cache
alternate. The second table has the rounding error of the shipped autoencoder's latents and, for comparison, the
autoencoder's own reconstruction error.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mmdit.autoencoder import open_autoencoder
from training.cache import DTYPES
from training.cache_writer import CacheOptions, write_cache
from training.config import load_config
from training.data import one_pass, open_source
from training.feed import statistics_of, to_signed
from training.run import RunFolder
from training.trainer import Trainer

SAMPLES = 256


def write_encoder(kind: str, folder: Path) -> None:
    """A text encoder with random weights, and a tokenizer trained on captions of the drawn world."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config
    from transformers import T5EncoderModel as T5

    from mmdit.text import Tokenizer

    source = open_source("shapes:2000")
    words = Tokenizer.train((source.caption(i) for i in range(2000)), 512, 77)
    names = dict(eos_token="<eos>", pad_token="<pad>", model_max_length=77)
    PreTrainedTokenizerFast(tokenizer_object=words.backend, **names).save_pretrained(folder)
    if kind == "T5-small":
        T5(T5Config(vocab_size=512, feed_forward_proj="gated-gelu")).save_pretrained(folder)
        return
    shape = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    ends = dict(eos_token_id=words.eos, pad_token_id=words.pad, bos_token_id=words.eos)
    config = CLIPTextConfig(vocab_size=512, projection_dim=768, **shape, **ends)
    CLIPTextModelWithProjection(config).save_pretrained(folder)


def compare_steps(kind: str, steps: int, folder: Path) -> dict[str, float]:
    """Median milliseconds of a step from images and from their cache; bytes a sample and samples written per second."""
    write_encoder(kind, folder / "encoder")
    overrides = [f"data.num_samples={SAMPLES}", "data.held_out=0", f"text.encoder={folder / 'encoder'}"]
    overrides += ["text.max_length=77", "training.compile=off", "training.precision=fp32"]
    config = load_config("demo", overrides)
    written = write_cache(config, folder / "cache", CacheOptions())
    size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    trainers = {
        name: _trainer([*overrides, *more], folder / f"from {name}")
        for name, more in (("images", []), ("cache", [f"data.source={folder / 'cache'}"]))
    }
    times: dict[str, list[float]] = {name: [] for name in trainers}
    batches = {name: trainer.feed.batches(32, 0) for name, trainer in trainers.items()}
    for step in range(steps + 2):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer._train_step(trainer.learner, next(batches[name]))
            if step >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        **{name: statistics.median(some) for name, some in times.items()},
        "bytes": size / SAMPLES,
        "rate": written.samples / written.seconds,
    }


def _trainer(overrides: list[str], out: Path) -> Trainer:
    config = load_config("demo", [*overrides, f"training.out={out}"])
    return Trainer(config, RunFolder.create(out, config))


def rounding() -> dict[str, tuple[float, float]]:
    """By dtype: (root mean square error of latents of unit variance, PSNR in dB of decoded images against those of
    unrounded latents); and under "the autoencoder" the PSNR of its reconstructions.
    """
    autoencoder, source = open_autoencoder("shapes"), open_source("shapes:256", 64)
    images = torch.cat([batch.images for batch in one_pass(source, np.arange(256), 64)])
    with torch.no_grad():
        raw = statistics_of(autoencoder, images, torch.device("cpu"))
        exact, latents = autoencoder.decode(autoencoder.latents_of(raw)), autoencoder.latents_of(raw)
        found = {"the autoencoder": (0.0, _psnr(exact, to_signed(images)))}
        for name, dtype in DTYPES.items():
            rounded = autoencoder.latents_of(raw.to(dtype).float())
            error = (rounded - latents).square().mean().sqrt().item()
            found[name] = (error, _psnr(autoencoder.decode(rounded), exact))
    return found


def _psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return 10 * float(torch.log10(4 / (x - y).square().mean().double().clamp(min=1e-30)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    steps = parser.parse_args().steps
    rows = []
    for kind in ("T5-small", "CLIP-L"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((kind, compare_steps(kind, steps, Path(folder))))
    print("\n| text encoder | ms a step, computed | ms a step, cached | bytes a sample | samples written a second |")
    print("|---|---|---|---|---|")
    for kind, found in rows:
        numbers = (found["images"], found["cache"], found["bytes"], found["rate"])
        print(f"| {kind} | " + " | ".join(f"{x:.0f}" for x in numbers) + " |")
    print("\n| latents | error | decoded, dB beside exact latents |\n|---|---|---|")
    for name, (error, psnr) in rounding().items():
        print(f"| {name} | {error:.1e} | {psnr:.1f} |")


if __name__ == "__main__":
    main()
