"""Images and captions in Parquet files, on disk or behind a URL.

A row group is the least that can be read. The order therefore shuffles row groups, and then the samples of a few of
them (`order.WINDOW`), which each process keeps in memory: row groups of some tens of MB are best.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from training.errors import DataError, one_line
from training.order import WINDOW
from training.remote import Listed, Patience, RemoteError, RemoteFile, is_url, list_urls
from training.rows import Row, bytes_in, columns_to_read, image_column, row_of

if TYPE_CHECKING:
    from training.table import Entry
    from training.wanted import Wanted


class ParquetRows:
    """Reads rows of Parquet files. Raises `DataError` where pyarrow is missing."""

    def __init__(self, patience: Patience) -> None:
        _pyarrow()
        self.patience = patience
        self._groups: OrderedDict[tuple[str, int], _Once] = OrderedDict()
        self._lock = Lock()  # several threads read the samples of a server

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetRows, (self.patience,)

    def rows(self, file: Listed, wanted: Wanted) -> Iterator[Row]:
        """All rows, without their images unless sizes are wanted. Raises OSError, ValueError for a corrupt file."""
        with _reading(file.url):
            parquet = self._open(file)
            names = parquet.schema_arrow.names
            image = image_column(names, file.url)
            columns, key = columns_to_read(names, image, wanted)
        for group in range(parquet.num_row_groups):
            with _reading(file.url):
                table = parquet.read_row_group(group, columns=columns)
            for row in range(table.num_rows if columns else parquet.metadata.row_group(group).num_rows):
                values = {name: table.column(name)[row].as_py() for name in columns}
                yield row_of(group, row, values, key, image if wanted.measures else None, wanted.captions)

    def image(self, entry: Entry) -> bytes:
        """The image file of a sample. Raises OSError where it cannot be read."""
        place = (entry.path, entry.offset)
        with self._lock:
            group = self._groups.setdefault(place, _Once(partial(self._images, *place)))
            self._groups.move_to_end(place)
            while len(self._groups) > WINDOW:
                self._groups.popitem(last=False)
        return bytes_in(group()[entry.size].as_py())

    def _images(self, path: str, group: int) -> Any:
        """The column of images of a row group."""
        with _reading(path):
            file = list_urls(path, self.patience)[0] if is_url(path) else Listed(path, 0, "")
            parquet = self._open(file)
            column = image_column(parquet.schema_arrow.names, path)
            return parquet.read_row_group(group, columns=[column]).column(column)

    def _open(self, file: Listed) -> Any:
        return _pyarrow().ParquetFile(RemoteFile(file, self.patience) if is_url(file.url) else file.url)


class _Once:
    """A function's result, computed once by the first thread that asks; others wait. An error is not kept."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask, self.lock = ask, Lock()

    def __call__(self) -> Any:
        with self.lock:
            if not hasattr(self, "found"):
                self.found = self.ask()
            return self.found


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Whatever pyarrow raises becomes OSError."""
    try:
        yield
    except (RemoteError, DataError):
        raise
    except Exception as error:
        raise OSError(f"{path}: {one_line(error)}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError('Parquet files need pyarrow: pip install "mmdit[parquet]"') from error
    return pyarrow.parquet
