"""Text and images, in and out: a trained `Transfusion` with its tokenizer and autoencoder.

Called with prompts it draws a picture of each, as every text-to-image pipeline; `generate` goes on from any mixture of
text and pictures with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import samplers
from mmdit.config import TransfusionConfig
from mmdit.generate import ImageSampling, Written, generate
from mmdit.sequences import MixedBatch
from mmdit.text import TextConfig, Tokenizer, Tokens
from mmdit.text_to_image import TextToImage
from mmdit.transfusion import MixedOutput, Transfusion
from mmdit.weights_io import load_weights, read_config

if TYPE_CHECKING:
    from PIL.Image import Image


class Words(nn.Module):
    """The conditioner of a trunk that reads words itself: a tokenizer, and nothing to learn."""

    num_encoders = 1

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if None in tokenizer.special:
            raise ValueError("the tokenizer has no tokens for images: it is not of a model of text and images")
        self.config, self.tokenizer = config, tokenizer

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens`, on the CPU."""
        return self.tokenizer(captions)


class CaptionedTransfusion(nn.Module):
    """A `Transfusion` and its tokenizer: all that is trained, as one module."""

    def __init__(self, transformer: Transfusion, conditioner: Words) -> None:
        super().__init__()
        if conditioner.tokenizer.vocab_size > transformer.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {conditioner.tokenizer.vocab_size} tokens, the trunk only "
                f"{transformer.config.vocab_size}: they are not of one model"
            )
        own, found = conditioner.tokenizer.special, transformer.config
        if own != (found.pad, found.eos, found.boi, found.eoi):
            raise ValueError(
                f"the tokenizer's end, padding and image tokens are {own}, the trunk's "
                f"{(found.pad, found.eos, found.boi, found.eoi)}: they are not of one model"
            )
        self.transformer, self.conditioner = transformer, conditioner

    def pack(self, documents: Sequence[Sequence[Tensor]]) -> MixedBatch:
        """As the trunk's."""
        return self.transformer.pack(documents)

    def forward(self, batch: MixedBatch, t: Tensor | None = None) -> MixedOutput:
        """As the trunk's."""
        return self.transformer(batch, t)


class TransfusionPipeline(TextToImage):
    """Prompts to pictures, and with `generate` text and pictures to more of both."""

    format = "mmdit transfusion 1"

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[str | Image]], seed: int | Sequence[int] = 0, **how: Any
    ) -> list[list[str | Image]]:
        """Go on from prompts, each a list of strings and PIL images of sides that divide by `step`.

        Gives the new parts of each. how: as `mmdit.generate.generate` takes it (max_tokens, max_images, text, begin,
        ...); pictures are drawn as the model's own defaults say unless `image` is given.
        """
        how.setdefault("image", self._image_sampling())
        written = generate(self.model.transformer, [self._parts(p) for p in prompts], seed=seed, **how)
        return [self._shown(one) for one in written]

    def _image_sampling(self) -> ImageSampling:
        s: dict[str, Any] = self.sampling
        factor = self.autoencoder.factor
        size = (self.size[0] // factor, self.size[1] // factor)
        return ImageSampling(size, s["solver"], s["num_steps"], s["guidance"], tuple(s["interval"]), self.shift)

    def _parts(self, prompt: Sequence[str | Image]) -> list[Tensor]:
        trunk, parts = self.model.transformer, []
        for part in prompt:
            if isinstance(part, str):
                ids, mask = self.model.conditioner.tokenize([part])
                parts.append(ids[0, mask[0]][:-1].to(trunk.device))  # without the end: there is more to come
            else:
                pixels = torch.tensor(np.asarray(part.convert("RGB"))).permute(2, 0, 1)[None].to(trunk.device)
                parts.append(self.autoencoder.encode(pixels.float() / 127.5 - 1)[0].to(trunk.dtype))
        return parts

    def _shown(self, written: Written) -> list[str | Image]:
        return [
            self._pictures(part[None])[0] if part.is_floating_point() else self.model.conditioner.tokenizer.decode(part)
            for part in written.parts
        ]

    def _field(self, prompts: Sequence[str], guidance: float, interval: Sequence[float]) -> samplers.Field:
        """The velocity of a picture after each prompt, guided over that of a picture alone."""
        trunk: Transfusion = self.model.transformer
        cache, rows = trunk.cache(len(prompts)), [i for i, prompt in enumerate(prompts) if prompt]
        parts = [self._parts([prompt]) for prompt in prompts]
        if rows:
            reading = cache.reading(rows)
            trunk(trunk.pack([parts[i] for i in rows]), None, reading)
            reading.keep()

        def field(in_context: bool) -> samplers.Field:
            def network(x_t: Tensor, t: Tensor) -> Tensor:
                past = cache.reading(range(len(x_t))) if in_context else None
                return torch.stack(trunk(trunk.pack([[x] for x in x_t]), t, past).v)

            return samplers.Field(network, samplers.RectifiedFlow(), "velocity")

        return samplers.cfg(field(True), field(False), guidance, (interval[0], interval[1]))

    @staticmethod
    def _load_model(folder: Path) -> nn.Module:
        config = read_config(TextConfig, folder / "text" / "config.json")
        tokenizer = Tokenizer.load(folder / "text" / "tokenizer.json", config.max_length)
        transformer = Transfusion(read_config(TransfusionConfig, folder / "transformer" / "config.json"))
        load_weights(transformer, folder / "transformer" / "model.safetensors")
        return CaptionedTransfusion(transformer, Words(config, tokenizer))
