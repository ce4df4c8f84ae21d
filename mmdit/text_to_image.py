"""Text to image: the trainable model (trunk and text encoder) and the pipeline that samples it.

Shape letters: B batch, C channels, h w latent sides, H W image sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import samplers
from mmdit.autoencoder import Autoencoder, PixelSpace, open_autoencoder
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import Condition, LearnedText, TextConfig, Tokenizer, Tokens
from mmdit.weights_io import load_weights, read_config, save_weights, write_json

if TYPE_CHECKING:
    from PIL.Image import Image


class CaptionedMMDiT(nn.Module):
    """An MMDiT and the conditioner that feeds it: all that is trained, as one module."""

    def __init__(self, transformer: MMDiT, conditioner: LearnedText) -> None:
        super().__init__()
        self.transformer, self.conditioner = transformer, conditioner

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tokens, drop: Tensor | None = None) -> Tensor:
        """Velocity (B, C, h, w) at x_t and t (B,), given captions; where `drop` (B, encoders), the empty caption."""
        context, pooled, mask = self.conditioner(tokens, drop)
        return self.transformer(x_t, t, context, pooled, mask)


class TextToImage:
    """Prompts to pictures.

    size: (height, width) in pixels that the model was trained at, the default of a call. shift: the time shift it was
    trained with; sampling at another size moves it by sqrt(tokens / trained tokens), as SD3 does (arXiv 2403.03206,
    eq. 23).
    """

    format = "mmdit text-to-image 1"

    def __init__(
        self,
        model: Any,
        autoencoder: Autoencoder,
        size: tuple[int, int],
        shift: float = 1.0,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.autoencoder, self.shift = model, autoencoder, shift
        self.size: tuple[int, int] = (size[0], size[1])
        self.sampling = {"solver": "ab2", "num_steps": 28, "guidance": 4.0, "interval": [0.0, 1.0]} | (sampling or {})

    @property
    def step(self) -> int:
        """Height and width of a picture must divide by this, in pixels."""
        return self.autoencoder.factor * self.model.transformer.config.patch_size

    def to(self, device: torch.device | str) -> TextToImage:
        self.model.to(device)
        self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        callback: Callable[[samplers.Progress], object] | None = None,
    ) -> list[Image]:
        """One PIL image a prompt; what is not given is as the model's own defaults, `self.sampling`, say.

        seed: one number (prompt i takes seed + i) or one a prompt; a prompt with its seed starts from the same noise
        alone and in any batch. guidance: classifier-free guidance scale, 1 = none. callback: told of each solver
        step. Raises ValueError for an unknown solver and for sizes that do not divide by `step`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompt given: pass at least one caption")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one number, or one a prompt")
        height, width = self._fitting(height, width)
        given = {"solver": solver, "num_steps": num_steps, "guidance": guidance}
        how: dict[str, Any] = self.sampling | {name: value for name, value in given.items() if value is not None}
        pictures: list[Image] = []
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            x = self._noise(seeds[rows], height, width)
            field = self._field(prompts[rows], how["guidance"], how["interval"])
            grid = samplers.shift_time(samplers.uniform(how["num_steps"]), self._shift_at(height, width))
            x_0 = samplers.sample(field, x, how["solver"], grid=grid, callback=callback).x
            pictures += self._pictures(x_0)
        return pictures

    def _pictures(self, x_0: Tensor) -> list[Image]:
        """PIL images of scaled latents (B, C, h, w)."""
        from PIL import Image

        pixels = ((self.autoencoder.decode(x_0).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def _fitting(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, the model's own where none is; ValueError where it does not divide."""
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        if min(height, width) < 1 or height % self.step or width % self.step:
            raise ValueError(f"a picture of {height} x {width} does not fit: both sides must divide by {self.step}")
        return height, width

    def _shift_at(self, height: int, width: int) -> float:
        return self.shift * samplers.resolution_shift(height * width, self.size[0] * self.size[1])

    def _noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        f, c = self.autoencoder.factor, self.autoencoder.channels
        noise = [torch.randn(c, height // f, width // f, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self.model.transformer.device, self.model.transformer.dtype)

    def _field(self, prompts: Sequence[str], guidance: float, interval: Sequence[float]) -> samplers.Field:
        """The guided velocity field of a batch of prompts; captions are encoded once, not once a step."""
        encode, trunk, n = self.model.conditioner, self.model.transformer, len(prompts)
        both = encode(encode.tokenize([*prompts, *[""] * n]).to(trunk.device))

        def field(condition: Condition) -> samplers.Field:
            return samplers.Field(lambda x, t: trunk(x, t, *condition), samplers.RectifiedFlow(), "velocity")

        cond = field(Condition(*(part[:n] for part in both)))
        return samplers.cfg_batched(cond, field(both), guidance, (interval[0], interval[1]))

    def save(self, folder: str | Path) -> None:
        """Write everything that `load` needs: four small parts, each a config and safetensors."""
        folder = Path(folder)
        transformer, text = self.model.transformer, self.model.conditioner
        write_json(folder / "transformer" / "config.json", transformer.config.to_dict())
        write_json(folder / "text" / "config.json", text.config.to_dict())
        text.tokenizer.save(folder / "text" / "tokenizer.json")
        self.autoencoder.save(folder / "autoencoder")
        self.save_defaults(folder)
        self.save_weights(folder)

    def save_defaults(self, folder: str | Path) -> None:
        """Replace what a call takes where it is not told, in a folder that `save` wrote."""
        write_json(
            Path(folder) / "pipeline.json",
            {
                "format": self.format,
                "size": list(self.size),
                "shift": self.shift,
                "sampling": self.sampling,
                "autoencoder": "none" if isinstance(self.autoencoder, PixelSpace) else "autoencoder",
            },
        )

    def save_weights(self, folder: str | Path) -> None:
        """Replace the weights in a folder that `save` wrote."""
        save_weights(self.model.transformer.state_dict(), Path(folder) / "transformer" / "model.safetensors")
        save_weights(self.model.conditioner.state_dict(), Path(folder) / "text" / "model.safetensors")

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> TextToImage:
        """A pipeline from a run folder, or from a folder that `save` wrote, on `device` (None: CUDA if there is one).

        Raises FileNotFoundError where no pipeline is, ValueError where its files do not fit together.
        """
        root = Path(path)
        folder = root / "pipeline" if (root / "pipeline" / "pipeline.json").exists() else root
        if not (folder / "pipeline.json").exists():
            raise FileNotFoundError(f"{root} holds no trained model: expected a run folder of `mmdit train`")
        about: dict[str, Any] = read_config(dict, folder / "pipeline.json")
        missing = [key for key in ("size", "shift", "sampling", "autoencoder") if key not in about]
        if missing:
            raise ValueError(f"{folder / 'pipeline.json'} lacks {', '.join(missing)}")
        kind = cls
        if about.get("format") != cls.format:
            from mmdit.text_and_images import TransfusionPipeline

            kind = TransfusionPipeline if about.get("format") == TransfusionPipeline.format else cls
        model = kind._load_model(folder)
        spec = about["autoencoder"]
        autoencoder = open_autoencoder("none" if spec == "none" else str(folder / spec))
        pipe = kind(model.eval(), autoencoder, about["size"], about["shift"], about["sampling"])
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @staticmethod
    def _load_model(folder: Path) -> nn.Module:
        """The trunk and the text encoder in a folder that `save` wrote."""
        text_config = read_config(TextConfig, folder / "text" / "config.json")
        tokenizer = Tokenizer.load(folder / "text" / "tokenizer.json", text_config.max_length)
        transformer = MMDiT(read_config(MMDiTConfig, folder / "transformer" / "config.json"))
        text = LearnedText(text_config, tokenizer)
        load_weights(transformer, folder / "transformer" / "model.safetensors")
        load_weights(text, folder / "text" / "model.safetensors")
        return CaptionedMMDiT(transformer, text)
