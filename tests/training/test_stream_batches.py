"""Streams in buckets and of mixed sizes: the batches that are made of rows as they come, and runs trained on such."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training
from mmdit.weights_io import read_json
from tests.training.pictures import noisy, parquet_of, picture
from tests.training.runs import assert_bit_equal, config_for, metrics
from tests.training.test_mixed_sizes import read
from training.data import SourceOptions, open_source
from training.run import RunFolder
from training.setup import bucket_text, open_run_source
from training.share import Share
from training.stream import HeldOut, StreamSource, stream_loader
from training.stream_batches import bucketfuls, cut_by_shape
from training.trainer import Trainer
from training.wanted import Wanted

SHAPES = [(16, 64), (24, 48), (32, 32), (48, 24)]
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=60)


def made(kinds, batch_size, start_step=0, num_rows=None, read_epochs=None):
    """Batches of rows (epoch, number), each of which has the size kinds[number]; shuffled anew every epoch."""

    def epoch_from(epoch, start):
        if read_epochs is not None:
            read_epochs.append(epoch)
        order = np.random.default_rng([7, epoch]).permutation(len(kinds))
        return ((epoch, int(i)) for i in order[start:])

    return bucketfuls(epoch_from, lambda row: kinds[row[1]], batch_size, 7, start_step, num_rows)


@given(shapes, st.integers(1, 20))
def test_each_row_comes_once_an_epoch(kinds, size):
    batches = list(itertools.islice(made(kinds, size), -(-3 * len(kinds) // size)))
    assert all(len(batch.rows) == size for batch in batches)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(row for row in rows if row[0] < 3) == [(e, i) for e in range(3) for i in range(len(kinds))]
    done = [3 * len(kinds) // size * size, len(rows)]  # what is more fills up the last batch
    assert sum(row[0] >= 3 for row in rows) == done[1] - 3 * len(kinds)
    assert all(row[0] < 3 for row in rows[: done[0]])


@given(shapes, st.integers(1, 20))
def test_batches_are_of_one_size_but_for_an_epochs_end(kinds, size):
    """As many of each size as it has rows for, first; then those of neighbours."""
    n = len(kinds)
    for step, batch in enumerate(itertools.islice(made(kinds, size), -(-3 * n // size))):
        assert batch.size in {kinds[i] for epoch, i in batch.rows if epoch == step * size // n}
    for epoch in range(3):
        first, last = -(-epoch * n // size), (epoch + 1) * n // size
        own = list(itertools.islice(made(kinds, size, first), max(0, last - first)))
        assert all(row[0] == epoch for batch in own for row in batch.rows)
        pure = Counter(batch.size for batch in own if {kinds[i] for _, i in batch.rows} == {batch.size})
        order = np.random.default_rng([7, epoch]).permutation(n)[first * size - epoch * n :]
        for kind, count in Counter(kinds[i] for i in order).items():
            assert pure[kind] >= count // size


@given(shapes, st.integers(1, 20), st.integers(0, 40), st.booleans())
def test_counting_on_from_any_step(kinds, size, start, known):
    whole = list(itertools.islice(made(kinds, size), start + 12))
    epochs = []
    again = made(kinds, size, start, len(kinds) if known else None, epochs)
    assert next(again) == whole[start]
    first, last = start * size // len(kinds), (start * size + size - 1) // len(kinds)
    assert epochs == [*([] if known or not first else [0]), *range(first, last + 1)]
    assert list(itertools.islice(again, 11)) == whole[start + 1 :]


@given(shapes, st.integers(1, 20))
def test_one_size_is_the_plain_order(kinds, size):
    n = len(kinds)
    plain = [(e, int(i)) for e in range(3) for i in np.random.default_rng([7, e]).permutation(n)]
    rows = [row for batch in itertools.islice(made([(8, 8)] * n, size), 3 * n // size) for row in batch.rows]
    assert rows == plain[: len(rows)]


@given(shapes, st.integers(1, 20))
def test_what_waits_is_cut_in_the_order_of_shape(kinds, size):
    waiting = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind in {*kinds}}
    whole, rest = cut_by_shape(waiting, size)
    assert (
        len(whole) == len(kinds) // size
        and [len(batch.rows) for batch in rest] == [len(kinds) % size or 0][: len(rest)]
    )
    assert sorted(i for batch in whole + rest for i in batch.rows) == list(range(len(kinds)))
    ordered = sorted(whole + rest, key=lambda batch: [kinds[i][0] / kinds[i][1] for i in batch.rows])
    ratios = [kinds[i][0] / kinds[i][1] for batch in ordered for i in batch.rows]
    assert ratios == sorted(ratios)
    for batch in ordered:
        assert batch.size == kinds[batch.rows[len(batch.rows) // 2]]
        below = sum(kinds[i][0] / kinds[i][1] < batch.size[0] / batch.size[1] for i in batch.rows)
        assert below <= len(batch.rows) // 2  # the median: no other size is nearer to all of them


def test_batches_of_an_epochs_end_come_in_another_order_each_time():
    kinds = [(8, 8 * k) for k in range(1, 31)]
    batches = list(itertools.islice(made(kinds, 3), 50))
    orders = [tuple(batch.size for batch in batches[e * 10 : e * 10 + 10]) for e in range(5)]
    assert len({*orders}) == 5 and len({tuple(sorted(order)) for order in orders}) == 1


# --- streams ---------------------------------------------------------------------------------------------------------

SIZES = ((32, 32), (24, 48), (48, 24), (30, 36), (9, 13), (100, 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two Parquet files with 70 pictures of six sizes."""
    datasets = pytest.importorskip("datasets")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # at the end of each pass
    path = tmp_path_factory.mktemp("mixed")
    for number, (first, last) in enumerate(((0, 33), (33, 70))):
        parquet_of(path / f"{number}.parquet", range(first, last), sizes=SIZES)
    return path


