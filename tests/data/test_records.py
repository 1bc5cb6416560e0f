"""Records: what is in a file does not depend on the units and chunks in which it is read."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reading import PACK, Found, Joined, all_jobs, chunks_of, read_all, read_job, rejected, texts

from rnnlm.config import CorpusConfig
from rnnlm.data.documents import Document, Rejected


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the files of one example after the other."""
    return tmp_path_factory.mktemp("examples")


LINES = ["first", "  second with spaces  ", "", "Ünï 漢字", "\t ", "last without line feed"]
KEPT = [line for line in LINES if line.strip()]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("unit_bytes", [1, 7, 1000])
def test_lines_plain_and_compressed_in_any_units(tmp_path: Path, suffix: str, unit_bytes: int) -> None:
    data = "\n".join(LINES).encode()
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(PACK[suffix](data[:20]) + PACK[suffix](data[20:]))  # several members, as parallel compressors do
    found = read_all(path, unit_bytes=unit_bytes)

    assert texts(found) == KEPT
    assert rejected(found) == [(data.index(b"\n\n") + 1, "empty"), (data.index(b"\t "), "empty")]
    assert {item.name for item in found} == {path.name}
    for item in found:
        if isinstance(item, Document):
            assert data[item.offset :].startswith(item.data)
            assert not item.repaired


def bytes_of(*alphabet: bytes) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from([b"a", b"b", "é".encode(), b" ", b"\n", b"\r\n", *alphabet]), max_size=60).map(
        b"".join
    )


def expected(data: bytes, corpus: CorpusConfig) -> list[Found]:
    """What is in text.txt with these bytes, the obvious way: split all of them at once."""
    edge = re.compile(rb"\r?\n" if corpus.document == "line" else rb"\r?\n([ \t]{0,253}\r?\n)+")
    blank = re.match(rb"([ \t]{0,253}\r?\n)*", data)
    begin = blank.end() if blank and corpus.document == "paragraph" else 0
    found: list[Found] = []

    while begin < len(data):
        separator = edge.search(data, begin)
        record = data[begin : separator.start() if separator else len(data)]
        if not separator:  # the file ends without one, perhaps in the middle of one
            record = record.removesuffix(b"\r") if corpus.document == "line" else record.rstrip(b"\r\n")

        text = record.decode(errors="replace").encode()
        if not text.strip():
            found.append(Rejected("text.txt", begin, "empty"))
        else:
            kind = Joined if len(text) > corpus.max_whole_bytes else Document
            found.append(kind("text.txt", begin, text, text != record))
        begin = separator.end() if separator else len(data)
    return found


def read_both_ways(directory: Path, data: bytes, chunk: int, corpus: CorpusConfig) -> list[Found]:
    """What is in text.txt with these bytes, each unit read alone; and text.txt.gz, read as one stream, has the same."""
    (directory / "text.txt").write_bytes(data)
    (directory / "text.txt.gz").write_bytes(gzip.compress(data, 1))
    plain = replace(corpus, train=str(directory / "text.txt"))
    packed = replace(corpus, train=str(directory / "text.txt.gz"))
    ranges, (whole,) = all_jobs(plain), all_jobs(packed)

    with chunks_of(chunk):
        alone = [unit for job in ranges for unit in read_job(job, plain)]
        streamed = read_job(whole, packed)

    assert sum(job.bytes(plain) for job in ranges) == len(data)
    assert [unit for unit, _ in alone] == list(range(len(ranges))), "one for each range, what is in it or not"
    for unit, items in alone:
        for item in items:
            first = not data[: item.offset].strip()  # blank lines before the first record belong to it
            assert item.offset // corpus.unit_bytes == unit or (first and unit == 0), "a unit has what starts in it"

    same = [(unit, [item._replace(name="text.txt") for item in items]) for unit, items in streamed if items]
    assert same == [(unit, items) for unit, items in alone if items]
    return [item for _, items in alone for item in items]


