"""Data behind URLs: the same samples as on disk; servers that stall, fail, lie about lengths, or have no such file."""

import functools
import http.server
import itertools
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import training.remote
from tests.training.flaky import Flaky, put
from tests.training.pictures import members, parquet_of, shards_of, tar_of
from training.data import DataError, SourceOptions, loader, open_source
from training.remote import (
    Listed,
    Patience,
    RemoteError,
    RemoteFile,
    is_url,
    list_urls,
    read_each,
    read_range,
    read_whole,
)
from training.wanted import Wanted

QUICK = Patience(timeout=10.0, retries=2, pause=0.01)
SHORT = Patience(timeout=0.1, retries=2, pause=0.01)  # where no answer is to come
ENOUGH = Patience(timeout=1.0, retries=9, pause=0.01)  # for an answer after some that do not come


@pytest.fixture(autouse=True)
def _flaky(flaky):
    pass


def options(patience=QUICK, **wanted) -> SourceOptions:
    return SourceOptions(wanted=Wanted(patience=patience, **wanted))


def test_what_a_url_is():
    assert all(map(is_url, ("s3://bucket/a.tar", "https://host/{a}.tar", "memory://x")))
    assert not any(map(is_url, ("/data/a.tar", "C:\\data", "shapes:3", "a=0.5,b=0.5", "hf:name")))


