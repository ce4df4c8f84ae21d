"""Processes that find each other, have the same, and end together; several of them: test_distributed.py."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from threading import Event, Timer
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._logging import warning_once
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmdit import linear
from tests.training.processes import free_port
from training.config import ConfigError, load_config
from training.devices import pick_device
from training.interrupts import Interrupts
from training.parallel import (
    ALONE,
    ENDED,
    LEFT,
    Answering,
    ProcessLost,
    Ranks,
    ToldByFirst,
    check_addresses,
    let_go,
    lost,
    own_address,
    ranks_of,
    stay,
)
from training.sharding import kept_ops, recompute


@pytest.fixture
def started(monkeypatch):
    """As torchrun starts the first of two processes; what would connect them is only looked at."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    seen = {}
    dist = torch.distributed
    own = seen["store"] = dist.HashStore()
    for attempt in ("0", ""):
        own.set(f"attempt {attempt}/process 1 came", own_address())
        own.add(f"attempt {attempt}/{LEFT}", 1)
    monkeypatch.setattr(dist, "rendezvous", lambda _, timeout: iter([(own, 0, 2)]))

    def connect(backend, store, timeout, **which):
        store.set("here", "yes")
        seen.update(to=backend, timeout=timeout, keys=own.check(["attempt 0/here"]), **which)

    monkeypatch.setattr(dist, "init_process_group", connect)
    monkeypatch.setattr(dist, "new_group", lambda *how: seen.setdefault("groups", []).append(how) or "group")
    monkeypatch.setattr(dist, "set_timeout", lambda t, group: seen.setdefault("given", []).append((group, t)))
    monkeypatch.setattr(dist, "all_gather_object", lambda values, value, group: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.update(ended=True))
    return seen


def test_several_processes_are_found_connected_and_left(started):
    with ranks_of(load_config("demo", ["parallel.timeout=7", "training.device=cpu"])) as ranks:
        assert (ranks.rank, ranks.world, ranks.per_node, ranks.group) == (0, 2, 2, "group")
        assert ranks.with_own_group().group == "group"
    quick, allowed = timedelta(seconds=5), timedelta(seconds=7)
    connected = {"to": "gloo", "timeout": quick, "keys": True, "rank": 0, "world_size": 2}
    given = [(None, allowed), ("group", allowed), ("group", allowed)]  # torch's own is half an hour
    del started["store"]
    assert started == {**connected, "groups": [(None, quick, "gloo")] * 2, "given": given, "ended": True}


def test_a_group_connects_within_the_timeout(started):
    """gloo waits five timeouts of a group for a process to connect, which may have died meanwhile."""
    for timeout, most in ((1, 25), (100, 100), (1800, 300)):
        with ranks_of(load_config("demo", [f"parallel.timeout={timeout}", "training.device=cpu"])):
            assert 5 * started["timeout"] == timedelta(seconds=most)
            assert started["given"][-1] == ("group", timedelta(seconds=timeout))


def test_a_process_that_is_lost_while_they_connect_is_one_line(started, monkeypatch):
    config = load_config("demo", ["training.device=cpu"])

    def connect(*all, **how):
        raise RuntimeError("Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.h:311] Connect timeout [none]")

    for name in ("new_group", "init_process_group"):
        monkeypatch.setattr(torch.distributed, name, connect)
        with pytest.raises(ProcessLost, match="process 0 stops"), ranks_of(config):
            pass
        assert started.pop("ended") and started["store"].check([f"attempt 0/{ENDED}"])


