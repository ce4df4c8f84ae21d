"""A procedural world of captioned pictures: coloured shapes, sizes, counts, positions and backgrounds.

`Facts` are what a caption states, and no more. A `Scene` is a whole picture: it agrees with the facts, and what they
leave open is random. A caption is one of several wordings of the same facts.

    draw_facts -> Facts -> caption_for -> caption -> parse_caption -> Facts
                        -> scene_for -> Scene -> render -> image uint8 (H, W, 3)

Captions are held out of training by the facts they state, not by their wording, and "a left of b" is the same fact as
"b right of a": no paraphrase of a held-out caption is trained on (`content`, `is_held_out`).

Scenes have coordinates in the unit square, x to the right and y downwards in [0, 1], and radii in units of the shorter
image side. Distances can only grow in a wider or taller image, so that a scene is valid at every image size. Each
object is centred in a quarter of its own: four positions, each seen often, can be learnt in a quarter of an hour.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 30, 40),
    "orange": (255, 128, 0),
    "yellow": (255, 225, 30),
    "green": (40, 160, 60),
    "cyan": (40, 210, 230),
    "blue": (20, 60, 230),
    "purple": (120, 20, 180),
    "pink": (255, 105, 180),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "beige": (230, 215, 180)}
SIZES = {"small": 0.15, "medium": 0.18, "large": 0.22}  # radius of the circumscribed circle, in shorter image sides
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "held-out", "all")

QUARTERS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))  # centres (x, y) of the quarters
HELD_OUT_ONE_IN = 10  # one in so many contents is held out
HELD_OUT_SALT = 31  # chosen so that for each shape a caption that names it without a colour is held out

# Half of the pictures have one object: only there does a shape's word describe all that is drawn.
KIND_PROBABILITIES: dict[str, float] = {"single": 0.5, "count": 0.15, "pair": 0.1, "relation": 0.25}
# Probability that a caption states an attribute. Detailed captions teach more per step (SD3, with synthetic ones).
STATED = {"background": 0.75, "colour": 0.85, "size": 0.25}
RELATION_WORDINGS = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{a} with {b} to its right"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}", "{a} with {b} to its left"),
    "above": ("{a} above {b}", "{a} over {b}", "{a} with {b} below it"),
    "below": ("{a} below {b}", "{a} under {b}", "{a} with {b} above it"),
}
BACKGROUND_WORDINGS = (" on a {} background", " on {}")
ITEM_PATTERN = rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"


@dataclass(frozen=True)
class Item:
    """What a caption states of one object, or of each of several equal ones; None where it states nothing."""

    shape: str
    colour: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, SHAPES)
        _one_of("colour", self.colour, COLOURS, optional=True)
        _one_of("size", self.size, SIZES, optional=True)


@dataclass(frozen=True)
class Facts:
    """What a caption states: one item, `count` times (1 to 4), or two, and maybe the relation of first to second."""

    items: tuple[Item, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _one_of("relation", self.relation, RELATIONS, optional=True)
        _one_of("background", self.background, BACKGROUNDS, optional=True)
        if len(self.items) not in (1, 2):
            raise ValueError(f"facts hold one or two items, not {len(self.items)}")
        if self.count != 1 and (self.count not in COUNTS or len(self.items) != 1):
            raise ValueError(f"count must be 1, or 2 to 4 of one item, not {self.count} of {len(self.items)} items")
        if self.relation is not None and len(self.items) != 2:
            raise ValueError(f"the relation {self.relation!r} needs two items, not {len(self.items)}")

    @property
    def kind(self) -> str:
        """One of "single", "count", "pair", "relation"."""
        if len(self.items) == 1:
            return "single" if self.count == 1 else "count"
        return "pair" if self.relation is None else "relation"


@dataclass(frozen=True)
class Object:
    """An object of a scene; (x, y) is its centre in [0, 1], from the left and from the top."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, SHAPES)
        _one_of("colour", self.colour, COLOURS)
        _one_of("size", self.size, SIZES)
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise ValueError(f"an object's centre must lie in [0, 1] x [0, 1], not at ({self.x}, {self.y})")


@dataclass(frozen=True)
class Scene:
    """A whole picture: a flat background and one to four objects that do not touch."""

    background: str
    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        _one_of("background", self.background, BACKGROUNDS)


