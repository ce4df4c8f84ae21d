"""The processes of one run, as torchrun starts them: the rank of this one, and small collectives between all of them.

Small values go over a process group of their own on the CPU (gloo), so that exchanging one does not wait for the GPU;
gradients and weights go over the device's group (nccl on CUDA). Without torchrun a run is one process, `ALONE`, for
which every collective returns at once; with `parallel.cpu_offload` it has a group too, since FSDP2 wants one.

    with ranks_of(config) as ranks:
        path = ranks.from_first(lambda: make_folder())     # called in process 0 alone; all get what it returns
        stop = ranks.any(interrupted)                      # all processes stop at the same step
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import ConfigError, TrainConfig
from training.devices import pick_device
from training.remote import within

T = TypeVar("T")
CONNECT = timedelta(minutes=2)  # to reach the store of a torchrun, which was there before this process
MEET = timedelta(minutes=5)  # for all processes to start: torchrun tells other machines nothing of one that failed
ENDED = "process 0 ended"
LEFT = "processes that know it"
LEAVE = timedelta(seconds=5)  # for the others to hear that process 0 ended, before the store ends with it
POLL = 0.2  # seconds after which a process that waits asks the store again, and process 0 says that it is there
TRIES = 5  # gloo waits so many timeouts for a process to connect, which may have ended
QUICK = timedelta(seconds=5)  # least timeout of a group while it connects
NO_SHARED_STORE = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 wherever torchrun is started"


class ProcessLost(ValueError):
    """Another process of the run, or the torchrun that started them, has ended or no longer responds."""


class ToldByFirst(SystemExit):
    """Process 0 failed and prints the error; this process exits too, without a message."""


@dataclass
class Ranks:
    """Process `rank` of `world`, of which `per_node` run on each machine.

    group: their process group on the CPU (None for one process); timeout: how long to wait for one that does not
    respond; store: torch's key-value store that they share; turns: numbers for its keys.
    """

    rank: int = 0
    world: int = 1
    per_node: int = 1
    group: Any = None
    timeout: timedelta = timedelta(minutes=30)
    store: Any = None
    turns: Iterator[int] = field(default_factory=count)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes files and prints for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process."""
        if self.world == 1:
            return flag
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return bool(found)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over all processes, on the CPU."""
        if self.world > 1:
            x = x.detach().cpu().clone()
            dist.all_reduce(x, group=self.group)
            x /= self.world
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        return self.mean(x) * self.world

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, self.group)
        return values

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.gather(None)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in process 0, in all processes. Where it fails, process 0 raises its error and the others
        exit with status 2, without a message.
        """
        if self.world == 1:
            return make()
        result: list[Any] = [None, False]  # (value, whether `make` succeeded)
        error: BaseException | None = None
        if self.first:
            try:
                result = [make(), True]
            except BaseException as caught:
                error = caught
        dist.broadcast_object_list(result, src=0, group=self.group)
        if error is not None:
            raise error
        if not result[1]:
            raise ToldByFirst(2)
        return result[0]

    def after_first(self, make: Callable[[], T]) -> T:
        """What `make` returns, called in process 0 first, so that the others find what it keeps; where that fails, they
        exit as in `from_first`. It may take longer than `timeout`, as reading the index of a server's shards does.
        """
        if self.world == 1:
            return make()
        key = f"made {next(self.turns)} by process 0"
        if not self.first:
            if self._last_said(key) != b"whole":
                raise ToldByFirst(2)
            return make()
        outcome, ended = "nothing", threading.Event()
        beating = threading.Thread(target=self._beat, args=(key, ended), daemon=True)
        beating.start()
        try:
            made, outcome = make(), "whole"
        finally:
            ended.set()
            beating.join()
            self.store.set(key, outcome)
        return made

    def _beat(self, key: str, ended: threading.Event) -> None:
        """Say in the store, until process 0 has ended what it does, that it is there."""
        with suppress(RuntimeError):  # the store may be gone
            for beat in count():
                self.store.set(key, str(beat))
                if ended.wait(POLL):
                    return

    def _last_said(self, key: str) -> bytes:
        """What process 0 says of its outcome. Raises DistStoreError where it says nothing more for `timeout`."""
        said, since = b"", time.monotonic()
        while said not in (b"whole", b"nothing"):  # no collective: those have a timeout
            time.sleep(POLL)
            now = self.store.get(key) if self.store.check([key]) else b""
            if now != said:
                said, since = now, time.monotonic()
            elif time.monotonic() - since > self.timeout.total_seconds():
                raise dist.DistStoreError("process 0 does not say any more that it is there")
        return said

    def agree(self, **values: Any) -> None:
        """Raises ConfigError in all processes where a value of one differs from that of process 0."""
        gathered = self.gather((socket.gethostname(), values))
        first_host, first = gathered[0]
        for rank, (host, other) in enumerate(gathered):
            if wrong := [name for name, value in other.items() if value != first[name]]:
                raise ConfigError(
                    f"process {rank} on {host} has other {' and '.join(wrong)} than process 0 on {first_host}: start "
                    "all alike"
                )

    def with_own_group(self) -> Ranks:
        """The same processes with another group, for a thread whose collectives run beside those of training."""
        if self.world == 1:
            return self
        self.barrier()  # connecting has little time
        return replace(self, group=_group(self.timeout, backend="gloo"))

    def group_among(self, parts: Sequence[Sequence[int]]) -> Any:
        """The process group for the device's tensors of that part of the ranks which has this one. All have to call it
        with the same parts.
        """
        self.barrier()
        groups = [_group(self.timeout, part) for part in parts]
        return next(group for group, part in zip(groups, parts, strict=True) if self.rank in part)

    @property
    def device_group(self) -> Any:
        """The process group that the device's tensors go over; None where there is one process."""
        return dist.group.WORLD if self.world > 1 else None


