"""Pictures to start from: near or far as the strength says, kept where the mask is black, one by one in any batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.edit import Edit, known_latents
from tests.mmdit.test_text_to_image import PROMPTS, pipe, pixels

__all__ = ["pipe"]  # a fixture
LEFT = Image.fromarray(np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(16, 0))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_weak_edit_is_near_its_picture_and_a_full_one_forgets_it(pipe):
    old = pixels([picture(8, 12)])
    edits = [Edit(picture(8, 12), strength) for strength in (0.05, 0.5, 1.0)]
    away = [abs(pixels(pipe("a star", num_steps=20, edit=edit)) - old).mean() for edit in edits]
    assert away[0] < 12 and away == sorted(away)
    full = dict(num_steps=4, solver="euler", seed=2)
    assert (pixels(pipe("a star", edit=edits[2], **full)) == pixels(pipe("a star", **full))).all()


def test_an_edit_begins_at_its_strength(pipe):
    seen = []
    pipe("a star", num_steps=10, edit=Edit(picture(8, 12), 0.4), callback=lambda p: seen.append(p.t))
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_size_is_the_pictures(pipe):
    [image] = pipe("a star", num_steps=2, edit=Edit(picture(16, 4)))
    assert (image.height, image.width) == (16, 4)


@pytest.mark.parametrize("solver", ["euler", "ab2", "stochastic-heun"])
def test_inpainting_keeps_what_is_black_to_the_bit_and_draws_what_is_white(pipe, solver):
    diffusion = "sin2" if solver == "stochastic-heun" else None
    edit = Edit(picture(16, 24), 1.0, LEFT)
    out, old = pixels(pipe("a star", edit=edit, num_steps=4, solver=solver, diffusion=diffusion)), pixels([edit.image])
    assert (out[:, :, 12:] == old[:, :, 12:]).all()
    assert abs(out[:, :, :12] - old[:, :, :12]).mean() > 20


def test_inpainting_shows_the_model_what_is_known(pipe):
    """The same noise and mask, with another picture beside it: the drawn part is another."""
    seen = []
    for i in (0, 1):
        states = []
        pipe("a star", edit=Edit(picture(16, 24, i), 1.0, LEFT), num_steps=4, callback=states.append)
        seen.append(states)
    assert torch.equal(seen[0][0].x_t, seen[1][0].x_t)
    assert (seen[0][-1].x_next - seen[1][-1].x_next)[..., :12].abs().max() > 1e-3


def test_edits_go_one_by_one_with_their_prompts(pipe):
    """One picture and mask a prompt, also over several batches."""
    images, masks = [picture(8, 12, i) for i in range(3)], [picture(8, 12, 9 + i) for i in range(3)]
    together = pixels(pipe(PROMPTS, seed=[1, 2, 3], batch_size=2, edit=Edit(images, 0.7, masks)))
    for i, prompt in enumerate(PROMPTS):
        alone = pixels(pipe(prompt, seed=1 + i, edit=Edit(images[i], 0.7, masks[i])))
        assert abs(alone[0] - together[i]).max() <= 1


def test_one_picture_and_mask_are_for_all_prompts(pipe):
    old, mask = picture(*pipe.size), Image.new("L", (pipe.size[1], pipe.size[0]), 0)
    mask.paste(255, (0, 0, 4, 4))
    one, each = Edit(old, 1.0, mask), Edit((old, old), 1.0, (mask, mask))
    assert [len(part) for edit in (one, each) for part in (edit.images(2), edit.redrawn(2))] == [2] * 4
    a, b = (pipe(PROMPTS[:2], edit=edit, num_steps=2, seed=3) for edit in (one, each))
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b] and len(a) == 2


def test_a_latent_pixel_is_known_where_no_pixel_of_it_is_drawn():
    drawn = torch.zeros(1, 1, 8, 16)
    drawn[0, 0, 7, 8], drawn[0, 0, 0, 0] = 0.25, 1
    assert known_latents(drawn, 4)[0, 0].tolist() == [[0, 1, 1, 1], [1, 1, 0.75, 1]]


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
        Edit(picture(8, 12), strength)


def test_a_mask_of_another_size_and_pictures_of_several_are_refused():
    with pytest.raises(ValueError, match="the mask is 8 x 16, the picture 8 x 12"):
        Edit(picture(8, 12), 0.5, picture(8, 16))
    with pytest.raises(ValueError, match="expected all of one size"):
        Edit([picture(8, 12), picture(12, 8)])


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (Edit(picture(8, 12)), dict(height=64), "64 x 12 is asked for and the picture to edit is 8 x 12"),
        (Edit(picture(8, 12)), dict(width=0), "8 x 0 is asked for and the picture to edit is 8 x 12"),
        (Edit(picture(10, 12)), {}, "10 x 12 does not fit"),
        (Edit([picture(8, 12)] * 3), {}, "3 pictures for 2 prompts"),
        (Edit(picture(8, 12), mask=[picture(8, 12)] * 3), {}, "3 masks for 2 prompts"),
    ],
    ids=["height", "no-width", "step", "pictures", "masks"],
)
def test_edits_that_do_not_fit_the_call_are_refused(pipe, edit, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[:2], edit=edit, **options)


def test_pictures_are_taken_as_a_viewer_shows_them(tmp_path):
    gray = Image.fromarray(np.full((8, 12), 0x8000, np.uint16))
    clear, red = Image.new("RGBA", (12, 8), (255, 0, 0, 0)), Image.new("RGB", (12, 8), "red")
    for image, colour in ((gray, 128), (clear, 255), (red.convert("P"), (255, 0, 0))):
        expected = torch.tensor(np.broadcast_to(colour, 3)).float() / 127.5 - 1
        assert torch.equal(Edit(image).images(1), expected[None, :, None, None].expand(1, 3, 8, 12))
    assert torch.allclose(Edit(red, 0.5, gray).redrawn(1), torch.tensor(128 / 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as a phone writes it
    picture(8, 12).save(tmp_path / "old.png", exif=exif)
    edit = Edit(Image.open(tmp_path / "old.png"))
    assert edit.fitting(None, None) == (12, 8)
    assert torch.equal(edit.images(1), Edit(picture(8, 12).rotate(-90, expand=True)).images(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(image="old.png"), "got a str for a picture: open it with PIL.Image.open"),
        (dict(image=None), "got a NoneType for a picture"),
        (dict(image=picture(8, 12), mask=np.zeros((8, 12))), "got a ndarray for a picture"),
        (dict(image=[]), "expected all of one size"),
        (dict(image=picture(8, 12), strength="1"), "strength is '1', expected a number"),
        (dict(image=picture(8, 12), strength=float("nan")), "strength is nan"),
        (dict(image=picture(8, 12), strength=0), "strength is 0"),
        (dict(image=picture(8, 12), strength=1.1), "strength is 1.1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_picture_or_strength_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Edit(**wrong)
