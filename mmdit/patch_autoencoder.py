"""Our own autoencoder: PCA of 8x8 patches, and small convolutional networks that learn the residual.

Shape letters: B batch, H W image sides, C latent channels, h w latent sides (h = H / 8), images float in [-1, 1].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.latents import Autoencoder
from mmdit.sampling import is_number
from mmdit.weights_io import json_writer, load_built, read_json, weights_writer, write_all_aside

SHIPPED = Path(__file__).parent / "weights" / "shapes-autoencoder"


@dataclass(frozen=True)
class PatchAutoencoderConfig:
    """Size of a `PatchAutoencoder`, and the two numbers that scale its latents."""

    channels: int = 16
    """Latent channels C."""
    widths: tuple[int, int] = (64, 128)
    """Channels of the residual blocks at 1/4 and at 1/8 of the image's sides; multiples of 8."""
    depth: int = 2
    """Residual blocks at each of the two sizes, in the encoder and in the decoder."""
    scaling_factor: float = 1.0
    """1 / standard deviation of the raw latents."""
    shift_factor: float = 0.0
    """Mean of the raw latents."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if not 1 <= self.channels <= 192 or self.depth < 0:
            raise ValueError(
                f"expected 1 to 192 channels and a depth of 0 or more, got {self.channels} and {self.depth}"
            )
        if len(self.widths) != 2 or any(width < 8 or width % 8 for width in self.widths):
            raise ValueError(f"widths must be two multiples of 8, got {self.widths}")
        if not is_number(self.scaling_factor) or self.scaling_factor <= 0 or not is_number(self.shift_factor):
            raise ValueError(
                f"scaling_factor is {self.scaling_factor!r} and shift_factor {self.shift_factor!r}, expected a number "
                "above 0 and a number"
            )


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))); the last convolution starts at zero, so a new block is the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class PatchAutoencoder(Autoencoder):
    """PCA of 8x8 patches, and a small convolutional network in encoder and decoder that learns the residual.

        z = A (p - mean) + f(x)          x = unpatchify(mean + B z) + g(z)

    with p the patches of x, A and B set by `start_from` and f, g starting at zero: training starts at PCA's quality.
    All layers work at 1/4 and 1/8 of the image's sides, where a CPU is quick (pixel unshuffling: Shi et al. 2016).
    """

    factor = 8

    def __init__(self, config: PatchAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c, (w4, w8), blocks = config.channels, config.widths, range(config.depth)
        self.linear_in = nn.Conv2d(3, c, 8, stride=8)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, w4, 3, padding=1),
            *(ResidualBlock(w4) for _ in blocks),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * w4, w8, 1),
            *(ResidualBlock(w8) for _ in blocks),
            nn.Conv2d(w8, c, 3, padding=1),
        )
        self.linear_out = nn.Conv2d(c, 3 * 64, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, w8, 3, padding=1),
            *(ResidualBlock(w8) for _ in blocks),
            nn.Conv2d(w8, 4 * w4, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(w4) for _ in blocks),
            nn.GroupNorm(8, w4),
            nn.SiLU(),
            nn.Conv2d(w4, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )
        for last in (self.encoder[-1], self.decoder[-2]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.config.channels

    @property
    def scaling_factor(self) -> float:
        return self.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        return self.config.shift_factor

    def set_scale(self, scaling_factor: float, shift_factor: float) -> None:
        """Store the measured scaling and shift factors."""
        self.config = replace(self.config, scaling_factor=scaling_factor, shift_factor=shift_factor)

    @torch.no_grad()
    def start_from(self, images: Tensor, balance: float) -> None:
        """Set A, B and mean to the first C principal components of the 8x8 patches of images (B, 3, H, W) in [-1, 1].

        balance: 0 keeps the components' variances, 1 whitens them; the mean square of the latents is 1 either way.
        """
        patches = F.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, 192)
        mean = patches.mean(0)
        std, axes = _principal(patches - mean, self.channels)
        wanted = std ** (1 - balance)
        unit = std / (wanted / wanted.square().mean().sqrt())  # the component's change for a change of 1 in the latent
        self.linear_in.weight.copy_((axes / unit[:, None]).view_as(self.linear_in.weight))
        self.linear_in.bias.copy_(-(axes @ mean) / unit)  # type: ignore[union-attr]
        self.linear_out.weight.copy_((axes.T * unit)[:, :, None, None])
        self.linear_out.bias.copy_(mean)  # type: ignore[union-attr]

    def statistics(self, images: Tensor) -> Tensor:
        return self.linear_in(images) + self.encoder(images)

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def raw_images(self, raw: Tensor) -> Tensor:
        return F.pixel_shuffle(self.linear_out(raw), 8) + self.decoder(raw)

    def save(self, folder: str | Path) -> None:
        """Write config.json, the preview map, and model.safetensors, in half precision: the rounding is far below the
        reconstruction error.
        """
        state = {name: tensor.half() for name, tensor in self.state_dict().items()}
        config = {"_class_name": "PatchAutoencoder", **asdict(self.config)}
        files = {"model.safetensors": weights_writer(state), **self.preview_file(), "config.json": json_writer(config)}
        write_all_aside({Path(folder) / name: write for name, write in files.items()})

    @classmethod
    def load(cls, folder: str | Path) -> PatchAutoencoder:
        """A stored autoencoder in float32, frozen, in eval mode. Raises ValueError if the files do not fit together."""
        config = {
            name: value for name, value in read_json(Path(folder) / "config.json").items() if name != "_class_name"
        }
        try:
            shape = PatchAutoencoderConfig(**config)
        except TypeError as error:
            raise ValueError(
                f"{Path(folder) / 'config.json'} is not the config of a PatchAutoencoder: {error}"
            ) from error
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise ValueError(
                f"no model.safetensors in {folder}: copy the whole folder that `mmdit autoencoder train` wrote"
            )
        model = load_built(partial(cls, shape), shape.depth, path)
        model.read_preview(Path(folder))
        return model.float().requires_grad_(False).eval()


def _principal(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """PCA of centred rows x (N, D): the n largest standard deviations, at least 1e-3, and their axes (n, D)."""
    variances, axes = torch.linalg.eigh(x.T.double() @ x.double() / len(x))
    axes = axes.flip(1)[:, :n].T
    axes = axes * torch.sign(axes.sum(1, keepdim=True) + 1e-12)  # the sign of an eigenvector is arbitrary: fix it
    return variances.flip(0)[:n].clamp(min=1e-6).sqrt().to(x.dtype), axes.to(x.dtype)
