"""Text to image: the trainable model (trunk and text encoder) and the pipeline that samples it.

Shape letters: B batch, C channels, h w latent sides, H W image sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import samplers
from mmdit.autoencoder import Autoencoder, PixelSpace, open_autoencoder
from mmdit.config import MMDiTConfig
from mmdit.drawing import Drawing
from mmdit.edit import Edit, known_latents
from mmdit.features import Features, KnownText
from mmdit.model import MMDiT
from mmdit.sampling import Sampling
from mmdit.text import Condition, LearnedText, Tokens
from mmdit.weights_io import load_weights, read_config, read_json, save_weights, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmdit.sd3_text import SD3Text
    from mmdit.text_encoders import TextEncoder


class CaptionedMMDiT(nn.Module):
    """An MMDiT and the conditioner that feeds it, learnt or frozen: all that is trained, as one module.

    packed: the trunk takes all samples in one row, without the padding of their captions, to the same numbers.
    """

    packed = False

    def __init__(self, transformer: MMDiT, conditioner: LearnedText | TextEncoder | SD3Text | KnownText) -> None:
        super().__init__()
        self.transformer, self.conditioner = transformer, conditioner

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tokens | Features, drop: Tensor | None = None) -> Tensor:
        """Velocity (B, C, h, w) at x_t and t (B,), given captions; where `drop` (B, encoders), the empty caption."""
        context, pooled, mask = self.conditioner(tokens, drop)
        if self.packed:
            return torch.stack(self.transformer(list(x_t), t, context, pooled, mask))
        return self.transformer(x_t, t, context, pooled, mask)


class TextToImage:
    """Prompts to pictures.

    size: (height, width) in pixels that the model was trained at, the default of a call. shift: the time shift it was
    trained with; sampling at another size moves it by sqrt(tokens / trained tokens), as SD3 does (arXiv 2403.03206,
    eq. 23). sampling: what a call takes where it is not told, fields of `Sampling`.
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
        self._visiting: torch.device | None = None  # where parts work that live on the CPU

    @property
    def step(self) -> int:
        """Height and width of a picture must divide by this, in pixels."""
        return self.autoencoder.factor * self.model.transformer.config.patch_size

    @property
    def device(self) -> torch.device:
        """Where pictures are drawn."""
        return self._visiting or self.model.transformer.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextToImage:
        """Move all parts; dtype is that of trunk and text encoders. The autoencoder and the states stay in float32."""
        self._visiting = None
        self.model.to(device, dtype)
        self.autoencoder.to(device)
        return self

    def offload(self, device: torch.device | str) -> TextToImage:
        """Keep all parts on the CPU, each on `device` while it works only: less memory there, more time."""
        self.to("cpu")
        self._visiting = torch.device(device)
        return self

    def compile(self, **how: Any) -> TextToImage:
        """Compile the trunk at its first call, and again for new shapes. how: as torch.compile takes it."""
        self.model.transformer.compile(**how)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        edit: Edit | None = None,
        batch_size: int = 64,
        callback: Callable[[samplers.Progress], object] | None = None,
        **options: Any,
    ) -> list[Image]:
        """One PIL image a prompt.

        options: fields of `Sampling` (solver, num_steps, guidance, ...); what is not given is as the model's own
        defaults, `self.sampling`, say. negative_prompts: what guidance leads away from, one for all or one a prompt;
        by default no caption. seed: one number (prompt i takes seed + i) or one a prompt; a prompt with its seed is the
        same alone and in any batch. edit: a picture to start from. callback: told of each solver step;
        `preview(progress)` shows it. Raises ValueError for unknown options, for sizes that do not divide by `step`, and
        for lists of other lengths than the prompts'.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompt given: pass at least one caption")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one number, or one a prompt")
        if edit is not None:
            height, width = edit.fitting(height, width)
        height, width = self._fitting(height, width)
        negatives = _listed(negative_prompts, len(prompts))
        how = Sampling.of(self.sampling, options)
        ts = how.times(self.shift, self._shift_at(height, width) / self.shift)
        pictures: list[Image] = []
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            field = self._field(prompts[rows], negatives[rows], how, ts)
            drawing = Drawing(field, how, ts, seeds[rows], callback)
            if edit is None:
                pictures += self._drawn(drawing, height, width)
            else:
                pictures += self._edited(drawing, edit.part(rows, len(prompts)))
        return pictures

    def preview(self, progress: samplers.Progress) -> list[Image]:
        """What a callback's pictures look like so far: the estimate of the data, decoded."""
        return self.pictures(progress.x_0)

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """What pictures of that size in pixels start from, (B, C, h, w), each drawn from its seed on the CPU."""
        like = self._latent(height, width)
        return samplers.randn((len(seeds), *like.shape), list(seeds), like.dtype, like.device)

    def _latent(self, height: int, width: int) -> Tensor:
        """An empty latent (C, h, w); in float32, also where the trunk works in less."""
        f, dtype = self.autoencoder.factor, torch.promote_types(self.model.transformer.dtype, torch.float32)
        return torch.empty(self.autoencoder.channels, height // f, width // f, dtype=dtype, device=self.device)

    def _drawn(self, drawing: Drawing, height: int, width: int) -> list[Image]:
        """Pictures from noise."""
        with self._at_work(self.model.transformer):
            x_0 = drawing.from_noise(self._latent(height, width))
        return self.pictures(x_0)

    def _edited(self, drawing: Drawing, edit: Edit) -> list[Image]:
        """Pictures from pictures."""
        count = len(drawing.seeds)
        images, drawn = edit.images(count).to(self.device), edit.drawn(count)
        with self._at_work(self.autoencoder):
            known = self.autoencoder.encode(images)
        mask = None if drawn is None else known_latents(drawn, self.autoencoder.factor).to(known)
        with self._at_work(self.model.transformer):
            x_0 = drawing.from_latents(known, edit.strength, mask)
        return self.pictures(x_0) if drawn is None else edit.pasted(self.pictures(x_0))

    def pictures(self, x_0: Tensor) -> list[Image]:
        """PIL images of scaled latents (B, C, h, w)."""
        from PIL import Image

        with self._at_work(self.autoencoder):
            images = self.autoencoder.decode(x_0.float())
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
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

    @contextmanager
    def _at_work(self, part: nn.Module) -> Iterator[None]:
        """With `offload`, a part is on the device while it works."""
        if self._visiting is None:
            yield
            return
        part.to(self._visiting)
        try:
            yield
        finally:
            part.to("cpu")

    def conditions(self, prompts: Sequence[str | None]) -> Condition:
        """What the trunk takes for prompts; for None what it takes for no prompt, as in training where one is dropped.

        Encoded once, not once a step.
        """
        encode = self.model.conditioner
        drop = torch.tensor([[prompt is None] * encode.num_encoders for prompt in prompts], device=self.device)
        with self._at_work(encode):
            out = encode(encode.tokenize([prompt or "" for prompt in prompts]).to(self.device), drop)
        return out.to(self.device, self.model.transformer.dtype)

    def _field(
        self, prompts: Sequence[str], negatives: Sequence[str | None], how: Sampling, ts: Tensor
    ) -> samplers.Field:
        """The guided velocity field of a batch of prompts."""
        trunk, n = self.model.transformer, len(prompts)
        if unknown := [i for i in how.skip_layers if not 0 <= i < trunk.config.depth]:
            raise ValueError(f"skip_layers names blocks {unknown}, but there are blocks 0 to {trunk.config.depth - 1}")
        both = self.conditions([*prompts, *negatives])
        cond, uncond = both.rows(slice(n)), both.rows(slice(n, None))

        def velocity(condition: Condition, skip_layers: Sequence[int] = ()) -> samplers.Field:
            def network(x_t: Tensor, t: Tensor) -> Tensor:
                return trunk(x_t.to(trunk.dtype), t, *condition, skip_layers).to(x_t.dtype)

            return samplers.Field(network, samplers.RectifiedFlow(), "velocity")

        return how.guided(velocity(cond), velocity(uncond), velocity(both), velocity(cond, how.skip_layers), ts)

    def save(self, folder: str | Path, layout: Literal["mmdit", "diffusers"] = "mmdit") -> None:
        """Write everything that `load` needs, each part with its config and safetensors.

        layout "diffusers": a folder for StableDiffusion3Pipeline (see mmdit/sd3_pipeline.py for what it can hold).
        """
        folder = Path(folder)
        if layout == "diffusers":
            from mmdit.sd3_pipeline import write_sd3

            return write_sd3(self, folder)
        if layout != "mmdit":
            raise ValueError(f"layout is {layout!r}, expected 'mmdit' or 'diffusers'")
        write_json(folder / "transformer" / "config.json", self.model.transformer.config.to_dict())
        self.model.conditioner.save_config(folder / "text")
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
        self._save_trunk(Path(folder) / "transformer")
        self.model.conditioner.save_weights(Path(folder) / "text")

    def _save_trunk(self, folder: Path) -> None:
        """The trunk's weights; adapters are added to them, and written beside."""
        from mmdit.lora import lora_pairs, plain_state, save_lora

        trunk = self.model.transformer
        save_weights(plain_state(trunk), folder / "model.safetensors")
        if lora_pairs(trunk):
            save_lora(trunk, folder / "lora.safetensors")

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        without: Sequence[str] = (),
    ) -> TextToImage:
        """A pipeline from a run folder, a folder that `save` wrote, or a diffusers SD3 pipeline folder.

        device: None is CUDA if there is one. dtype: of trunk and text encoders, None for float32. without: text
        encoders of an SD3 pipeline to leave out, of "clip_l", "clip_g" and "t5". Raises FileNotFoundError where no
        pipeline is, ValueError where its files do not fit together or are of another pipeline.
        """
        root = Path(path)
        folder = root / "pipeline" if (root / "pipeline" / "pipeline.json").exists() else root
        if not (folder / "pipeline.json").exists() and (folder / "model_index.json").exists():
            from mmdit.sd3_pipeline import read_sd3

            pipe = read_sd3(folder, dtype or torch.float32, without)
        elif without:
            raise ValueError(f"{root} has not the three text encoders of SD3: nothing can be left out")
        else:
            pipe = cls._load_own(root, folder)
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)

    @classmethod
    def _load_own(cls, root: Path, folder: Path) -> TextToImage:
        if not (folder / "pipeline.json").exists():
            raise FileNotFoundError(
                f"{root} holds no trained model: expected a run folder of `mmdit train`, or a diffusers SD3 pipeline"
            )
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
        return kind(model.eval(), autoencoder, about["size"], about["shift"], about["sampling"])

    @staticmethod
    def _load_model(folder: Path) -> nn.Module:
        """The trunk and the text encoder in a folder that `save` wrote."""
        text: LearnedText | TextEncoder | SD3Text
        if "encoder" in read_json(folder / "text" / "config.json"):
            from mmdit.text_encoders import load_encoder

            text = load_encoder(folder / "text")
        else:
            text = LearnedText.load(folder / "text")
        transformer = MMDiT(read_config(MMDiTConfig, folder / "transformer" / "config.json"))
        load_weights(transformer, folder / "transformer" / "model.safetensors")
        return CaptionedMMDiT(transformer, text)


def _listed(negatives: str | Sequence[str] | None, count: int) -> list[str | None]:
    """Negative prompts, one a prompt; None where there is none."""
    if negatives is None or isinstance(negatives, str):
        return [negatives] * count
    if len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts: give one for all, or one a prompt")
    return list(negatives)
