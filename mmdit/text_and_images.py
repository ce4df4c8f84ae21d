"""The pipeline of text and images: a trained `Transfusion` with its tokenizer and autoencoder.

Called with prompts it draws a picture for each, as any text-to-image pipeline; `generate` continues any mixture of text
and pictures with both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import samplers
from mmdit.blocks import allow_graphs
from mmdit.generate import ImageSampling, Written, generate, velocity
from mmdit.pictures import as_shown
from mmdit.pipeline_files import load_trunk
from mmdit.sampling import Sampling
from mmdit.sequences import MixedBatch
from mmdit.text import TextConfig, Tokenizer, Tokens
from mmdit.text_to_image import TextToImage
from mmdit.transfusion import MixedOutput, Transfusion
from mmdit.weights_io import read_config, write_json

if TYPE_CHECKING:
    from PIL.Image import Image


class Words(nn.Module):
    """The conditioner of a trunk that reads text itself: a tokenizer, without parameters."""

    num_encoders = 1

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if None in tokenizer.special:
            raise ValueError("the tokenizer has no tokens for images: it is not of a model of text and images")
        self.config, self.tokenizer = config, tokenizer

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens`, on the CPU."""
        return self.tokenizer(captions)

    def save_config(self, folder: str | Path) -> None:
        """Write config and tokenizer."""
        write_json(Path(folder) / "config.json", self.config.to_dict())
        self.tokenizer.save(Path(folder) / "tokenizer.json")

    def weights_writers(self, folder: Path) -> dict[Path, Callable[[Path], object]]:
        """None: there are no parameters."""
        return {}


class CaptionedTransfusion(nn.Module):
    """A `Transfusion` and its tokenizer: all that is trained, as one module."""

    def __init__(self, transformer: Transfusion, conditioner: Words) -> None:
        super().__init__()
        if conditioner.tokenizer.vocab_size > transformer.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {conditioner.tokenizer.vocab_size} tokens, the trunk only "
                f"{transformer.config.vocab_size}: they are not of one model"
            )
        tokenizer, config = conditioner.tokenizer, transformer.config
        own, others = (*tokenizer.special, *tokenizer.sizes), (config.pad, config.eos, config.boi, config.eoi)
        if own != (*others, *config.sizes):
            raise ValueError(
                f"the tokenizer's tokens for padding, end, images and sizes are {own}, the trunk's "
                f"{(*others, *config.sizes)}: they are not of one model"
            )
        self.transformer, self.conditioner = transformer, conditioner

    def pack(self, documents: Sequence[Sequence[Tensor]]) -> MixedBatch:
        """`Transfusion.pack`."""
        return self.transformer.pack(documents)

    def forward(self, batch: MixedBatch, t: Tensor | None = None) -> MixedOutput:
        """`Transfusion.forward`."""
        return self.transformer(batch, t)


