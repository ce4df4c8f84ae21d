"""Batches of latents and tokens: the right ones, in an order that a number alone decides, with or without the cache."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import training.feed
from mmdit.autoencoder import PixelSpace
from mmdit.text import LearnedText, TextConfig, Tokenizer
from training.corpus import Pieces
from training.data import DataError, Sample, Source
from training.feed import (
    CPU_BLOCK,
    Encoding,
    ImageFeed,
    LatentFeed,
    NothingUsable,
    WithText,
    latent_generators,
    latents_from,
    statistics_of,
    to_signed,
)
from training.share import WHOLE, Share

CPU = torch.device("cpu")


@dataclass
class Numbers(Source):
    """Sample i is an image of colour i with the caption "i"; the bad ones say why."""

    n: int = 10
    bad: tuple[int, ...] = ()
    image_size: tuple[int, int] = (4, 6)
    skipped: list = field(default_factory=list)

    @property
    def keys(self):
        return [f"key {i}" for i in range(self.n)]

    def __len__(self):
        return self.n

    def caption(self, i):
        return f"{i}"

    def __getitem__(self, i):
        if i in self.bad:
            return Sample(self.keys[i], None, f"{i}", f"broken {i}")
        return Sample(self.keys[i], np.full((4, 6, 3), i, dtype=np.uint8), f"{i}")


class Noisy(PixelSpace):
    """Its posterior has the pixels as its mean, and a deviation of 1."""

    def draw(self, statistics, generators):
        if generators is None:
            return statistics
        noise = [torch.randn(x.shape, generator=own) for x, own in zip(statistics, generators, strict=True)]
        return statistics + torch.stack(noise)


class Counting(PixelSpace):
    """It says of each image how many it saw at the same time."""

    def statistics(self, images):
        return torch.full_like(images, len(images))


class Broken(PixelSpace):
    """It fails."""

    def statistics(self, images):
        raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def text():
    return LearnedText(TextConfig(260, 6, 16, 1, 2), Tokenizer.train([], 258, 6))


def latent_feed(text, source, indices, **options):
    told = []
    encoding = Encoding(PixelSpace(), text, CPU, skipped=lambda *what: told.append(what))
    return LatentFeed(source, np.array(indices), encoding, **options), told


def image_feed(text, source, indices, num_workers=0):
    told = []
    encoding = Encoding(PixelSpace(), text, CPU, num_workers, lambda *what: told.append(what))
    return ImageFeed(source, np.array(indices), encoding), told


def numbers(text, batch) -> list[int]:
    """The samples of a batch by their colour, having checked that their captions say the same."""
    colours = [round(((latent.mean().item()) + 1) * 127.5) for latent in batch.latents]
    assert [text.tokenizer.decode(ids) for ids in batch.tokens.ids] == [str(c) for c in colours]
    return colours


def take(text, feed, n, batch_size=4, seed=0, start=0) -> list[list[int]]:
    batches = feed.batches(batch_size, seed, start)
    taken = [numbers(text, next(batches)) for _ in range(n)]
    batches.close()
    return taken


def test_signed_is_from_minus_one_to_one():
    x = to_signed(torch.tensor([0, 127, 128, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([-1, -1 / 255, 1 / 255, 1]))


def test_signed_images_are_contiguous_though_decoded_ones_are_not():
    """So that what an autoencoder rounds does not hang on how they were read."""
    assert to_signed(torch.zeros(2, 4, 6, 3, dtype=torch.uint8).permute(0, 3, 1, 2)).is_contiguous()


@pytest.mark.parametrize("make", [latent_feed, image_feed])
def test_an_epoch_has_each_sample_once_and_the_next_another_order(text, make):
    feed, _ = make(text, Numbers(8), [0, 1, 3, 5, 6, 7])
    batches = take(text, feed, 4, batch_size=3)
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert sorted(first) == sorted(second) == [0, 1, 3, 5, 6, 7]
    assert first != second
    assert take(text, feed, 4, batch_size=3, seed=1) != batches


@pytest.mark.parametrize("make", [latent_feed, image_feed])
@pytest.mark.parametrize("start", [1, 2, 5])
def test_starting_later_goes_on_as_from_the_start(text, make, start):
    """Batches of 4 of 10 samples: in the middle of an epoch, and over its end."""
    feed, _ = make(text, Numbers(), range(10))
    assert take(text, feed, 3, start=start) == take(text, feed, start + 3)[start:]


def test_cached_and_uncached_feeds_are_equal(text):
    cached, uncached = (make(text, Numbers(), range(10))[0] for make in (latent_feed, image_feed))
    a, b = cached.batches(4, 3), uncached.batches(4, 3)
    for _ in range(6):
        one, other = next(a), next(b)
        assert torch.equal(one.latents, other.latents) and torch.equal(one.tokens.ids, other.tokens.ids)


def test_workers_change_nothing(text):
    alone, helped = (image_feed(text, Numbers(), range(10), workers)[0] for workers in (0, 2))
    assert take(text, alone, 5) == take(text, helped, 5)


def test_a_batch_larger_than_the_data_repeats_it(text):
    feed, _ = latent_feed(text, Numbers(), [2, 4])
    assert sorted(take(text, feed, 1, batch_size=6)[0]) == [2, 2, 2, 4, 4, 4]


def test_bad_samples_are_told_and_left_out_of_the_cache(text):
    feed, told = latent_feed(text, Numbers(bad=(2, 5)), range(10))
    assert told == [("key 2", "broken 2"), ("key 5", "broken 5")]
    assert len(feed) == 8 and feed.captions == ["0", "1", "3", "4", "6", "7", "8", "9"]
    assert sorted(sum(take(text, feed, 2), [])) == [0, 1, 3, 4, 6, 7, 8, 9]


def test_bad_samples_are_told_and_replaced_without_the_cache(text):
    feed, told = image_feed(text, Numbers(bad=(2, 5)), range(10))
    assert not {2, 5} & set(sum(take(text, feed, 5), []))
    assert set(told) == {("key 2", "broken 2"), ("key 5", "broken 5")}


def test_nothing_usable_is_an_error_that_gives_a_reason(text):
    with pytest.raises(NothingUsable, match="none of the 2 samples can be used; one of them is key 4: broken 4"):
        latent_feed(text, Numbers(bad=(4, 5)), [4, 5])
    with pytest.raises(NothingUsable, match="none of the 0 samples"):
        latent_feed(text, Numbers(), [])
    feed, _ = image_feed(text, Numbers(bad=(4, 5)), [4, 5])
    with pytest.raises(DataError, match="none of the 2 samples can be used"):
        take(text, feed, 1)


def test_rows_are_picked_as_asked(text):
    feed, _ = latent_feed(text, Numbers(), range(10))
    assert numbers(text, feed.at([7, 0, 7])) == [7, 0, 7]
    assert feed.at([1]).latents.shape == (1, 3, 4, 6)


def test_captions_that_come_with_the_images_are_not_made_again(text, monkeypatch):
    """A drawn scene's caption costs as much as a third of its picture."""
    monkeypatch.setattr(Numbers, "caption", None)
    feed, _ = latent_feed(text, Numbers(), range(10))
    assert feed.captions == [str(i) for i in range(10)] and len(next(feed.batches(4, 0)).latents) == 4