class ShapesWorld:
    """An infinite, seeded source of captioned pictures.

    `split`: "train" (no held-out content), "held-out" (held-out content only) or "all".
    Raises ValueError for a bad size, seed or split.
    """

    def __init__(self, image_size: int | tuple[int, int] = 64, seed: int = 0, split: str = "train") -> None:
        _one_of("split", split, SPLITS)
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more, not {seed!r}")
        self.height, self.width = image_height_width(image_size)
        self.seed, self.split = int(seed), split

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, str, Scene]:
        """Draw (image uint8 (H, W, 3), caption, scene)."""
        facts = self._facts(rng)
        caption, scene = caption_for(facts, rng), scene_for(facts, rng)
        return render(scene, (self.height, self.width)), caption, scene

    def __getitem__(self, i: int) -> tuple[np.ndarray, str, Scene]:
        """Sample i, a pure function of (seed, split, i)."""
        return self.sample(self._rng(i))

    def caption(self, i: int) -> str:
        """The caption of sample i, without rendering its image."""
        rng = self._rng(i)
        return caption_for(self._facts(rng), rng)

    def _rng(self, i: int) -> np.random.Generator:
        if i < 0:
            raise IndexError(f"the world counts from 0 and has no end; there is no sample {i}")
        return np.random.default_rng([self.seed, SPLITS.index(self.split), i])

    def _facts(self, rng: np.random.Generator) -> Facts:
        while True:
            facts = draw_facts(rng)
            if self.split == "all" or is_held_out(facts) == (self.split == "held-out"):
                return facts


# --- facts -----------------------------------------------------------------------------------------------------------


def draw_facts(rng: np.random.Generator, kind: str | None = None) -> Facts:
    """Random facts; `kind` is "single", "count", "pair", "relation" or (None) any of them."""
    if kind is None:
        kind = str(rng.choice(list(KIND_PROBABILITIES), p=list(KIND_PROBABILITIES.values())))
    _one_of("kind", kind, KIND_PROBABILITIES)
    background = _choice(rng, BACKGROUNDS) if rng.random() < STATED["background"] else None
    if kind in ("single", "count"):
        count = 1 if kind == "single" else int(rng.integers(2, 5))
        colour = _choice(rng, COLOURS) if rng.random() < STATED["colour"] else None
        size = _choice(rng, SIZES) if rng.random() < STATED["size"] else None
        return Facts((Item(_choice(rng, SHAPES), colour, size),), count=count, background=background)
    shapes = rng.permutation(SHAPES)[:2].tolist()
    colours = [_choice(rng, COLOURS) for _ in shapes] if rng.random() < STATED["colour"] else [None, None]
    sizes = [_choice(rng, SIZES) if rng.random() < STATED["size"] else None for _ in shapes]
    if kind == "relation" and background is not None:
        sizes = [None, None]  # keeps the caption short
    items = tuple(Item(*attributes) for attributes in zip(shapes, colours, sizes, strict=True))
    return Facts(items, relation=_choice(rng, RELATIONS) if kind == "relation" else None, background=background)


def content(facts: Facts) -> tuple:
    """The facts in canonical form, equal for both directions of a relation and both orders of a pair."""
    items, relation = facts.items, facts.relation
    if relation in ("right of", "below"):
        items, relation = items[::-1], OPPOSITE[relation]
    elif facts.kind == "pair":
        items = tuple(sorted(items, key=repr))
    described = tuple((item.shape, item.colour, item.size) for item in items)
    return (facts.kind, facts.count, relation, facts.background, described)


