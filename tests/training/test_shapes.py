"""The shapes world: captions say what is true of the picture, round-trip, and never leak held-out content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from training.shapes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KIND_PROBABILITIES,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    STATED,
    Facts,
    Item,
    Object,
    Scene,
    ShapesWorld,
    caption_for,
    content,
    draw_facts,
    is_held_out,
    parse_caption,
    render,
    scene_for,
)


def optional(options):
    return st.none() | st.sampled_from(list(options))


ITEMS = st.builds(Item, st.sampled_from(SHAPES), optional(COLOURS), optional(SIZES))
SINGLES = st.builds(lambda item, background: Facts((item,), background=background), ITEMS, optional(BACKGROUNDS))
PAIRS = st.builds(
    lambda a, b, relation, background: Facts((a, b), 1, relation, background),
    ITEMS,
    ITEMS,
    optional(RELATIONS),
    optional(BACKGROUNDS),
)
SEVERAL = st.builds(
    lambda shape, colour, size, count, background: Facts((Item(shape, colour, size),), count, None, background),
    st.sampled_from(SHAPES),
    optional(COLOURS),
    optional(SIZES),
    st.sampled_from(list(COUNTS)),
    optional(BACKGROUNDS),
)
FACTS = SINGLES | PAIRS | SEVERAL
SEEDS = st.integers(0, 2**32 - 1)


# --- captions


@given(FACTS, SEEDS)
def test_parsing_a_caption_gives_back_the_facts_that_it_states(facts, seed):
    caption = caption_for(facts, np.random.default_rng(seed))
    assert parse_caption(caption) == facts
    assert caption == caption.lower() == " ".join(caption.split())
    assert parse_caption(f" {caption.upper()}".replace(" ", " \n")) == facts


def test_captions_are_short_many_worded_and_of_a_small_vocabulary():
    captions = [ShapesWorld(split="all").caption(i) for i in range(3000)]
    assert max(len(caption.split()) for caption in captions) <= 16
    assert len({word for caption in captions for word in caption.split()}) <= 64
    facts = Facts((Item("circle", "red"), Item("square")), relation="left of", background="white")
    wordings = {caption_for(facts, np.random.default_rng(seed)) for seed in range(100)}
    assert "a red circle left of a square on white" in wordings
    assert "a red circle with a square to its right on a white background" in wordings
    assert len(wordings) == 6


def test_articles_and_plurals():
    def wordings(facts):
        return {caption_for(facts, np.random.default_rng(seed)) for seed in range(100)}

    def with_openings(caption, there):
        return {caption, f"a picture of {caption}", f"there {there} {caption}"}

    assert wordings(Facts((Item("ring", "orange"), Item("star")))) == {"an orange ring and a star"}
    assert wordings(Facts((Item("ring"),))) == with_openings("a ring", "is")
    assert wordings(Facts((Item("cross"),), count=2)) == with_openings("two crosses", "are")
    assert wordings(Facts((Item("square", "blue"),), count=3)) == with_openings("three blue squares", "are")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "circle",
        "a dog",
        "a red",
        "a circle red",
        "a red large circle",
        "five circles",
        "two circle",
        "two squarees",
        "a circle near a square",
        "a circle on a mat",
        "a circle and a square and a ring",
    ],
)
def test_words_outside_the_grammar_are_refused(caption):
    with pytest.raises(ValueError, match="shapes world"):
        parse_caption(caption)


# --- held-out content


@given(PAIRS)
def test_content_is_one_for_both_directions_of_a_statement(facts):
    first, second = facts.items
    if facts.relation is None:
        turned = Facts((second, first), 1, None, facts.background)
    else:
        turned = Facts((second, first), 1, OPPOSITE[facts.relation], facts.background)
    assert content(turned) == content(facts)
    assert is_held_out(turned) == is_held_out(facts)


@given(FACTS, FACTS)
def test_content_is_another_for_other_statements(a, b):
    if content(a) == content(b):
        assert (a.kind, a.count, a.background) == (b.kind, b.count, b.background)
        assert sorted(map(repr, a.items)) == sorted(map(repr, b.items))
        if a.items == b.items and a.items[0] != a.items[-1]:
            assert a.relation == b.relation


@pytest.mark.parametrize("kind", KIND_PROBABILITIES)
def test_a_tenth_of_the_contents_of_each_kind_is_held_out(kind):
    rng = np.random.default_rng(0)
    contents = {content(facts): is_held_out(facts) for facts in (draw_facts(rng, kind) for _ in range(6000))}
    assert len(contents) > 500
    assert 0.06 < np.mean(list(contents.values())) < 0.14


def test_the_split_is_stable():
    """These choices must not move with the version of Python or of this package: runs are compared by them."""
    rng = np.random.default_rng(0)
    bare = [Facts((Item(shape, colour),)) for shape in SHAPES for colour in COLOURS]
    held_out = [caption_for(facts, rng).split(" a ")[-1] for facts in bare if is_held_out(facts)]
    assert [caption.split()[-2:] for caption in held_out] == [
        ["orange", "square"],
        ["yellow", "square"],
        ["green", "square"],
        ["yellow", "ring"],
    ]


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_each_split_shows_its_own_contents_only(split):
    world = ShapesWorld(seed=3, split=split)
    for i in range(1500):
        assert is_held_out(parse_caption(world.caption(i))) == (split == "held-out")


def test_all_mixes_both_splits():
    world = ShapesWorld(split="all")
    share = np.mean([is_held_out(parse_caption(world.caption(i))) for i in range(2000)])
    assert 0.05 < share < 0.2


# --- the world


def test_a_sample_is_a_pure_function_of_seed_split_and_index():
    world, again = ShapesWorld(seed=5), ShapesWorld(seed=5)
    backwards = {i: again[i] for i in reversed(range(8))}
    for i in range(8):
        image, caption, scene = world[i]
        np.testing.assert_array_equal(image, backwards[i][0])
        assert (caption, scene) == backwards[i][1:]
        assert world.caption(i) == caption
    scenes = [world[i][2] for i in range(8)]
    assert len(set(scenes)) == 8
    assert [ShapesWorld(seed=6)[i][2] for i in range(8)] != scenes
    assert not {ShapesWorld(seed=5, split="all")[i][2] for i in range(8)} & set(scenes)


def test_sample_draws_from_the_given_generator():
    world = ShapesWorld(image_size=(32, 48))
    image, caption, scene = world.sample(np.random.default_rng(7))
    assert image.shape == (32, 48, 3) and image.dtype == np.uint8
    assert world.sample(np.random.default_rng(7))[1:] == (caption, scene)


def test_every_kind_and_every_word_choice_comes_up():
    facts = [parse_caption(ShapesWorld().caption(i)) for i in range(2000)]
    for kind, probability in KIND_PROBABILITIES.items():
        assert np.mean([f.kind == kind for f in facts]) == pytest.approx(probability, abs=0.05)
    items = [item for f in facts for item in f.items]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.colour for item in items} == {None, *COLOURS}
    assert {item.size for item in items} == {None, *SIZES}
    assert {f.background for f in facts} == {None, *BACKGROUNDS}
    assert {f.relation for f in facts} == {None, *RELATIONS}
    assert {f.count for f in facts} == {1, *COUNTS}


def test_drawn_facts_state_as_often_as_they_say_and_two_shapes_are_never_one():
    rng = np.random.default_rng(0)
    singles, pairs = ([draw_facts(rng, kind) for _ in range(2000)] for kind in ("single", "pair"))
    for facts in (singles, pairs):
        stated = {
            "background": np.mean([f.background is not None for f in facts]),
            "colour": np.mean([f.items[-1].colour is not None for f in facts]),
            "size": np.mean([f.items[-1].size is not None for f in facts]),
        }
        assert stated == pytest.approx(STATED, abs=0.05)  # 5 standard errors
    assert all(a.shape != b.shape for a, b in (f.items for f in pairs))
    coloured = [f.items for f in pairs if f.items[0].colour]
    assert np.mean([a.colour == b.colour for a, b in coloured]) == pytest.approx(1 / len(COLOURS), abs=0.05)


# --- scenes


@settings(max_examples=200, deadline=None)
@given(FACTS, SEEDS)
def test_the_facts_are_true_of_their_scene_and_nothing_else_is_in_it(facts, seed):
    scene = scene_for(facts, np.random.default_rng(seed))
    wanted = [item for item in facts.items for _ in range(facts.count)]
    assert len(scene.objects) == len(wanted)
    for item, thing in zip(wanted, scene.objects, strict=True):
        assert thing.shape == item.shape
        assert item.colour in (None, thing.colour)
        assert item.size in (None, thing.size)
    assert facts.background in (None, scene.background)
    if facts.kind == "count":
        assert len({(thing.colour, thing.size) for thing in scene.objects}) == 1
    if facts.relation is not None:
        a, b = scene.objects
        right, down = b.x - a.x, b.y - a.y
        along = {"left of": right, "right of": -right, "above": down, "below": -down}[facts.relation]
        across = down if "of" in facts.relation else right
        assert along == 0.5 and across == 0


@settings(max_examples=100, deadline=None)
@given(FACTS, SEEDS, st.sampled_from([64, (64, 160), (100, 64)]))
def test_objects_stay_in_the_frame_and_apart(facts, seed, image_size):
    scene = scene_for(facts, np.random.default_rng(seed))
    background = np.array(BACKGROUNDS[scene.background])
    masks = [(render(Scene(scene.background, (o,)), image_size) != background).any(-1) for o in scene.objects]
    for mask in masks:
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    for i, mask in enumerate(masks):
        distance = ndimage.distance_transform_edt(~mask)
        assert all(distance[other].min() >= 3 for other in masks[:i])


# --- pictures


def one(shape, size="large", colour="blue", background="white", x=0.5, y=0.5):
    return Scene(background, (Object(shape, colour, size, x, y),))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("shape", "unit_area"),
    [
        ("circle", np.pi * 0.93**2),
        ("square", 1.4**2),
        ("triangle", 0.75 * np.sqrt(3)),
        ("star", 5 * 0.45 * np.sin(np.pi / 5)),
        ("cross", 2 * 1.9 * 0.6 - 0.6**2),
        ("ring", np.pi * (1 - 0.55**2)),
    ],
)
def test_a_shape_covers_its_area_around_its_centre(shape, unit_area, size):
    image = render(one(shape, size, "pink", "black", x=0.4, y=0.55), 256)
    coverage = image[..., 0] / 255  # pink on black: red is 0 or 255
    radius = SIZES[size] * 256
    assert coverage.sum() == pytest.approx(unit_area * radius**2, rel=0.04)
    y, x = ndimage.center_of_mass(coverage)
    assert (x + 0.5) / 256 == pytest.approx(0.4, abs=0.005)
    assert (y + 0.5) / 256 == pytest.approx(0.55, abs=0.005)
    rows, columns = np.nonzero(coverage > 0.5)
    assert np.hypot(rows - y, columns - x).max() <= 1.05 * radius


@pytest.mark.parametrize(("shape", "depth"), [("triangle", 0.5), ("star", np.cos(np.pi / 5))])
def test_a_triangle_and_a_star_stand_on_their_feet(shape, depth):
    rows, columns = np.nonzero((render(one(shape, "large"), 256) != BACKGROUNDS["white"]).any(-1))
    radius = SIZES["large"] * 256
    assert 128 - rows.min() == pytest.approx(radius, abs=1.5)
    assert rows.max() - 128 == pytest.approx(depth * radius, abs=1.5)
    assert columns[rows == rows.min()].mean() == pytest.approx(127.5, abs=1)


def test_colours_are_exact_inside_and_edges_are_antialiased():
    image = render(one("ring", colour="green", background="beige"), 64).astype(int)
    assert tuple(image[32, 32]) == BACKGROUNDS["beige"]
    assert tuple(image[32, 32 + 10]) == COLOURS["green"]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_looks_the_same_at_every_resolution(shape):
    small, large = (render(one(shape, x=0.37), side).astype(float) for side in (64, 256))
    reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert (
        np.abs(small - reduced).sum() < 0.08 * np.abs(reduced - 255).sum()
    )  # the difference, against all that is drawn


def test_objects_keep_their_form_on_frames_that_are_not_square():
    image = render(one("circle", x=0.75), (100, 400))
    rows, columns = np.nonzero((image == COLOURS["blue"]).all(-1))
    assert image.shape == (100, 400, 3)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=1)
    assert columns.mean() == pytest.approx(300, abs=1)


def test_all_colours_are_told_apart_under_blur_and_noise():
    names = {**COLOURS, **BACKGROUNDS}
    palette = np.array(list(names.values()), dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=-1)
    assert distances[~np.eye(len(palette), dtype=bool)].min() > 85
    rng = np.random.default_rng(0)
    for i, name in enumerate(COLOURS):
        for background in BACKGROUNDS:
            image = render(one("circle", "medium", name, background), 64).astype(float)
            image = ndimage.gaussian_filter(image, (0.8, 0.8, 0)) + rng.normal(0, 8, image.shape)
            inside = image[28:36, 28:36].reshape(-1, 3)
            nearest = np.linalg.norm(inside[:, None] - palette, axis=-1).argmin(-1)
            assert (nearest == i).all()


# --- bad input


@pytest.mark.parametrize("image_size", [8, 5000, "64", 64.0, (64,), (64, 64, 3), (64, 8), None])
def test_a_bad_image_size_is_refused(image_size):
    with pytest.raises(ValueError, match="image_size must be"):
        ShapesWorld(image_size=image_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShapesWorld(split="test"), "split must be one of train, held-out, all, not 'test'"),
        (lambda: ShapesWorld(seed=-1), "seed must be"),
        (lambda: ShapesWorld(seed=0.5), "seed must be"),
        (lambda: Item("hexagon"), "shape must be one of circle"),
        (lambda: Item("circle", "teal"), "colour must be one of red"),
        (lambda: Item("circle", "red", "huge"), "size must be one of small"),
        (lambda: Object("circle", "red", "small", 1.5, 0.5), "centre"),
        (lambda: Object("circle", "red", "small", 0.5, 1.5), "centre"),
        (lambda: Object("circle", None, "small", 0.5, 0.5), "colour must be"),
        (lambda: Scene("green", ()), "background must be one of white"),
        (lambda: Facts(()), "one or two items, not 0"),
        (lambda: Facts((Item("ring"),) * 3), "one or two items, not 3"),
        (lambda: Facts((Item("ring"),), count=5), "count must be"),
        (lambda: Facts((Item("ring"), Item("star")), count=2), "count must be"),
        (lambda: Facts((Item("ring"),), relation="above"), "needs two items"),
        (lambda: Facts((Item("ring"), Item("star")), relation="near"), "relation must be"),
        (lambda: draw_facts(np.random.default_rng(0), "triple"), "kind must be"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_world_has_no_negative_index():
    with pytest.raises(IndexError, match="counts from 0"):
        ShapesWorld()[-1]