def opened(folder, buckets=True, size=(32, 32), wanted=None, **options):
    options = SourceOptions(buckets, 2.0, wanted=wanted or Wanted(), **options)
    return StreamSource(f"hf-stream:{folder}", size, 8, options=options, buffer=16)


def number_of(image) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def test_every_batch_of_a_stream_is_of_one_bucket(folder):
    """Of 140 rows 24 make no batch of their own size; each is shown whole but for what its batch's shape cuts."""
    stream = opened(folder)
    files = open_source(str(folder), (32, 32), 8, options=SourceOptions(buckets=True))
    nearest = {row.key: stream.size_of(row) for row in stream.rows(0, None)}
    assert Counter(nearest.values()) == Counter(files.layout.sizes[b] for b in files.layout.bucket)
    assert stream.layout.bucket is None and {*files.layout.sizes} < {*stream.layout.sizes}
    batches = list(itertools.islice(stream_loader(stream, 0.0, 4, 1), 35))
    seen = Counter(key for batch in batches for key in batch.keys)
    assert seen == dict.fromkeys(nearest, 2)
    pure = [batch for batch in batches if {nearest[key] for key in batch.keys} == {(*batch.images.shape[2:],)}]
    assert len(pure) >= 35 - 6
    for batch in batches:
        assert batch.images.shape[:2] == (4, 3) and batch.sizes is None
        assert batch.captions == [f"picture {number_of(image)}" for image in batch.images]


def test_of_each_bucket_come_as_many_batches_as_it_has_rows_for(folder):
    shown = Counter()
    for batch in itertools.islice(stream_loader(opened(folder), 0.0, 4, 1), 350):
        shown[(*batch.images.shape[2:],)] += 1
    expected = Counter(opened(folder).size_of(row) for row in opened(folder).rows(0, None))
    for size, count in expected.items():
        assert shown[size] / 350 == pytest.approx(count / 70, abs=0.03)
    assert sum(shown[size] for size in expected) >= 345