@given(
    st.one_of(
        st.tuples(st.just("line"), bytes_of(b"\r", b"\xff", b"\xc3")),
        st.tuples(st.just("paragraph"), bytes_of(b"\n\n", b"\r\n\r\n", b"\n \n", b"\t", b"\xff", b"\xc3")),
    ),
    st.integers(1, 40),
    st.integers(3, 50),
    st.integers(1, 40),
)
@example(("line", b"aaaa\n"), 9, 3, 9)
@example(("line", b"aaa\r\n"), 9, 3, 4)
@example(("paragraph", b"\n" + b"a" * 9), 20, 3, 3)
@example(("paragraph", b"\n\n "), 1, 3, 1)
@example(("paragraph", b"aaaa\n" + b" " * 253 + b"\r\nb"), 257, 3, 20)
@example(("paragraph", b"aaaa\n" + b" " * 253 + b"\r\nb"), 260, 300, 1)
@example(("paragraph", b"aaaa\n" + b" " * 254 + b"\nb"), 260, 300, 1)
@example(("paragraph", b" \t\n \n  aaaa\n\t\r\n \n b"), 3, 3, 3)
@example(("paragraph", b"\n\n" * 30 + b"a" * 20), 7, 9, 5)
@example(("paragraph", b"aaaa\n\n\n\n\nb"), 20, 3, 3)
@example(("paragraph", b"aaaa" + b"\n" * 30 + b"bbbb" + b"\r\n" * 30 + b"c"), 5, 3, 7)
def test_every_way_to_read_a_file_finds_what_is_there(
    directory: Path, drawn: tuple[Any, bytes], unit_bytes: int, longest: int, chunk: int
) -> None:
    document, data = drawn
    corpus = CorpusConfig(document=document, unit_bytes=unit_bytes, max_whole_bytes=longest, on_bad_record="replace")
    assert read_both_ways(directory, data, chunk, corpus) == expected(data, corpus)


@given(bytes_of(b"\n\n", b"\r"), st.integers(1, 40), st.integers(3, 50), st.integers(1, 40))
@example(b"x\n\n\r\r\ra", 6, 50, 40)
@example(b"aaaa\n\n\r\r\rb", 40, 3, 3)
def test_stray_carriage_returns_never_lose_or_join_paragraphs(
    directory: Path, data: bytes, unit_bytes: int, longest: int, chunk: int
) -> None:
    path = directory / "text.txt"
    path.write_bytes(data)
    whole = read_all(path, document="paragraph")

    with chunks_of(chunk):
        found = read_all(path, document="paragraph", unit_bytes=unit_bytes, max_whole_bytes=longest)
    assert [text.strip("\r\n") for text in texts(found)] == [text.strip("\r\n") for text in texts(whole)]
    assert "".join("".join(texts(whole)).split()) == "".join(data.decode().split())


@given(st.lists(st.integers(0, 60), max_size=20), st.integers(1, 30), st.integers(1, 40))
def test_oversized_json_is_the_same_in_any_units(
    directory: Path, sizes: list[int], chunk: int, unit_bytes: int
) -> None:
    lines = [json.dumps({"text": "x" * size}) for size in sizes]
    path = directory / "d.jsonl"
    path.write_text("\n".join(lines))
    options = {"document": "jsonl", "max_document_bytes": 40, "on_bad_record": "skip"}

    with chunks_of(chunk):
        found = read_all(path, unit_bytes=unit_bytes, **options)

    assert [item.offset for item in found] == [sum(len(line) + 1 for line in lines[:k]) for k in range(len(lines))]
    for item, size, line in zip(found, sizes, lines, strict=True):
        if size > 40:
            assert item == Rejected("d.jsonl", item.offset, "oversized document")
        elif len(line) < 40:
            document = Document("d.jsonl", item.offset, b"x" * size, False)
            assert item == (document if size else Rejected("d.jsonl", item.offset, "empty"))
    assert found == read_all(path, unit_bytes=10**6, **options), "where the JSON is longer than its text may be"


@pytest.mark.parametrize("blank", ["", " ", "\t", "  \t ", " " * 253])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_spaces_and_tabs_ends_a_paragraph(tmp_path: Path, blank: str, end: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(end.join([blank, "  one", "two", blank, blank, "\tthree", blank]).encode())
    assert texts(read_all(path, document="paragraph")) == [
        f"  one{end}two",
        "\tthree" + ("" if not blank else end + blank),
    ]