def test_connections_to_many_processes_find_room(started):
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual[1] - 1, usual[1]))
    try:
        with ranks_of(load_config("demo", ["training.device=cpu"])):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (usual[1], usual[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.parametrize("served", [True, False])
def test_nobody_who_answers_is_one_line(monkeypatch, served):
    """torchrun serves before it starts a process: one whose torchrun has been killed does not wait for it for long."""
    port = str(free_port())
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (env | {"TORCHELASTIC_USE_AGENT_STORE": str(served)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("training.parallel.CONNECT", timedelta(seconds=0.5))
    who = "the torchrun that had started it" if served else "process 0"
    timeout = 3600 if served else 1
    config = load_config("demo", [f"parallel.timeout={timeout}", "training.device=cpu"])
    with pytest.raises(ProcessLost, match=f"process 1 stops: {who} does not answer at 127.0.0.1:{port}"):  # noqa: SIM117
        with ranks_of(config):
            pass


@pytest.mark.parametrize("served", [True, False])
def test_one_that_never_comes_is_one_line(monkeypatch, served):
    """On another machine it may have ended long ago, and its torchrun tells this one nothing."""
    dist = torch.distributed
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = str(server.port if served else free_port())
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (env | {"TORCHELASTIC_USE_AGENT_STORE": str(served), "GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("training.parallel.MEET", timedelta(seconds=1))
    with pytest.raises(ProcessLost, match="process 0 stops: not all of the 2 have begun within 1 s"):  # noqa: SIM117
        with ranks_of(load_config("demo", ["training.device=cpu"])):
            pass


def test_a_machine_that_others_cannot_reach_is_named(monkeypatch):
    monkeypatch.setattr("training.parallel.socket.gethostname", lambda: "node2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = {}
    for address in ("127.0.1.1", "10.0.0.2"):
        monkeypatch.setattr("training.parallel.socket.getaddrinfo", lambda *_, a=address: [(0, 0, 0, "", (a, 0))])
        found[address] = own_address().encode()
    check_addresses([b"node1 10.0.0.1", found["10.0.0.2"]])
    check_addresses([found["127.0.1.1"]] * 2)  # one machine
    with pytest.raises(ConfigError, match=r"whose host name stands for itself alone \(node2 is 127.0.1.1\)"):
        check_addresses([b"node1 10.0.0.1", found["127.0.1.1"]])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_addresses([b"node1 10.0.0.1", own_address().encode()])


@pytest.mark.parametrize(("rank", "goes"), [("0", [2]), ("1", [])])
def test_all_read_which_machine_it_is_before_the_first_ends(started, monkeypatch, rank, goes):
    """Its store may end with it; the fixture's process 1 is on this machine."""
    gone = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("training.parallel.let_go", lambda store, world: gone.append(world))
    monkeypatch.setattr("training.parallel.own_address", lambda: "node9 127.0.1.1")
    started["store"].set("attempt 0/process 0 came", "node8 10.0.0.1")
    with pytest.raises(ConfigError, match="node9 is 127.0.1.1"), ranks_of(load_config("demo", ["training.device=cpu"])):
        pass
    known = started["store"].add(f"attempt 0/{LEFT}", 0) - 1  # one was there
    assert gone == goes and known == int(rank)


def test_others_stay_until_the_first_has_ended(started, monkeypatch):
    """A signal ends it before, as does a process 0 that is never heard of again."""
    store, ended = torch.distributed.HashStore(), []
    Timer(0.3, lambda: (ended.append(True), store.set(ENDED, ""))).start()
    stay(store, timedelta(seconds=60))
    assert ended and store.add(LEFT, 0) == 1
    stay(torch.distributed.HashStore(), timedelta(seconds=0))
    monkeypatch.setattr("training.parallel.time.sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    with Interrupts():
        stay(torch.distributed.HashStore(), timedelta(seconds=60))


def test_the_first_goes_when_all_others_know_it(monkeypatch):
    """Its store may end with it: torch prints a traceback where one still asks there. Those that are gone never do."""
    store, left = torch.distributed.HashStore(), []
    Timer(0.3, lambda: (left.append(store.check([ENDED])), store.add(LEFT, 2))).start()
    let_go(store, 3)
    assert left == [True]
    monkeypatch.setattr("training.parallel.LEAVE", timedelta(seconds=0.1))
    let_go(torch.distributed.HashStore(), 2)


def test_the_first_ends_at_once_and_the_others_stay(started, monkeypatch):
    stayed, config = [], load_config("demo", ["training.device=cpu", "parallel.timeout=7"])
    monkeypatch.setattr("training.parallel.stay", lambda store, timeout: stayed.append(timeout.seconds))
    for rank, seconds in (("0", []), ("1", [7])):
        monkeypatch.setenv("RANK", rank)
        with ranks_of(config):
            pass
        assert stayed == seconds


def test_the_first_ends_though_nobody_can_be_told_any_more(started, monkeypatch):
    def gone(self, key, value):
        if key == ENDED:
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(torch.distributed.PrefixStore, "set", gone)
    monkeypatch.setattr(torch.distributed.PrefixStore, "wait", lambda self, keys, timeout: None)
    monkeypatch.setattr(torch.distributed.PrefixStore, "multi_get", lambda self, keys: [])
    with ranks_of(load_config("demo", ["training.device=cpu"])):
        pass
    assert started["ended"]


def test_the_first_tells_the_others_that_it_has_ended(started, monkeypatch):
    told = []
    monkeypatch.setattr(torch.distributed.PrefixStore, "set", lambda self, key, value: told.append(key))
    monkeypatch.setattr(torch.distributed.PrefixStore, "wait", lambda self, keys, timeout: None)
    monkeypatch.setattr(torch.distributed.PrefixStore, "multi_get", lambda self, keys: [])
    with pytest.raises(OSError, match="no room"), ranks_of(load_config("demo", ["training.device=cpu"])):
        raise OSError("no room")
    assert told[-1] == ENDED


@pytest.mark.parametrize(("machines", "restarts", "warned"), [("2", "3", 1), ("2", "0", 0), ("1", "3", 0)])
def test_a_store_for_all_attempts_is_warned_of_on_several_machines(
    started, monkeypatch, capsys, machines, restarts, warned
):
    env = {"USE_AGENT_STORE": "True", "MAX_RESTARTS": restarts}
    for name, value in {f"TORCHELASTIC_{name}": value for name, value in env.items()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    if machines == "2":  # each of which counts its own attempts: what they meet by has no count
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with ranks_of(load_config("demo", ["training.device=cpu"])):
        pass
    assert capsys.readouterr().out.count("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == warned


@pytest.mark.parametrize("setting", ["parallel.strategy=none", "training.device=mps"])
def test_several_processes_for_a_run_of_one_are_refused(started, setting):
    with (
        pytest.raises(ConfigError, match="but 2 processes were started"),
        ranks_of(load_config("demo", [setting])),
    ):
        pass
    assert started.keys() == {"store"}


def test_without_torchrun_there_is_one_process():
    with ranks_of(load_config("demo")) as ranks:
        assert ranks is ALONE and ranks.first and pick_device("cpu").type == "cpu"


def test_a_process_that_is_gone_is_one_line_and_other_errors_stay_as_they_are(started):
    config = load_config("demo", ["training.device=cpu"])
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321")
    with pytest.raises(ProcessLost, match="process 0 stops: .*go on with: mmdit train --resume runs/demo"):  # noqa: SIM117
        with ranks_of(config):
            raise gone
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), ranks_of(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert lost(gone) and lost(torch.distributed.DistBackendError("NCCL")) and not lost(RuntimeError("socket"))


def test_compiled_selective_recompute_is_silent(capfd):
    """torch would warn of operations in place, for which nothing speaks here."""
    warning_once.cache_clear()
    model = nn.Module()
    model.transformer = nn.Module()
    model.transformer.blocks = nn.ModuleList([nn.Linear(4, 4)])
    recompute(model, "selective", 1)
    torch.compile(model.transformer.blocks[0], backend="aot_eager")(torch.randn(2, 4)).sum().backward()
    assert capfd.readouterr() == ("", "")


def test_compiled_selective_recompute_keeps_onednns_products(monkeypatch):
    """Two products and two derivatives by what went into them; computed again, the first would be a fifth."""
    monkeypatch.setattr(linear, "MIN_PRODUCTS_GRAD", linear.MIN_PRODUCTS)
    first, second = linear.Linear(64, 128), linear.Linear(128, 64)
    x = torch.randn(2, 256, 64, requires_grad=True)
    kept = partial(create_selective_checkpoint_contexts, list(kept_ops()))
    run = torch.compile(lambda x: checkpoint(lambda x: second(first(x).sin()), x, use_reentrant=False, context_fn=kept))
    with torch.profiler.profile() as seen:
        run(x).square().sum().backward()
    assert sum(event.name == "mkldnn::_linear_pointwise" for event in seen.events()) == 4


def test_the_others_wait_for_the_first_however_long_it_takes():
    """Without a collective, which has a timeout: there is no group to call one on."""
    store, order = dist.HashStore(), []
    ranks = [Ranks(rank, 3, store=store) for rank in range(3)]

    def make(rank: int) -> int:
        time.sleep(0.5 * (rank == 0))
        order.append(rank)
        return rank

    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert [*pool.map(lambda one: one.after_first(lambda: make(one.rank)), reversed(ranks))] == [2, 1, 0]
    assert order[0] == order[3] == 0 and sorted(order) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ZeroDivisionError):
        ranks[0].after_first(lambda: 1 // 0)
    for other in ranks[1:]:
        with pytest.raises(ToldByFirst):
            other.after_first(lambda: order.append("made although the first has failed"))
    assert len(order) == 6


def test_the_others_do_not_wait_for_one_that_is_gone():
    """Their store may be on another machine, and go on without process 0."""
    other = Ranks(1, 2, store=dist.HashStore(), timeout=timedelta(seconds=0.5))
    other.store.set("made 0 by process 0", "7")
    with pytest.raises(dist.DistStoreError, match="process 0 does not say any more"):
        other.after_first(lambda: None)


def test_a_store_that_does_not_answer_is_not_waited_for():
    """Its process, or its machine, stands still: torch's own calls have no timeout there."""
    over, never = Event(), dist.HashStore()
    frozen = Answering(SimpleNamespace(check=lambda keys: over.wait(), add=never.add), timedelta(seconds=0.1))
    try:
        with pytest.raises(dist.DistStoreError, match="the store does not answer"):
            Ranks(1, 2, store=frozen).after_first(lambda: None)
        stay(frozen, timedelta(seconds=60))
        assert frozen.add(LEFT, 0) == 1
    finally:
        over.set()
