"""The processes of one run, as torchrun starts them: which one this is, and what they tell each other.

Numbers go over a group of their own on the CPU (gloo), so that asking costs no wait for a GPU; gradients and weights go
over the device's (nccl on CUDA). Without torchrun a run is one process, `ALONE`, and nothing of this does anything.

    with ranks_of(config) as ranks:
        path = ranks.from_first(lambda: make_folder())     # made by process 0 alone, known to all
        stop = ranks.any(interrupted)                      # all stop at the same step
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import ConfigError, TrainConfig
from training.devices import pick_device

T = TypeVar("T")
CONNECT = timedelta(minutes=2)  # to a torchrun that serves since before it started this process
MEET = timedelta(minutes=5)  # until all have begun: of one that ends before, torchrun tells other machines nothing
ENDED = "process 0 ended"
NO_SHARED_STORE = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 wherever torchrun is started"
COMMAND = "torchrun --nproc-per-node 2 -m mmdit_cli train"


class ProcessLost(ValueError):
    """Another process of the run ended, or does not answer any more; or the torchrun that started them."""


class ToldByFirst(SystemExit):
    """Process 0 failed and says why; this one ends with it, and says nothing."""


class Ranks:
    """Process `rank` of `world`, number `local` of the `per_node` on its machine.

    group: their channel on the CPU; timeout: how long one waits on it for another.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        local: int = 0,
        per_node: int = 1,
        group: Any = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.rank, self.world, self.local, self.per_node, self._group = rank, world, local, per_node, group
        self.timeout = timeout

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so in one process at least."""
        if self.world == 1:
            return flag
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
        return bool(found)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes, on the CPU."""
        if self.world > 1:
            x = x.detach().cpu().clone()
            dist.all_reduce(x, group=self._group)
            x /= self.world
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        return self.mean(x) * self.world

    def gather(self, value: T) -> list[T]:
        """What each process says, in order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, self._group)
        return values

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)

    def from_first(self, make: Callable[[], T]) -> T:
        """What process 0 makes. Where that fails, it raises its error and the others end with status 2, silently."""
        if self.world == 1:
            return make()
        told: list[Any] = [None, False]
        error: BaseException | None = None
        if self.first:
            try:
                told = [make(), True]
            except BaseException as caught:
                error = caught
        dist.broadcast_object_list(told, src=0, group=self._group)
        if error is not None:
            raise error
        if not told[1]:
            raise ToldByFirst(2)
        return told[0]

    def agree(self, **said: Any) -> None:
        """Raises ValueError in all processes where one says another value than the first."""
        everyone = self.gather(said)
        for rank, other in enumerate(everyone):
            if wrong := [name for name, value in other.items() if value != everyone[0][name]]:
                raise ValueError(f"process {rank} has other {' and '.join(wrong)} than process 0: start all alike")

    def apart(self) -> Ranks:
        """The same processes with a channel of their own, for a thread beside the one that trains."""
        group = dist.new_group(backend="gloo", timeout=self.timeout) if self.world > 1 else None
        return Ranks(self.rank, self.world, self.local, self.per_node, group, self.timeout)

    @property
    def group(self) -> Any:
        """The channel on the CPU; None where there is one process."""
        return self._group

    @property
    def everyone(self) -> Any:
        """The channel on the device; None where there is one process."""
        return dist.group.WORLD if self.world > 1 else None


ALONE = Ranks()


@contextmanager
def ranks_of(config: TrainConfig) -> Iterator[Ranks]:
    """The processes that torchrun started, connected; `ALONE` where it did not.

    Raises ConfigError where several are there and the config wants one, ProcessLost when one of them ends early.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, per_node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > 1 and config.parallel.strategy == "none":
        raise ConfigError(f'parallel.strategy is "none", but {world} processes were started: set "auto", or start one')
    if world > 1 and config.training.device == "mps":
        raise ConfigError(f'training.device is "mps", which is one GPU, but {world} processes were started: start one')
    on_cuda = pick_device(config.training.device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(local)
    timeout = timedelta(seconds=config.parallel.timeout)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    store = _store(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:  # a group takes its own timeout, not the first one's
        yield Ranks(rank, world, local, per_node, dist.new_group(backend="gloo", timeout=timeout), timeout)
        if rank > 0:
            stay(store, timeout)
    except RuntimeError as error:
        if not lost(error):
            raise
        raise ProcessLost(
            f"process {rank} stops: another one of the {world} ended or does not answer any more; what all had saved "
            f"is whole, go on with: mmdit train --resume {config.run_folder}"
        ) from error
    finally:
        if rank == 0:
            with suppress(RuntimeError):  # of a store that is gone
                store.set(ENDED, "")
        dist.destroy_process_group()


def stay(store: dist.Store, timeout: timedelta) -> None:
    """Until process 0 has ended, which scores last, so long or until a signal comes: where its processes have ended
    torchrun does, and on other machines those that met at it are ended too.
    """
    last = time.monotonic() + timeout.total_seconds()
    with suppress(RuntimeError, KeyboardInterrupt):
        while time.monotonic() < last and not store.check([ENDED]):
            time.sleep(0.2)


def _store(timeout: timedelta) -> dist.Store:
    """Where processes find each other. torchrun may serve one store to all its attempts, in which the addresses of
    those that died are left: on one machine, where attempts have one count, each has keys of its own. Raises
    ProcessLost where nobody answers, or one does not come.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if served and not alone and rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        print(f"warning: a machine that comes back will not find the others: {NO_SHARED_STORE}", flush=True)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=min(timeout, CONNECT if served else MEET)))
        store.set_timeout(timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else ""
        store = dist.PrefixStore(f"attempt {attempt}", store)
        store.set(f"process {rank} came", "")
        store.wait([f"process {k} came" for k in range(world)], min(timeout, MEET))
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        who = "the torchrun that had started it" if served else "process 0"
        raise ProcessLost(f"process {rank} stops: {who} does not answer at {where}") from error
    except dist.DistStoreError as error:
        raise ProcessLost(
            f"process {rank} stops: not all of the {world} have begun within {min(timeout, MEET).seconds} s; look at "
            "what the others say, each on its machine"
        ) from error
    return store


def lost(error: BaseException) -> bool:
    """Whether an error of torch says that another process is gone."""
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "socket")
    return isinstance(error, dist.DistError) or ("gloo" in text and any(sign in text for sign in signs))
