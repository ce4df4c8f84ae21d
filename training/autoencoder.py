"""Trains an `mmdit.autoencoder.Autoencoder` on a person's own images, without a perceptual network or a discriminator.

One step, for images x and the encoder's mean m (Kingma & Welling 2014, with the posterior's width fixed instead of learned):

    z = (m - mean) / std                     per channel over the batch: every channel has zero mean and unit variance
    loss = charb(D(z + n) - x) + gradient_weight * charb(grad D(z + n) - grad x),     n ~ N(0, (u * latent_noise)^2), u ~ U(0, 1)

Unit variance and the noise together fix how many bits a latent can carry, which is the part that the KL term has in a VAE: the
decoder learns to bear the small errors of a generative model, and the latents stay smooth. On a share `equivariance` of the steps z
and x are both halved in size before decoding, so that a shrunk latent is the latent of a shrunk picture (EQ-VAE, Kouzelis et al.
2025). At the end the channels' statistics over the training images are folded into the encoder's last convolution, exactly, and the
two scalars of diffusers are measured on the result.

Shapes: B batch, H W image sides, C latent channels, h w latent sides.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmdit.autoencoder import Autoencoder, AutoencoderConfig


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """All that decides an autoencoder's training; the defaults make the weights shipped for the captioned shapes."""

    data: str = "shapes:12000"  # "shapes", a folder of images, .tar shards: as `training.data.open_source` reads it
    out: str = "runs/autoencoder"  # folder to write; must be new or empty
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)  # size of the network
    image_size: int | tuple[int, int] | None = None  # side or (height, width) images are fitted to; None: the source's own choice
    crop_size: int = 128  # longer sides are cut to random windows of this many pixels while training
    num_images: int = 12000  # at most so many training images are read, kept in memory as bytes
    held_out: float = 0.02  # share of the images kept for the PSNR
    num_held_out: int = 256  # at most so many held-out images are scored
    num_steps: int = 6000  # optimizer steps
    batch_size: int = 16  # images a step
    lr: float = 2e-3  # peak learning rate of AdamW, after warm-up; cosine decay to zero follows
    warmup_steps: int = 100  # steps of linear warm-up
    weight_decay: float = 1e-4  # decoupled weight decay
    grad_clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.999  # decay of the weights' average that is scored and saved
    latent_noise: float = 0.2  # largest standard deviation of the noise on unit-variance latents
    equivariance: float = 0.25  # share of the steps that decode half-size latents to half-size images
    gradient_weight: float = 0.5  # weight of the loss on finite differences, which keeps outlines crisp
    precision: str = "auto"  # "fp32" | "bf16" | "auto": bf16 where the machine multiplies it natively
    storage: str = "fp16"  # "fp32" | "fp16": type of the stored weights
    device: str = "auto"  # "cpu" | "cuda" | "auto"
    seed: int = 0  # decides weights, order, crops and noise
    log_every: int = 50  # steps between lines of metrics.jsonl
    evaluate_every: int = 1000  # steps between held-out scores, and weights saved

    def __post_init__(self) -> None:
        for name in ("crop_size", "num_images", "num_held_out", "num_steps", "batch_size", "log_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "latent_noise", "gradient_weight", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")
        if not (0 <= self.ema_decay < 1 and 0 <= self.equivariance <= 1):
            raise ValueError(f"ema_decay must lie in [0, 1) and equivariance in [0, 1], got {self.ema_decay}, {self.equivariance}")
        choices = {"precision": ("auto", "fp32", "bf16"), "storage": ("fp32", "fp16"), "device": ("auto", "cpu", "cuda")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        factor = 2 ** (len(self.model.widths) - 1)
        if self.crop_size % factor:
            raise ValueError(f"crop_size must be a multiple of the autoencoder's factor {factor}, got {self.crop_size}")


# ---- measures ----------------------------------------------------------------------------------------------------------


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,), for images (B, 3, H, W) in [-1, 1] seen with data range 1."""
    mse = ((images - others) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp_min(1e-10))


@torch.no_grad()
def held_out_psnr(autoencoder: Autoencoder, images: Sequence[np.ndarray], batch_size: int = 32) -> float:
    """Mean over the images, uint8 (H, W, 3), of the PSNR of decode(encode(image)), posterior mode."""
    scores = [psnr(autoencoder.decode(autoencoder.encode(x)), x) for x in _batches(autoencoder, images, batch_size)]
    return torch.cat(scores).mean().item()


@torch.no_grad()
def channel_statistics(
    autoencoder: Autoencoder, images: Sequence[np.ndarray], batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C,) and (C,) float64, of the scaled latents of uint8 images (H, W, 3)."""
    count, total, squares = 0, 0.0, 0.0
    for x in _batches(autoencoder, images, batch_size):
        z = autoencoder.encode(x).double()
        count += z[:, 0].numel()
        total = total + z.sum((0, 2, 3))
        squares = squares + z.square().sum((0, 2, 3))
    mean = torch.as_tensor(total) / count
    return mean, (torch.as_tensor(squares) / count - mean.square()).clamp_min(1e-12).sqrt()


