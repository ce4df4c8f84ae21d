"""Text to image: the trainable model (trunk and text encoder) and the pipeline that samples it.

Shape letters: B batch, C channels, h w latent sides, H W image sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import samplers
from mmdit.autoencoder import Autoencoder
from mmdit.drawing import Drawing, each_seed, progress_bar
from mmdit.edit import Edit, known_latents
from mmdit.features import Features, KnownText
from mmdit.memory import keeping_memory
from mmdit.model import MMDiT
from mmdit.pipeline_files import (
    load_captioned,
    load_pipeline,
    save_defaults,
    save_pipeline,
    save_pipeline_weights,
)
from mmdit.sampling import Sampling, check_solver
from mmdit.text import Condition, LearnedText, Tokens
from mmdit.weights_io import check_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmdit.sd3_text import SD3Text
    from mmdit.text_encoders import TextEncoder


class CaptionedMMDiT(nn.Module):
    """An MMDiT and its conditioner, learnt or frozen: all that is trained, as one module.

    packed: samples are packed in one row without the padding of their captions, which gives the same numbers.
    """

    packed = False

    def __init__(self, transformer: MMDiT, conditioner: LearnedText | TextEncoder | SD3Text | KnownText) -> None:
        super().__init__()
        self.transformer, self.conditioner = transformer, conditioner

    def forward(
        self, x_t: Tensor | list[Tensor], t: Tensor, tokens: Tokens | Features, drop: Tensor | None = None
    ) -> Any:
        """Velocity at x_t (B, C, h, w), or a list of (C, h, w), and t (B,), given captions, which are dropped where
        `drop` (B, num_encoders) is True.
        """
        if self.packed and isinstance(self.conditioner, LearnedText) and isinstance(tokens, Tokens):
            tokens = tokens.trimmed()
        context, pooled, mask = self.conditioner(tokens, drop)
        if self.packed and isinstance(x_t, Tensor):
            return torch.stack(self.transformer(list(x_t), t, context, pooled, mask))
        return self.transformer(x_t, t, context, pooled, mask)


class TextToImage:
    """Prompts to pictures.

    size: (height, width) in pixels that the model was trained at, the default of a call. shift: the time shift it was
    trained with; sampling at another size multiplies it by sqrt(tokens / trained tokens), as in SD3 (arXiv 2403.03206,
    eq. 23). sampling: default options of a call, fields of `Sampling`.
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
        self._offload_device: torch.device | None = None  # with `offload`, where parts on the CPU do their work

    @property
    def step(self) -> int:
        """Height and width of a picture must be multiples of this, in pixels."""
        return self.autoencoder.factor * self.model.transformer.config.patch_size

    @property
    def device(self) -> torch.device:
        """The device that pictures are drawn on."""
        return self._offload_device or self.model.transformer.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextToImage:
        """Move all parts; dtype: of trunk and text encoders. The autoencoder and the solver's states stay in float32.

        Raises ValueError for what is no floating dtype, or a dtype in place of the device.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"the device is {device}: a type goes after it, pipe.to(pipe.device, {device})")
        check_dtype(dtype)
        self._offload_device = None
        self.model.to(device, dtype)
        self.autoencoder.to(device)
        return self

    def offload(self, device: torch.device | str) -> TextToImage:
        """Keep all parts on the CPU, and move each to `device` only while it works: less memory there, more time."""
        self.to("cpu")
        self._offload_device = torch.device(device)
        return self

    def compile(self, **options: Any) -> TextToImage:
        """Compile the trunk at its first call, and again for new shapes. options: torch.compile's."""
        self.model.transformer.compile(**options)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str | None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        edit: Edit | None = None,
        batch_size: int = 64,
        callback: Callable[[samplers.Progress], object] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Image]:
        """One PIL image per prompt.

        options: fields of `Sampling` (solver, num_steps, guidance, ...), by default those of `self.sampling`.
        negative_prompts: what guidance leads away from, one for all or one per prompt; by default no caption. seed: one
        number (prompt i takes seed + i) or one per prompt; a prompt and a seed give the same picture alone and in any
        batch. edit: a picture to start from. callback: called after each solver step; `preview(progress)` decodes its
        state. progress: show a progress bar. Raises ValueError for unknown options, for sizes that are not multiples of
        `step`, and for lists of other lengths than the prompts'.
        """
        prompts = as_captions(prompts)
        seeds, negatives = each_seed(seed, len(prompts)), as_negatives(negative_prompts, len(prompts))
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected a whole number of at least 1")
        if edit is not None:
            if not isinstance(edit, Edit):
                raise ValueError(f"edit is a {type(edit).__name__}, expected an mmdit.Edit of a picture")
            height, width = edit.fitting(height, width)
        height, width = self._image_size(height, width)
        sampling = Sampling.of(self.sampling, options)
        ts = sampling.times(self.shift, self._shift_at(height, width) / self.shift)
        check_solver(sampling.solver, ts, sampling.diffusion)
        pictures: list[Image] = []
        firsts = range(0, len(prompts), batch_size)
        reporting = progress_bar(len(firsts), callback) if progress else nullcontext(callback)
        with keeping_memory(self.device), reporting as on_step:
            for first in firsts:
                rows = slice(first, first + batch_size)
                field = self._field(prompts[rows], negatives[rows], sampling, ts)
                drawing = Drawing(field, sampling, ts, seeds[rows], on_step)
                if edit is None:
                    pictures += self._draw(drawing, height, width)
                else:
                    pictures += self._draw_edited(drawing, edit.part(rows, len(prompts)))
        return pictures

    def preview(self, progress: samplers.Progress) -> list[Image]:
        """The pictures of a callback so far: its estimate of the data, decoded."""
        return self.pictures(progress.x_0)

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """The initial noise (B, C, h, w) of pictures of this size in pixels, each drawn from its seed on the CPU."""
        like = self._latent(height, width)
        return samplers.randn((len(seeds), *like.shape), list(seeds), like.dtype, like.device)

    def _latent(self, height: int, width: int) -> Tensor:
        """An uninitialised latent (C, h, w); in float32 even if the trunk computes in half precision."""
        f, dtype = self.autoencoder.factor, torch.promote_types(self.model.transformer.dtype, torch.float32)
        return torch.empty(self.autoencoder.channels, height // f, width // f, dtype=dtype, device=self.device)

    def _draw(self, drawing: Drawing, height: int, width: int) -> list[Image]:
        """Pictures from noise."""
        with self._on_device(self.model.transformer):
            x_0 = drawing.from_noise(self._latent(height, width))
        return self.pictures(x_0)

    def _draw_edited(self, drawing: Drawing, edit: Edit) -> list[Image]:
        """Pictures from the pictures of an edit."""
        count = len(drawing.seeds)
        images, redrawn = edit.images(count).to(self.device), edit.redrawn(count)
        with self._on_device(self.autoencoder):
            known = self.autoencoder.encode(images)
        mask = None if redrawn is None else known_latents(redrawn, self.autoencoder.factor).to(known)
        with self._on_device(self.model.transformer):
            x_0 = drawing.from_latents(known, edit.strength, mask)
        return self.pictures(x_0) if redrawn is None else edit.composited(self.pictures(x_0))

    def pictures(self, x_0: Tensor) -> list[Image]:
        """PIL images of scaled latents (B, C, h, w)."""
        from PIL import Image

        with self._on_device(self.autoencoder):
            images = self.autoencoder.decode(x_0.float())
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, by default the model's own. ValueError if its sides are not multiples of `step`."""
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        if not isinstance(height, Integral) or not isinstance(width, Integral):
            raise ValueError(f"a picture of {height!r} x {width!r}: expected whole numbers of pixels")
        if min(height, width) < 1 or height % self.step or width % self.step:
            near = " x ".join(str(max(1, round(side / self.step)) * self.step) for side in (height, width))
            raise ValueError(
                f"a picture of {height} x {width} does not fit: both sides must be multiples of {self.step}, as {near}"
            )
        if max(height, width) > 2**24:
            raise ValueError(f"a picture of {height} x {width}: expected sides of at most 2**24 pixels")
        return int(height), int(width)

    def _shift_at(self, height: int, width: int) -> float:
        return self.shift * samplers.resolution_shift(height * width, self.size[0] * self.size[1])

    @contextmanager
    def _on_device(self, part: nn.Module) -> Iterator[None]:
        """Move a part to the device while it works, if parts are offloaded."""
        if self._offload_device is None:
            yield
            return
        part.to(self._offload_device)
        try:
            yield
        finally:
            part.to("cpu")

    def conditions(self, prompts: Sequence[str | None]) -> Condition:
        """The conditions of prompts for the trunk; None is a dropped prompt, as in training."""
        encode = self.model.conditioner
        drop = torch.tensor([[prompt is None] * encode.num_encoders for prompt in prompts], device=self.device)
        with self._on_device(encode):
            out = encode(encode.tokenize([prompt or "" for prompt in prompts]).to(self.device), drop)
        return out.to(self.device, self.model.transformer.dtype)

    def _field(
        self, prompts: Sequence[str], negatives: Sequence[str | None], sampling: Sampling, ts: Tensor
    ) -> samplers.Field:
        """The guided velocity field of a batch of prompts, which are encoded once, not once per step."""
        trunk, n = self.model.transformer, len(prompts)
        trunk.check_layers(sampling.skip_layers)
        both = self.conditions([*prompts, *negatives])
        cond, uncond = both.rows(slice(n)), both.rows(slice(n, None))

        def velocity(condition: Condition, skip_layers: Sequence[int] = ()) -> samplers.Field:
            def network(x_t: Tensor, t: Tensor) -> Tensor:
                return trunk(x_t.to(trunk.dtype), t, *condition, skip_layers).to(x_t.dtype)

            return samplers.Field(network, samplers.RectifiedFlow(), "velocity")

        weak = velocity(cond, sampling.skip_layers)
        return sampling.guided(velocity(cond), velocity(uncond), velocity(both), weak, ts)

    def save(self, folder: str | Path, layout: Literal["mmdit", "diffusers"] = "mmdit") -> None:
        """Write everything that `load` needs, each part with its config and safetensors.

        layout "diffusers": a folder for StableDiffusion3Pipeline (mmdit/sd3_pipeline.py says what it can hold).
        """
        save_pipeline(self, Path(folder), layout)

    def save_defaults(self, folder: str | Path) -> None:
        """Replace the default options in a folder that `save` wrote."""
        save_defaults(self, Path(folder))

    def save_weights(self, folder: str | Path) -> None:
        """Replace the weights in a folder that `save` wrote."""
        save_pipeline_weights(self, Path(folder))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        without: Sequence[str] = (),
        *,
        text: str | Path | None = None,
        autoencoder: str | Path | None = None,
    ) -> TextToImage:
        """A pipeline from a run folder, a folder that `save` wrote, a diffusers SD3 pipeline folder, or one
        .safetensors file in the original SD3 layout.

        device: None is CUDA if there is one. dtype: of trunk and text encoders, None for float32. without: text
        encoders of SD3 to leave out, of "clip_l", "clip_g" and "t5". For a single file, text: the source of tokenizers
        and of text encoders that the file lacks, a diffusers SD3 pipeline's folder or its name on the hub; autoencoder:
        as `open_autoencoder` takes it, None for the file's own. Raises FileNotFoundError if there is no pipeline,
        ValueError if its parts are missing, do not fit together or are of another pipeline.
        """
        pipe = load_pipeline(Path(path), dtype, without, text, autoencoder)
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)

    @staticmethod
    def load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
        """The trunk, in that type, and the text encoder in a folder that `save` wrote."""
        return load_captioned(folder, dtype)


def as_captions(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list. Raises ValueError for an empty list, and for anything but strings."""
    listed = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else [prompts]
    if not listed:
        raise ValueError("no prompt given: pass at least one caption")
    if wrong := [prompt for prompt in listed if not isinstance(prompt, str)]:
        raise ValueError(f"a prompt is a {type(wrong[0]).__name__}, expected a string or a list of strings")
    return listed


def as_negatives(negatives: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """Negative prompts as a list, one per prompt; None for no negative prompt."""
    if negatives is None or isinstance(negatives, str):
        return [negatives] * count
    if not isinstance(negatives, Sequence):
        raise ValueError(f"negative_prompts is {negatives!r}, expected a string, or a list with one per prompt")
    if len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts: give one for all, or one per prompt")
    if wrong := [one for one in negatives if not isinstance(one, str | None)]:
        raise ValueError(f"a negative prompt is a {type(wrong[0]).__name__}, expected a string, or None for none")
    return list(negatives)
