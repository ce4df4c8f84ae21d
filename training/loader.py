"""Batches from a source, in an order that is a pure function of (seed, epoch), with or without worker processes.

Batch number `step` holds positions step * B ... step * B + B - 1 of the endless concatenation of epochs; epoch e is the
permutation drawn by default_rng([seed, e]). A batch is thus a function of its number: to resume is to start counting
elsewhere, and each worker process builds whole batches on its own.

Shapes: B samples in a batch, h, w the source's image size.
"""

from __future__ import annotations

import atexit
import itertools
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from training.share import WHOLE, Share
from training.sources import DataError

if TYPE_CHECKING:
    from training.data import Sample, Source


@dataclass(frozen=True)
class Batch:
    """Images uint8 RGB (B, 3, h, w), captions and keys; `skipped` lists the bad samples met: (key, reason)."""

    images: torch.Tensor
    captions: list[str]
    keys: list[str]
    skipped: list[tuple[str, str]]


def loader(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Generator[Batch, None, None]:
    """Endless shuffled batches of exactly `batch_size` of the samples at `indices`, from batch number `start_step` on.

    share: the rows of each batch that this process reads. Batches run across the ends of epochs. In place of a bad
    sample stands the next good one in `indices`. The batches
    do not depend on `num_workers`. The iterator's `close()` ends the workers. Raises `DataError` for arguments out of
    range; while iterating, when no sample is good or a worker process dies.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("seed", seed, 0)
    _at_least("start_step", start_step, 0)
    _at_least("num_workers", num_workers, 0)
    if len(indices) == 0:
        raise DataError("no samples to train on: the list of indices is empty; use more data, or hold out less of it")
    return _run(
        _Shuffled(source, np.asarray(indices), batch_size, seed, share), itertools.count(start_step), num_workers
    )


def one_pass(
    source: Source, indices: Sequence[int] | np.ndarray, batch_size: int, num_workers: int = 0
) -> Generator[Batch, None, None]:
    """All good samples at `indices` once and in order, in batches of `batch_size` less the bad ones.

    Raises `DataError` for arguments out of range; while iterating, when a worker process dies.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("num_workers", num_workers, 0)
    chunks = [np.asarray(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return _run(partial(_in_order, source, chunks), range(len(chunks)), num_workers)


class Order:
    """Places 0 .. n - 1 in the endless concatenation of shuffled epochs: `order[position]`."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, k = divmod(position, self.n)
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}  # keep the one before
            self._epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self._epochs[epoch][k])


class _Shuffled:
    """step -> Batch, as `loader` says."""

    def __init__(self, source: Source, indices: np.ndarray, batch_size: int, seed: int, share: Share) -> None:
        self.source, self.indices, self.batch_size = source, indices, batch_size
        self.rows = share.rows(batch_size)
        self.order = Order(len(indices), seed)

    def __call__(self, step: int) -> Batch:
        skipped: list[tuple[str, str]] = []
        first = step * self.batch_size
        samples = [self._good_sample(self.order[first + row], skipped) for row in self.rows]
        return _batch(self.source, samples, skipped)

    def _good_sample(self, place: int, skipped: list[tuple[str, str]]) -> Sample:
        for i in range(len(self.indices)):
            sample = self.source[int(self.indices[(place + i) % len(self.indices)])]
            if sample.error is None:
                return sample
            skipped.append((sample.key, sample.error))
        key, reason = skipped[-1]
        raise DataError(f"none of the {len(self.indices)} samples can be used; one of them is {key}: {reason}")


def _in_order(source: Source, chunks: Sequence[np.ndarray], step: int) -> Batch:
    samples = [source[int(i)] for i in chunks[step]]
    skipped = [(sample.key, sample.error) for sample in samples if sample.error is not None]
    return _batch(source, [sample for sample in samples if sample.error is None], skipped)


def _batch(source: Source, samples: list[Sample], skipped: list[tuple[str, str]]) -> Batch:
    images = np.empty((len(samples), *source.image_size, 3), dtype=np.uint8)
    for slot, sample in zip(images, samples, strict=True):
        assert sample.image is not None
        slot[:] = sample.image
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Batch(channels_first, [sample.caption for sample in samples], [sample.key for sample in samples], skipped)


# --- worker processes ------------------------------------------------------------------------------------------------


class _Steps(Dataset):
    """What a worker calls: step -> Batch, or the error as a value, to be raised without the worker's traceback."""

    def __init__(self, batch_at: Callable[[int], Batch]) -> None:
        self.batch_at = batch_at

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self.batch_at(step)
        except DataError as error:
            return error


def _run(batch_at: Callable[[int], Batch], steps: Iterable[int], num_workers: int) -> Generator[Batch, None, None]:
    if num_workers == 0:
        yield from map(batch_at, steps)
        return
    workers: DataLoader = DataLoader(
        _Steps(batch_at),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else it draws from the global one
    )
    with _signals_blocked():
        batches: Any = iter(workers)
    stop = partial(_stop, batches)
    atexit.register(stop)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "exited unexpectedly" not in reason and "killed by signal" not in reason:
            raise
        raise DataError(f"a data worker died, perhaps for want of memory; try num_workers = 0 ({reason})") from error
    finally:
        atexit.unregister(stop)
        stop()


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started herein never see SIGINT and SIGTERM: to the whole group they must not take the workers from a
    trainer that still saves. Blocking is inherited, so that there is no moment at which a new worker is open to them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(batches: Any) -> None:
    """End the workers, also those that do not answer; needed at exit, where multiprocessing would only send SIGTERM."""
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise DataError(f"{name} must be at least {low}, not {value}")
