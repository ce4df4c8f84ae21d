"""The interface of autoencoders: images <-> scaled latents, whole or tile by tile, and a cheap preview of latents.

Raw latents are shifted and scaled to zero mean and unit variance by two measured numbers that are stored with the
weights, in the convention of diffusers (SD3: 1.5305 and 0.0609):

    z = (raw - shift_factor) * scaling_factor        raw = z / scaling_factor + shift_factor

Shape letters: B batch, H W image sides, C latent channels, h w latent sides (h = H / factor), images float in [-1, 1].
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.tiles import in_tiles
from mmdit.weights_io import json_writer, read_json

PREVIEW = "preview.json"
Generators = torch.Generator | Sequence[torch.Generator]


class Autoencoder(nn.Module, ABC):
    """The interface of autoencoders; a subclass defines `channels`, `factor` and the abstract methods."""

    channels: int
    """Latent channels C."""
    factor: int
    """Image pixels per latent pixel, along each side."""
    has_posterior = False
    """Whether latents are a distribution, which `draw` can sample from."""
    preview_map: Tensor | None
    """(C + 1, 3): the linear map from latent channels to colours, its bias last; None until it is fitted or read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("preview_map", None, persistent=False)

    @property
    @abstractmethod
    def scaling_factor(self) -> float:
        """1 / the measured standard deviation of raw latents."""

    @property
    @abstractmethod
    def shift_factor(self) -> float:
        """The measured mean of raw latents."""

    @abstractmethod
    def statistics(self, images: Tensor) -> Tensor:
        """The encoder's output (B, S, h, w): raw latents, or the parameters of their distribution."""

    def draw(self, statistics: Tensor, generator: Generators | None) -> Tensor:
        """Raw latents from `statistics`: a sample if a generator (or a list, one per image) is given, else the mode."""
        return statistics

    def raw_latents(self, images: Tensor) -> Tensor:
        """The encoder's latents (their mode), neither shifted nor scaled."""
        return self.draw(self.statistics(images), None)

    @abstractmethod
    def raw_images(self, raw: Tensor) -> Tensor:
        """Images of raw latents, not clamped."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a folder that `open_autoencoder` reads."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None, tile: int | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        An autoencoder with a posterior gives its mode, or a sample if a generator is given. tile: side in pixels of the
        tiles in which each layer is computed, which bounds the device's memory and does not change the result (None:
        no tiles; see `mmdit.tiles`). Raises ValueError for sides that are not multiples of `factor`.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor or not height or not width:
            raise ValueError(
                f"image sides must be multiples of {self.factor}, got {height} x {width}: crop or resize first"
            )
        return self.latents_of(self._tiled(self.statistics, images, tile), generator)

    def latents_of(self, statistics: Tensor, generator: Generators | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) from `statistics`; `generator` as in `draw`."""
        return (self.draw(statistics, generator) - self.shift_factor) * self.scaling_factor

    def settings(self) -> dict[str, Any]:
        """Everything beside the weights that the latents depend on, for `fingerprint`."""
        return {}

    def fingerprint(self) -> str:
        """SHA-256 of class, settings and float32 weights: the same for every copy, wherever it is stored."""
        about = [type(self).__name__, self.channels, self.factor, self.scaling_factor, self.shift_factor]
        digest = hashlib.sha256(json.dumps([*about, self.settings()], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1], of scaled latents (B, C, h, w); `tile` as in `encode`."""
        self._check(latents)
        raw = latents / self.scaling_factor + self.shift_factor
        return self._tiled(self.raw_images, raw, tile).clamp(-1, 1)

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"expected latents of shape (B, {self.channels}, h, w), got {tuple(latents.shape)}")

    def _tiled(self, work: Callable[[Tensor], Tensor], x: Tensor, tile: int | None) -> Tensor:
        if tile is None:
            return work(x)
        if tile < 16:
            raise ValueError(f"tile is {tile}, expected a side of at least 16 pixels")
        with in_tiles(self, tile):
            return work(x.cpu()).to(x.device)

    # --- preview ---

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        """A rough preview of scaled latents (B, C, h, w) without decoding: images (B, 3, h, w) in [-1, 1].

        A linear map of the channels; if none has been fitted or read, it is fitted to synthetic patches of colour.
        """
        self._check(latents)
        if self.preview_map is None:
            self.fit_preview(_colours(self.factor))
        assert self.preview_map is not None
        table = self.preview_map.to(latents)
        return (torch.einsum("bchw,cr->brhw", latents, table[:-1]) + table[-1, :, None, None]).clamp(-1, 1)

    @torch.no_grad()
    def fit_preview(self, images: Tensor) -> None:
        """Fit the map of `preview` by least squares: from each latent pixel of images (B, 3, H, W) to the mean colour
        of its `factor` x `factor` image pixels.
        """
        own = next(self.parameters(), images)
        z = self.encode(images.to(own)).float().cpu().permute(0, 2, 3, 1).reshape(-1, self.channels)
        rows = F.pad(z, (0, 1), value=1.0).double()
        colours = F.avg_pool2d(images.float().cpu(), self.factor).permute(0, 2, 3, 1).reshape(-1, 3).double()
        self.preview_map = torch.linalg.lstsq(rows, colours, driver="gelsd").solution.float().to(own.device)

    def preview_file(self) -> dict[str, Callable[[Path], object]]:
        """The preview map's file, for `write_all_aside`; null without a map, so that an older file is overwritten."""
        table = self.preview_map
        return {PREVIEW: json_writer(None if table is None else [[round(x, 5) for x in row] for row in table.tolist()])}

    def read_preview(self, folder: Path) -> None:
        """Read the preview map in a folder, if there is one. Raises ValueError if it does not have C + 1 rows."""
        path = folder / PREVIEW
        if not path.is_file() or (rows := read_json(path)) is None:
            return
        try:
            table = torch.tensor(rows, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no table of numbers: {error}") from error
        if table.shape != (self.channels + 1, 3):
            raise ValueError(f"{path} is a table {tuple(table.shape)}, expected ({self.channels + 1}, 3)")
        self.preview_map = table


def _colours(factor: int) -> Tensor:
    """Images of smooth patches of random colour, the same each time: (16, 3, 16 factor, 16 factor)."""
    patches = torch.rand(16, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(patches, size=(16 * factor, 16 * factor), mode="bilinear")


class PixelSpace(Autoencoder):
    """The identity in place of an autoencoder: latents are pixels, (B, 3, H, W) in [-1, 1]."""

    channels = 3
    factor = 1
    scaling_factor = 1.0
    shift_factor = 0.0

    def statistics(self, images: Tensor) -> Tensor:
        return images

    def raw_images(self, raw: Tensor) -> Tensor:
        return raw

    def preview(self, latents: Tensor) -> Tensor:
        """The pixels themselves."""
        return self.decode(latents)

    def save(self, folder: str | Path) -> None:
        """Nothing: `open_autoencoder("none")` needs no files."""
