"""Files on a server that is in memory, under flaky://, and that fails when a test says so."""

import threading

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Flaky(MemoryFileSystem):
    """Files in memory whose reads do what `faults` says, one after the other, and then work."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    faults: list[str] = []
    reads: list[tuple[int, int]] = []
    over = threading.Event()

    def cat_file(self, path, start=None, end=None, **how):
        type(self).reads.append((start, end))
        match type(self).faults.pop(0) if type(self).faults else "works":
            case "stalls":
                type(self).over.wait()
            case "fails":
                raise ConnectionResetError("connection reset by peer")
            case "cuts":
                return super().cat_file(path, start, end)[:-1]
        return super().cat_file(path, start, end)


fsspec.register_implementation("flaky", Flaky, clobber=True)


def put(path: str, data: bytes) -> None:
    with fsspec.open(path, "wb") as file:
        file.write(data)
