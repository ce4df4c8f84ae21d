"""Documents of text alone, to train on beside captioned pictures: read from files, cut into pieces, drawn by number.

    file | folder | glob -> Corpus (documents) -> part (training, held out) -> Pieces -> batches of Tokens

In plain text (any file but those below) a blank line ends a document, as in the corpora of BERT and fairseq. `.jsonl`
has a document in each line, in its field "text" (or "content", "caption"); `.parquet` in each row, in such a column.

Shape letters: D documents of a batch, P tokens of the longest one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mmdit.text import Tokenizer, Tokens
from training.data import DataError, place_of
from training.errors import one_line
from training.listing import printable, walk
from training.order import Order
from training.share import WHOLE, Share

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_FIELDS = ("text", "content", "caption")
TOKENIZED = 1000  # documents that are tokenized at a time
Skipped = Callable[[str, str], None]  # called with (place, reason) for every line that cannot be used


class Corpus:
    """The documents of a file, a folder (its .txt, .jsonl and .parquet files, nested ones too) or a glob.

    Iterating reads the files again; only their names stay in memory. digest: SHA-256 of all documents in order. Raises
    DataError where there is no text, for parquet without pyarrow, and for parquet without a column of text.
    """

    def __init__(self, spec: str, skipped: Skipped = lambda place, reason: None) -> None:
        self.files, self._skipped, self._reason = _files(spec), skipped, ""
        found, self.num_documents = hashlib.sha256(), 0
        for document in self:
            found.update(hashlib.sha256(document.encode("utf-8", "replace")).digest())
            self.num_documents += 1
        self.digest = found.hexdigest()
        if not self.num_documents:
            raise DataError(f"no text found in {spec}: {len(self.files)} files hold no document{self._reason}")

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            read = {".jsonl": self._json_lines, ".parquet": _parquet}.get(path.suffix.lower(), _plain)
            yield from filter(None, map(str.strip, read(path)))

    def part(self, held_out: bool, fraction: float) -> Iterator[str]:
        """The held-out documents, those with SHA-256 / 2^256 below the fraction, or else the others.

        A document and all its copies are on the same side, wherever they stand.
        """
        return (document for document in self if (place_of(document) < fraction) == held_out)

    def _json_lines(self, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text, reason = _field(line)
                    if reason:
                        self._skip(f"{printable(path.name)}:{number}", reason)
                    yield text

    def _skip(self, place: str, reason: str) -> None:
        self._reason = self._reason or f"; one line is skipped, {place}: {reason}"
        self._skipped(place, reason)


class Pieces:
    """Documents as token ids in memory (4 bytes each), cut into pieces of at most `length` tokens.

    A document ends with the end token. A piece begins with the last token of the piece before it, so that every token
    but a document's first is predicted once. most: keep only so many pieces. Raises DataError where there is none.
    """

    def __init__(
        self, documents: Iterable[str], tokenizer: Tokenizer, length: int, device: torch.device, most: int | None = None
    ) -> None:
        self.device, self.pad = device, tokenizer.pad
        places: list[tuple[int, int]] = []
        numbers, documents = array("i"), iter(documents)
        while (some := list(islice(documents, TOKENIZED))) and (most is None or len(places) < most):
            for ids in filter(None, tokenizer.encode(some)):
                first = len(numbers)
                numbers.extend([*ids, tokenizer.eos])
                places += [(i, min(i + length, len(numbers))) for i in range(first, len(numbers) - 1, length - 1)]
        if not places:
            raise DataError("no text to learn from: add documents, or lower data.held_out if all of them are held out")
        self.places = np.array(places[:most])
        self.ids = torch.from_numpy(np.array(numbers, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all documents."""
        return len(self.ids)

    def at(self, rows: Iterable[int]) -> Tokens:
        """The pieces at some rows (D, P), padded to the longest."""
        parts = [self.ids[first:last].long() for first, last in self.places[list(rows)]]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=self.pad)
        return Tokens(ids, ids != self.pad).to(self.device)

    def batches(self, num: int, seed: int, start_step: int = 0, share: Share = WHOLE) -> Generator[Tokens, None, None]:
        """Endless shuffled batches of `num` pieces from number `start_step` on: a function of (seed, step)."""
        order, first, rows = Order(len(self), seed), start_step * num, share.rows(num)
        while True:
            yield self.at(order[first + row] for row in rows)
            first += num


def _files(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = [path / name for name in sorted(walk(path)) if name.lower().endswith(TEXT_SUFFIXES)]
    elif glob.has_magic(spec):
        files = [found for found in map(Path, sorted(glob.glob(str(path), recursive=True))) if found.is_file()]
    else:
        raise DataError(f"no text found: there is no file or folder {spec}; transfusion.text names one, or a glob")
    if not files:
        raise DataError(f"no text found: {spec} has no {', '.join(TEXT_SUFFIXES)} file")
    return files


def _plain(path: Path) -> Iterator[str]:
    """The runs of lines between blank lines."""
    lines: list[str] = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines.clear()
    yield "".join(lines)


def _field(line: str) -> tuple[str, str]:
    """(the text in a line of JSON, ""), or ("", the reason why there is none)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "", "no JSON"
    for name in TEXT_FIELDS if isinstance(row, dict) else ():
        if isinstance(row.get(name), str):
            return row[name], ""
    return "", f"no field {' or '.join(TEXT_FIELDS)} that holds text"


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f'{path} is parquet, which needs pyarrow: pip install "mmdit[parquet]"') from error
    try:
        file = parquet.ParquetFile(path)
        kinds = {field.name: field.type for field in file.schema_arrow}
        name = next((name for name in TEXT_FIELDS if name in kinds), None)
        if name is None:
            raise DataError(
                f"{path} has no column {' or '.join(TEXT_FIELDS)}: its columns are {', '.join(kinds) or 'none'}"
            )
        if not (arrow.types.is_string(kinds[name]) or arrow.types.is_large_string(kinds[name])):
            raise DataError(f"the column {name} of {path} is {kinds[name]}, expected text (string)")
        for batch in file.iter_batches(columns=[name]):
            yield from filter(None, batch.column(0).to_pylist())
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable parquet file: {one_line(error)}") from error
