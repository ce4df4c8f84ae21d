"""Text alone: documents as their files hold them, pieces in which every token is learnt once, draws by number."""

import builtins
import json
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit.text import Tokenizer
from training.corpus import Corpus, Pieces
from training.data import DataError

CPU = torch.device("cpu")
DOCUMENTS = [f"document {i}:\nso many words, {i} of them" for i in range(40)]


@cache
def tokenizer():
    return Tokenizer.train(DOCUMENTS, 300, 8, images=True)


def read(path, told=None):
    return list(Corpus(str(path), (lambda *what: told.append(what)) if told is not None else lambda *what: None))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- documents ----------------------------------------------------------------------------------------------------


def test_a_blank_line_ends_a_document_of_plain_text(tmp_path):
    path = tmp_path / "words"  # whatever its name
    path.write_bytes("\ufeff\n \t\nan ode\r\nto ends\r\n\r\n\n  \n  two \u661f\n".encode() + b"\xff\xfe last\n\nend")
    assert read(path) == ["an ode\nto ends", "two \u661f\n\ufffd\ufffd last", "end"]


def test_lines_of_json_are_documents(tmp_path):
    told: list = []
    path = lines(tmp_path / "a.jsonl", [{"text": "one\n\nof two"}, {"id": 1, "content": "two"}, {"caption": " three "}])
    with path.open("ab") as file:
        file.write(b'no JSON\n\n{"text": 5}\n["text"]\n{"text": "\xff"}\n{"text": ""}\n{"text": "\\ud83d half"}\n')
    assert read(path, told) == ["one\n\nof two", "two", "three", "\ufffd", "\ud83d half"]
    assert dict(told).keys() == {"a.jsonl:4", "a.jsonl:6", "a.jsonl:7"}
    assert dict(told)["a.jsonl:4"] == "no JSON" and "no field text or content or caption" in dict(told)["a.jsonl:6"]


def test_a_folder_is_read_in_the_order_of_names_and_a_glob_too(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.png").write_text("no text")
    (tmp_path / ".c.txt").write_text("hidden")
    lines(tmp_path / "c.jsonl", [{"text": "third"}])
    assert read(tmp_path) == ["first", "second", "third"]
    assert read(f"{tmp_path}/*.txt") == ["first"] and read(f"{tmp_path}/**/*.txt") == ["first", "second"]


def test_rows_of_parquet_are_documents(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"n": [1, 2, 3], "text": ["one", None, "a star\n\n\u661f"]}), path)
    assert read(tmp_path) == ["one", "a star\n\n\u661f"]
    parquet.write_table(arrow.table({"n": [1], "caption": arrow.array(["two"], arrow.large_string())}), path)
    assert read(path) == ["two"]
    parquet.write_table(arrow.table({"n": [1], "words": ["one"]}), path)
    with pytest.raises(
        DataError, match=r"a.parquet has no column text or content or caption: its columns are n, words"
    ):
        Corpus(str(path))
    parquet.write_table(arrow.table({"text": [1]}), path)
    with pytest.raises(DataError, match="the column text of .*a.parquet is int64, expected text"):
        Corpus(str(path))
    path.write_text("no parquet")
    with pytest.raises(DataError, match="a.parquet is no readable parquet file"):
        Corpus(str(path))


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    (tmp_path / "a.parquet").write_text("whatever")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r'needs pyarrow: pip install "mmdit\[parquet\]"'):
        Corpus(str(tmp_path))


def test_places_without_text_are_named(tmp_path):
    with pytest.raises(DataError, match="no text found: there is no file or folder xxx"):
        Corpus("x" * 999)
    with pytest.raises(DataError, match="no text found: there is no file or folder nowhere"):
        Corpus("nowhere")
    with pytest.raises(DataError, match="has no .txt, .jsonl, .parquet file"):
        Corpus(str(tmp_path))
    with pytest.raises(DataError, match="has no .txt"):
        Corpus(f"{tmp_path}/*.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="1 files hold no document$"):
        Corpus(str(tmp_path))
    lines(tmp_path / "a.jsonl", [{"words": "one"}])
    with pytest.raises(DataError, match="one line is skipped, a.jsonl:1: no field text"):
        Corpus(str(tmp_path))


def test_the_digest_is_of_the_documents_alone(tmp_path):
    """Wherever they stand; another word, another order, another cut is another corpus."""
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    digest = Corpus(str(tmp_path / "a.txt")).digest
    assert Corpus(str(lines(tmp_path / "b.jsonl", [{"text": "one"}, {"text": "two"}]))).digest == digest
    for other in ("one\n\nTwo", "two\n\none", "one\ntwo", "one\n\ntwo\n\ntwo"):
        (tmp_path / "a.txt").write_text(other)
        assert Corpus(str(tmp_path / "a.txt")).digest != digest


def test_each_document_is_on_one_side_and_stays_there(tmp_path):
    corpus = Corpus(str(lines(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])))
    held_out, training = (list(corpus.part(side, 0.3)) for side in (True, False))
    assert sorted(held_out + training) == sorted(DOCUMENTS) and 4 <= len(held_out) <= 20
    more = Corpus(str(lines(tmp_path / "b.jsonl", [{"text": text} for text in ["new", *DOCUMENTS[::-1], *held_out]])))
    assert set(more.part(True, 0.3)) - {"new"} == set(held_out)
    assert list(corpus.part(True, 0.0)) == []


# --- pieces -------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(2, 9))
def test_every_token_but_the_first_is_predicted_once(texts, length):
    """From what stands before it in its piece; together the predictions of a document's pieces are all of its own."""
    encoded = [[*ids, tokenizer().eos] for ids in tokenizer().encode(texts) if ids]
    if not encoded:
        return
    pieces = Pieces(texts, tokenizer(), length, CPU)
    ids, mask = pieces.at(range(len(pieces)))
    rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    assert all(2 <= len(row) <= length for row in rows)
    assert [pair for row in rows for pair in zip(row, row[1:], strict=False)] == [
        pair for document in encoded for pair in zip(document, document[1:], strict=False)
    ]
    assert all(len(row) == length for row, after in zip(rows, rows[1:], strict=False) if row[-1] == after[0] != 1)
    assert pieces.num_tokens == sum(map(len, encoded))


def test_batches_are_a_function_of_their_number():
    pieces = Pieces(DOCUMENTS, tokenizer(), 8, CPU)
    from_start, later = pieces.batches(7, seed=3), pieces.batches(7, seed=3, start_step=4)
    batches = [next(from_start) for _ in range(30)]
    for batch in batches[4:]:
        assert torch.equal(batch.ids, next(later).ids)
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(batches, pieces.batches(7, seed=4), strict=False))


def test_an_epoch_has_each_piece_once():
    pieces = Pieces(DOCUMENTS[:6], tokenizer(), 400, CPU)
    assert len(pieces) == 6
    batches = pieces.batches(3, seed=0)
    first, second = ([tokenizer().decode(ids) for _ in range(2) for ids in next(batches).ids] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(DOCUMENTS[:6]) and first != second


def test_as_many_pieces_as_asked():
    assert len(Pieces(DOCUMENTS, tokenizer(), 8, CPU, most=5)) == 5
    with pytest.raises(DataError, match="no text to learn from"):
        Pieces([], tokenizer(), 8, CPU)
