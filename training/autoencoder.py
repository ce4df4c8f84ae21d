"""Training of a `PatchAutoencoder` on one's own images, without a perceptual network or a discriminator.

It starts from the principal components of the images' patches, and minimises the mean squared error of the
reconstruction from noisy latents,

    loss = mean (D(E(x) + u s n) - x)^2 + 1e-4 (mean E(x)^2 - 1)^2,     n ~ N(0, 1), u ~ U(0, 1) a sample, s =
    latent_noise

The last term keeps latents near unit variance, so that the noise limits the bits that they can carry, as the KL term
does in a VAE (Kingma & Welling 2014) whose posterior has a fixed width. The decoder also learns to tolerate the small
errors of a generator.

Shape letters: B batch, H W image sides, C latent channels, h w latent sides.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmdit.autoencoder import Autoencoder, PatchAutoencoder, PatchAutoencoderConfig, open_autoencoder
from mmdit.memory import keeping_memory
from training.devices import pick_device, pick_precision
from training.images import LARGE
from training.interrupts import Interrupts
from training.optim import warmup_warning
from training.plots import caption_grid
from training.progress import Progress
from training.run import RunFolder
from training.seeds import generator_for
from training.settings import BelowOne, Count, CountOrZero, Fraction, NotNegative, Positive, Settings

if TYPE_CHECKING:
    from training.data import Source

PCA_IMAGES = 1024  # images whose patches give the linear start
PREVIEW_IMAGES = 256  # images that the preview is fitted to
STATISTICS_IMAGES = 2048  # images over which the latents' mean and variance are measured
LEAST_SCALE = 0.05  # smallest standard deviation of latents: plain pictures of one colour have 0


@dataclass(frozen=True)
class AutoencoderTrainConfig(Settings):
    """Settings of an autoencoder's training; the defaults give the weights in the package, for the drawn shapes."""

    data: str = "shapes:12000"
    """Images: "shapes" (drawn), a folder, or .tar shards."""
    out: str = "runs/autoencoder"
    """Folder to write; new or empty."""
    image_size: Count | tuple[Count, Count] | None = None
    """Pixels that every image is fitted to: a side, or [height, width]; "none" takes the commonest size of the data."""
    channels: Count = 16
    """Latent channels."""
    widths: tuple[Count, Count] = (64, 128)
    """Channels of the networks at 1/4 and at 1/8 of the image's sides."""
    depth: CountOrZero = 2
    """Residual blocks at each of the two sizes, on each side."""
    balance: Fraction = 0.5
    """How even the latent channels start: 0 keeps the variances of the principal components, 1 gives all the same."""
    latent_noise: NotNegative = 0.15
    """Largest standard deviation of the noise on the latents (which have unit variance)."""
    crop_size: Count = 128
    """Longer sides are cut to random windows of this many pixels while training; a multiple of 8."""
    held_out: BelowOne = 0.02
    """Fraction of the images kept for the PSNR, by a hash of their keys."""
    num_held_out: Count = 256
    """At most so many held-out images are scored."""
    num_steps: Count = 6000
    """Optimizer steps."""
    batch_size: Count = 16
    """Images a step."""
    lr: Positive = 1e-3
    """Peak learning rate of AdamW; warm-up, then cosine decay to zero."""
    warmup_steps: CountOrZero = 200
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    seed: CountOrZero = 0
    """Decides weights, order, crops and noise."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; "auto" takes CUDA if present. "mps" is the GPU of a Mac."""
    log_every: Count = 10
    """Steps from one line in metrics.jsonl to the next."""
    evaluate_every: Count = 1000
    """Steps between held-out scores; the weights are saved then too."""

    def check(self) -> None:
        if self.crop_size % PatchAutoencoder.factor:
            raise ValueError(f"crop_size is {self.crop_size}, expected a multiple of {PatchAutoencoder.factor}")
        PatchAutoencoderConfig(self.channels, self.widths, self.depth)


# --- measures ---------------------------------------------------------------------------------------------------------


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,), for images (B, 3, H, W) in [-1, 1], scaled to [0, 1]."""
    mse = ((images - others) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp_min(1e-10))


@torch.no_grad()
def held_out_psnr(autoencoder: Autoencoder, images: np.ndarray) -> float:
    """Mean over uint8 images (N, H, W, 3) of the PSNR of decode(encode(image))."""
    device = next(autoencoder.parameters()).device
    batches = (x.to(device) for x in _batches(images))
    return torch.cat([psnr(autoencoder.decode(autoencoder.encode(x)), x) for x in batches]).mean().item()


@torch.no_grad()
def channel_statistics(autoencoder: Autoencoder, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C,) float64, of each channel of the scaled latents of uint8 images (N, H, W, 3)."""
    device = next(autoencoder.parameters()).device
    latents = torch.cat([autoencoder.encode(x.to(device)).cpu().double() for x in _batches(images)])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)


def _batches(images: np.ndarray) -> Iterator[Tensor]:
    for first in range(0, len(images), 32):
        yield _to_float(images[first : first + 32])