def is_held_out(facts: Facts) -> bool:
    """Whether captions with this content are held out of training: a tenth of all contents, by SHA-256."""
    digest = hashlib.sha256(f"{HELD_OUT_SALT} {content(facts)!r}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


# --- captions --------------------------------------------------------------------------------------------------------


def caption_for(facts: Facts, rng: np.random.Generator) -> str:
    """A random wording of the facts: lower case, at most 16 words for facts from `draw_facts`."""
    if facts.kind == "count":
        item = facts.items[0]
        plural = item.shape + ("es" if item.shape == "cross" else "s")
        text = " ".join(word for word in (COUNTS[facts.count], item.size, item.colour, plural) if word)
    else:
        phrases = [_with_article(" ".join(w for w in (i.size, i.colour, i.shape) if w)) for i in facts.items]
        if facts.relation is not None:
            text = _choice(rng, RELATION_WORDINGS[facts.relation]).format(a=phrases[0], b=phrases[1])
        else:
            text = " and ".join(phrases)
    if facts.background is not None:
        text += _choice(rng, BACKGROUND_WORDINGS).format(facts.background)
    if facts.kind in ("single", "count") and rng.random() < 0.2:
        there = "there is " if facts.kind == "single" else "there are "
        text = _choice(rng, ("a picture of ", there)) + text
    return text


def parse_caption(caption: str) -> Facts:
    """The facts that a caption states, the inverse of `caption_for`. Raises ValueError for other text."""
    text = re.sub(r"^(a picture of|there is|there are) ", "", " ".join(caption.lower().split()))
    background = None
    if match := re.fullmatch(rf"(.*) on (?:a )?({'|'.join(BACKGROUNDS)})(?: background)?", text):
        text, background = match.groups()
    facts = _parse_objects(text)
    if facts is None:
        raise ValueError(f"not a caption of the shapes world: {caption!r}; write 'a red circle above a star' or alike")
    return replace(facts, background=background)


def _parse_objects(text: str) -> Facts | None:
    if match := re.fullmatch(f"({'|'.join(COUNTS.values())}) {ITEM_PATTERN}(?:(?<=cross)e)?s", text):
        count = next(number for number, word in COUNTS.items() if word == match[1])
        return Facts((Item(match[4], match[3], match[2]),), count=count)
    if match := re.fullmatch(f"an? {ITEM_PATTERN}", text):
        return Facts((Item(match[3], match[2], match[1]),))
    wordings = [(None, "{a} and {b}")] + [(relation, w) for relation in RELATIONS for w in RELATION_WORDINGS[relation]]
    for relation, wording in wordings:
        if match := re.fullmatch(wording.format(a=f"an? {ITEM_PATTERN}", b=f"an? {ITEM_PATTERN}"), text):
            return Facts((Item(match[3], match[2], match[1]), Item(match[6], match[5], match[4])), relation=relation)
    return None


# --- scenes ----------------------------------------------------------------------------------------------------------


def scene_for(facts: Facts, rng: np.random.Generator) -> Scene:
    """A random scene that agrees with the facts and has no other objects."""
    looks = []
    for item in facts.items:
        colour, size = item.colour or _choice(rng, COLOURS), item.size or _choice(rng, SIZES)
        looks += [(item.shape, colour, size)] * facts.count
    background = facts.background or _choice(rng, BACKGROUNDS)
    layouts = _layouts(len(looks), facts.relation)
    places = layouts[int(rng.integers(len(layouts)))]
    return Scene(background, tuple(Object(*look, *place) for look, place in zip(looks, places, strict=True)))


@cache
def _layouts(num_objects: int, relation: str | None) -> tuple[tuple[tuple[float, float], ...], ...]:
    """All ways to place `num_objects`, in order; two in a relation share a row or a column."""
    ways = permutations(QUARTERS, num_objects)
    return tuple(way for way in ways if relation is None or _side_by_side(relation, np.subtract(way[1], way[0])))


def _side_by_side(relation: str, offset: np.ndarray) -> bool:
    return 0 in offset and related(relation, offset, margin=0.25)


def related(relation: str, offset: np.ndarray, margin: float) -> bool:
    """Whether `relation` holds by at least `margin` for `offset` (2,), from the first centre to the second."""
    along = offset[0 if relation in ("left of", "right of") else 1]
    return bool(along >= margin if relation in ("left of", "above") else -along >= margin)


# --- pictures --------------------------------------------------------------------------------------------------------


def render(scene: Scene, image_size: int | tuple[int, int]) -> np.ndarray:
    """Render a scene with antialiased edges: uint8 (H, W, 3); `image_size` is a side or (height, width)."""
    height, width = image_height_width(image_size)
    scale = 4  # supersampling, averaged by a box filter, which has no ringing
    image = Image.new("RGB", (width * scale, height * scale), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        radius = SIZES[thing.size] * min(height, width) * scale
        centre = (thing.x * width * scale, thing.y * height * scale)
        for outline, filled in OUTLINES[thing.shape]:
            corners = [(centre[0] + radius * x, centre[1] + radius * y) for x, y in outline]
            fill = COLOURS[thing.colour] if filled else BACKGROUNDS[scene.background]
            if len(corners) == 2:
                draw.ellipse(corners, fill=fill)
            else:
                draw.polygon(corners, fill=fill)
    return np.asarray(image.reduce(scale))


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), -radius * math.sin(math.radians(degrees))


Outline = list[tuple[float, float]]  # polygon in the unit circle, centroid at 0; two points: an ellipse's bounding box
CROSS: Outline = [(0.3, 0.95), (0.3, 0.3), (0.95, 0.3), (0.95, -0.3), (0.3, -0.3), (0.3, -0.95)]
CROSS += [(-x, -y) for x, y in CROSS]
OUTLINES: dict[str, list[tuple[Outline, bool]]] = {  # (outline, whether it is filled)
    "circle": [([(-0.93, -0.93), (0.93, 0.93)], True)],
    "square": [([(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)], True)],
    "triangle": [([_polar(1.0, 90), _polar(1.0, 210), _polar(1.0, 330)], True)],
    "star": [([_polar(0.45 if i % 2 else 1.0, 90 + 36 * i) for i in range(10)], True)],
    "cross": [(CROSS, True)],
    "ring": [([(-1.0, -1.0), (1.0, 1.0)], True), ([(-0.55, -0.55), (0.55, 0.55)], False)],
}


def image_height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a side or a pair; raises ValueError unless both are whole numbers from 16 to 4096."""
    sides = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
    good = isinstance(sides, tuple | list) and len(sides) == 2
    if not good or not all(isinstance(s, int | np.integer) and 16 <= s <= 4096 for s in sides):
        raise ValueError(f"image_size must be a side or (height, width), 16 to 4096 pixels each, not {image_size!r}")
    return int(sides[0]), int(sides[1])


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _choice(rng: np.random.Generator, options: Any) -> str:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _one_of(name: str, value: Any, allowed: Any, optional: bool = False) -> None:
    if value not in allowed and not (optional and value is None):
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