class TransfusionPipeline(TextToImage):
    """Prompts to pictures; with `generate`, text and pictures to their continuation."""

    format = "mmdit transfusion 1"

    def compile(self, **options: Any) -> TextToImage:
        """Compile the trunk's blocks at their first call, for any number of tokens. options: torch.compile's."""
        allow_graphs()
        for block in self.model.transformer.blocks:
            block.compile(**({"dynamic": True} | options))
        return self

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[str | Image]],
        seed: int | Sequence[int] = 0,
        told: Callable[[int, str | Image], object] | None = None,
        **options: Any,
    ) -> list[Written]:
        """Continue prompts, each a list of strings and of PIL images whose sides are multiples of `step`.

        Returns the new parts of each, strings and PIL images, and why it ended. A string that continues the prompt's
        last one begins with a space where a new word begins. told(i, part) is called with each piece of text and each
        picture of prompt i as it comes. options: those of `mmdit.generate.generate` (max_tokens,
        max_images, text, begin, ...); without `image`, pictures are drawn with the model's defaults.
        """
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts is a {type(prompts).__name__}, expected a list of prompts, each a list")
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str) or not isinstance(prompt, Sequence):
                found = type(prompt).__name__
                raise ValueError(f"prompt {i} is a {found}, expected a list of strings and pictures")
        parts = [self._parts(p) for p in prompts]
        options.setdefault(
            "image", self.image_sampling(free=all(any(len(part) for part in prompt) for prompt in parts))
        )
        before = [prompt[-1].tolist() if prompt and _is_text(prompt[-1]) else [] for prompt in parts]
        decoders = [_StreamDecoder(self.model.conditioner.tokenizer, ids) for ids in before]

        def report(i: int, part: Tensor) -> None:
            new = decoders[i].add(part) if _is_text(part) else self.pictures(part[None])[0]
            if told is not None and new != "":
                told(i, new)

        written = generate(self.model.transformer, parts, seed=seed, told=report if told else None, **options)
        for i, decoder in enumerate(decoders):
            if told is not None and (rest := decoder.rest()):
                told(i, rest)
        return [
            Written([self._shown(part, ids if k == 0 else []) for k, part in enumerate(one.parts)], one.stopped)
            for one, ids in zip(written, before, strict=True)
        ]

    def fitted(self, picture: Image) -> Image:
        """A picture scaled to cover a size that the model has learnt, and cropped to it: the trained size or, of a
        model with size tokens, the one nearest to the picture's own, of no larger area.
        """
        from PIL.Image import Resampling
        from PIL.ImageOps import fit

        shown, (height, width) = as_shown(picture), self.size
        if most := self.model.transformer.config.size_tokens:
            scale = min(1.0, (height * width / (shown.height * shown.width)) ** 0.5)
            steps = (min(most, max(1, round(side * scale / self.step))) for side in (shown.height, shown.width))
            height, width = (count * self.step for count in steps)
        return fit(shown, (width, height), Resampling.LANCZOS)

    def image_sampling(
        self,
        num_steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        diffusion: str | float | None = None,
        free: bool = False,
    ) -> ImageSampling:
        """Options for pictures, by default the model's own; height and width in pixels.

        free: if no size is given, a model with size tokens chooses it.
        """
        given = {"solver": solver, "num_steps": num_steps, "guidance": guidance, "diffusion": diffusion}
        sampling = Sampling.of(self.sampling, given)
        _check_guidance(sampling)
        factor, size = self.autoencoder.factor, None
        if not (free and height is None and width is None and self.model.transformer.config.size_tokens):
            height, width = self._image_size(height, width)
            size = (height // factor, width // factor)
        trained = (self.size[0] // factor, self.size[1] // factor)
        names = ("solver", "num_steps", "guidance", "interval", "grid", "diffusion")
        options = {name: getattr(sampling, name) for name in names}
        return ImageSampling(size, **options, shift=self.shift, shift_of=trained)

    def _parts(self, prompt: Sequence[str | Image]) -> list[Tensor]:
        trunk, parts = self.model.transformer, []
        for part in prompt:
            if isinstance(part, str):
                ids = torch.tensor(self.model.conditioner.tokenizer.encode([part])[0], dtype=torch.int64)
                parts.append(ids.to(trunk.device))  # without an end token: the document continues
            else:
                shown = as_shown(part)
                self._image_size(shown.height, shown.width)
                pixels = torch.tensor(np.asarray(shown)).permute(2, 0, 1)[None].to(trunk.device)
                parts.append(self.autoencoder.encode(pixels.float() / 127.5 - 1)[0].to(trunk.dtype))
        return parts

    def _shown(self, part: Tensor, before: Sequence[int] = ()) -> str | Image:
        """A part as text or picture. before: the ids of the text that it continues."""
        if _is_text(part):
            return self.model.conditioner.tokenizer.decode(part, before)
        return self.pictures(part[None])[0]

    def offload(self, device: torch.device | str) -> TextToImage:
        """Raises ValueError: the trunk is the only large part."""
        raise ValueError(f"a model of text and images is one trunk: there is nothing to offload, move it to {device}")

    def _field(
        self, prompts: Sequence[str], negatives: Sequence[str | None], sampling: Sampling, ts: Tensor
    ) -> samplers.Field:
        """The velocity of a picture that follows each prompt, guided away from that of a picture without a prompt."""
        _check_guidance(sampling, negatives)
        trunk: Transfusion = self.model.transformer
        cache, parts = trunk.cache(len(prompts)), [self._parts([prompt]) for prompt in prompts]
        rows = [i for i, (ids,) in enumerate(parts) if len(ids)]  # a tokenizer may give no ids for some texts
        if rows:
            reading = cache.reading(rows)
            trunk(trunk.pack([parts[i] for i in rows]), None, reading)
            reading.keep()
        return velocity(trunk, cache, range(len(prompts)), sampling.guidance, sampling.interval)

    @staticmethod
    def load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
        config = read_config(TextConfig, folder / "text" / "config.json")
        tokenizer = Tokenizer.load(folder / "text" / "tokenizer.json", config.max_length)
        return CaptionedTransfusion(load_trunk(folder, Transfusion, dtype), Words(config, tokenizer))


def _check_guidance(sampling: Sampling, negatives: Sequence[str | None] = ()) -> None:
    """Raises ValueError for kinds of guidance that a model of text and images does not have."""
    if any(negatives) or sampling.skip_layers or sampling.rescale or sampling.rule != "cfg":
        raise ValueError(
            "a model of text and images is guided away from no prompt, by rule 'cfg': leave out negative prompts, "
            "rule, rescale and skip_layers"
        )


def _is_text(part: Tensor) -> bool:
    """Whether a part of a document is token ids, and not an image."""
    return not part.is_floating_point()


class _StreamDecoder:
    """Decodes tokens as they come to the pieces of text that they add; a character of several tokens is added whole.

    before: the ids of the text that they continue.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer, self.before, self.ids, self.shown = tokenizer, before, list[int](), ""

    def add(self, ids: Tensor) -> str:
        self.ids += ids.tolist()
        text = self.tokenizer.decode(self.ids, self.before)
        return "" if text.endswith("\ufffd") else self._new(text)

    def rest(self) -> str:
        """What the last tokens add, be it a part of a character alone."""
        return self._new(self.tokenizer.decode(self.ids, self.before))

    def _new(self, text: str) -> str:
        if not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new
