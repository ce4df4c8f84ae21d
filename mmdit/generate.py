"""Generation with a `Transfusion`: text token by token, images by solving their flow, in any order (Zhou et al. 2024,
arXiv 2408.11039, section 3.4).

A prompt is prefilled into a KV cache. Then text is sampled; at BOI (or the size tokens before it) an image is sampled
from noise in its place, with any solver and guidance of `samplers`. The finished image is added to the cache at t = 0,
and text continues after its EOI. Images of a batch are sampled together, once no prompt is writing text.

Shape letters: R prompts, V vocabulary, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

import samplers
from mmdit.cache import NO_ROW, Cache
from mmdit.drawing import each_seed
from mmdit.memory import keeping_memory
from mmdit.sampling import check_finite, check_solver, pair_of_numbers
from mmdit.sequences import MixedBatch, Part, check_parts
from mmdit.transfusion import Transfusion
from samplers.schedules import widest_float

Stopped = Literal["end", "length"]
Told = Callable[[int, Part], object]


@dataclass(frozen=True)
class TextSampling:
    """How a token is sampled from its logits: greedily at temperature 0, else from the tokens that the rules keep.

    top_k keeps the k most probable tokens; of these top_p keeps the most probable ones up to this share of their total
    probability, and min_p those with at least this fraction of the highest probability: the order of transformers.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, ("temperature", "top_p", "min_p"))
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected a number of at least 0")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k is {self.top_k}, expected a whole number of at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, expected a number in [0, 1]")

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One id per row, (R,), of logits (R, V); row i is sampled with generator i (on the CPU)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.to(widest_float(logits.device))  # in float32 the smallest temperatures would round to 0
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1).float()
        ordered, order = p.sort(dim=-1, descending=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = 0.0
        kept = ordered >= self.min_p * ordered[:, :1]
        if self.top_p < 1:  # the most probable one is always kept
            kept &= ordered.cumsum(-1) - ordered < self.top_p * ordered.sum(-1, keepdim=True)
        ordered = torch.where(kept, ordered, 0.0).cpu()
        picks = [torch.multinomial(row, 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
        return order.gather(1, torch.stack(picks).to(order.device))[:, 0]


@dataclass(frozen=True)
class ImageSampling:
    """How an image is sampled: size (h, w) of its latent, solver, steps, guidance away from the image without context.

    size None: the model chooses, if it has size tokens. shift: the time shift at latents of size `shift_of`; at other
    sizes it is multiplied by the root of the ratio of tokens. shift_of None: shift holds for any size.
    """

    size: tuple[int, int] | None = (8, 8)
    solver: str = "ab2"
    num_steps: int = 28
    guidance: float = 3.0
    interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0
    diffusion: str | float | None = None
    """Noise of an SDE solver: "kl", "sigma", "sin2", "constant" or a number; None is the solver's own."""
    shift_of: tuple[int, int] | None = None
    grid: str = "uniform"
    """Times by name, of `samplers.GRIDS`, before the shift."""

    def __post_init__(self) -> None:
        check_finite(self, ("guidance", "shift"))
        object.__setattr__(self, "interval", pair_of_numbers("interval", self.interval))
        if self.size is not None:
            object.__setattr__(self, "size", pair_of_numbers("size", self.size))
            if not all(isinstance(side, Integral) for side in self.size):
                raise ValueError(f"size is {self.size}, expected two whole numbers")
        if self.guidance < 0 or self.shift <= 0:
            raise ValueError(f"guidance is {self.guidance} and shift {self.shift}, expected >= 0 and > 0")
        if self.shift_of is not None and min(pair_of_numbers("shift_of", self.shift_of)) <= 0:
            raise ValueError(f"shift_of is {self.shift_of}, expected the sides of a latent")
        check_solver(self.solver, samplers.time_grid(self.grid, self.num_steps, self.shift), self.diffusion)


@dataclass
class Written:
    """The continuation of one prompt: new parts in reading order, token ids int64 (n,) and latents (C, h, w), or from
    a pipeline strings and PIL images; and why it ended.

    stopped: "end" at the end token; "length" if max_tokens, or the model's longest document, was reached first.
    """

    parts: list[Any] = field(default_factory=list)
    stopped: Stopped = "length"


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
    """Continue prompts, each a list of ids (n,) and clean latents (C, h, w); an empty prompt begins with an image.

    max_tokens, max_images: of each document, beyond its prompt; after max_images the model cannot begin another one.
    begin = "image" begins with an image instead of text. seed: one number (prompt i takes seed + i) or one per prompt;
    a prompt and a seed give the same alone and in any batch, to rounding. told(i, part) is called with each token and
    image of prompt i as it comes. Raises ValueError for prompts of another form, and for a size that is no multiple of
    the patch.
    """
    text, image = (TextSampling() if text is None else text), (ImageSampling() if image is None else image)
    for name, given, kind in (("text", text, TextSampling), ("image", image, ImageSampling)):
        if not isinstance(given, kind):
            raise ValueError(f"{name} is a {type(given).__name__}, expected a {kind.__name__}")
    check_parts(prompts, "prompt")
    prompts = [[part for part in prompt if part.numel()] for prompt in prompts]  # drop empty parts
    _check(model, prompts, image, begin, max_tokens, max_images)
    generation = _Generation(model, each_seed(seed, len(prompts)), max_tokens, max_images, text, image, told)
    generation.prefill(prompts, begin == "image")
    with keeping_memory(model.device):
        while generation.writing or generation.drawing:
            if generation.writing:
                generation.sample_tokens()
            else:
                generation.sample_images()
    return generation.out


class _Generation:
    """The state of a batch being generated: `writing`, the rows whose next part is text; `drawing`, the rows that wait
    for an image, with the size of its latent; and what each row has so far.
    """

    def __init__(
        self,
        model: Transfusion,
        seeds: Sequence[int],
        max_tokens: int,
        max_images: int,
        text: TextSampling,
        image: ImageSampling,
        told: Told | None,
    ) -> None:
        self.model, self.config, self.text, self.image, self.told = model, model.config, text, image, told
        self.max_tokens, self.max_images, num = max_tokens, max_images, len(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.cache, self.out = model.cache(num), [Written() for _ in seeds]
        self.logits = model.head.weight.new_zeros(num, self.config.vocab_size)  # of each row's next token
        self.writing: set[int] = set()
        self.drawing: dict[int, tuple[int, int]] = {}
        self.tokens, self.images, self.lengths = [0] * num, [0] * num, [0] * num

    def prefill(self, prompts: Sequence[Sequence[Part]], image_first: bool) -> None:
        """Add the prompts to the cache."""
        given = [i for i, prompt in enumerate(prompts) if prompt]
        if given:
            self._append(given, [prompts[i] for i in given])
        for i, prompt in enumerate(prompts):
            if image_first or not prompt:
                self._begin_image(i)
            else:
                self.writing.add(i)

    def sample_tokens(self) -> None:
        """One more token for each row that writes."""
        self.writing = {i for i in self.writing if self.tokens[i] < self.max_tokens and self._fits(i)}
        rows = sorted(self.writing)
        if not rows:
            return
        sampled = self.text.draw(self._allowed(rows), [self.generators[i] for i in rows]).tolist()
        for i, token in zip(rows, sampled, strict=True):
            if token == self.config.eos:
                self.out[i].stopped = "end"
                self.writing.discard(i)
            elif token in self.config.opening:
                self.writing.discard(i)
                self._begin_image(i, token)
            else:
                self.tokens[i] += 1
                self._emit(i, torch.tensor([token]))
        more = [(i, token) for i, token in zip(rows, sampled, strict=True) if i in self.writing]
        if more:
            ids = torch.tensor([[token] for _, token in more], device=self.logits.device)
            self._append([i for i, _ in more], [[row] for row in ids])

    def sample_images(self) -> None:
        """An image for each row that waits for one, those of one size together; then these rows write again."""
        for size in sorted(set(self.drawing.values())):
            rows = [i for i in sorted(self.drawing) if self.drawing[i] == size]
            latents = self._denoise(rows, size)
            self._append(rows, [[x] for x in latents])
            for i, x in zip(rows, latents, strict=True):
                self.images[i] += 1
                self._emit(i, x)
        self.writing = set(self.drawing)
        self.drawing = {}

    def _append(self, rows: Sequence[int], documents: Sequence[Sequence[Part]]) -> None:
        """Add finished parts to the cache, and set the logits of the next token."""
        reading, batch = self.cache.reading(rows), self.model.pack(documents)
        states = self.model(batch, None, reading).states
        reading.keep()
        ends = torch.cat([batch.document.diff() != 0, batch.document.new_ones(1, dtype=torch.bool)])
        self.logits[list(rows)] = self.model.head(states[ends])
        for i, length in zip(rows, reading.lengths.tolist(), strict=True):
            self.lengths[i] = length

    def _fits(self, i: int, size: tuple[int, int] | None = None) -> bool:
        """Whether one more token, or an image of this size, keeps row i within the model's longest document."""
        new = 1 if size is None else self.config.image_tokens(size)
        return self.lengths[i] + new <= self.config.max_tokens

    def _allowed(self, rows: list[int]) -> Tensor:
        """The logits of rows, with those of reserved tokens, and of a further image after `max_images`, at -inf."""
        allowed, opening = self.logits[rows].clone(), list(self.config.opening)
        allowed[:, [i for i in self.config.reserved if i not in opening]] = -torch.inf
        full = [self.images[i] >= self.max_images for i in rows]
        allowed[:, opening] = allowed[:, opening].masked_fill(
            torch.tensor(full, device=allowed.device)[:, None], -torch.inf
        )
        return allowed

    def _begin_image(self, i: int, token: int | None = None) -> None:
        """Row i continues with an image, if it fits: of the size asked for, or that its size tokens state.

        token: the first of these, if it has been sampled.
        """
        if self._fits(i):  # the first size token, if there is one
            size = self.image.size or self._sample_size(i, token)
            if self._fits(i, size):
                self.drawing[i] = size

    def _sample_size(self, i: int, rows: int | None) -> tuple[int, int]:
        """The latent size that the model states in two tokens, of which the first may have been sampled already."""
        opening, one, patch = torch.tensor(self.config.opening), self.config.first_size, self.config.patch_size

        def sampled(logits: Tensor) -> int:
            return int(opening[self.text.draw(logits[None, opening.to(logits.device)], [self.generators[i]])[0].cpu()])

        rows = sampled(self.logits[i]) if rows is None else rows
        ids = torch.tensor([rows], device=self.logits.device)
        batch = MixedBatch(ids, torch.zeros_like(ids), (), self.config.boi, self.config.eoi)
        states = self.model(batch, None, self.cache.reading([i])).states  # not kept: it is appended with its image
        columns = sampled(self.model.head(states[-1]))
        return (rows - one + 1) * patch, (columns - one + 1) * patch

    def _denoise(self, rows: list[int], size: tuple[int, int]) -> list[Tensor]:
        """Latents (C, h, w) of this size, sampled from noise, that continue these rows."""
        how, generators, model = self.image, [self.generators[i] for i in rows], self.model
        shape = (len(rows), self.config.in_channels, *size)
        x = samplers.randn(shape, generators, model.state_dtype, None).to(model.device)
        field = velocity(model, self.cache, rows, how.guidance, how.interval)
        base = how.shift_of or size
        shift = how.shift * samplers.resolution_shift(size[0] * size[1], base[0] * base[1])
        grid = samplers.time_grid(how.grid, how.num_steps, shift)
        out = samplers.sample(field, x, how.solver, grid=grid, diffusion=how.diffusion, generator=generators)
        return list(out.x)

    def _emit(self, i: int, part: Part) -> None:
        """Add a part to row i's output, and report it."""
        parts = self.out[i].parts
        if parts and not parts[-1].is_floating_point() and not part.is_floating_point():
            parts[-1] = torch.cat([parts[-1], part])
        else:
            parts.append(part)
        if self.told is not None:
            self.told(i, part)


def velocity(
    model: Transfusion, cache: Cache, rows: Sequence[int], guidance: float = 1.0, interval: Sequence[float] = (0, 1)
) -> samplers.Field:
    """The field of images (B, C, h, w) that continue B rows of a cache, guided away from that of images without
    context; both are evaluated in one pass.
    """

    def field(rows: Sequence[int]) -> samplers.Field:
        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return torch.stack(model(model.pack([[x] for x in x_t]), t, cache.reading(rows)).v).to(x_t.dtype)

        return samplers.Field(network, samplers.RectifiedFlow(), "velocity")

    pair = field([*rows, *[NO_ROW] * len(rows)])
    return samplers.cfg_batched(field(rows), pair, guidance, (interval[0], interval[1]))


def _check(
    model: Transfusion, prompts: Sequence[Sequence[Part]], image: ImageSampling, begin: str, tokens: int, images: int
) -> None:
    if not prompts:
        raise ValueError("no prompt given: pass at least one, an empty list for an image from nothing")
    if begin not in ("text", "image"):
        raise ValueError(f"begin is {begin!r}, expected 'text' or 'image'")
    if any(not isinstance(number, Integral) or number < 0 for number in (tokens, images)):
        raise ValueError(f"max_tokens = {tokens!r} and max_images = {images!r}: give whole numbers of at least 0")
    if not images and (begin == "image" or not all(prompts)):
        raise ValueError("max_images is 0, but an image is to begin: give at least 1, and prompts that are not empty")
    if model.config.attention == "full":
        raise ValueError("a model with attention = 'full' cannot generate: attention must be causal over the text")
    if image.size is None:
        if not model.config.size_tokens or not all(prompts):
            raise ValueError(
                "no size is given for an image: a model with size tokens (size_tokens) chooses one after a prompt"
            )
    elif any(side < 1 or side % model.config.patch_size for side in image.size):
        raise ValueError(
            f"an image of {image.size} does not fit: both sides must be multiples of {model.config.patch_size}"
        )
    else:
        c, (rows, columns) = model.config, (side // model.config.patch_size for side in image.size)
        limits = [c.size_tokens] if c.size_tokens else []
        limits += [c.pos_embed_max_size] if c.positions != "rope" else []
        if limits and max(rows, columns) > min(limits):
            raise ValueError(
                f"an image of {rows} x {columns} patches does not fit: the model draws sizes of 1 to {min(limits)}"
            )
