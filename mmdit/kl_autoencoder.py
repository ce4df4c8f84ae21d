"""AutoencoderKL of diffusers (Rombach et al. 2022, section 3.1), from its folder or from a single file.

A single file has no config: the architecture follows from the tensors' shapes, and how latents are scaled from the
model that it belongs to. Its names may be diffusers' or those of the original code (latent diffusion's, which SD, SDXL,
SD3 and Flux kept), alone or under "first_stage_model." beside a trunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdit.files import DIFFUSERS_WEIGHTS, read_folder
from mmdit.latents import Autoencoder, Generators
from mmdit.mapped import read_weights
from mmdit.sampling import is_number
from mmdit.text_encoders import first_line
from mmdit.weights_io import check_fit, json_writer, read_json, weights_writer, write_all_aside

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SCALES: dict[str, tuple[int, float, float | None]] = {
    "sd3": (16, 1.5305, 0.0609),
    "flux": (16, 0.3611, 0.1159),
    "sd": (4, 0.18215, None),
    "sdxl": (4, 0.13025, None),
}
"""Latent channels, scaling factor and shift factor of published autoencoders."""

_KIND_OF = {  # by the names of tensors stored beside the autoencoder
    "joint_blocks.": "sd3",
    "double_blocks.": "flux",
    "conditioner.embedders.1.": "sdxl",
    "cond_stage_model.": "sd",
}
_PREFIXES = ("first_stage_model.", "vae.")
_RENAMES = (  # the original code's names to diffusers', then diffusers' old names to its new ones
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.0\.)(q|k|v)\.", r"\1to_\2."),
    (r"(\.attentions\.0\.)(q|k|v)(?:uery|ey|alue)\.", r"\1to_\2."),
    (r"(\.attentions\.0\.)(?:proj_out|proj_attn)\.", r"\1to_out.0."),
)


class KLAutoencoder(Autoencoder):
    """An AutoencoderKL of diffusers, `vae`, with our interface."""

    has_posterior = True

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae: Any = vae

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:  # type: ignore[override]
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)  # SD's has none

    def statistics(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent_dist.parameters

    def draw(self, statistics: Tensor, generator: Generators | None) -> Tensor:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior = DiagonalGaussianDistribution(statistics)
        return posterior.mode() if generator is None else posterior.sample(generator)  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in json.loads(self.vae.to_json_string()).items() if name[0] != "_"}

    def raw_images(self, raw: Tensor) -> Tensor:
        return self.vae.decode(raw).sample

    def save(self, folder: str | Path) -> None:
        """Write a folder that diffusers reads too."""
        weights = weights_writer(self.vae.state_dict(), {"format": "pt"})
        config = json_writer(json.loads(self.vae.to_json_string()))
        files = {f"{DIFFUSERS_WEIGHTS}.safetensors": weights, **self.preview_file(), "config.json": config}
        write_all_aside({Path(folder) / name: write for name, write in files.items()})

    @classmethod
    def load(cls, path: str | Path, kind: str | None = None) -> KLAutoencoder:
        """A stored AutoencoderKL in float32, frozen, in eval mode: a folder, or a .safetensors file.

        kind: the key of `SCALES` that says how a file's latents are scaled; not needed if the file also holds a trunk
        or text encoders, or has a config.json beside it. Raises ValueError if it cannot be read.
        """
        from diffusers import AutoencoderKL

        path = Path(path)
        try:
            config, tensors = _from_folder(path) if path.is_dir() else _from_file(path, kind)
            scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
            if not is_number(scale) or scale <= 0 or not is_number(shift):
                raise ValueError(f"scaling_factor is {scale!r} and shift_factor {shift!r}, expected numbers")
            with torch.device("meta"):
                vae = AutoencoderKL.from_config(config)
            check_fit(vae.state_dict(), tensors, str(path))
        except Exception as error:  # diffusers does not check configs: any exception may come
            raise ValueError(f"cannot read the autoencoder in {path}: {first_line(error)}") from error
        vae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        model = cls(vae)
        model.read_preview(path if path.is_dir() else path.parent)
        return model.requires_grad_(False).eval()


def _from_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_json(folder / "config.json"), renamed(read_folder(folder, DIFFUSERS_WEIGHTS))


def _from_file(path: Path, kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    stored = read_weights(path)
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in stored)), "")
    tensors = renamed({name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)})
    config = path.parent / "config.json"
    if kind is None and config.is_file():
        stored_config = read_json(config)
        if isinstance(stored_config, dict) and stored_config.get("_class_name") == "AutoencoderKL":
            return stored_config, tensors
    kind = kind or next((told for part, told in _KIND_OF.items() if any(part in name for name in stored)), None)
    if kind is None:
        raise ValueError(f"it does not say how its latents are scaled; write {', '.join(f'{k}:FILE' for k in SCALES)}")
    return config_from_tensors(tensors, kind), tensors


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an AutoencoderKL, named as in any of the supported sources, under diffusers' present names.

    The original code numbers the decoder's levels from the highest resolution, diffusers in the order of execution; and
    its attention projections are 1x1 convolutions, in diffusers linear layers.
    """
    levels = [int(found[1]) for name in tensors if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"(decoder\.up\.)(\d+)", lambda found: f"{found[1]}{max(levels) - int(found[2])}", name)
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        out[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return out


def config_from_tensors(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    """diffusers' config of an AutoencoderKL from its tensors' shapes, with the scale of `kind`.

    Raises ValueError if they are not an AutoencoderKL, or its latent channels are not those of `kind`.
    """
    if kind not in SCALES:
        raise ValueError(f"no autoencoder is known as {kind!r}, expected one of {', '.join(SCALES)}")
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")
    if lacking := [name for name in needed if name not in tensors]:
        raise ValueError(f"no AutoencoderKL: {', '.join(lacking)} missing")
    widths: list[int] = []
    while (first := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in tensors:
        widths.append(tensors[first].shape[0])
    layers = sum(name.startswith("encoder.down_blocks.0.resnets.") and name.endswith("conv1.bias") for name in tensors)
    channels, scaling, shift = SCALES[kind]
    if (found := tensors["decoder.conv_in.weight"].shape[1]) != channels:
        raise ValueError(f"it has {found} latent channels, {kind}'s autoencoder has {channels}")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["encoder.conv_in.weight"].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": channels,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "scaling_factor": scaling,
        "shift_factor": shift,
    }
