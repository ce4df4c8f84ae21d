"""The six questions: right on true pictures, wrong on contrasts, under blur and noise; malformed shapes go unnamed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from training.shapes import COLOURS, SHAPES, Facts, Item, Object, Scene, ShapesWorld, is_held_out, parse_caption, render
from training.shapes_eval import QUESTIONS, Detection, Found, Prompt, ShapesEval, answers, describes, detect

NUM_PROMPTS = 100
SPOILT = {"true": (0, 0), "blur": (0.8, 0), "noise": (0, 8), "blur and noise": (0.8, 8)}


def spoil(image, blur, noise, rng):
    """The image as a small model may leave it: `blur` in pixels, `noise` in grey levels."""
    pixels = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
    return np.clip(np.round(pixels + rng.normal(0, 1, pixels.shape) * noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def evaluation():
    return ShapesEval(image_size=64, prompts_per_question=NUM_PROMPTS, seed=0)


@pytest.fixture(scope="module", params=SPOILT)
def detections(request, evaluation):
    rng = np.random.default_rng(0)
    return [detect(spoil(image, *SPOILT[request.param], rng)) for image in evaluation.true_images()]


# --- the scores


@pytest.mark.parametrize("question", QUESTIONS)
def test_true_pictures_answer_each_question_and_contrasts_do_not(question, evaluation, detections):
    asked = [(p, d) for p, d in zip(evaluation.prompts, detections, strict=True) if p.question == question]
    assert len(asked) == NUM_PROMPTS
    right = np.mean([answers(question, prompt.facts, detection) for prompt, detection in asked])
    wrong = np.mean([answers(question, evaluation.contrast(prompt).facts, detection) for prompt, detection in asked])
    assert right >= 0.99
    assert wrong <= 0.02


@pytest.mark.parametrize("image_size", [32, 256, (100, 400)])
def test_true_pictures_of_other_sizes_score_as_high(image_size):
    evaluation = ShapesEval(image_size, prompts_per_question=12, seed=1)
    assert evaluation.score(evaluation.true_images())["mean"] == 1


def test_the_score_is_the_part_answered_and_their_mean():
    evaluation = ShapesEval(prompts_per_question=4)
    right = evaluation.true_images()
    wrong = evaluation.true_images([evaluation.contrast(prompt) for prompt in evaluation.prompts])
    mixed = [wrong[i] if i % 4 == 0 else right[i] for i in range(len(right))]
    assert evaluation.score(right) == dict.fromkeys((*QUESTIONS, "mean"), 1.0)
    assert evaluation.score(wrong) == dict.fromkeys((*QUESTIONS, "mean"), 0.0)
    assert evaluation.score(mixed) == dict.fromkeys((*QUESTIONS, "mean"), 0.75)
    counting_wrong = [
        w if prompt.question == "counting" else r for prompt, r, w in zip(evaluation.prompts, right, wrong, strict=True)
    ]
    scores = evaluation.score([Image.fromarray(image) for image in counting_wrong])
    assert scores["counting"] == 0 and scores["position"] == 1 and scores["mean"] == pytest.approx(5 / 6)


def test_pictures_of_nothing_score_nothing():
    evaluation = ShapesEval(prompts_per_question=3)
    rng = np.random.default_rng(0)
    flat = np.full((64, 64, 3), 255, dtype=np.uint8)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 3))
    for image in (flat, noise, ramp):
        assert evaluation.score([image] * len(evaluation.prompts))["mean"] == 0


# --- the prompts


def test_prompts_are_held_out_and_each_asks_what_its_question_needs(evaluation):
    assert [p.question for p in evaluation.prompts] == [q for q in QUESTIONS for _ in range(NUM_PROMPTS)]
    for prompt in evaluation.prompts:
        assert parse_caption(prompt.caption) == prompt.facts
        assert is_held_out(prompt.facts)
        items = prompt.facts.items
        assert len(items) == (2 if prompt.question in ("two objects", "position", "colour attribution") else 1)
        assert len({item.shape for item in items}) == len(items)
        if "colour" in prompt.question:
            assert None not in {item.colour for item in items}
        if prompt.question == "counting":
            assert prompt.facts.count in (2, 3, 4)
        assert (prompt.facts.relation is not None) == (prompt.question == "position")


def test_prompts_ask_for_every_shape_and_seldom_repeat(evaluation):
    for question in QUESTIONS:
        prompts = [p for p in evaluation.prompts if p.question == question]
        counts = [sum(p.facts.items[0].shape == shape for p in prompts) for shape in SHAPES]
        assert max(counts) - min(counts) <= 1
        assert len({p.caption for p in prompts}) >= 0.6 * NUM_PROMPTS


def test_prompts_are_a_pure_function_of_the_arguments():
    captions = [p.caption for p in ShapesEval(prompts_per_question=5, seed=2).prompts]
    assert [p.caption for p in ShapesEval(prompts_per_question=5, seed=2).prompts] == captions
    assert [p.caption for p in ShapesEval(prompts_per_question=5, seed=3).prompts] != captions
    default, same = ShapesEval(), ShapesEval(64, prompts_per_question=32, seed=0)
    assert (default.prompts, default.image_size) == (same.prompts, same.image_size)


def test_a_contrast_changes_just_what_the_question_asks(evaluation):
    for prompt in evaluation.prompts:
        facts, other = prompt.facts, evaluation.contrast(prompt).facts
        assert other.background == facts.background
        assert [item.size for item in other.items] == [item.size for item in facts.items]
        changed = {
            "shape": [i.shape for i in other.items] != [i.shape for i in facts.items],
            "colour": [i.colour for i in other.items] != [i.colour for i in facts.items],
            "count": other.count != facts.count,
            "relation": other.relation != facts.relation,
        }
        expected = {"counting": "count", "colours": "colour", "position": "relation", "colour attribution": "colour"}
        assert [name for name, differs in changed.items() if differs] == [expected.get(prompt.question, "shape")]


def test_a_question_asks_no_more_than_its_name_says():
    """A wrong background or an unasked colour is no wrong answer, as in GenEval."""
    picture = render(Scene("gray", (Object("star", "pink", "small", 0.3, 0.5),)), 64)
    item = Item("star", "red", "large")
    assert Prompt("one object", "", Facts((item,), background="white")).answered_by(picture)
    assert not Prompt("colours", "", Facts((item,), background="white")).answered_by(picture)
    assert answers("counting", Facts((item,), count=2), Detection("gray", detect(picture).objects * 2))


def test_each_of_two_objects_has_its_own_colour():
    """One right colour is not enough, and neither are the two of them on the wrong shapes."""
    facts = Facts((Item("circle", "red"), Item("star", "blue")))

    def answered(circle, star):
        there = [Found(shape, c, "small", 0.5, 0.5, 0.1, 1.0) for shape, c in (("circle", circle), ("star", star))]
        return answers("colour attribution", facts, Detection("white", tuple(there)))

    assert answered("red", "blue")
    assert not any(answered(*colours) for colours in (("red", "red"), ("blue", "blue"), ("blue", "red")))


# --- the detector


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(SPOILT.values())))
def test_the_detector_finds_just_what_the_scene_holds(i, spoilt):
    image, _, scene = ShapesWorld(split="all")[i]
    detection = detect(spoil(image, *spoilt, np.random.default_rng(i)))
    assert detection.background == scene.background
    assert len(detection.objects) == len(scene.objects)
    for thing in scene.objects:
        found = min(detection.objects, key=lambda f: math.hypot(f.x - thing.x, f.y - thing.y))
        assert (found.shape, found.colour, found.size) == (thing.shape, thing.colour, thing.size)
        assert math.hypot(found.x - thing.x, found.y - thing.y) < 1 / 64


def test_what_is_found_lies_where_it_was_drawn():
    """Centre and area, as parts of the picture."""
    picture = render(Scene("white", (Object("circle", "red", "small", 0.3, 0.6),)), 128)
    (found,) = detect(picture).objects
    assert (found.x, found.y) == pytest.approx((0.3, 0.6), abs=0.004)
    assert found.area == pytest.approx((255 - picture[..., 1].mean()) / (255 - COLOURS["red"][1]), rel=0.02)


@pytest.mark.parametrize(("offset", "answered"), [(0.05, False), (0.15, True)])
def test_a_position_is_a_clear_offset(offset, answered):
    facts = Facts((Item("circle"), Item("star")), relation="left of")
    there = [Found(shape, "red", "small", x, 0.5, 0.1, 1.0) for shape, x in (("circle", 0.5), ("star", 0.5 + offset))]
    assert answers("position", facts, Detection("white", tuple(there))) == answered


def test_the_detector_forgives_a_drift_of_all_colours():
    rng = np.random.default_rng(0)
    evaluation = ShapesEval(prompts_per_question=10)
    drifted = [spoil(np.clip(im + rng.normal(0, 12, 3), 0, 255), 0.6, 5, rng) for im in evaluation.true_images()]
    assert evaluation.score(drifted)["mean"] >= 0.98


def drawing(draw_on, background="white", blur=0.6, noise=5):
    """What `draw_on` draws on a canvas of 256 pixels, at 64 and slightly spoilt."""
    canvas = Image.new("RGB", (256, 256), background)
    draw_on(ImageDraw.Draw(canvas))
    return spoil(np.asarray(canvas.reduce(4)), blur, noise, np.random.default_rng(0))


RED, BLUE = COLOURS["red"], COLOURS["blue"]
BOX = (84, 84, 172, 172)


def wobbly(draw):
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radii = 40 * (1 + 0.2 * np.cos(2 * angles) + 0.15 * np.cos(3 * angles + 1))
    draw.polygon([(128 + r * np.cos(a), 128 + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)], fill=RED)


def two_merged(draw):
    draw.ellipse((70, 84, 140, 154), fill=RED)
    draw.ellipse((120, 104, 190, 174), fill=RED)


MALFORMED = {
    "flattened circle": lambda draw: draw.ellipse((76, 98, 180, 158), fill=RED),
    "circle with a bite": lambda draw: draw.pieslice(BOX, 0, 300, fill=RED),
    "half a circle": lambda draw: draw.pieslice(BOX, 0, 180, fill=RED),
    "open ring": lambda draw: draw.arc(BOX, 0, 300, fill=RED, width=20),
    "between circle and square": lambda draw: draw.rounded_rectangle((96, 96, 160, 160), radius=18, fill=RED),
    "square on its corner": lambda draw: draw.regular_polygon((128, 128, 44), 4, rotation=45, fill=RED),
    "triangle on its tip": lambda draw: draw.regular_polygon((128, 128, 44), 3, rotation=60, fill=RED),
    "long bar": lambda draw: draw.rectangle((60, 110, 196, 146), fill=RED),
    "wobbly blob": wobbly,
    "two merged circles": two_merged,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_shape_is_seen_but_not_named(name):
    (found,) = detect(drawing(MALFORMED[name])).objects
    assert found.shape is None and found.confidence < 0.93  # less than that of a good shape
    assert found.colour == "red"
    assert found.x == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("shape", ["triangle", "star", "cross", "ring"])
def test_a_shape_that_lacks_a_quarter_is_not_named(shape):
    image = render(Scene("gray", (Object(shape, "cyan", "large", 0.5, 0.5),)), 64).copy()
    assert [found.shape for found in detect(image).objects] == [shape]
    image[:32, 32:] = image[0, 0]
    assert all(found.shape is None for found in detect(image).objects)


def test_a_blob_beside_good_shapes_spoils_the_count_only():
    def circles_and_blob(draw):
        draw.ellipse((20, 20, 90, 90), fill=RED)
        draw.ellipse((150, 20, 220, 90), fill=RED)
        draw.rectangle((60, 180, 200, 210), fill=RED)

    facts = Facts((Item("circle"),), count=2)
    detection = detect(drawing(circles_and_blob))
    assert sorted(str(found.shape) for found in detection.objects) == ["None", "circle", "circle"]
    assert not answers("counting", facts, detection)
    assert answers("one object", Facts((Item("circle"),)), detection)


def test_touching_objects_of_two_colours_are_parted():
    def touching(draw):
        draw.ellipse((70, 84, 140, 154), fill=RED)
        draw.rectangle((136, 89, 196, 149), fill=BLUE)

    found = {(thing.shape, thing.colour) for thing in detect(drawing(touching)).objects}
    assert found == {("circle", "red"), ("square", "blue")}


def test_an_odd_colour_is_not_forced_into_a_name():
    picture = detect(drawing(lambda draw: draw.ellipse(BOX, fill=(120, 90, 40)), background="black"))
    assert [(found.shape, found.colour) for found in picture.objects] == [("circle", None)]


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShapesEval(image_size=4), "image_size must be"),
        (lambda: ShapesEval(prompts_per_question=0), "prompts_per_question must be"),
        (lambda: ShapesEval(seed=-1), "seed must be"),
        (lambda: ShapesEval(prompts_per_question=1).score([]), "one image for each of the 6 prompts, not 0"),
        (lambda: detect(np.zeros((64, 64, 3))), "uint8"),
        (lambda: detect(np.zeros((64, 64), dtype=np.uint8)), "height, width, 3"),
        (lambda: detect(np.zeros((3, 64, 64), dtype=np.uint8)), "height, width, 3"),
        (lambda: answers("taste", Facts((Item("star"),)), detect(np.zeros((64, 64, 3), dtype=np.uint8))), "cannot ask"),
        (lambda: Prompt("position", "", Facts((Item("star"),))).answered_by(Image.new("RGB", (64, 64))), "cannot ask"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_describes_a_scene():
    def thing(shape, colour):
        return Object(shape, colour, "small", 0.25, 0.25)

    pair, three = (
        Scene("white", (thing("circle", "red"), thing("star", "blue"))),
        Scene("black", (thing("ring", "red"),) * 3),
    )
    for caption in ("a red circle and a blue star", "a blue star left of a red circle on gray", "a circle and a star"):
        assert describes(caption, pair) and not describes(caption, three)
    for caption in (
        "a red star and a blue circle",
        "a red circle",
        "two red circles",
        "a red circle and",
        "",
        "nonsense",
    ):
        assert not describes(caption, pair)
    assert describes("three red rings on white", three) and describes("there are three rings", three)
    assert not describes("two red rings", three) and not describes("three blue rings", three)