def _to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


# --- data -------------------------------------------------------------------------------------------------------------


def read_images(config: AutoencoderTrainConfig, log: Callable[[str], None] = print) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out images, uint8 (N, H, W, 3), all of one size; unreadable ones are skipped, counted and
    named.

    Raises ValueError where nothing readable is left for one of the two.
    """
    source, train, held_out = _open(config, PatchAutoencoder.factor)
    height, width = source.image_size
    if config.image_size is None and height * width > LARGE:
        memory = (len(train) + len(held_out)) * height * width * 3 / 2**30
        log(
            f"warning: images keep their commonest size, {height} x {width}, {memory:.1f} GiB of memory: "
            "image_size=256 scales them down"
        )
    return _read(source, train, "training", config, log), _read(source, held_out, "held-out", config, log)


def read_held_out(config: AutoencoderTrainConfig, factor: int, log: Callable[[str], None] = print) -> np.ndarray:
    """The held-out images alone, as `read_images` gives them, with sides that are multiples of `factor`."""
    source, _, held_out = _open(config, factor)
    return _read(source, held_out, "held-out", config, log)


def _open(config: AutoencoderTrainConfig, factor: int) -> tuple[Source, np.ndarray, np.ndarray]:
    """(source, training indices, held-out indices)."""
    from training.data import open_source, split_by_key

    source = open_source(config.data, config.image_size, step=factor, seed=config.seed, need_captions=False)
    train, held_out = split_by_key(source, config.held_out)
    return source, train, held_out[: config.num_held_out]


def _read(
    source: Source, indices: np.ndarray, part: str, config: AutoencoderTrainConfig, log: Callable[[str], None]
) -> np.ndarray:
    from training.data import one_pass

    batches = list(one_pass(source, indices, 64))
    bad = [key for batch in batches for key, _ in batch.skipped]
    if bad:
        log(f"skipped {len(bad)} {part} images: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}")
    images = [batch.images for batch in batches if len(batch.images)]
    if not images:
        change = "lower" if part == "training" else "raise"
        raise ValueError(
            f"no {part} image in {config.data} (held_out = {config.held_out}): give more images, or {change} held_out"
        )
    return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()


def _draw(images: np.ndarray, config: AutoencoderTrainConfig, step: int) -> Tensor:
    """The step's batch, one random window of each of its images: a pure function of (seed, step)."""
    rng = np.random.default_rng([config.seed, step])
    height, width = (min(config.crop_size, side) for side in images.shape[1:3])
    chosen = images[rng.integers(len(images), size=config.batch_size)]
    top, left = rng.integers(images.shape[1] - height + 1), rng.integers(images.shape[2] - width + 1)
    return _to_float(chosen[:, top : top + height, left : left + width])


# --- training ---------------------------------------------------------------------------------------------------------


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def train_autoencoder(config: AutoencoderTrainConfig, log: Callable[[str], None] = print) -> Path:
    """Train on `config.data`; returns the folder, which `open_autoencoder` reads.

    Beside the weights it holds training.json (the config, the held-out PSNR in dB, the latents' statistics, the
    time), metrics.jsonl, tensorboard/ and reconstructions.png. Ctrl-C or SIGTERM saves what there is. Raises ValueError
    for a folder that is not empty, and where training diverges.
    """
    out, started = Path(config.out), time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another folder or remove it")
    if warning := warmup_warning(config.warmup_steps, config.num_steps):
        log(f"warning: {warning}")
    train, held_out = read_images(config, log)
    log(f"{len(train)} training and {len(held_out)} held-out images of {train.shape[1]} x {train.shape[2]}")
    device = pick_device(config.device)
    torch.default_generator.manual_seed(config.seed)
    model = PatchAutoencoder(PatchAutoencoderConfig(config.channels, config.widths, config.depth))
    model.start_from(_to_float(train[:PCA_IMAGES]), config.balance)
    log(f"principal components alone: held-out PSNR {held_out_psnr(model, held_out):.2f} dB")
    model.to(device)
    optimizer = _optimizer(model, config)
    out.mkdir(parents=True, exist_ok=True)
    losses: list[Tensor] = []  # (loss, PSNR) of each step since the last line of metrics
    shown = Progress("training", config.num_steps, images=config.batch_size, quiet=log is not print)
    with (
        Interrupts() as interrupts,
        interrupts.deferred(),
        keeping_memory(device),
        closing(RunFolder(out)) as run,
        shown as progress,
    ):
        for step in range(config.num_steps):
            lr = config.lr * _schedule(step, config)
            both, norm = _step(model, optimizer, _draw(train, config, step).to(device), config, step, lr)
            losses.append(both)
            done, stopped = step + 1, interrupts.caught
            last = stopped or done == config.num_steps
            if last or done % config.log_every == 0:
                _write_metrics(run, progress, done, losses, norm, lr)
            else:
                progress.show(done)
            if last or done % config.evaluate_every == 0:
                with progress.paused():
                    if stopped:
                        log(f"stopping after step {done}: saving, and comparing held-out images")
                    _report(model, train, held_out, config, done, run, started, log)
            if stopped:
                log(f"stopped at step {done}, all saved")
                break
    log(f"done. Originals above, decoded latents below: {out}/reconstructions.png")
    log(f"Try: mmdit train latent --data {shlex.quote(config.data)} autoencoder={shlex.quote(str(out))}")
    return out


