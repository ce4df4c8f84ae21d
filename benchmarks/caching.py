"""What a cache saves and loses: the time of training steps with a frozen text encoder, the precision of latents, and
how fast a cache on a server is read.

    OMP_NUM_THREADS=1 python -m benchmarks.caching            # tables on standard output
    OMP_NUM_THREADS=1 python -m benchmarks.caching --steps 20

Text encoders with random weights in the shapes of T5-small and CLIP-L (time does not depend on the weights) encode
captions of the drawn world; the trunk is the demo's, with 32 images a step. Steps from images and from the cache
alternate. The second table has the rounding error of the shipped autoencoder's latents and, for comparison, the
autoencoder's own reconstruction error. The third one (alone: `--steps 0`) has samples of 32 x 32 x 32 latents and
encoders of 77 tokens by 1024, from a server in memory that answers each request `LATE` seconds late.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import torch
from fsspec.implementations.memory import MemoryFileSystem

from mmdit.autoencoder import open_autoencoder
from training.cache import DTYPES, Known, Shard, as_tensors, write_shard
from training.cache_samples import CachedSample
from training.cache_writer import CacheOptions, write_cache
from training.cached import READS
from training.config import load_config
from training.data import one_pass, open_source
from training.feed import statistics_of, to_signed
from training.remote import read_each
from training.run import RunFolder
from training.trainer import Trainer

SAMPLES = 256
LATE = 0.03  # seconds


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


class Late(MemoryFileSystem):
    """Files in memory, each answer `LATE` seconds late."""

    protocol = "late"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        time.sleep(LATE)
        data: bytes = super().cat_file(path, start, end, **kwargs)
        return data


def read_from_server(num_encoders: int, folder: Path) -> float:
    """Samples a second that are read from a cache on such a server."""
    text = [(torch.randn(77, 1024).half(), torch.randn(768).half()) for _ in range(num_encoders)]
    known = [Known(torch.randn(32, 32, 32).half(), [text] if text else [])] * SAMPLES
    samples = [CachedSample(str(i), "", ["a caption"]) for i in range(SAMPLES)]
    write_shard(folder / "shard", samples, as_tensors(known, known[0]))
    fsspec.register_implementation("late", Late, clobber=True)
    for path in folder.iterdir():
        with fsspec.open(f"late://{path.name}", "wb") as file:
            file.write(path.read_bytes())
    shard = Shard("late://shard")
    shard.read(0)
    start = time.perf_counter()
    count = sum(1 for _ in read_each(shard.read, range(SAMPLES), True, READS))
    return count / (time.perf_counter() - start)


def _psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return 10 * float(torch.log10(4 / (x - y).square().mean().double().clamp(min=1e-30)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each; 0: the server alone")
    steps = parser.parse_args().steps
    if steps:
        _print_steps(steps)
    print("\n| frozen text encoders | samples a second from a server |\n|---|---|")
    for num_encoders in (0, 1, 3):
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {num_encoders or 'none'} | {read_from_server(num_encoders, Path(folder)):.0f} |")


def _print_steps(steps: int) -> None:
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
