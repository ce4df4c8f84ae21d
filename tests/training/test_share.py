"""Rows of a batch for every process: all of them once, part after part, and refused where they do not divide."""

import pytest

from training.share import WHOLE, Share


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)])
def test_the_shares_are_the_batch(world, parts):
    batch = list(range(48))
    of_part = 48 // parts
    own = [[batch[row] for row in Share(rank, world, parts).rows(48)] for rank in range(world)]
    assert {len(rows) for rows in own} == {48 // world}
    for part in range(parts):
        size = of_part // world
        pieces = [row for rows in own for row in rows[part * size : (part + 1) * size]]
        assert pieces == batch[part * of_part : (part + 1) * of_part]


def test_a_piece_of_what_was_drawn_for_all():
    assert [Share(rank, 3).of(list(range(6))) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert WHOLE.of([1, 2]) == [1, 2] and WHOLE.rows(3) == [0, 1, 2]
    WHOLE.check("batch", 3)


def test_a_batch_that_does_not_divide_is_refused_with_the_next_that_do():
    Share(0, 4, 2).check("batch", 16)
    with pytest.raises(ValueError, match="batch is 18, .*grad_accumulation = 2 times 4 processes: 16 or 24"):
        Share(0, 4, 2).check("batch", 18)
    with pytest.raises(ValueError, match="2 times 4 processes: 8$"):
        Share(0, 4, 2).check("batch", 3)
