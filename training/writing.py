"""Writing checkpoints during a run: by process 0, or sharded by all; at once, or in a thread beside training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from training.checkpoint import save_checkpoint
from training.parallel import Ranks
from training.sharded_checkpoint import save_sharded, stored

Weights = Mapping[str, Mapping[str, Tensor]]


class Writer:
    """Writes the checkpoints of a run. All processes call `write` and `wait`.

    sharded: the tensors are, and each process writes its shards; otherwise process 0 writes all. background: `write`
    only copies the tensors, and a thread writes them; its error is raised by the next `write` or `wait`.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks, sharded: bool, background: bool) -> None:
        self.run, self.keep, self.sharded, self.background = run, keep, sharded, background
        self.ranks = ranks.with_own_group() if background else ranks
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._writing = ""  # what is being written, in words

    def write(
        self, state: Mapping[str, Any], weights: Weights, after: Callable[[Weights], object] | None = None
    ) -> None:
        """Write one checkpoint, then call `after` in process 0, with the tensors that were written: `stored` ones, if
        sharded.
        """
        self.wait()
        if self.background and not self.sharded and self.ranks.first:
            weights = {
                group: {k: x.detach().to("cpu", copy=True) for k, x in some.items()} for group, some in weights.items()
            }
        self._writing = "last checkpoint was"
        finish = self._begin(state, weights)

        def complete() -> None:
            folder = finish()
            self._writing = "last checkpoint is whole, but its pipeline was"
            if after is not None and folder is not None and self.ranks.first:
                after(stored(folder) if self.sharded else weights)

        if self.background:
            self._thread = Thread(target=self._keep_error, args=(complete,), name="checkpoint")
            self._thread.start()
        else:
            complete()

    def _begin(self, state: Mapping[str, Any], weights: Weights) -> Callable[[], Path | None]:
        """The function that writes it. Of sharded tensors that a thread will write, copy them."""
        if self.sharded:
            return save_sharded(self.run, state, weights, self.keep, self.ranks, self.background)
        if not self.ranks.first:
            return lambda: None
        return lambda: save_checkpoint(self.run, state, weights, self.keep)

    def _keep_error(self, complete: Callable[[], None]) -> None:
        try:
            complete()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        """Wait until nothing is being written; an error of the thread is kept for `wait` or `tell`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def tell(self, log: Callable[[str], None]) -> None:
        """Log the thread's error, where another error ends the run and `wait` will not be called."""
        self.join()
        if self._error is not None:
            with suppress(OSError):  # the log may be on the same full disk
                log(f"warning: the {self._writing} not written: {self._error}")

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is written. Raises the thread's error."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
