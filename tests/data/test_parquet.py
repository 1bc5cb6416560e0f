"""Parquet: rows are documents, row groups are units, and the policies hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from reading import all_jobs, read_all, read_job, rejected, take, texts

from rnnlm.config import CorpusConfig
from rnnlm.data.documents import Document, Rejected, read
from rnnlm.errors import UserError


def write_parquet(path: Path, values: list[Any], rows: int, kind: Any = None, column: str = "text") -> None:
    table = pyarrow.table({"number": list(range(len(values))), column: pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize("document", ["line", "paragraph", "jsonl", "file"])
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()], ids=str)
def test_parquet_rows_are_documents_whatever_they_hold(tmp_path: Path, document: str, kind: Any) -> None:
    path = tmp_path / "text.parquet"
    values = ["one\n\ntwo\r\n", "Ünï 漢字\0", " \n", "four", "five", "x" * 101, "last"]
    write_parquet(path, values, 3, kind)

    options = {"document": document, "max_document_bytes": 100}
    found = read_all(path, **options, on_bad_record="skip")
    assert texts(found) == [value for value in values if value.strip() and len(value) < 100]
    assert [item.offset for item in found] == list(range(7))
    assert rejected(found) == [(2, "empty"), (5, "oversized document")]

    with pytest.raises(UserError, match="text.parquet: record at row 5: oversized document"):
        read_all(path, **options)


def test_parquet_row_groups_are_units(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    write_parquet(path, [f"row {row}" for row in range(1000)], 300)
    corpus = CorpusConfig(train=str(path), unit_bytes=1)
    (job,) = all_jobs(corpus)
    units = read_job(job, corpus)
    assert [(unit, len(items)) for unit, items in units] == [(0, 300), (1, 300), (2, 300), (3, 100)]
    assert [item.offset for _, items in units for item in items] == list(range(1000))
    assert texts([item for _, items in units for item in items]) == [f"row {row}" for row in range(1000)]

    last = [(unit, [take(item) for item in items]) for unit, items in read(job, corpus) if unit == 3]
    assert last == units[-1:], "rows are counted also where nobody takes them"


def test_parquet_obeys_the_policies(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    write_parquet(path, [b"one", None, b"caf\xe9", b"four"], 2, pyarrow.binary())
    with pytest.raises(UserError, match="text.parquet: record at row 1: missing field"):
        read_all(path)
    one, four = Document(path.name, 0, b"one", False), Document(path.name, 3, b"four", False)
    missing = Rejected(path.name, 1, "missing field")
    assert read_all(path, on_bad_record="skip") == [one, missing, Rejected(path.name, 2, "invalid UTF-8"), four]
    repaired = Document(path.name, 2, "caf\ufffd".encode(), True)
    assert read_all(path, on_bad_record="replace") == [one, missing, repaired, four]


@pytest.mark.parametrize("policy", ["fail", "skip", "replace"])
def test_parquet_without_the_column_is_a_mistake_under_any_policy(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "text.parquet"
    write_parquet(path, ["one"], 2, column="content")
    for field in ("text", "number"):
        with pytest.raises(UserError, match=rf"no text column corpus.field={field}; .*'number', 'content'"):
            read_all(path, field=field, on_bad_record=policy)
    assert texts(read_all(path, field="content", on_bad_record=policy)) == ["one"]


@pytest.mark.parametrize("damage", ["cut", "within", "nothing"])
def test_damaged_parquet_obeys_the_policy(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "text.parquet"
    write_parquet(path, [f"row {row} {row**9}" for row in range(100)], 50)
    packed = bytearray(path.read_bytes())
    if damage == "within":
        second = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
        begin = second.dictionary_page_offset or second.data_page_offset
        packed[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(b"" if damage == "nothing" else packed[:-20] if damage == "cut" else packed)

    row = 50 if damage == "within" else 0
    with pytest.raises(UserError, match=rf"text.parquet: record at row {row}: damaged file"):
        read_all(path)
    found = read_all(path, on_bad_record="skip")
    assert [item.offset for item in found] == list(range(row + 1))
    assert rejected(found) == [(row, "damaged file")]