@pytest.mark.parametrize("buckets", [True, "own"])
def test_batches_of_mixed_sizes_are_in_the_plain_order(folder, buckets):
    stream = opened(folder, buckets, mixed=True)
    size_of = {row.key: stream.size_of(row) for row in stream.rows(0, None)}
    files = open_source(str(folder), (32, 32), 8, options=SourceOptions(buckets, mixed=True))
    assert Counter(size_of.values()) == Counter(files.layout.sizes[b] for b in files.layout.bucket)
    assert {*size_of.values()} <= {*stream.layout.sizes}
    plain = stream_loader(opened(folder, False), 0.1, 7, 1)
    for one, other in zip(itertools.islice(stream_loader(stream, 0.1, 7, 1), 30), plain, strict=False):
        assert one.keys == other.keys and one.sizes == [size_of[key] for key in one.keys] and len({*one.sizes}) > 1
        assert [number_of(image) for _, image in read(one)] == [int(text.split()[1]) for text in one.captions]


@pytest.mark.parametrize("how", [{}, {"mixed": True}, {"buckets": "own", "mixed": True}])
def test_workers_shares_and_resuming_change_nothing(folder, how):
    how |= {"crop": "random", "flip": True}
    alone = list(itertools.islice(stream_loader(opened(folder, **how), 0.1, 6, 1), 30))
    for start, num_workers in ((0, 2), (17, 1), (28, 0)):
        batches = stream_loader(opened(folder, **how), 0.1, 6, 1, start, num_workers)
        for one, other in zip(alone[start:], batches, strict=False):
            assert one.keys == other.keys and one.sizes == other.sizes and torch.equal(one.images, other.images)
        batches.close()
    ranks = [stream_loader(opened(folder, **how), 0.1, 6, 1, share=Share(rank, 2)) for rank in range(2)]
    for one in alone[:14]:  # over an epoch's end
        parts = [next(rank) for rank in ranks]
        assert sum((part.keys for part in parts), []) == one.keys
        assert torch.equal(torch.cat([part.images for part in parts]), one.images)


