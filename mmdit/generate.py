"""Writing with a `Transfusion`: text token by token, images by solving their flow, in any order (Zhou et al. 2024,
arXiv 2408.11039, section 3.4).

A prompt is read once into a cache. Then the language model writes; where it writes BOI, an image is denoised in its
place from noise, with any solver and guidance of `samplers`; when it is done it is read as finished, at t = 0, and
writing goes on after its EOI. Prompts of a batch wait for each other only where images are drawn, together.

Shape letters: R prompts, V vocabulary, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import samplers
from mmdit.cache import Cache
from mmdit.sequences import Part
from mmdit.transfusion import Transfusion

Stopped = Literal["end", "length"]


@dataclass(frozen=True)
class TextSampling:
    """How a token is drawn from its logits: greedily at temperature 0, else from those that every rule leaves.

    top_k: the k likeliest; top_p: the likeliest that together have this probability; min_p: those with at least this
    share of the likeliest one's.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("expected temperature >= 0 and top_k >= 1")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("expected 0 < top_p <= 1 and 0 <= min_p <= 1")

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One id (R,) of logits (R, V), row i with generator i (on the CPU)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        p = (logits.float() / self.temperature).softmax(-1)
        ordered, order = p.sort(dim=-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < self.top_p  # the likeliest one always
        kept &= ordered >= self.min_p * ordered[:, :1]
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        ordered = torch.where(kept, ordered, 0.0).cpu()
        picks = [torch.multinomial(row, 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
        return order.gather(1, torch.stack(picks).to(order.device))[:, 0]


@dataclass(frozen=True)
class ImageSampling:
    """How an image is drawn: size (h, w) of its latent, solver, steps, guidance over the same image without context."""

    size: tuple[int, int] = (8, 8)
    solver: str = "ab2"
    num_steps: int = 28
    guidance: float = 3.0
    interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0


@dataclass
class Written:
    """What came of one prompt: new parts in reading order, token ids int64 (n,) and latents (C, h, w); and why it
    ended: "end" at the end token, "length" where max_tokens or max_images was reached first."""

    parts: list[Part] = field(default_factory=list)
    stopped: Stopped = "length"


Told = Callable[[int, Part], object]


@torch.no_grad()
def generate(
    model: Transfusion,
    prompts: Sequence[Sequence[Part]],
    max_tokens: int = 64,
    max_images: int = 1,
    text: TextSampling | None = None,
    image: ImageSampling | None = None,
    seed: int | Sequence[int] = 0,
    begin: Literal["text", "image"] = "text",
    told: Told | None = None,
) -> list[Written]:
    """Go on from prompts, each a list of ids (n,) and latents (C, h, w), clean; an empty prompt begins with an image.

    max_tokens, max_images: of each document, beyond its prompt; at max_images none is begun any more. begin = "image"
    draws one at once instead of waiting for BOI. seed: one number (prompt i takes seed + i) or one a prompt: a prompt
    with its seed gives the same alone and in any batch, to rounding. told(i, part) is called with each token and image
    of prompt i as it comes. Raises ValueError for prompts that are none, and for a size the patch does not divide.
    """
    text, image = text or TextSampling(), image or ImageSampling()
    _check(model, prompts, image, begin, max_tokens, max_images)
    config, rows = model.config, range(len(prompts))
    seeds = [seed + i for i in rows] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one number, or one a prompt")
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    cache, out = model.cache(len(prompts)), [Written() for _ in rows]
    logits = model.head.weight.new_full((len(prompts), model.config.vocab_size), -torch.inf)
    drawing = {i for i in rows if begin == "image" or not prompts[i]}
    counts, images = [0] * len(prompts), [0] * len(prompts)

    def read(which: Sequence[int], documents: Sequence[Sequence[Part]]) -> None:
        """Read finished parts into rows; their last logits are kept."""
        reading, batch = cache.reading(which), model.pack(documents)
        states = model(batch, None, reading).states
        reading.keep()
        ends = torch.cat([batch.document.diff() != 0, batch.document.new_ones(1, dtype=torch.bool)])
        logits[list(which)] = model.head(states[ends])

    def add(i: int, part: Part) -> None:
        parts = out[i].parts
        if parts and not parts[-1].is_floating_point() and not part.is_floating_point():
            parts[-1] = torch.cat([parts[-1], part])
        else:
            parts.append(part)
        if told is not None:
            told(i, part)

    given = [i for i in rows if prompts[i]]
    if given:
        read(given, [prompts[i] for i in given])
    writing = {i for i in rows if i not in drawing}
    while writing or drawing:
        if not writing:
            which = sorted(drawing)
            latents = _draw(model, cache, which, image, [generators[i] for i in which])
            read(which, [[x] for x in latents])
            for i, x in zip(which, latents, strict=True):
                images[i] += 1
                add(i, x)
            writing, drawing = drawing, set()
        writing = {i for i in writing if counts[i] < max_tokens}
        which = sorted(writing)
        if not which:
            continue
        allowed = logits[which].clone()
        allowed[:, [config.pad, config.eoi]] = -torch.inf
        full = torch.tensor([images[i] >= max_images for i in which], device=allowed.device)
        allowed[:, config.boi] = allowed[:, config.boi].masked_fill(full, -torch.inf)
        drawn = text.draw(allowed, [generators[i] for i in which]).tolist()
        more: list[int] = []
        for i, token in zip(which, drawn, strict=True):
            if token == config.eos:
                out[i].stopped = "end"
                writing.discard(i)
            elif token == config.boi:
                writing.discard(i)
                drawing.add(i)
            else:
                counts[i] += 1
                add(i, torch.tensor([token]))
                more.append(i)
        if more:
            read(more, [[out[i].parts[-1][-1:].to(logits.device)] for i in more])
    return out


def _draw(
    model: Transfusion, cache: Cache, rows: Sequence[int], how: ImageSampling, generators: list[torch.Generator]
) -> list[Tensor]:
    """An image for each of some rows, from noise, in the context that they hold."""
    c, like = model.config, model.head.weight
    x = samplers.randn((len(rows), c.in_channels, *how.size), generators, like.dtype, None).to(like.device)

    def velocity(in_context: bool) -> samplers.Field:
        def network(x_t: Tensor, t: Tensor) -> Tensor:
            past = cache.reading(rows) if in_context else None
            return torch.stack(model(model.pack([[latent] for latent in x_t]), t, past).v)

        return samplers.Field(network, samplers.RectifiedFlow(), "velocity")

    field = samplers.cfg(velocity(True), velocity(False), how.guidance, how.interval)
    grid = samplers.shift_time(samplers.uniform(how.num_steps), how.shift)
    return list(samplers.sample(field, x, how.solver, grid=grid, generator=generators).x)


def _check(
    model: Transfusion, prompts: Sequence[Sequence[Part]], image: ImageSampling, begin: str, tokens: int, images: int
) -> None:
    if not prompts:
        raise ValueError("no prompt given: pass at least one, an empty list for an image from nothing")
    if begin not in ("text", "image"):
        raise ValueError(f"begin is {begin!r}, expected 'text' or 'image'")
    if tokens < 0 or images < 0:
        raise ValueError(f"max_tokens = {tokens} and max_images = {images}: give numbers of at least 0")
    if model.config.attention == "full":
        raise ValueError("a model whose text sees what follows cannot write: attention must be causal over the text")
    if any(side < 1 or side % model.config.patch_size for side in image.size):
        raise ValueError(f"an image of {image.size} does not fit: both sides must divide by {model.config.patch_size}")
