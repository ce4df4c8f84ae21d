"""ShapesEval: the six tasks of GenEval (Ghosh et al. 2023, arXiv:2310.11513) on the shapes world.

The tasks ("questions") are one object, two objects, counting, colours, position and colour attribution. As in GenEval a
detector finds the objects of a generated image, which decide the answer. As images are flat shapes, it needs no
weights: the background is the median colour of the border, pixels get a colour by projection on the lines from
background to colours, objects are connected components, and shapes are found by template matching of coverage with
position and area normalised.

Letters: H, W image sides; P template side; K number of templates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from training.shapes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    OPPOSITE,
    SHAPES,
    SIZES,
    Facts,
    Item,
    Object,
    Scene,
    caption_for,
    draw_facts,
    image_height_width,
    is_held_out,
    parse_caption,
    related,
    render,
    scene_for,
)

KIND_OF_QUESTION = {  # the kind of facts of its prompts
    "one object": "single",
    "two objects": "pair",
    "counting": "count",
    "colours": "single",
    "position": "relation",
    "colour attribution": "pair",
}
QUESTIONS = tuple(KIND_OF_QUESTION)
POSITION_MARGIN = 0.1  # least offset of two centres, in image sides; true renderings have at least twice that

WORKING_SIDE = 64  # shorter side to which every image is resized, in pixels; the thresholds below are for it
FRAME = 2  # width of the border, in pixels, which has no or few pixels of objects
SMOOTHING = 0.5  # sigma of a Gaussian filter against pixel noise, in pixels
MIN_AREA = 20  # pixels of an object; the smallest rendered one has more than 70
MIN_CONTRAST = 45  # least RGB distance to the background of a pixel of an object
MIN_SHARE = 0.4  # least share of an object's colour, mixed with the background, in a pixel of the object
MAX_COLOUR_ERROR = 75  # largest RGB distance to a named colour; named colours are 88 apart or more
MIN_OVERLAP = 0.86  # soft intersection over union with the best template
MIN_LEAD = 0.03  # least difference in overlap between the best shape and the second
TEMPLATE_BLURS = (SMOOTHING, 0.9, 1.4)  # sigmas in pixels, as generated images are a little blurred
TEMPLATE_SIDE, TEMPLATE_REACH = 24, 1.75  # samples a side, and half-width in radii of the disc of equal area


@dataclass(frozen=True)
class Found:
    """A detected object; shape and size are None where no shape clearly fits, colour where no named colour is near.

    (x, y) is its centroid in [0, 1], `area` the fraction of the image that it covers, `confidence` the overlap (soft
    intersection over union, at most 1) with the best template.
    """

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float
    area: float
    confidence: float


@dataclass(frozen=True)
class Detection:
    """What the detector finds in one image; background is None where no named one is near."""

    background: str | None
    objects: tuple[Found, ...]


# --- the detector ----------------------------------------------------------------------------------------------------


def detect(image: Any) -> Detection:
    """Find the objects in an image: uint8 (H, W, 3), or a PIL image. Raises ValueError for anything else."""
    pixels = _at_working_size(image)
    frame = (pixels[:FRAME], pixels[-FRAME:], pixels[:, :FRAME], pixels[:, -FRAME:])  # background in every scene
    backdrop = np.median(np.concatenate([edge.reshape(-1, 3) for edge in frame]), axis=0)
    regions = _regions(pixels, backdrop)
    objects = (_found(pixels, backdrop, regions == i) for i in range(1, int(regions.max()) + 1))
    return Detection(_nearest(backdrop, BACKGROUNDS), tuple(thing for thing in objects if thing is not None))


def _at_working_size(image: Any) -> np.ndarray:
    """The image resized to a shorter side of WORKING_SIDE pixels and smoothed: float (H, W, 3), 0 to 255."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be uint8 of shape (height, width, 3), not {array.dtype} of {array.shape}")
    height, width = image_height_width(array.shape[:2])
    scale = WORKING_SIDE / min(height, width)
    if scale != 1:
        size = (round(width * scale), round(height * scale))
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        array = np.asarray(Image.fromarray(array).resize(size, method))
    return ndimage.gaussian_filter(array.astype(np.float32), (SMOOTHING, SMOOTHING, 0))


