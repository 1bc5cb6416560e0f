"""Tables: rows are documents, row groups and record batches make units, and the policies hold."""

from __future__ import annotations

import json
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


def write_arrow(path: Path, table: pyarrow.Table, rows: int, form: str = "stream") -> None:
    """As Hugging Face's datasets write it (a stream), or as .feather (a file)."""
    make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write(path: Path, table: pyarrow.Table, rows: int) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
    else:
        write_arrow(path, table, rows, "stream" if path.suffix == ".arrow" else "file")


SUFFIXES = [".parquet", ".arrow", ".feather"]
TEXT_TYPES = [
    pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary(),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_a_column_of_text_is_read_however_it_is_stored(tmp_path: Path, suffix: str, kind: Any) -> None:
    values = ["one", None, "Ünï 漢字\0", "", "one", "x" * 40, "last"]
    stored = pyarrow.array(values, pyarrow.string()).cast(kind)
    write(tmp_path / f"text{suffix}", pyarrow.table({"number": list(range(7)), "text": stored}), 3)

    found = read_all(tmp_path / f"text{suffix}", on_bad_record="skip")
    assert texts(found) == [value for value in values if value]
    assert rejected(found) == [(1, "missing field"), (3, "empty")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_within_others_is_named_by_its_path(tmp_path: Path, suffix: str) -> None:
    rows = [{"b": {"c": "deep", "n": 1}, "b.c": "shallow"}, None, {"b": None, "b.c": "x"}]
    columns = {"a": rows, "a.b.c": ["top", "top", "top"], "list": [["x"]] * 3}
    path = tmp_path / f"text{suffix}"
    write(path, pyarrow.table(columns), 2)
    assert texts(read_all(path, field="a.b.c")) == ["top"] * 3, "a column of that very name comes first"

    write(path, pyarrow.table({"a": [row and {"b": row["b"]} for row in rows], "list": columns["list"]}), 2)
    found = read_all(path, field="a.b.c", on_bad_record="skip")
    assert texts(found) == ["deep"]
    assert rejected(found) == [(1, "missing field"), (2, "missing field")]

    for field, message in (
        (
            "a.b",
            r"no text column corpus.field=a.b; it holds a.b.c, a.b.n; name one of these; its columns: \['a', 'list'\]",
        ),
        ("a.b.x", r"no text column corpus.field=a.b.x; its columns: \['a', 'list'\]"),
        ("a.b.n", r"corpus.field=a.b.n; it holds int64; make a column of text of it"),
        ("list", r"corpus.field=list; it holds list<\w+: string>; make a column of text of it"),
    ):
        with pytest.raises(UserError, match=message):
            read_all(path, field=field, on_bad_record="skip")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parts_of_a_table_make_units_of_so_many_bytes(tmp_path: Path, suffix: str) -> None:
    lines = [f"row {row:03d}" for row in range(1000)]
    write(tmp_path / f"text{suffix}", pyarrow.table({"text": lines}), 100)
    corpus = CorpusConfig(train=str(tmp_path / f"text{suffix}"), unit_bytes=1500)
    three = all_jobs(corpus, workers=3)
    assert len(three) == 3

    mine: dict[int, list[str]] = {}
    for job in three:
        passed = []
        for unit, items in read(job, corpus):
            passed.append(unit)
            if unit % job.stride == job.unit:
                mine[unit] = texts([take(item) for item in items])
        assert passed == list(range(len(passed)))
        assert len(passed) in (4, 5), "three batches of 700 bytes each are a unit"
    assert [line for unit in sorted(mine) for line in mine[unit]] == lines
    assert {len(unit) for unit in mine.values()} <= {100, 200, 300}


def test_a_dataset_saved_to_disk_is_read_in_the_order_of_its_list(tmp_path: Path) -> None:
    """The layout of datasets 5.2, `Dataset.save_to_disk` and `DatasetDict.save_to_disk`."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(2):
            table = pyarrow.table({"text": [f"{split} {number} {row}" for row in range(3)]})
            write_arrow(tmp_path / split / f"data-0000{number}-of-00002.arrow", table, 2)
        names = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in (1, 0)]
        (tmp_path / split / "state.json").write_text(json.dumps({"_data_files": names, "_split": None}))
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    expected = [f"train {number} {row}" for number in (1, 0) for row in range(3)]
    assert texts(read_all(tmp_path / "train")) == expected
    with pytest.raises(UserError, match=rf"a dataset of the splits train, test; name one, as in {tmp_path}/train"):
        read_all(tmp_path)


@pytest.mark.parametrize("damage", ["between batches", "within a batch", "offsets", "nothing", "old"])
@pytest.mark.parametrize("form", ["stream", "file"])
def test_damaged_arrow_obeys_the_policy(tmp_path: Path, form: str, damage: str) -> None:
    path = tmp_path / "text.arrow"
    table = pyarrow.table({"text": [f"row {row:03d}" for row in range(100)]})
    write_arrow(path, table, 50, form)
    packed = bytearray(path.read_bytes())
    if damage == "offsets":  # those of the second batch: 0, 7, 14, ...
        at = packed.rindex(b"".join(number.to_bytes(4, "little") for number in (0, 7, 14, 21)))
        packed[at + 8 : at + 12] = b"\xff\xff\xff\x7f"
    elif damage == "between batches":
        packed = packed[: packed.index(b"\xff\xff\xff\xff", packed.index(b"row 049"))]
    elif damage == "within a batch":
        packed = packed[: packed.index(b"row 077")]
    path.write_bytes(b"" if damage == "nothing" else b"FEA1" + bytes(9) if damage == "old" else packed)

    row = 50 if damage == "offsets" else 0
    reason = "no text" if damage == "old" else "damaged file"
    with pytest.raises(UserError, match=rf"text.arrow: record at row {row}: {reason} \("):
        read_all(path)
    found = read_all(path, on_bad_record="skip")
    assert rejected(found) == [(row, reason)]
    assert texts(found) == [f"row {number:03d}" for number in range(row)]


@pytest.mark.parametrize("document", ["line", "paragraph", "jsonl", "file"])
def test_rows_are_documents_whatever_they_hold(tmp_path: Path, document: str) -> None:
    path = tmp_path / "text.parquet"
    values = ["one\n\ntwo\r\n", "Ünï 漢字\0", " \n", "four", "five", "x" * 101, "last"]
    write_parquet(path, values, 3)

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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_columns_of_one_name_are_refused_since_nobody_knows_which_is_meant(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    write(path, pyarrow.Table.from_arrays([pyarrow.array(["one"]), pyarrow.array(["two"])], ["text", "text"]), 1)
    with pytest.raises(UserError, match=r"has several columns text; rename all but one; its columns:"):
        read_all(path)


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
