"""Who may write in a run folder: one run at a time, and the next as soon as all of the last have ended."""

import errno
import io
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import training
from tests.training.runs import config_for
from training import launch, lock
from training.lock import LOCK, NotShared, RunTaken, only_run_in
from training.parallel import ALONE, Ranks
from training.run import RunFolder

fcntl = pytest.importorskip("fcntl")

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def byte_of_another(folder: Path, byte: int):
    """Another process that has one byte locked, or could not ("" is read from it)."""
    command = [sys.executable, "-c", HOLD, str(folder / LOCK), str(byte)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def second_of_two(monkeypatch, said: str) -> Ranks:
    """A process whose first one says that it has written that in the lock."""
    second = Ranks(1, 2)
    monkeypatch.setattr(second, "from_first", lambda make: said)
    monkeypatch.setattr(second, "gather", lambda value: [(True, "node1"), value])
    return second


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_for(tmp_path / "run"))


@pytest.mark.parametrize("byte", [0, 1, 7])
def test_a_process_of_another_run_keeps_all_new_ones_out(run, byte, monkeypatch, capsys):
    """Whichever it is of that run's; nothing is removed meanwhile, and what ends it is its end."""
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    (run.path / LOCK).write_text("process 77 on node3")
    with byte_of_another(run.path, byte) as (process, said):
        before = listing(run.path)
        assert said == "held"
        for begin in (lambda: training.resume(run.path), lambda: training.train(run.config(), restart=True)):
            with pytest.raises(RunTaken, match=r"run is being trained by another run \(process 77 on node3 began it\)"):
                begin()
        assert listing(run.path) == before
        assert capsys.readouterr().out.count("waiting for it to end") == 2
        process.kill()
        process.wait()
        with only_run_in(run.path, ALONE):
            assert (run.path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (run.path / LOCK).exists()


def test_it_is_waited_for(run):
    with byte_of_another(run.path, 0) as (process, _):
        threading.Timer(0.3, process.kill).start()
        with only_run_in(run.path, ALONE):
            assert process.wait(60) < 0


def test_each_process_holds_a_byte_of_its_own(run, monkeypatch):
    """The first takes all, so that no other is there, and leaves the rest to the others of its run."""
    with only_run_in(run.path, ALONE):
        for byte, free in {0: "", 1: "held", 2: "held"}.items():
            with byte_of_another(run.path, byte) as (_, said):
                assert said == free
    (run.path / LOCK).write_text("process 77 on node3\n1-2-3")
    with only_run_in(run.path, second_of_two(monkeypatch, "process 77 on node3\n1-2-3")):
        for byte, free in {0: "held", 1: "", 2: "held"}.items():
            with byte_of_another(run.path, byte) as (_, said):
                assert said == free
    assert (run.path / LOCK).exists()  # the first may write still, and keeps new runs out


@pytest.mark.parametrize("there", [None, "process 77 on node3\n4-5-6"])
def test_a_folder_of_another_machine_by_the_same_name_is_refused(run, monkeypatch, there):
    """Where there is no lock, or one of an earlier run."""
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    if there:
        (run.path / LOCK).write_text(there)
    before = listing(run.path)
    second = second_of_two(monkeypatch, "process 77 on node3\n1-2-3")
    with pytest.raises(NotShared, match="^process 1 on .* cannot see .*run as process 0 on node1 does: "):  # noqa: SIM117
        with only_run_in(run.path, second):
            pass
    assert listing(run.path) == before


def test_of_many_machines_three_are_named_each_once(run, monkeypatch):
    last = Ranks(15, 16)
    answers = [(node == 0, f"node{node + 1}") for node in range(8) for _ in range(2)]
    monkeypatch.setattr(last, "from_first", lambda make: "process 77 on node3\n1-2-3")
    monkeypatch.setattr(last, "gather", lambda value: answers)
    monkeypatch.setattr(lock, "PATIENCE", 0)
    who = "process 2 on node2 and process 4 on node3 and process 6 on node4 and those of 4 more machines cannot see"
    with pytest.raises(NotShared, match=f"^{who} .*run as process 0 on node1 does: "), only_run_in(run.path, last):
        pass


@pytest.mark.parametrize("there", [None, "process 77 on node3\n4-5-6"])
def test_what_the_first_said_may_be_seen_late(run, monkeypatch, there):
    """As over a network: no lock yet, or that of an earlier run."""
    if there:
        (run.path / LOCK).write_text(there)
    said = "process 77 on node3\n1-2-3"
    threading.Timer(0.3, (run.path / LOCK).write_text, [said]).start()
    with only_run_in(run.path, second_of_two(monkeypatch, said)):
        assert (run.path / LOCK).read_text() == said


def test_no_two_runs_say_the_same(run):
    """Though the numbers of processes come again, as they do in containers."""
    said = []
    for _ in range(2):
        with only_run_in(run.path, ALONE):
            said.append((run.path / LOCK).read_text())
    assert said[0] != said[1]


def test_a_new_run_that_others_cannot_see_leaves_its_name_free(tmp_path, monkeypatch):
    def blind(path, ranks):
        raise NotShared("process 1 on node2 cannot see it")

    monkeypatch.setattr(launch, "only_run_in", blind)
    with pytest.raises(NotShared):
        training.train(config_for(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_had_the_folder_meanwhile_keeps_what_it_wrote(tmp_path, monkeypatch):
    """It began at the same moment and has ended, while the one that others cannot see waited for its lock."""

    def blind(path, ranks):
        (path / "metrics.jsonl").write_text("{}")
        raise NotShared("process 1 on node2 cannot see it")

    monkeypatch.setattr(launch, "only_run_in", blind)
    with pytest.raises(FileExistsError):
        training.train(config_for(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_where_the_first_of_several_fails_the_file_stays_for_the_others(run, monkeypatch):
    """When all have ended it goes."""
    several = Ranks(0, 2)
    monkeypatch.setattr(several, "from_first", lambda make: make())
    monkeypatch.setattr(several, "gather", lambda value: [value, value])
    for ranks, stays in ((several, True), (ALONE, False)):
        with pytest.raises(OSError, match="no room"), only_run_in(run.path, ranks):
            raise OSError("no room")
        assert (run.path / LOCK).exists() == stays
        with byte_of_another(run.path, 0) as (_, said):
            assert said == "held"
        (run.path / LOCK).unlink()
    with only_run_in(run.path, several):
        pass
    assert not (run.path / LOCK).exists()


def test_a_lock_that_was_removed_meanwhile_is_none(run, monkeypatch):
    """The run before removes its file when it ends, which may be just after this one has opened it."""
    real, removed = fcntl.lockf, []

    def lockf(file, how, *place):
        if not removed:
            removed.append((run.path / LOCK).unlink())
        real(file, how, *place)

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with only_run_in(run.path, ALONE), byte_of_another(run.path, 0) as (_, said):
        assert removed and said == ""


def test_a_file_system_without_locks_is_trained_on(run, monkeypatch):
    def lockf(*words):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    number = errno.ENOLCK
    with only_run_in(run.path, ALONE):
        pass
    number = errno.EIO  # which says nothing of locks
    with pytest.raises(OSError, match="put/output error"), only_run_in(run.path, ALONE):
        pass


def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with only_run_in(tmp_path, ALONE):
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_that_trains_is_locked_and_leaves_no_lock(tmp_path, monkeypatch):
    seen = []

    def fit(self, interrupts):
        for byte in (0, 1):
            with byte_of_another(self.run.path, byte) as (_, said):
                seen.append(said)

    monkeypatch.setattr(training.trainer.Trainer, "fit", fit)
    out = training.train(config_for(tmp_path / "run"))
    assert seen == ["", "held"] and not (out / LOCK).exists()


@pytest.mark.parametrize("there", [True, False])
def test_of_two_runs_that_begin_at_once_one_trains(tmp_path, monkeypatch, there):
    """Both find the folder empty; the one that is later, at making the folder or at its lock, leaves it alone."""
    folder = tmp_path / "run"
    make, lock_of = Path.mkdir, launch.only_run_in

    def begun_by_another():
        make(folder, exist_ok=True)
        (folder / "metrics.jsonl").write_text("its own")

    def late_folder(path, *args, **kwargs):
        if path == folder:
            begun_by_another()
        make(path, *args, **kwargs)

    def late_lock(path, ranks):
        begun_by_another()
        return lock_of(path, ranks)

    if there:
        folder.mkdir()
        monkeypatch.setattr(launch, "only_run_in", late_lock)
    else:
        monkeypatch.setattr(Path, "mkdir", late_folder)
    with pytest.raises(FileExistsError, match="exists: continue it with `mmdit train --resume"):
        training.train(config_for(folder))
    assert (folder / "metrics.jsonl").read_text() == "its own"
    assert {path.name for path in folder.iterdir()} <= {"metrics.jsonl", "config.toml"}


@pytest.fixture
def on_nfs(monkeypatch):
    """A lock that is removed while it is open stays under another name until it is closed."""
    unlink = os.unlink

    def renamed(name, *, dir_fd=None):
        if os.path.basename(name) == LOCK:
            os.rename(name, os.path.join(os.path.dirname(name), ".nfs00c1"), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", renamed)


def test_on_nfs_too_a_run_that_fails_says_why(tmp_path, on_nfs):
    with pytest.raises(ValueError, match="all 64 samples are held out: raise data.num_samples, or"):
        training.train(config_for(tmp_path / "run", "data.held_out=0.9999999"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".nfs00c1"]


def test_on_nfs_too_a_run_that_got_nowhere_begins_anew(run, on_nfs):
    training.train(run.config(), restart=True)
    assert (run.path / "checkpoints").is_dir()


def test_a_full_disk_is_said_with_the_file(run, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "_all_bytes", lambda path: Full())
    with pytest.raises(OSError, match="No space left on device") as error, only_run_in(run.path, ALONE):
        pass
    assert error.value.filename == str(run.path / LOCK)