def _regions(pixels: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    """Label the objects: int (H, W), 0 for background, each other label a connected region of one colour.

    A pixel gets the colour whose segment from the background's colour is nearest to it, as antialiased edge pixels lie
    on the segment: half red on white is close to pink, but to no mixture of pink and white.
    """
    height, width, _ = pixels.shape
    offset = pixels - backdrop
    covered = np.linalg.norm(offset, axis=-1) > MIN_CONTRAST
    offset = offset[covered]
    direction = np.array(list(COLOURS.values()), dtype=np.float32) - backdrop
    share = np.clip(offset @ (direction / (direction**2).sum(1, keepdims=True)).T, 0, 1)
    distance = np.full((height, width, len(COLOURS)), np.inf, dtype=np.float32)
    distance[covered] = np.linalg.norm(offset[:, None] - share[..., None] * direction, axis=-1)
    colour = distance.argmin(-1)
    covered[covered] = np.take_along_axis(share, colour[covered][:, None], -1)[:, 0] > MIN_SHARE
    regions = np.zeros((height, width), dtype=int)
    blobs, num_blobs = ndimage.label(covered)
    for number, box in zip(range(1, num_blobs + 1), ndimage.find_objects(blobs), strict=True):
        blob = blobs[box] == number
        votes = np.bincount(colour[box][blob], minlength=len(COLOURS))
        present = np.flatnonzero(votes >= max(MIN_AREA, 0.2 * votes.sum()))
        if not len(present):
            continue
        if len(present) == 1:
            regions[box][blob] = regions.max() + 1
            continue
        own = present[distance[box][..., present].argmin(-1)]  # objects of several colours touch: separate them
        for one in present:
            parts, _ = ndimage.label(blob & (own == one))
            regions[box] = np.where(parts > 0, parts + regions.max(), regions[box])
    return regions


def _found(pixels: np.ndarray, backdrop: np.ndarray, region: np.ndarray) -> Found | None:
    """The object of a region; None if it has fewer than MIN_AREA pixels."""
    if region.sum() < MIN_AREA:
        return None
    tint, coverage = _coverage(pixels, backdrop, region)
    y, x, area = _centroid(coverage)
    shape, size, overlap = _classify(_normalised(coverage), area)
    height, width = region.shape
    return Found(
        shape,
        _nearest(tint, COLOURS),
        size,
        x=(x + 0.5) / width,
        y=(y + 0.5) / height,
        area=area / region.size,
        confidence=overlap,
    )


def _coverage(pixels: np.ndarray, backdrop: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour (3,) of a region, and the coverage (H, W) in [0, 1] of pixels in and around it by that colour."""
    offset = pixels - backdrop
    contrast = np.linalg.norm(offset[region], axis=-1)
    direction = np.median(offset[region][contrast >= np.quantile(contrast, 0.6)], axis=0)
    near = ndimage.binary_dilation(region, iterations=2)
    return backdrop + direction, np.clip(offset @ (direction / (direction**2).sum()), 0, 1) * near


def _centroid(coverage: np.ndarray) -> tuple[float, float, float]:
    """Centroid and area (y, x, area) of a coverage map, in pixels."""
    area = float(coverage.sum())
    y = float(coverage.sum(1) @ np.arange(coverage.shape[0])) / area
    x = float(coverage.sum(0) @ np.arange(coverage.shape[1])) / area
    return y, x, area


def _normalised(coverage: np.ndarray) -> np.ndarray:
    """A coverage map (H, W) resampled to a standard centroid and area: (P * P,)."""
    y, x, area = _centroid(coverage)
    reach = TEMPLATE_REACH * math.sqrt(area / math.pi)
    steps = np.linspace(-reach, reach, TEMPLATE_SIDE)
    return ndimage.map_coordinates(coverage, np.meshgrid(y + steps, x + steps, indexing="ij"), order=1).ravel()


def _classify(sample: np.ndarray, area: float) -> tuple[str | None, str | None, float]:
    """(shape, size, overlap) of a normalised coverage map; shape and size are None where no shape clearly fits."""
    templates, areas = _templates()
    overlaps = np.minimum(templates, sample).sum(-1) / np.maximum(templates, sample).sum(-1)
    best_of = overlaps.reshape(len(SHAPES), -1).max(1)
    first, second = np.argsort(best_of)[[-1, -2]]
    overlap = float(best_of[first])
    if overlap < MIN_OVERLAP or overlap - best_of[second] < MIN_LEAD:
        return None, None, overlap
    size = int(np.abs(np.log(areas[first] / area)).argmin())
    return SHAPES[first], tuple(SIZES)[size], overlap


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Normalised coverage (K, P * P) by shape, size and blur, and areas (shapes, sizes), as of detected objects."""
    templates, areas = [], np.zeros((len(SHAPES), len(SIZES)))
    for i, shape in enumerate(SHAPES):
        for j, size in enumerate(SIZES):
            scene = Scene("black", (Object(shape, "pink", size, 0.5, 0.5),))
            picture = render(scene, WORKING_SIDE).astype(np.float32)
            for blur in TEMPLATE_BLURS:
                pixels = ndimage.gaussian_filter(picture, (blur, blur, 0))
                backdrop = np.zeros(3, dtype=np.float32)
                _, coverage = _coverage(pixels, backdrop, _regions(pixels, backdrop) == 1)
                templates.append(_normalised(coverage))
                areas[i, j] += coverage.sum() / len(TEMPLATE_BLURS)
    return np.array(templates), areas


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOUR_ERROR else None


# --- the questions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A caption, and the question that is asked of an image generated from it."""

    question: str
    caption: str
    facts: Facts

    def answered_by(self, image: Any) -> bool:
        """Whether the image, uint8 (H, W, 3) or PIL, is right by the question."""
        return answers(self.question, self.facts, detect(image))


def answers(question: str, facts: Facts, detection: Detection) -> bool:
    """Whether a detection is right by `question` about `facts`; nothing else is checked.

    one object, two objects: the shapes are found. counting: the shape is found exactly `count` times, and every object
    has a known shape. colours, colour attribution: each shape is found in its colour. position: of both shapes objects
    are found whose offset satisfies the relation by POSITION_MARGIN.
    """
    if facts.kind != KIND_OF_QUESTION.get(question):
        raise ValueError(
            f"cannot ask {question!r} of {facts}: expected one of {', '.join(QUESTIONS)}, and facts to fit"
        )
    items = facts.items
    if question in ("one object", "two objects"):
        return all(_matching(Item(item.shape), detection) for item in items)
    if question in ("colours", "colour attribution"):
        return all(_matching(Item(item.shape, item.colour), detection) for item in items)
    if question == "counting":
        unnamed = any(thing.shape is None for thing in detection.objects)
        return not unnamed and len(_matching(Item(items[0].shape), detection)) == facts.count
    first, second = (_matching(Item(item.shape), detection) for item in items)
    offsets = [np.array([b.x - a.x, b.y - a.y]) for a in first for b in second if a is not b]
    return any(related(str(facts.relation), offset, POSITION_MARGIN) for offset in offsets)


def _matching(item: Item, detection: Detection) -> list[Found]:
    return [thing for thing in detection.objects if thing.shape == item.shape and item.colour in (None, thing.colour)]


class ShapesEval:
    """Held-out prompts and the score of images for them; a pure function of the arguments.

    `prompts`: `prompts_per_question` for each question, in the order of QUESTIONS, with each shape about equally often.
    Raises ValueError for bad arguments.
    """

    def __init__(self, image_size: int | tuple[int, int] = 64, prompts_per_question: int = 32, seed: int = 0) -> None:
        self.image_size = image_height_width(image_size)
        if not isinstance(prompts_per_question, int | np.integer) or prompts_per_question < 1:
            raise ValueError(f"prompts_per_question must be a whole number, 1 or more, not {prompts_per_question!r}")
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more, not {seed!r}")
        self.seed = int(seed)
        self.prompts: list[Prompt] = []
        for i, question in enumerate(QUESTIONS):
            self.prompts += _draw_prompts(question, prompts_per_question, np.random.default_rng([self.seed, i]))

    def score(self, images: Sequence[Any]) -> dict[str, float]:
        """The fraction of images that are right, by question, and the mean; `images`: one for each prompt, in order."""
        if len(images) != len(self.prompts):
            raise ValueError(
                f"expected one image for each of the {len(self.prompts)} prompts, not {len(images)} images"
            )
        hits: dict[str, list[bool]] = {question: [] for question in QUESTIONS}
        for prompt, image in zip(self.prompts, images, strict=True):
            hits[prompt.question].append(prompt.answered_by(image))
        scores = {question: sum(answered) / len(answered) for question, answered in hits.items()}
        return {**scores, "mean": sum(scores.values()) / len(scores)}

    def true_images(self, prompts: Sequence[Prompt] | None = None) -> list[np.ndarray]:
        """A correct rendering, uint8 (H, W, 3), for each of `prompts`, by default the evaluation's own."""
        chosen = self.prompts if prompts is None else prompts
        rngs = (np.random.default_rng([self.seed, len(QUESTIONS), i]) for i in range(len(chosen)))
        return [render(scene_for(p.facts, rng), self.image_size) for p, rng in zip(chosen, rngs, strict=True)]

    def contrast(self, prompt: Prompt) -> Prompt:
        """The prompt with what its question asks changed, so that no image is right for both."""
        rng = np.random.default_rng([self.seed, *prompt.caption.encode()])
        facts = _changed(prompt.question, prompt.facts, rng)
        return Prompt(prompt.question, caption_for(facts, rng), facts)


def _draw_prompts(question: str, number: int, rng: np.random.Generator) -> list[Prompt]:
    """Held-out prompts, with the shapes in turn; a caption is repeated only after ten tries for another."""
    prompts: dict[str, Prompt] = {}
    repeats: list[Prompt] = []
    for i in range(number):
        shape = SHAPES[i % len(SHAPES)]
        for _ in range(10):
            facts = _draw_question_facts(question, shape, rng)
            caption = caption_for(facts, rng)
            if caption not in prompts:
                prompts[caption] = Prompt(question, caption, facts)
                break
        else:
            repeats.append(Prompt(question, caption, facts))
    return [*prompts.values(), *repeats]


def _draw_question_facts(question: str, shape: str, rng: np.random.Generator) -> Facts:
    while True:
        facts = draw_facts(rng, KIND_OF_QUESTION[question])
        first, *rest = facts.items
        facts = replace(facts, items=(replace(first, shape=shape), *rest))
        if all(item.shape != shape for item in rest) and _can_be_asked(question, facts) and is_held_out(facts):
            return facts


def _can_be_asked(question: str, facts: Facts) -> bool:
    colours = {item.colour for item in facts.items}
    if question in ("colours", "colour attribution"):
        return None not in colours and len(colours) == len(facts.items)
    return question != "counting" or facts.items[0].size in (None, "small")  # four larger ones leave little room


def _changed(question: str, facts: Facts, rng: np.random.Generator) -> Facts:
    """The facts with what the question asks changed."""
    first, *rest = facts.items
    if question in ("one object", "two objects"):
        taken = {item.shape for item in facts.items}
        first = replace(first, shape=str(rng.choice([shape for shape in SHAPES if shape not in taken])))
    elif question == "counting":
        return replace(facts, count=int(rng.choice([count for count in COUNTS if count != facts.count])))
    elif question == "colours":
        first = replace(first, colour=str(rng.choice([colour for colour in COLOURS if colour != first.colour])))
    elif question == "position":
        return replace(facts, relation=OPPOSITE[str(facts.relation)])
    elif question == "colour attribution":
        first, rest = replace(first, colour=rest[0].colour), [replace(rest[0], colour=first.colour)]
    return replace(facts, items=(first, *rest))


def describes(caption: str, scene: Scene) -> bool:
    """Whether the objects of a caption are those of a scene, by shape and, where stated, by colour.

    False for text that `parse_caption` refuses.
    """
    try:
        facts = parse_caption(caption)
    except ValueError:
        return False
    named = facts.items * facts.count
    return len(named) == len(scene.objects) and any(
        all(item.shape == o.shape and item.colour in (None, o.colour) for item, o in zip(named, order, strict=True))
        for order in permutations(scene.objects)
    )
