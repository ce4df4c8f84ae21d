"""Autoencoders: images <-> scaled latents, the space in which the models work.

`Autoencoder` wraps the AutoencoderKL of diffusers (Rombach et al. 2022, section 3.1; with 16 channels and no quant convolutions
as in SD3, Esser et al. 2024, section 5.2.1). Its raw latents are shifted and scaled to zero mean and unit variance by two measured
numbers that are stored with the weights, in the convention of diffusers:

    z = (raw - shift_factor) * scaling_factor        raw = z / scaling_factor + shift_factor

`PixelSpace` is the identity, for models that work on patches of pixels. diffusers is imported when an `Autoencoder` is made.

Shapes: B batch, H W image sides, C latent channels, h w latent sides (h = H / factor), images float in [-1, 1].
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model"
SHIPPED = Path(__file__).parent / "weights" / "shapes-autoencoder"


@dataclass(frozen=True)
class AutoencoderConfig:
    """The size of an `Autoencoder`; the defaults are a small f8 network for two CPU cores."""

    channels: int = 16  # latent channels C
    widths: tuple[int, ...] = (16, 32, 64, 96)  # channels of each level, finest first; factor = 2 ** (levels - 1)
    layers_per_block: int = 1  # residual blocks of an encoder level; a decoder level has one more
    norm_groups: int = 8  # groups of each GroupNorm; divides every width
    attention: bool = False  # one self-attention at the coarsest level

    def __post_init__(self) -> None:
        if self.channels < 1 or self.layers_per_block < 1 or not self.widths:
            raise ValueError(f"channels, layers_per_block and the number of widths must be at least 1, got {self}")
        odd = [width for width in self.widths if width < 1 or width % self.norm_groups]
        if odd:
            raise ValueError(f"every width must be a multiple of norm_groups={self.norm_groups}, got {odd}")

    def build(self) -> AutoencoderKL:
        """A freshly initialised AutoencoderKL (from the global torch seed), unscaled."""
        from diffusers import AutoencoderKL

        levels = len(self.widths)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(self.widths),
            layers_per_block=self.layers_per_block,
            latent_channels=self.channels,
            norm_num_groups=self.norm_groups,
            scaling_factor=1.0,
            shift_factor=0.0,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=self.attention,
        )


class Autoencoder(nn.Module):
    """Images in [-1, 1] <-> scaled latents, by an AutoencoderKL of diffusers.

    `vae` is that network; `Autoencoder(AutoencoderConfig(...))` makes a fresh one, `Autoencoder.load(folder)` a stored one.
    """

    def __init__(self, config: AutoencoderConfig | AutoencoderKL | None = None) -> None:
        super().__init__()
        vae = config if isinstance(config, nn.Module) else (config or AutoencoderConfig()).build()
        self.vae: AutoencoderKL = vae

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """1 / the standard deviation of the raw latents, as measured."""
        return float(self.vae.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        """The mean of the raw latents, as measured (0 where the file has none)."""
        return float(self.vae.config.shift_factor or 0.0)

    def set_scale(self, scaling_factor: float, shift_factor: float) -> None:
        """Stores the measured scalars, z = (raw - shift_factor) * scaling_factor, in the configuration."""
        self.vae.register_to_config(scaling_factor=float(scaling_factor), shift_factor=float(shift_factor))

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: z = (raw - shift) * scale.

        raw is the posterior's mode, or a sample of the posterior where a generator is given. ValueError if a side is not a
        multiple of `factor`.
        """
        _check_images(images, self.factor)
        posterior = self.vae.encode(images).latent_dist
        raw = posterior.mode() if generator is None else posterior.sample(generator)
        return (raw - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1], of scaled latents (B, C, h, w)."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"expected latents of shape (B, {self.channels}, h, w), got {tuple(latents.shape)}")
        return self.vae.decode(latents / self.scaling_factor + self.shift_factor).sample.clamp(-1, 1)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes config.json and the safetensors weights as diffusers reads them; `dtype` is that of the file (None: as is)."""
        vae = self.vae if dtype is None else copy.deepcopy(self.vae).to(dtype)
        vae.save_pretrained(Path(folder), safe_serialization=True)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Autoencoder:
        """A stored AutoencoderKL (or the `vae` of a stored diffusers pipeline) in float32, frozen, in eval mode.

        ValueError if the folder is missing, holds another kind of model, or has no (readable) safetensors weights.
        """
        folder = _vae_folder(Path(folder))
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except Exception as error:  # diffusers and safetensors raise many kinds; a person needs the one line
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"cannot read the autoencoder in {folder}: {reason}") from error
        return cls(vae).requires_grad_(False).eval()


class PixelSpace(nn.Module):
    """The identity in the autoencoder's place: the latents are the pixels, (B, 3, H, W) in [-1, 1]."""

    channels = 3
    factor = 1
    scaling_factor = 1.0
    shift_factor = 0.0

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images themselves."""
        _check_images(images, self.factor)
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves, clamped to [-1, 1]."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"expected latents of shape (B, {self.channels}, h, w), got {tuple(latents.shape)}")
        return latents.clamp(-1, 1)


def open_autoencoder(spec: str | Path) -> Autoencoder | PixelSpace:
    """The autoencoder that `spec` names: "none" (pixels), "shapes" (the shipped weights) or a folder written by `save`."""
    if str(spec) == "none":
        return PixelSpace()
    if str(spec) == "shapes":
        return Autoencoder.load(SHIPPED)
    return Autoencoder.load(spec)


def _check_images(images: Tensor, factor: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % factor or width % factor or not height or not width:
        raise ValueError(f"image sides must be multiples of {factor}, got {height}x{width}; crop or resize the images first")


def _vae_folder(folder: Path) -> Path:
    """The folder that holds the AutoencoderKL's own config.json, or a ValueError that says what is there instead."""
    if not folder.is_dir():
        raise ValueError(f'autoencoder folder not found: {folder} (give "none", "shapes" or a folder with config.json)')
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no config.json in {folder}: not an autoencoder folder as `mmdit autoencoder train` writes it")
    try:
        name = json.loads(path.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if name != "AutoencoderKL":
        raise ValueError(f"{path} describes {name or 'no known model'}, expected AutoencoderKL")
    if not any(folder.glob(f"{WEIGHTS}*.safetensors*")):
        raise ValueError(f"no {WEIGHTS}.safetensors in {folder}; only safetensors weights are read")
    return folder
