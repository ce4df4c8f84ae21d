"""Two machines, as torchrun sees them: two of its agents, which meet at an address of this one."""

import os
import re
import signal

import pytest

import training
from tests.training.processes import LONG_COMMAND, PATIENCE, children, free_port, linux, python, wait_for_steps
from tests.training.runs import metrics
from training.checkpoint import load_latest

pytestmark = [pytest.mark.slow, linux]
STEPS = ("training.checkpoint_every=5", "evaluation.prompts_per_question=0", "training.num_steps=150")


def machine(number: int, port: int, *words: object, max_restarts: int = 0):
    """Number 0 or 1 of two machines with a process each; the address is at number 0."""
    launch = ["torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", max_restarts]
    launch += ["--rdzv-id", "run", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    launch += ["--rdzv-conf", f"is_host={number == 0},keep_alive_interval=1", "--local-addr", "127.0.0.1"]
    return python("-m", *launch, *words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def test_a_machine_is_lost_and_comes_back(tmp_path):
    """All go on from the newest checkpoint; and one machine alone from where they ended."""
    out, port = tmp_path / "run", free_port()
    words = (*LONG_COMMAND, "--out", out, *STEPS, "parallel.strategy=fsdp", "--restart")
    with machine(0, port, *words, max_restarts=2) as first:
        with machine(1, port, *words, max_restarts=2) as second:
            wait_for_steps(first, out, 12)
            [process] = children(second)
            os.kill(second.pid, signal.SIGKILL)
            os.kill(process, signal.SIGKILL)
        with machine(1, port, *words, max_restarts=2) as second:
            said = [process.communicate(timeout=PATIENCE)[0] for process in (first, second)]
            assert [first.returncode, second.returncode] == [0, 0], said
    log = (out / "log.txt").read_text()
    assert log.count("2 processes, fsdp") == 2 and re.search("resumed at step [1-9]", log)
    assert "another one of the 2 ended" in said[0] and load_latest(out, print)[0]["step"] == 150
    training.resume(out, ["training.num_steps=151", "parallel.strategy=auto"])
    assert metrics(out, "loss")[-1][0] == 151