def _optimizer(model: PatchAutoencoder, config: AutoencoderTrainConfig) -> torch.optim.AdamW:
    """AdamW; the linear layers, which start from principal components, have 1/30 of the rate and no weight decay."""
    linear = [*model.linear_in.parameters(), *model.linear_out.parameters()]
    rest = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": linear, "share": 1 / 30, "weight_decay": 0.0},
        {"params": rest, "share": 1.0, "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))


def _step(
    model: PatchAutoencoder,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    config: AutoencoderTrainConfig,
    step: int,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """Train on a batch; returns (loss, PSNR) (2,) and the norm of the gradients before they were clipped."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    loss, score = _loss(model, x, config, generator_for(config.seed, step))
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    return torch.stack([loss.detach(), score]), norm


def _loss(
    model: PatchAutoencoder, x: Tensor, config: AutoencoderTrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(the loss of a batch, the mean PSNR of its reconstruction from noisy latents)."""
    precision = pick_precision("auto", x.device)
    with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
        z = model.raw_latents(x).float()
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        noise *= config.latent_noise * torch.rand(len(z), 1, 1, 1, generator=generator).to(z.device)
        y = model.raw_images(z + noise).float()
    loss = (y - x).square().mean() + 1e-4 * (z.square().mean() - 1).square()
    return loss, psnr(y.detach(), x).mean()


def _schedule(step: int, config: AutoencoderTrainConfig) -> float:
    """Linear warm-up times cosine decay to zero, in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def _write_metrics(
    run: RunFolder, progress: Progress, step: int, losses: list[Tensor], norm: Tensor, lr: float
) -> None:
    """Write and show the means of (loss, PSNR) since the last time, which are forgotten, beside the latest norm and
    rate.
    """
    loss, score = torch.stack(losses).mean(0).tolist()
    losses.clear()
    values = {"loss": loss, "psnr_through_noise": score, "grad_norm": float(norm)}
    progress.show(step, **values)
    values["lr"] = lr
    if progress.rate:
        values["images_per_second"] = progress.images_per_second
    run.write_metrics(step, **{name: x for name, x in values.items() if math.isfinite(x)})


def _report(
    model: PatchAutoencoder,
    train: np.ndarray,
    held_out: np.ndarray,
    config: AutoencoderTrainConfig,
    step: int,
    run: RunFolder,
    started: float,
    log: Callable[[str], None],
) -> None:
    """Measure the latents' statistics, save the weights, and score the saved ones."""
    out, model = Path(config.out), copy.deepcopy(model)
    mean, std = channel_statistics(model, train[:STATISTICS_IMAGES])
    if not mean.isfinite().all():
        raise ValueError(
            f"training has diverged before step {step}: lower lr, which is {config.lr:g}; what {out} has is of before"
        )
    shift = mean.mean()
    scale = (std.square() + (mean - shift).square()).mean().sqrt().clamp(min=LEAST_SCALE)
    model.set_scale(1 / scale.item(), shift.item())
    model.fit_preview(_to_float(train[:PREVIEW_IMAGES]))
    model.save(out)
    stored = open_autoencoder(out)
    mean, std = channel_statistics(stored, held_out)
    score = held_out_psnr(stored, held_out)
    result = {
        "steps": step,
        "held_out_psnr": score,
        "held_out_images": len(held_out),
        "scaling_factor": stored.scaling_factor,
        "shift_factor": stored.shift_factor,
        "latent_mean": [round(x, 3) for x in mean.tolist()],
        "latent_std": [round(x, 3) for x in std.tolist()],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "training.json").write_text(json.dumps({"config": asdict(config), "result": result}, indent=1) + "\n")
    run.write_metrics(step, held_out_psnr=score)
    reconstruction_grid(stored, held_out[:8]).save(out / "reconstructions.png")
    log(f"step {step}/{config.num_steps}: held-out PSNR {score:.2f} dB, {result['seconds']:.0f} s")


@torch.no_grad()
def reconstruction_grid(autoencoder: Autoencoder, images: Sequence[np.ndarray] | np.ndarray) -> Image.Image:
    """A picture: uint8 images (N, H, W, 3) above, their reconstructions below, each with its PSNR."""
    x = _to_float(np.stack(list(images)))
    y = autoencoder.decode(autoencoder.encode(x))
    back = ((y + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    scores = [f"decoded: {score:.1f} dB" for score in psnr(y, x).tolist()]
    pictures = [Image.fromarray(picture) for picture in (*images, *back)]
    return caption_grid(pictures, ["original"] * len(images) + scores, columns=len(images))
