"""Position tables, patches and rotary embeddings against their formulas."""

import pytest
import torch

from mmdit.embeddings import (
    crop_positions,
    extended_positions,
    patchify,
    position_table,
    rotary_2d,
    rotary_mixed,
    rotate,
    unpatchify,
)


def test_position_table_is_that_of_diffusers_where_both_count_tokens():
    """With s = 16 tokens in a table of 16 both formulas are the token's number; rows and columns are not exchanged."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(32, 16, base_size=16, output_type="pt").float()
    torch.testing.assert_close(position_table(32, 16, 16)[0], theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("trained", [4, 16, 40])
def test_position_table_spans_0_to_16_where_it_was_trained(trained):
    """SD3, section 5.3.2: the trained grid is 0, 16/s, 2 * 16/s, ... at the centre of the table, at any s."""
    dim, side = 16, trained + 8
    table = position_table(dim, side, trained).view(side, side, dim)
    for token in (0, 1, trained - 1):
        p = torch.tensor(token * 16 / trained, dtype=torch.float64)
        omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        expected = torch.cat([(p * omega).sin(), (p * omega).cos()]).float()
        torch.testing.assert_close(table[7, token + 4, : dim // 2], expected)
        torch.testing.assert_close(table[token + 4, 7, dim // 2 :], expected)


def test_crop_is_the_centre_of_the_table():
    table = torch.arange(36.0).view(1, 36, 1)
    assert crop_positions(table, 2, 4).flatten().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    assert crop_positions(table, 6, 6).flatten().tolist() == list(range(36))
    with pytest.raises(ValueError, match="8 x 4 tokens does not fit the position table of 6 x 6"):
        crop_positions(table, 8, 4)


def test_patches_go_there_and_back():
    x = torch.randn(2, 3, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    torch.testing.assert_close(patches[1, 4], x[1, :, 2:4, 2:4].flatten(), rtol=0, atol=0)  # channels first, going in
    channels_last = patches.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    torch.testing.assert_close(unpatchify(channels_last, 2, 4, 6), x, rtol=0, atol=0)


def test_rotary_scores_depend_on_the_displacement_alone():
    """q . k of rotated vectors is a function of the rows and columns between them; and not a constant one."""
    height, width, dim = 5, 7, 8
    q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = rotary_2d(height, width, dim, torch.device("cpu"))
    here = [rotate(x.expand(1, 1, height * width, dim), rotary)[0, 0] for x in (q, k)]
    scores = (here[0] @ here[1].T).view(height, width, height, width)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], atol=1e-5, rtol=0)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows are not columns
    assert (scores[0, 0, 0, 0] - scores[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(scores[2, 3, 2, 3], q @ k, atol=1e-5, rtol=0)


def test_rotary_angles_are_the_formula():
    """Rows before columns, from the centre; in a sequence the step of the text first, with a base of its own."""

    def angle(at, num, base):
        return [at * base ** (-k / num) for k in range(num)]

    expected = [angle(row - 1, 4, 100) + angle(column - 1.5, 4, 100) for row in range(3) for column in range(4)]
    for of_angle, got in zip((torch.cos, torch.sin), rotary_2d(3, 4, 16, torch.device("cpu")), strict=True):
        torch.testing.assert_close(got, of_angle(torch.tensor(expected)))
    places = [(7, 0, 0), (8, -1.5, 2), (9, 0.5, -3)]
    expected = [angle(step, 4, 10_000) + angle(row, 2, 100) + angle(column, 2, 100) for step, row, column in places]
    for of_angle, got in zip((torch.cos, torch.sin), rotary_mixed(torch.tensor(places), 16), strict=True):
        torch.testing.assert_close(got, of_angle(torch.tensor(expected)))


def test_a_table_is_continued_about_its_centre_and_no_other_is():
    table = position_table(16, 6, 4)
    assert extended_positions(table, 6, 4) is table
    for side, longer in ((7, 8), (8, 8), (9, 10)):
        torch.testing.assert_close(extended_positions(table, side, 4), position_table(16, longer, 4))
    half = extended_positions(table.bfloat16(), 8, 4)  # a table as it is rounded
    torch.testing.assert_close(half, position_table(16, 8, 4).bfloat16())
    with pytest.raises(ValueError, match="cannot be continued"):
        extended_positions(table + 5e-3, 8, 4)


def test_rotary_of_a_larger_picture_agrees_where_they_overlap():
    small, large = (rotary_2d(n, n, 8, torch.device("cpu"))[0].view(n, n, -1) for n in (4, 6))
    torch.testing.assert_close(large[1:5, 1:5], small)
