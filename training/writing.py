"""Who writes checkpoints, and when: one process or each its part; at once, or in a thread beside the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from training.checkpoint import save_checkpoint
from training.parallel import Ranks
from training.sharded_checkpoint import save_sharded

Weights = Mapping[str, Mapping[str, Tensor]]


class Writer:
    """Writes the checkpoints of a run. All processes call `write` and `wait`.

    in_parts: each process has a part of the tensors; otherwise the first writes all. beside: `write` only copies, and
    what follows happens in a thread; an error there is raised by the next `write` or `wait`.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks, in_parts: bool, beside: bool) -> None:
        self.run, self.keep, self.in_parts, self.beside = run, keep, in_parts, beside
        self.ranks = ranks.apart() if beside else ranks
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def write(self, state: Mapping[str, Any], weights: Weights, after: Callable[[], object]) -> None:
        """Write one checkpoint, then do what comes after it (process 0 alone)."""
        self.wait()
        finish = self._begun(state, weights)

        def complete() -> None:
            finish()
            if self.ranks.first:
                after()

        if self.beside:
            self._thread = Thread(target=self._kept, args=(complete,), name="checkpoint")
            self._thread.start()
        else:
            complete()

    def _begun(self, state: Mapping[str, Any], weights: Weights) -> Callable[[], object]:
        if self.in_parts:
            return save_sharded(self.run, state, weights, self.keep, self.ranks, self.beside)
        if not self.ranks.first:
            return lambda: None
        if self.beside:
            weights = {
                group: {k: x.detach().to("cpu", copy=True) for k, x in some.items()} for group, some in weights.items()
            }
        return lambda: save_checkpoint(self.run, state, weights, self.keep)

    def _kept(self, complete: Callable[[], None]) -> None:
        try:
            complete()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        """Until nothing is being written any more; what went wrong is kept."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def tell(self, log: Callable[[str], None]) -> None:
        """Say what went wrong, where another error ends the run and nobody will `wait`."""
        self.join()
        if self._error is not None:
            with suppress(OSError):  # as of a disk that is full
                log(f"warning: the last checkpoint was not written: {self._error}")

    def wait(self) -> None:
        """Until what was begun is written. Raises what went wrong with it."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