@pytest.mark.parametrize("spec", ["flaky://set", "flaky://set/*.tar", "flaky://set/00[01].tar"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_behind_a_url_are_those_on_disk(tmp_path, spec, num_workers):
    local = shards_of(tmp_path, (5, 3))
    for path in local.iterdir():
        put(f"flaky://set/{path.name}", path.read_bytes())
    one, other = open_source(str(local)), open_source(spec, options=options())
    assert other.is_remote and other.keys == one.keys and other.image_size == one.image_size
    pairs = zip(loader(one, range(8), 4, 0), loader(other, range(8), 4, 0, num_workers=num_workers), strict=True)
    for a, b in itertools.islice(pairs, 4):
        assert a.keys == b.keys and a.captions == b.captions and a.images.equal(b.images)


def test_an_index_reads_headers_and_captions_alone():
    """Pictures larger than what is asked for at a time are passed over."""
    files = members(range(3)) | {f"{i:05d}.png": bytes(3 << 20) for i in range(3)}
    put("flaky://large.tar", tar_of(files))
    source = open_source("flaky://large.tar", image_size=8, options=options())
    assert len(source) == 3 and source.caption(2) == "picture 2"
    assert sum(end - start for start, end in Flaky.reads) < 5 << 20


def test_parquet_behind_a_url(tmp_path):
    put("flaky://rows.parquet", parquet_of(tmp_path / "rows.parquet", range(10)).read_bytes())
    one, other = open_source(str(tmp_path / "rows.parquet")), open_source("flaky://rows.parquet", options=options())
    assert all((one[i].image == other[i].image).all() and one[i].key == other[i].key for i in range(10))


@pytest.mark.parametrize("fault", ["stalls", "fails", "cuts"])
def test_a_fault_is_survived_and_the_last_one_is_an_error(fault):
    put("flaky://a", b"0123456789")
    Flaky.faults = [fault] * 2
    assert read_range("flaky://a", 2, 6, ENOUGH) == b"2345" and not Flaky.faults
    Flaky.faults = [fault] * 3
    reason = {
        "stalls": r"no answer within 0\.1 s",
        "fails": "connection reset by peer",
        "cuts": "3 bytes came in place",
    }
    with pytest.raises(RemoteError, match=rf"^flaky://a: {reason[fault]}.* \(tried 3 times\)$"):
        read_range("flaky://a", 2, 6, SHORT if fault == "stalls" else QUICK)


def test_a_server_that_fails_stops_the_batches_and_loses_no_sample(tmp_path):
    """A sample whose server fails is not bad: no other stands in its place."""
    put("flaky://a.tar", tar_of(members(range(6))))
    source, patient = (open_source("flaky://a.tar", options=options(patience)) for patience in (QUICK, ENOUGH))
    Flaky.faults = ["fails"] * 100
    for num_workers in (0, 1):
        batches = loader(source, range(6), 2, 0, num_workers=num_workers)
        with pytest.raises(DataError, match="flaky://a.tar: connection reset by peer .tried 3 times"):
            next(batches)
    Flaky.faults = ["fails", "stalls"]
    assert len(next(loader(patient, range(6), 2, 0)).keys) == 2


def test_a_shard_that_cannot_be_indexed_is_an_error_not_a_loss():
    put("flaky://set/a.tar", tar_of(members(range(6))))
    Flaky.faults = ["stalls"] * 100
    with pytest.raises(DataError, match="no answer within"):
        open_source("flaky://set", options=options(SHORT))


def test_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    put("flaky://a", b"0123456789")
    Flaky.faults = ["fails"] * 9
    with pytest.raises(RemoteError, match="tried 6 times"):
        read_range("flaky://a", 0, 1, Patience(5, 5, pause=1.0))
    assert len(pauses) == 5 and all(2**k * 0.5 <= pause <= 2**k * 1.5 for k, pause in enumerate(pauses))


def test_what_is_not_there_is_said_at_once():
    with pytest.raises(DataError, match="flaky://none.tar: there is no such file on the server"):
        open_source("flaky://none.tar", options=options())
    put("flaky://set/a.png", b"")
    with pytest.raises(DataError, match="flaky://set holds no shards"):
        open_source("flaky://set", options=options())
    with pytest.raises(DataError, match="nosuch://a.tar cannot be read: .*nosuch"):
        open_source("nosuch://a.tar")


def test_a_remote_file_reads_and_seeks_as_a_local_one():
    data = np.random.default_rng(0).bytes(3 << 20)
    put("flaky://file", data)
    file = RemoteFile(list_urls("flaky://file", QUICK)[0], QUICK)
    for offset, size in ((0, 10), (5, 100), (1 << 20, 1 << 21), (2, 3), (len(data) - 5, 100), (len(data), 1)):
        file.seek(offset)
        assert file.read(size) == data[offset : offset + size]
    assert file.seek(-4, 2) == len(data) - 4 and file.read() == data[-4:]
    assert RemoteFile(Listed("flaky://file", len(data), ""), QUICK).read() == data


def test_an_index_is_found_again_while_the_files_are_the_same(tmp_path):
    cache = tmp_path / "index"
    put("flaky://set/a.tar", tar_of(members(range(6))))
    first = open_source("flaky://set", image_size=8, options=options(cache=cache))
    Flaky.reads.clear()
    second = open_source("flaky://set", image_size=8, options=options(cache=cache))
    assert not Flaky.reads and second.keys == first.keys and (second[3].image == first[3].image).all()
    open_source("flaky://set", image_size=8, options=options(cache=cache, min_side=3))
    assert Flaky.reads  # other wishes, another index
    put("flaky://set/a.tar", tar_of(members(range(7))))
    assert len(open_source("flaky://set", image_size=8, options=options(cache=cache))) == 7
    for path in cache.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    assert len(open_source("flaky://set", image_size=8, options=options(cache=cache))) == 7


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that knows ranges, as those of shards do, and is silent to so many requests as it is told."""

    silent, over = 0, threading.Event()

    def log_message(self, *args):
        pass

    def do_GET(self):
        if type(self).silent > 0:
            type(self).silent -= 1
            type(self).over.wait()
            return
        first, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        if not Path(self.translate_path(self.path)).is_file():
            self.send_error(404)
            return
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(part)


def test_a_server_on_http_that_is_not_reached_is_no_missing_file():
    """fsspec calls both a missing file; the first is tried again."""
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(RemoteError, match=r"000.tar: Cannot connect .*\(tried 3 times\)"):
            list_urls(f"http://127.0.0.1:{nobody.getsockname()[1]}/000.tar", QUICK)


def test_a_server_on_http_that_is_silent_for_a_while(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    local = shards_of(tmp_path / "set", (5,))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        spec = f"http://127.0.0.1:{server.server_port}/set/000.tar"
        source = open_source(spec, options=options(ENOUGH))
        _Quiet.silent = 2
        one, other = next(loader(open_source(str(local)), range(5), 5, 0)), next(loader(source, range(5), 5, 0))
        assert one.keys == other.keys and one.images.equal(other.images)
        with pytest.raises(DataError, match="no such file on the server"):
            open_source(spec.replace("000", "none"), options=options())
    finally:
        _Quiet.over.set()
        server.shutdown()


@pytest.mark.parametrize("silent_to", ["HEAD", "GET"], ids=["listing", "reading shards"])
def test_a_signal_while_a_server_is_silent_ends_indexing_at_once(tmp_path, monkeypatch, silent_to):
    """And not when the reads that hang are given up."""
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    over, asked, given_up, within = threading.Event(), itertools.count(), [], training.remote.within

    class Silent(_Quiet):
        def parse_request(self):
            known = super().parse_request()
            if self.command == silent_to:
                if next(asked) == 0:  # and by then all wait
                    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                over.wait()
            return known

    def watched(ask, seconds):
        try:
            return within(ask, seconds)
        except TimeoutError:
            given_up.append(seconds)
            raise

    monkeypatch.setattr("training.remote.within", watched)
    shards_of(tmp_path / "set", (2, 2))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            spec = f"http://127.0.0.1:{server.server_port}/set/{{000,001}}.tar"
            open_source(spec, options=options(Patience(timeout=5.0, retries=0)))
        assert not given_up
    finally:
        over.set()
        server.shutdown()


@pytest.mark.parametrize("stop", [RemoteError, KeyboardInterrupt])
def test_an_error_or_a_signal_does_not_wait_for_reads_that_hang(stop):
    """Nor does the end of the process, and no further read begins."""
    over, begun, daemons, ended, threads = threading.Event(), threading.Barrier(3), [], [], []

    def read(i):
        threads.append(threading.current_thread())
        daemons.append(threading.current_thread().daemon)
        begun.wait(20)
        if i == 1 and stop is RemoteError:
            raise RemoteError("connection reset by peer")
        if i == 1:
            os.kill(os.getpid(), signal.SIGINT)
        over.wait(20)
        ended.append(i)

    with pytest.raises(stop):
        read_each(read, range(10), remote=True, at_once=3)
    assert not ended and daemons == [True] * 3
    over.set()
    for thread in list(threads):
        thread.join(60)
    assert len(threads) == 3


def test_reads_come_in_order():
    second = threading.Event()

    def read(i):
        second.wait(20) if i == 0 else second.set()
        return i * i

    assert read_each(read, range(5), remote=True, at_once=2) == [0, 1, 4, 9, 16]
    assert list(read_each(read, [], remote=True)) == []


def test_what_a_server_on_http_refuses_is_not_asked_for_again():
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    asked = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(403)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(RemoteError, match=r"/a.json: the server refuses it \(403, .*\); are the credentials there"):
            read_whole(f"http://127.0.0.1:{server.server_port}/a.json", QUICK)
        assert len(asked) == 1
    finally:
        server.shutdown()


def test_a_server_that_cannot_read_ranges_is_named_as_that(monkeypatch):
    put("flaky://a", b"0123456789")
    monkeypatch.setattr(Flaky, "cat_file", lambda self, path, **how: b"0123456789")
    message = r"a: 10 bytes came in place of 2, as from a server that cannot read ranges \(tried 3 times\)"
    with pytest.raises(RemoteError, match=message):
        read_range("flaky://a", 2, 4, QUICK)
