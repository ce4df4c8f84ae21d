"""`mmdit cache`: what it says, how bad input and a signal end it, and that a run trains on what it wrote."""

import time

import fsspec
import pytest

from tests.mmdit_cli.command import assert_one_line_error, run
from tests.training.processes import PATIENCE, end, python
from training.cache import Cache
from training.config import load_config

TINY = ("cache", "pixels-tiny", "training.device=cpu")


def test_it_writes_goes_on_and_verifies(tmp_path):
    out = tmp_path / "cache"
    half = run(*TINY, "data.num_samples=130", "--shard-mb", "0.4", "--part", "1/2", "--out", out)
    assert half.exit_code == 0 and "part 1/2 is whole; 2 shards of other parts are missing" in half.output
    assert "fewer shards" not in half.output
    small = run(*TINY, "--part", "1/2", "--out", tmp_path / "small")
    assert "part 1/2 is whole; 1 shards of other parts are missing" in small.output
    assert "there are fewer shards (1) than parts: make them smaller by --shard-mb" in small.output
    assert_one_line_error(run("cache", "--verify", out), "2 of 3 shards are missing, the first is shard-00000")
    rest = run(*TINY, "data.num_samples=130", "--shard-mb", "0.4", "--out", out)
    assert rest.exit_code == 0 and "66 samples, " in rest.output
    assert f"train with: mmdit train pixels-tiny training.device=cpu data.num_samples=130 --data {out}" in rest.output
    again = run(*TINY, "data.num_samples=130", "--shard-mb", "0.4", "--out", out)
    assert f"nothing was missing; is the data what it was? mmdit cache --verify {out} --data SPEC" in again.output
    assert "nothing was missing" not in rest.output
    assert (Cache(out).about.dtype, len(Cache(out).samples)) == ("fp16", 130)
    seen = run("cache", "--verify", out, "--data", "shapes")
    assert seen.exit_code == 0 and "130 samples in 3 shards, all as they were written" in seen.output
    path = out / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    seen = run("cache", "--verify", out)
    assert seen.exit_code == 2 and "does not verify: 1 problem, the first" in seen.stderr
    assert "sample shapes-00000127" in seen.stdout


def test_it_verifies_a_copy_on_a_server(tmp_path):
    out = tmp_path / "cache"
    assert run(*TINY, "--out", out).exit_code == 0
    disk, server = fsspec.filesystem("file"), fsspec.filesystem("memory")
    for path in out.iterdir():
        server.pipe_file(f"/copied/{path.name}", disk.cat_file(str(path)))
    seen = run("cache", "--verify", "memory://copied/cache.json", "--data", "shapes")
    assert seen.exit_code == 0 and "memory://copied/cache.json: 64 samples in 1 shard, all as they were" in seen.output
    server.rm("/copied/shard-00000.safetensors")
    missing = "memory://copied/shard-00000.safetensors: there is no such file on the server"
    assert_one_line_error(run("cache", "--verify", "memory://copied/cache.json"), missing)


def test_options_reach_the_library(tmp_path):
    out = tmp_path / "cache"
    how = ("--dtype", "bf16", "--text-dtype", "fp32", "--data", "shapes:20", "--out", out)
    assert run(*TINY, "data.num_samples=none", *how).exit_code == 0
    about = Cache(out).about
    assert (about.dtype, about.text_dtype, about.source, about.samples) == ("bf16", "fp32", "shapes:20", 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache"], "which config, and where to? mmdit cache CONFIG"),
        (["cache", "demo"], "where to?"),
        (["cache", "dmeo", "--out", "cache"], 'did you mean the preset "demo"?'),
        (["cache", "demo", "--out", "cache", "--part", "4"], '--part is "4", expected I/N, such as 0/4'),
        (["cache", "demo", "--out", "cache", "--part", "4/4"], "the part is 4/4, expected 0/4 to 3/4"),
        (["cache", "demo", "--out", "cache", "--dtype", "int8"], "--dtype"),
        (["cache", "demo", "--out", "cache", "--shard-mb", "0"], "shard_mb is 0, expected a number above 0"),
        (["cache", "demo", "--out", "cache", "--data", "nowhere"], "no folder or file nowhere"),
        (["cache", "demo", "--out", "cache", "autoencoder=nowhere"], "autoencoder not found: nowhere"),
        (["cache", "demo", "--out", "cache", "text.encoder=nowhere"], "no text encoder in"),
        (["cache", "demo", "--out", "memory://cache"], "memory://cache: a cache is written to a disk; copy it"),
        (["cache", "--verify", "nowhere"], "nowhere is no cache: it has no cache.json"),
        (["cache", "demo", "--verify", "nowhere"], "--verify takes a cache alone"),
    ],
    ids=str,
)
def test_bad_input_ends_with_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run(*words), message)
    assert not list(tmp_path.iterdir())


def test_sigterm_keeps_what_is_there(tmp_path):
    """With worker processes, which end with it."""
    out = tmp_path / "cache"
    words = (*TINY, "--out", out, "data.num_samples=100000", "--shard-mb", "0.8", "data.num_workers=2")
    with python("-m", "mmdit_cli", *words) as process:
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until and not (out / "shard-00001.json").exists():
            time.sleep(0.05)
        output = end(process)
    assert "stopped, all is kept; go on with the same command" in output
    shards, chunks = len(list(out.glob("shard-*.json"))), list(out.glob(".shard-*/*.json"))
    assert shards >= 2 and len(chunks) < 2  # two chunks are a shard
    assert load_config("pixels-tiny").data.num_samples == 64  # what follows is another cache
    assert_one_line_error(run(*TINY, "--out", out), "was made with another data set: name another folder")