def test_progress_counts_to_the_end(text, monkeypatch):
    monkeypatch.setattr("training.feed.ENCODE_BATCH", 4)
    seen = []
    latent_feed(text, Numbers(bad=(9,)), range(10), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("kind", [ImageFeed, LatentFeed])
def test_each_latent_is_drawn_by_its_place_in_the_run_whoever_encodes_it(text, kind):
    """Another noise for each seed, step and row; of two processes, as of one, also where batches come in parts."""
    feed = kind(Numbers(), np.arange(10), Encoding(Noisy(), text, CPU, sampled=True))

    def noise(share=WHOLE, seed=0, step=0):
        batch = next(feed.batches(4, seed, step, share))
        colours = [int(text.tokenizer.decode(ids)) for ids in batch.tokens.ids]
        return batch.latents - (torch.tensor(colours) / 127.5 - 1)[:, None, None, None]

    found = [noise(), noise(seed=1), noise(step=1)]
    assert len({round(x.flatten()[0].item(), 4) for rows in found for x in rows}) == 12
    for parts in (1, 2):
        shares = [Share(rank, 2, parts) for rank in range(2)]
        for share in shares:
            torch.testing.assert_close(noise(share), found[0][share.rows(4)])


def test_latents_of_several_sizes_are_drawn_as_each_by_itself():
    statistics = [torch.zeros(3, *size) for size in ((4, 4), (2, 6), (4, 4), (2, 6))]
    found = latents_from(Noisy(), statistics, latent_generators(True, 0, 5, range(4)), CPU)
    for row, own in enumerate(statistics):
        assert torch.equal(found[row], latents_from(Noisy(), own[None], latent_generators(True, 0, 5, [row]), CPU)[0])


def test_latents_are_in_fp32_whatever_a_cache_keeps_them_in():
    for dtype in (torch.float16, torch.bfloat16):
        statistics = torch.full((2, 3, 4, 4), 0.1, dtype=dtype)
        for form in (statistics, list(statistics)):
            for sampled in (False, True):
                found = latents_from(Noisy(), form, latent_generators(sampled, 0, 0, range(2)), CPU)
                assert {x.dtype for x in found} == {torch.float32}


@pytest.mark.parametrize("num", [1, 3, CPU_BLOCK, CPU_BLOCK + 3])
def test_on_a_cpu_an_image_is_always_seen_among_as_many(num):
    images = torch.zeros(num, 3, 4, 4, dtype=torch.uint8)
    for mixed, at_a_time in ((False, CPU_BLOCK), (True, 1)):
        found = statistics_of(Counting(), images, CPU, mixed)
        assert len(found) == num and set(found.flatten().tolist()) == {at_a_time}


def test_an_error_ends_what_reads_ahead(text, monkeypatch):
    """Workers too, though the traceback is kept: of the autoencoder's, and of the text beside the pictures."""
    ended, plain = [], training.feed.loader

    def watched(*args):
        try:
            yield from plain(*args)
        finally:
            ended.append(True)

    monkeypatch.setattr(training.feed, "loader", watched)
    broken = ImageFeed(Numbers(), np.arange(10), Encoding(Broken(), text, CPU))
    none = WithText(image_feed(text, Numbers(), range(10))[0], Pieces(["one"], text.tokenizer, 5, CPU), 1)
    monkeypatch.setattr(none.text, "batches", lambda *args: iter(()))
    for feed, message in ((broken, "out of memory"), (none, "shorter")):
        with pytest.raises((RuntimeError, ValueError), match=message) as kept:
            next(feed.batches(4, 0))
        assert ended == [True] and kept.tb is not None
        ended.clear()


def test_the_order_hangs_on_how_many_samples_there_are(text):
    """Those that are left in memory; of those that are read as they come all, the bad ones too."""
    source, pieces = Numbers(bad=(2,)), Pieces(["one"], text.tokenizer, 5, CPU)
    feeds = [make(text, source, range(8))[0] for make in (latent_feed, image_feed)]
    assert [feed.num_ordered for feed in feeds] == [WithText(feed, pieces, 1).num_ordered for feed in feeds] == [7, 8]


@pytest.mark.parametrize("make", [latent_feed, image_feed])
def test_text_stands_beside_as_many_pictures_less(text, make):
    """From any step on the same batches, of the feed's own pictures and the text's own pieces."""
    feed, _ = make(text, Numbers(), range(10))
    pieces = Pieces(["one two", "three", "four five six"], text.tokenizer, 5, CPU)
    batches, pictures, words = WithText(feed, pieces, 3).batches(8, 1), feed.batches(5, 1), pieces.batches(3, 1)
    later = WithText(feed, pieces, 3).batches(8, 1, start_step=2)
    for step in range(4):
        batch, own = next(batches), next(pictures)
        assert torch.equal(batch.latents, own.latents) and torch.equal(batch.tokens.ids, own.tokens.ids)
        assert torch.equal(batch.text.ids, next(words).ids)
        if step >= 2:
            again = next(later)
            assert torch.equal(again.latents, batch.latents) and torch.equal(again.text.ids, batch.text.ids)
    share = Share(1, 2)
    own, whole = next(WithText(feed, pieces, 4).batches(8, 1, 0, share)), next(WithText(feed, pieces, 4).batches(8, 1))
    assert torch.equal(own.latents, whole.latents[2:]) and torch.equal(own.text.ids, whole.text.ids[2:])
