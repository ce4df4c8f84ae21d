"""The order of samples: epochs, shares of sources, turns of buckets, and each sample once over ranks and workers."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.pictures import shards_of
from training.data import loader, open_source
from training.order import WINDOW, Layout, Mix, Order, Plan, Turns
from training.share import Share


def test_an_epoch_is_the_permutation_of_its_seed_and_number():
    """In every version: a run that is resumed after an update goes on in the same order."""
    order = Order(1000, 7)
    for epoch in range(2):
        expected = np.random.default_rng([7, epoch]).permutation(1000)
        assert [order[1000 * epoch + k] for k in range(1000)] == expected.tolist()


def test_a_permutation_takes_four_bytes_a_sample_and_two_are_kept():
    order = Order(100_000, 0)
    order[0]
    assert sum(epoch.nbytes for epoch in order._epochs.values()) == 400_000
    for position in (100_000, 99_999, 200_000, 199_999):
        order[position]
    assert [*order._epochs] == [1, 2]


def test_blocks_are_read_together():
    """Within WINDOW blocks samples are shuffled, and blocks are shuffled among each other."""
    blocks = np.repeat(np.arange(40), 25)
    order = Order(1000, 3, blocks=blocks)
    places = [order[k] for k in range(1000)]
    assert sorted(places) == list(range(1000))
    windows = [set(blocks[places[i : i + 25 * WINDOW]]) for i in range(0, 1000, 25 * WINDOW)]
    assert [len(window) for window in windows] == [WINDOW] * 5
    assert windows[0] != set(range(WINDOW)) and len(set(blocks[places[:50]])) > 4
    assert [order[1000 + k] for k in range(1000)] != places


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.integers(0, 10**7))
def test_a_mix_has_its_shares_in_any_stretch(weights, first):
    mix = Mix(weights)
    dealt = [mix[position] for position in range(first, first + 500)]
    assert dealt == [Mix(weights)[position] for position in range(first, first + 500)]
    for part, weight in enumerate(weights):
        own = [k for p, k in dealt if p == part]
        assert own == list(range(own[0], own[0] + len(own))) if own else True
        assert len(own) == pytest.approx(500 * weight / sum(weights), abs=2 * len(weights))


def test_a_weight_too_small_for_a_number_is_no_part_of_a_mix():
    assert [Mix([1.0, 0.0])[k] for k in range(3)] == [(0, 0), (0, 1), (0, 2)]
    assert [Mix([0.0, 1.0])[k] for k in range(3)] == [(1, 0), (1, 1), (1, 2)]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any), st.integers(1, 9), st.integers(0, 2**31))
def test_turns_give_each_bucket_its_batches_once_an_epoch(counts, batch_size, seed):
    turns, steps = Turns(counts, batch_size, seed), 0
    if len(counts) == 1:
        assert [turns[step] for step in range(5)] == [(0, step) for step in range(5)]
        return
    for epoch in range(1, 6):
        due = [epoch * count // batch_size for count in counts]
        dealt = [turns[step] for step in range(steps, sum(due))]
        steps = sum(due)
        again = [Turns(counts, batch_size, seed)[step] for step in range(steps)]
        assert dealt == again[len(again) - len(dealt) :]  # asked from the middle, the same
        for bucket in range(len(counts)):
            assert sorted(k for b, k in again if b == bucket) == list(range(due[bucket]))


def test_turns_are_shuffled():
    turns = Turns([400, 400], 4, 0)
    first, second = ([turns[step][0] for step in range(e * 200, e * 200 + 200)] for e in (0, 1))
    assert first != sorted(first) and first != second
    assert first != [Turns([400, 400], 4, 1)[step][0] for step in range(200)]


def test_a_plan_over_buckets_and_sources_shows_each_sample_once_an_epoch():
    """The sources have other shares of the buckets; with weights as their sizes an epoch is one of each."""
    rng = np.random.default_rng(0)
    bucket, part = rng.integers(0, 3, 240), np.repeat([0, 1], [80, 160])
    plan = Plan(240, Layout(((8, 8), (8, 16), (16, 8)), bucket, part, (80, 160)), 4, 5)
    seen: Counter = Counter()
    for step in range(plan.turns._done(10).sum()):
        b, places = plan.places(step, range(4))
        numbers = [int(pool[place]) for pool, place in places]
        assert {int(bucket[i]) for i in numbers} == {b}
        seen.update(numbers)
    assert set(seen) == set(range(240)) and set(seen.values()) <= {9, 10, 11}


def test_what_each_source_has_of_each_bucket_has_an_order_of_its_own():
    """In every version that of the seed, the epoch and the numbers of both, or of blocks where the source has some."""
    numbers = np.arange(800)
    bucket, part = numbers % 2, numbers // 400
    block = np.where(part, numbers // 20, -1)
    plan, seen = Plan(800, Layout(((8, 8), (8, 16)), bucket, part, (1, 1), block), 4, 5), {}
    for step in sorted(range(200), key=lambda step: plan.turns[step]):
        b, places = plan.places(step, range(4))
        for pool, place in places:
            seen.setdefault((b, int(part[pool[0]])), []).append((place, int(block[pool[place]])))
    for b in (0, 1):
        plain, together = ([*zip(*seen[b, s], strict=True)] for s in (0, 1))
        assert [*plain[0]] == np.random.default_rng([5, 0, b + 1, 1]).permutation(200).tolist()
        assert len({*together[1][: 10 * WINDOW]}) == WINDOW and {*plain[1]} == {-1}
    assert seen[0, 1] != seen[1, 1]


def test_a_bucket_of_a_source_with_next_to_no_weight_has_its_turn():
    plan = Plan(9, Layout(((8, 8), (8, 16)), np.arange(9) // 8, np.arange(9) // 8, (1.0, 1e-9)), 1, 0)
    assert sorted(plan.places(step, [0])[0] for step in range(10)) == [0] * 9 + [1]


def test_sources_have_their_weights_whatever_their_size():
    part = np.repeat([0, 1, 2], [10, 1000, 90])
    plan = Plan(1100, Layout(((8, 8),), None, part, (0.5, 0.25, 0.25)), 8, 0)
    seen: Counter = Counter()
    for step in range(200):
        seen.update(int(part[pool[place]]) for pool, place in plan.places(step, range(8))[1])
    assert seen == {0: 800, 1: 400, 2: 400}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sample_once_an_epoch_over_ranks_and_workers_with_uneven_shards(tmp_path, num_workers):
    """Four ranks, each with its workers: together they read every sample once, and no rank's rows meet another's."""
    source = open_source(str(shards_of(tmp_path, (7, 1, 23, 12, 0, 5))))
    assert len(source) == 48
    ranks = []
    for rank in range(4):
        batches = loader(source, range(48), 8, 3, num_workers=num_workers, share=Share(rank, 4))
        ranks.append([batch.keys for batch in islice(batches, 12)])
        batches.close()
    assert {len(keys) for rank in ranks for keys in rank} == {2}
    for epoch in range(2):
        keys = [key for rank in ranks for some in rank[6 * epoch : 6 * epoch + 6] for key in some]
        assert sorted(keys) == sorted(source.keys)
    alone = [batch.keys for batch in islice(loader(source, range(48), 8, 3), 12)]
    assert [sum(rows, []) for rows in zip(*ranks, strict=True)] == alone


def test_some_of_the_samples_keep_their_buckets_parts_and_blocks():
    numbers = np.arange(6)
    layout = Layout(
        ((8, 8), (8, 16)), bucket=numbers % 2, part=numbers % 3, weights=(1.0, 1.0, 1.0), block=numbers // 2
    )
    some = layout.of(np.array([5, 2, 0]))
    assert (some.bucket.tolist(), some.part.tolist(), some.block.tolist()) == ([1, 0, 0], [2, 2, 0], [2, 1, 0])
    assert Layout(((8, 8),)).of(np.array([1])).block is None