def test_a_resumed_stream_in_buckets_reads_no_epoch_in_between(folder, tmp_path, monkeypatch):
    wanted = Wanted(cache=tmp_path / "index")
    whole = [batch.keys for batch in itertools.islice(stream_loader(opened(folder, wanted=wanted), 0.1, 4, 1), 70)]
    for known in (True, False):
        stream = opened(folder, wanted=wanted if known else None)
        epochs, rows = [], stream.rows
        monkeypatch.setattr(
            stream, "rows", lambda epoch, seed, to=epochs, rows=rows: to.append(epoch) or rows(epoch, seed)
        )
        batches = stream_loader(stream, 0.1, 4, 1, 60)
        assert next(batches).keys == whole[60]
        batches.close()
        size = opened(folder, wanted=wanted).epoch_rows(0.1)
        assert epochs[0] == (240 // size if known else 0) and 0 not in epochs[1:] and epochs[-1] <= 260 // size
        assert set(epochs) & {1, 2} == set()


def test_a_stream_of_fewer_rows_than_a_batch(folder):
    stream = opened(folder)
    batches = list(itertools.islice(stream_loader(stream, 0.0, 200, 1), 7))
    assert Counter(key for batch in batches for key in batch.keys) == {row.key: 20 for row in stream.rows(0, None)}
    resumed = stream_loader(opened(folder), 0.0, 200, 1, 5)
    assert [next(resumed).keys for _ in range(2)] == [batch.keys for batch in batches[5:]]


def test_a_bad_image_takes_a_place_and_is_replaced_in_its_batch(tmp_path):
    """A header that cannot be read is as one of image_size; a file that is cut has the size that its header says."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    images = [picture(i, SIZES[i % 2]) for i in range(12)]
    images[3], images[4] = noisy(3, (24, 48))[:300], b"no image"
    table = pyarrow.table(
        {"image": [{"bytes": data, "path": None} for data in images], "text": [f"picture {i}" for i in range(12)]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    stream = opened(tmp_path, size=(32, 32))
    rows = list(stream.rows(0, None))
    assert [rows[i].size for i in (0, 3, 4)] == [(32, 32), (24, 48), None] and stream.size_of(rows[4]) == (32, 32)
    for start, batch in enumerate(itertools.islice(stream_loader(stream, 0.0, 6, 0), 4)):
        assert len(batch.skipped) == 1 and len({*batch.keys}) == 5
        wide = batch.images.shape[2:] == (24, 48)
        assert all(int(text.split()[1]) % 2 == wide for text in batch.captions), start


def test_filters_leave_rows_out_of_buckets(folder):
    left = {row.captions[0] for row in opened(folder, wanted=Wanted(min_side=10, max_aspect=2.0)).rows(0, None)}
    assert left == {f"picture {i}" for i in range(70) if i % 6 < 4}


@pytest.mark.parametrize("how", [{}, {"buckets": "own", "mixed": True}])
def test_held_out_rows_have_the_size_of_their_bucket(folder, how):
    held_out = HeldOut(opened(folder, **how), 0.3, 100)
    layout = held_out.layout
    assert len(layout.sizes) > 2 and layout.mixed == ("mixed" in how)
    for i, row in enumerate(held_out.rows):
        size = layout.sizes[layout.bucket_of(i)]
        assert held_out[i].image.shape[:2] == size == held_out.stream.size_of(row)
    assert HeldOut(opened(folder, False), 0.3, 100).layout.sizes == ((32, 32),)


# --- runs ------------------------------------------------------------------------------------------------------------

COMMON = ("data.image_size=32", "data.held_out=0.25", "data.cache_latents=false", "data.num_samples=none",
          "data.shuffle_buffer=16", "training.batch_size=8", "training.checkpoint_every=4", "training.log_every=1",
          "training.validate_every=50", "training.keep_checkpoints=9",
          "evaluation.validation_times=1", "sampling.num_steps=1")  # fmt: skip
OWN = ("data.buckets=own", "training.packing=true")
BUCKETS = ("data.buckets=true", "model.pos_embed_max_size=4")


@pytest.mark.parametrize(
    ("how", "said", "noted"),
    [
        (BUCKETS, "fitted to 5 buckets: 24 x 48, 24 x 40, 32 x 32, 40 x 24, 48 x 24", True),
        (BUCKETS, "fitted to 5 buckets: ", False),
        ((*OWN, "data.num_workers=1"), "fitted to 18 buckets: 8 x 8, ", True),
    ],
)  # fmt: skip
def test_a_run_on_a_stream_of_several_sizes_resumes_to_the_bit(folder, tmp_path, how, said, noted):
    """In the middle of its second epoch, with a note of how many rows an epoch has and without."""
    more = (f"data.source=hf-stream:{folder}", *COMMON, *how)
    whole = training.train(config_for(tmp_path / "whole", *more, "training.num_steps=10"))
    half = training.train(config_for(tmp_path / "half", *more, "training.num_steps=8"))
    if not noted:
        (note,) = (half / "index").iterdir()
        note.unlink()
    training.resume(half, ["training.num_steps=10"])
    assert_bit_equal(half, whole)
    assert metrics(half, "loss") == metrics(whole, "loss")
    assert said in (whole / "log.txt").read_text()
    pipe = training.evaluate.TextToImage.load(whole)
    assert pipe.model.transformer.config.pos_embed_max_size >= 48 // pipe.step
    scores = read_json(whole / "scores.json")
    config = RunFolder(whole).config()
    held_out = HeldOut(open_run_source(config, 8), 0.25, config.evaluation.validation_samples)
    sizes = {f"validation_loss_{h}x{w}" for h, w in held_out.layout.sizes}
    assert len(sizes) > 2 and sizes < scores.keys() and sizes < RunFolder(whole).metrics()[-1].keys()
    with pytest.raises(ValueError, match="another data.buckets"):
        training.resume(half, ["data.buckets=false"])


def test_a_transfusion_trains_on_a_stream_of_mixed_sizes(folder, tmp_path):
    own = ["data.buckets=own", "transfusion.enabled=true", "model.positions=rope", "text.vocab_size=400"]
    config = config_for(tmp_path / "run", f"data.source=hf-stream:{folder}", *COMMON, *own)
    trainer = Trainer(config, RunFolder.create(tmp_path / "run", config))
    batch = next(trainer.feed.batches(8, 0))
    assert len({x.shape for x in batch.latents}) > 1
    loss, _ = trainer._train_step(trainer.learner, batch)
    assert loss.isfinite()


def test_many_sizes_of_a_stream_are_named_by_the_ends(folder):
    assert bucket_text(opened(folder, "own", (64, 64), mixed=True)) == "56 sizes from 8 x 8 to 64 x 72"