ALONE = Ranks()


@contextmanager
def ranks_of(config: TrainConfig) -> Iterator[Ranks]:
    """The processes that torchrun started, connected; `ALONE` where it did not.

    Raises ConfigError where several were started and the config wants one, ProcessLost when one of them ends early.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        with _group_of_one(config) if config.parallel.cpu_offload else nullcontext():
            yield ALONE
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1 and config.parallel.strategy == "none":
        raise ConfigError(f'parallel.strategy is "none", but {world} processes were started: set "auto", or start one')
    if world > 1 and config.training.device == "mps":
        raise ConfigError(f'training.device is "mps", which is one GPU, but {world} processes were started: start one')
    _allow_many_files()
    if pick_device(config.training.device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    timeout = timedelta(seconds=config.parallel.timeout)
    store = _store(timeout)
    answering = Answering(store, min(timeout, MEET))
    try:
        dist.init_process_group(
            _backend(config), store=store, rank=rank, world_size=world, timeout=_to_connect(timeout)
        )
        _set_timeout(timeout, dist.group.WORLD)
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        group = _group(timeout, backend="gloo")
        yield Ranks(rank, world, per_node, group, timeout, answering)
        if rank > 0:
            stay(answering, timeout)
        else:
            let_go(answering, world)
    except RuntimeError as error:
        if not lost(error):
            raise
        raise ProcessLost(
            f"process {rank} stops: another one of the {world} ended or does not answer any more; what all had saved "
            f"is whole, go on with: mmdit train --resume {config.run_folder}"
        ) from error
    finally:
        if rank == 0:
            with suppress(RuntimeError):  # the store may be gone
                answering.set(ENDED, "")
        if dist.is_initialized():
            dist.destroy_process_group()


def _backend(config: TrainConfig) -> str:
    return "cpu:gloo,cuda:nccl" if pick_device(config.training.device).type == "cuda" else "gloo"


@contextmanager
def _group_of_one(config: TrainConfig) -> Iterator[None]:
    if dist.is_initialized():  # by the program that calls
        yield
        return
    dist.init_process_group(_backend(config), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass
class Answering:
    """torch's store, whose calls raise DistStoreError where it gives no answer for `timeout`: torch's own would wait as
    long as the process that serves it, or its machine, hangs.
    """

    store: dist.Store
    timeout: timedelta

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return within(lambda: getattr(self.store, name)(*args), self.timeout.total_seconds())
            except TimeoutError as error:
                raise dist.DistStoreError("the store does not answer") from error

        return call


def _group(timeout: timedelta, members: Sequence[int] | None = None, backend: str | None = None) -> Any:
    """A process group of these processes (all; over the device's backend), which all have to make at the same time."""
    group = dist.new_group(members, _to_connect(timeout), backend)
    if members is None or dist.get_rank() in members:
        _set_timeout(timeout, group)
    return group


def _to_connect(timeout: timedelta) -> timedelta:
    """The timeout of a group while it connects, so that it does so within the given one, or `MEET`."""
    return max(min(timeout, MEET) / TRIES, QUICK)


def _set_timeout(timeout: timedelta, group: Any) -> None:
    """Set how long a collective of a group may take, in torch before 2.14 too."""
    how = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    how(timeout, group)


def _allow_many_files() -> None:
    """Raise the limit of open files as far as the system lets one: each process has up to four connections to every
    other one, and usual limits are 1024.
    """
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def stay(store: Any, timeout: timedelta) -> None:
    """Wait until process 0 has ended, which scores after training; at most `timeout`, or until a signal comes.

    A torchrun whose processes have all ended exits, and with it go the processes of other machines that connected
    through its store.
    """
    last = time.monotonic() + timeout.total_seconds()
    with suppress(RuntimeError, KeyboardInterrupt):
        while time.monotonic() < last and not store.check([ENDED]):
            time.sleep(POLL)
    with suppress(RuntimeError):
        store.add(LEFT, 1)


def let_go(store: Any, world: int) -> None:
    """Tell the others that process 0 has ended, and wait until they know: those that still ask its store when it is
    gone print torch's own account of a lost connection.
    """
    last = time.monotonic() + LEAVE.total_seconds()
    with suppress(RuntimeError, KeyboardInterrupt):
        store.set(ENDED, "")
        while time.monotonic() < last and store.add(LEFT, 0) < world - 1:
            time.sleep(0.05)


def _store(timeout: timedelta) -> dist.Store:
    """The key-value store at which the processes find each other.

    torchrun may serve one store to all its restarts, and the addresses of processes that died stay in it. On one
    machine, where the number of restarts is the same for all, each attempt therefore has its own prefix of keys. Raises
    ProcessLost where the store does not answer, or a process does not come to it in time; see also `check_addresses`.
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
        came = [f"process {k} came" for k in range(world)]
        store.set(came[rank], own_address())
        store.wait(came, min(timeout, MEET))
        try:
            check_addresses(store.multi_get(came))
        except ConfigError:  # all find it, those that read it here last too
            let_go(store, world) if rank == 0 else store.add(LEFT, 1)
            raise
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


def own_address() -> str:
    """This machine's name and the address at which gloo tells others to reach it; "-" where that is an interface's."""
    name, address = socket.gethostname(), "-"
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        address = "127.0.0.1"  # for gloo too, where the name does not resolve
        with suppress(OSError):
            address = str(socket.getaddrinfo(name, None)[0][4][0])
    return f"{name} {address}"


def check_addresses(told: Sequence[bytes]) -> None:
    """Raises ConfigError where one of several machines gives an address that the others cannot reach: gloo would try to
    until its time is over. told: `own_address` of each process.
    """
    found = dict(text.decode().split() for text in told)
    wrong = [f"{name} is {address}" for name, address in found.items() if address == "::1" or address[:4] == "127."]
    if len(found) > 1 and wrong:
        raise ConfigError(
            f"other machines cannot reach one whose host name stands for itself alone ({', '.join(wrong[:3])}): "
            "correct the name's address (/etc/hosts), or set GLOO_SOCKET_IFNAME there to the network's interface"
        )


def lost(error: BaseException) -> bool:
    """Whether torch raised this error because another process is gone."""
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "connect timeout", "socket")
    return isinstance(error, dist.DistError) or ("gloo" in text and any(sign in text for sign in signs))