def _batches(autoencoder: Autoencoder, images: Sequence[np.ndarray], batch_size: int):
    """The images as float tensors on the model's device, neighbours of one size together."""
    device, factor, group = next(autoencoder.parameters()).device, autoencoder.factor, []
    for image in images:
        height, width = (side // factor * factor for side in image.shape[:2])
        image = image[:height, :width]
        if group and (len(group) == batch_size or group[0].shape != image.shape):
            yield _to_float(np.stack(group)).to(device)
            group = []
        group.append(image)
    yield _to_float(np.stack(group)).to(device)


def _to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)


# ---- the objective -----------------------------------------------------------------------------------------------------


class LatentNorm(nn.BatchNorm2d):
    """Zero mean and unit variance per latent channel, without learned scales (batch normalisation, Ioffe & Szegedy 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False, momentum=0.05)


def charbonnier(error: Tensor, width: float = 0.02) -> Tensor:
    """Mean of sqrt(error^2 + width^2) - width: squares small errors, takes the size of large ones (Charbonnier et al. 1994)."""
    return (error.square() + width**2).sqrt().mean() - width


def reconstruction_loss(output: Tensor, target: Tensor, gradient_weight: float) -> Tensor:
    """charb(output - target) + gradient_weight * charb of its finite differences, for images (B, 3, H, W)."""
    error = output - target
    loss = charbonnier(error)
    if gradient_weight:
        loss = loss + gradient_weight * (charbonnier(error.diff(dim=-1)) + charbonnier(error.diff(dim=-2))) / 2
    return loss


def autoencoder_loss(
    autoencoder: Autoencoder, norm: LatentNorm, images: Tensor, config: AutoencoderTrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The loss of one batch of images in [-1, 1], and the PSNR (dB) of the noisy reconstruction; see the file's head."""
    vae, device = autoencoder.vae, images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=_bf16(config, device)):
        z = norm(vae.encoder(images)[:, : autoencoder.channels].float())
        if torch.rand((), generator=generator) < config.equivariance:
            h, w = (max(1, side // 2) for side in z.shape[-2:])
            z = F.interpolate(z, size=(h, w), mode="area")
            images = F.interpolate(images, size=(h * autoencoder.factor, w * autoencoder.factor), mode="area")
        width = torch.rand(len(z), 1, 1, 1, generator=generator) * config.latent_noise
        z = z + (width * torch.randn(z.shape, generator=generator)).to(device)
        output = vae.decoder(z).float()
    return reconstruction_loss(output, images, config.gradient_weight), psnr(output.detach(), images).mean()


def _bf16(config: AutoencoderTrainConfig, device: torch.device) -> bool:
    if config.precision == "auto":
        return device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return config.precision == "bf16"


# ---- the data ----------------------------------------------------------------------------------------------------------


def read_images(
    config: AutoencoderTrainConfig, progress: Callable[[str], None] = print
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training and held-out images, uint8 (H, W, 3), read once; unreadable ones are skipped and counted.

    ValueError where nothing readable is left for one of the two, or where an image is smaller than the factor.
    """
    from training.data import open_source, split_by_key

    source = open_source(config.data, image_size=config.image_size)
    train, held_out = split_by_key(source, config.held_out)
    rng = np.random.default_rng([config.seed, 0])
    parts = []
    for name, indices, limit in (("train", train, config.num_images), ("held-out", held_out, config.num_held_out)):
        chosen = sorted(int(i) for i in rng.permutation(np.asarray(indices, dtype=np.int64))[:limit])
        samples = [source[i] for i in chosen]
        images = [np.asarray(sample.image) for sample in samples if sample.error is None]
        if len(images) < len(samples):
            bad = [sample.key for sample in samples if sample.error is not None]
            progress(f"skipped {len(bad)} unreadable {name} images: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
        if not images:
            raise ValueError(f"no readable {name} images in {config.data!r} (held_out={config.held_out}); give more images")
        parts.append(images)
    factor = 2 ** (len(config.model.widths) - 1)
    smallest = min(min(image.shape[:2]) for part in parts for image in part)
    if smallest < factor:
        raise ValueError(f"an image of {smallest} pixels is smaller than the autoencoder's factor {factor}; set image_size")
    return parts[0], parts[1]


def _draw(images: Sequence[np.ndarray], config: AutoencoderTrainConfig, factor: int, step: int) -> Tensor:
    """The step's batch, random windows of random images: a pure function of (seed, step)."""
    rng = np.random.default_rng([config.seed, 1, step])
    chosen = [images[i] for i in rng.integers(len(images), size=config.batch_size)]
    height, width = (min(config.crop_size, min(x.shape[k] for x in chosen) // factor * factor) for k in (0, 1))
    crops = []
    for image in chosen:
        top, left = (int(rng.integers(image.shape[k] - side + 1)) for k, side in ((0, height), (1, width)))
        crops.append(image[top : top + height, left : left + width])
    return _to_float(np.stack(crops))


# ---- the training ------------------------------------------------------------------------------------------------------


def train_autoencoder(config: AutoencoderTrainConfig, progress: Callable[[str], None] = print) -> Path:
    """Trains on `config.data` and returns the folder, which `Autoencoder.load` and diffusers read.

    Beside the weights it holds training.json (the configuration, the held-out PSNR in dB, the latents' statistics, the time),
    metrics.jsonl and reconstructions.png. Ctrl-C saves what there is. ValueError if the folder is not empty.
    """
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it")
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    train, held_out = read_images(config, progress)
    progress(f"{len(train)} training and {len(held_out)} held-out images in {time.perf_counter() - started:.0f} s")
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    autoencoder = Autoencoder(config.model).to(device).train()
    norm = LatentNorm(config.model.channels).to(device)
    ema = copy.deepcopy(autoencoder).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    generator, clock, done = torch.Generator(), _Clock(), 0
    result = {}
    try:
        with (out / "metrics.jsonl").open("w") as metrics:
            for step in range(config.num_steps):
                optimizer.param_groups[0]["lr"] = config.lr * _schedule(step, config)
                generator.manual_seed(config.seed * 1_000_003 + step)
                images = _draw(train, config, autoencoder.factor, step).to(device)
                loss, score = autoencoder_loss(autoencoder, norm, images, config, generator)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(autoencoder.parameters(), config.grad_clip)
                optimizer.step()
                decay = min(config.ema_decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(autoencoder.parameters()), 1 - decay)
                done = step + 1
                record = {}
                if done % config.log_every == 0 or done == config.num_steps:
                    record = {"step": done, "loss": loss.item(), "psnr": score.item(), **clock.at(done, config)}
                if done % config.evaluate_every == 0 and done < config.num_steps:
                    result = _finish(ema, train, held_out, config, out, done, time.perf_counter() - started)
                    record |= {"step": done, "held_out_psnr": result["held_out_psnr"]}
                if record:
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    progress("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
    except KeyboardInterrupt:
        progress(f"stopped at step {done}; saving")
    result = _finish(ema, train, held_out, config, out, done, time.perf_counter() - started)
    progress(f"{out}: held-out PSNR {result['held_out_psnr']:.2f} dB after {done} steps, {result['seconds']:.0f} s")
    return out


def _schedule(step: int, config: AutoencoderTrainConfig) -> float:
    """Linear warm-up, then cosine decay to zero, in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


class _Clock:
    """Images per second since the last asking, and the seconds left."""

    def __init__(self) -> None:
        self.time, self.step = time.perf_counter(), 0

    def at(self, step: int, config: AutoencoderTrainConfig) -> dict[str, float]:
        now = time.perf_counter()
        rate = (step - self.step) / (now - self.time)
        self.time, self.step = now, step
        return {"images_per_second": rate * config.batch_size, "seconds_left": (config.num_steps - step) / rate}


# ---- what comes out ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_statistics(autoencoder: Autoencoder, mean: Tensor, std: Tensor, posterior_std: float) -> None:
    """Makes the encoder give (m - mean) / std per channel, and a posterior of constant width `posterior_std`, exactly.

    Only the encoder's last convolution changes; mean and std are (C,). The decoder must have been trained on such latents.
    """
    conv, channels = autoencoder.vae.encoder.conv_out, autoencoder.channels
    mean, std = mean.to(conv.weight), std.to(conv.weight)
    conv.weight[:channels] /= std[:, None, None, None]
    conv.bias[:channels] = (conv.bias[:channels] - mean) / std
    conv.weight[channels:] = 0
    conv.bias[channels:] = 2 * math.log(max(posterior_std, 1e-6))


def _finish(
    ema: Autoencoder,
    train: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    config: AutoencoderTrainConfig,
    out: Path,
    step: int,
    seconds: float,
) -> dict:
    """Folds and measures the statistics, scores, and writes the folder; returns what training.json says of the result."""
    final = copy.deepcopy(ema)
    rng = np.random.default_rng([config.seed, 2])
    some = [train[i] for i in sorted(rng.permutation(len(train))[:2048])]
    width = config.latent_noise / math.sqrt(3)  # root mean square of u * latent_noise, u ~ U(0, 1)
    fold_statistics(final, *channel_statistics(final, some), posterior_std=width)
    mean, std = channel_statistics(final, some)
    shift = mean.mean()
    final.set_scale(1 / (std.square() + (mean - shift).square()).mean().sqrt().item(), shift.item())
    final.save(out, torch.float16 if config.storage == "fp16" else None)
    final = Autoencoder.load(out).to(next(ema.parameters()).device)  # what is scored is what was stored
    mean, std = channel_statistics(final, held_out)
    result = {
        "steps": step,
        "held_out_psnr": held_out_psnr(final, held_out),
        "held_out_images": len(held_out),
        "scaling_factor": final.scaling_factor,
        "shift_factor": final.shift_factor,
        "latent_mean": [round(x, 4) for x in mean.tolist()],
        "latent_std": [round(x, 4) for x in std.tolist()],
        "posterior_std": width,
        "parameters": sum(p.numel() for p in final.parameters()),
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps({"config": asdict(config), "result": result}, indent=1) + "\n")
    reconstruction_grid(final, held_out[:8]).save(out / "reconstructions.png")
    return result


@torch.no_grad()
def reconstruction_grid(autoencoder: Autoencoder, images: Sequence[np.ndarray]) -> Image.Image:
    """A picture: the uint8 images (H, W, 3) above, their reconstructions below."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    grid = np.full((2 * height, width * len(images), 3), 255, dtype=np.uint8)
    for k, x in enumerate(_batches(autoencoder, images, batch_size=1)):
        y = autoencoder.decode(autoencoder.encode(x))
        for row, picture in enumerate((x, y)):
            array = picture[0].add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            grid[row * height : row * height + array.shape[0], k * width : k * width + array.shape[1]] = array
    return Image.fromarray(grid)
