"""Corpus: formats, record edges, policies, and that units depend on the file alone, however it is read."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

import rnnlm.data.decompress
import rnnlm.data.documents
from rnnlm.config import CorpusConfig
from rnnlm.data.documents import BadRecordError, Document, Item, Job, LongDocument, Rejected, jobs, read
from rnnlm.data.sources import sources
from rnnlm.errors import UserError
from rnnlm.hashing import fraction, fraction_of, keyed_hash


class Joined(NamedTuple):
    """What became of a LongDocument: its parts together."""

    name: str
    offset: int
    data: bytes
    mended: bool


Found = Document | Joined | Rejected
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
COMPRESSED = [suffix for suffix in PACK if suffix]


def take(item: Item) -> Found:
    """What a consumer makes of an item."""
    if not isinstance(item, LongDocument):
        return item
    try:
        data = b"".join(item.parts)
    except BadRecordError as error:
        return error.rejected
    blank = not data.decode().strip()
    return Rejected(item.name, item.offset, "empty") if blank else Joined(item.name, item.offset, data, item.mended)


def read_job(job: Job, corpus: CorpusConfig) -> list[tuple[int, list[Found]]]:
    return [(unit, [take(item) for item in items]) for unit, items in read(job, corpus)]


def all_jobs(corpus: CorpusConfig, workers: int = 1) -> list[Job]:
    return list(jobs("train", sources(corpus.train, "corpus.train"), corpus, workers))


def read_all(path: Path | str, **options: Any) -> list[Found]:
    """All that is in the files, each unit by itself where that is possible."""
    corpus = CorpusConfig(train=str(path), **options)
    return [item for job in all_jobs(corpus) for _, items in read_job(job, corpus) for item in items]


def texts(found: list[Found]) -> list[str]:
    return [item.data.decode() for item in found if not isinstance(item, Rejected)]


def rejected(found: list[Found]) -> list[tuple[int, str]]:
    return [(item.offset, item.reason) for item in found if isinstance(item, Rejected)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the files of one example after the other."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (rnnlm.data.decompress, rnnlm.data.documents):
            patch.setattr(module, "CHUNK_BYTES", 7)
        yield


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
            assert not item.mended


def test_whole_files_json_fields_and_paragraphs(tmp_path: Path) -> None:
    for name, text in (("b.py", "x = 1\r\n\n"), ("a.py", "\ufeffy = 2"), ("c.py", " \n")):
        (tmp_path / name).write_bytes(text.encode())
    found = read_all(tmp_path / "*.py", document="file")
    assert found[:2] == [Document("a.py", 0, b"y = 2", False), Document("b.py", 0, b"x = 1\r\n\n", False)]
    assert found[2:] == [Rejected("c.py", 0, "empty")]
    lines = [{"text": "one\ntwo", "n": 1}, {"text": ""}, {"text": "three"}]
    (tmp_path / "d.jsonl").write_text("\r\n".join(map(json.dumps, lines)) + "\r\n\n")
    assert texts(read_all(tmp_path / "d.jsonl", document="jsonl")) == ["one\ntwo", "three"]
    assert texts(read_all(tmp_path / "d.jsonl", document="jsonl", field="n", on_bad_record="skip")) == []
    (tmp_path / "e.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n\r\nthree\n\n \n\n\nfour\n".encode())
    found = read_all(tmp_path / "e.txt", document="paragraph")
    assert texts(found) == ["one\r\ntwo", "three", "four"]
    assert rejected(found) == [(24, "empty")]


def bytes_of(*alphabet: bytes) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from([b"a", b"b", "é".encode(), b" ", b"\n", b"\r\n", *alphabet]), max_size=60).map(
        b"".join
    )


def expected(data: bytes, corpus: CorpusConfig) -> list[Found]:
    """What is in text.txt with these bytes, the obvious way: split all of them at once."""
    edge = re.compile(rb"\r?\n" if corpus.document == "line" else rb"(\r?\n){2,}")
    begin = 0 if corpus.document == "line" else len(data) - len(data.lstrip(b"\r\n"))
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
    parts, (whole,) = all_jobs(plain), all_jobs(packed)
    with pytest.MonkeyPatch.context() as patch:
        for module in (rnnlm.data.decompress, rnnlm.data.documents):
            patch.setattr(module, "CHUNK_BYTES", chunk)  # whose edges fall everywhere
        alone = [unit for job in parts for unit in read_job(job, plain)]
        streamed = read_job(whole, packed)
    assert sum(job.bytes(plain) for job in parts) == len(data)
    assert [unit for unit, _ in alone] == list(range(len(parts))), "one for each range, what is in it or not"
    for unit, items in alone:
        for item in items:
            first = not data[: item.offset].strip(b"\r\n")  # blank lines before the first record belong to it
            assert item.offset // corpus.unit_bytes == unit or (first and unit == 0), "a unit has what starts in it"
    same = [(unit, [item._replace(name="text.txt") for item in items]) for unit, items in streamed if items]
    assert same == [(unit, items) for unit, items in alone if items]
    return [item for _, items in alone for item in items]


@given(
    st.one_of(
        st.tuples(st.just("line"), bytes_of(b"\r", b"\xff", b"\xc3")),
        st.tuples(st.just("paragraph"), bytes_of(b"\n\n", b"\r\n\r\n", b"\xff", b"\xc3")),
    ),
    st.integers(1, 40),
    st.integers(3, 50),
    st.integers(1, 40),
)
@example(("line", b"aaaa\n"), 9, 3, 9)
@example(("line", b"aaa\r\n"), 9, 3, 4)
@example(("paragraph", b"\n" + b"a" * 9), 20, 3, 3)
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
    with pytest.MonkeyPatch.context() as patch:
        for module in (rnnlm.data.decompress, rnnlm.data.documents):
            patch.setattr(module, "CHUNK_BYTES", chunk)
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
    with pytest.MonkeyPatch.context() as patch:
        for module in (rnnlm.data.decompress, rnnlm.data.documents):
            patch.setattr(module, "CHUNK_BYTES", chunk)
        found = read_all(path, unit_bytes=unit_bytes, **options)
    assert [item.offset for item in found] == [sum(len(line) + 1 for line in lines[:k]) for k in range(len(lines))]
    for item, size, line in zip(found, sizes, lines, strict=True):
        if size > 40:
            assert item == Rejected("d.jsonl", item.offset, "oversized document")
        elif len(line) < 40:
            document = Document("d.jsonl", item.offset, b"x" * size, False)
            assert item == (document if size else Rejected("d.jsonl", item.offset, "empty"))
    assert found == read_all(path, unit_bytes=10**6, **options), "where the JSON is longer than its text may be"


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_the_jobs_of_a_compressed_file_share_its_units(tmp_path: Path, suffix: str) -> None:
    lines = [b"line %d" % number for number in range(200)]
    (tmp_path / f"text.txt{suffix}").write_bytes(PACK[suffix](b"\n".join(lines)))
    corpus = CorpusConfig(train=str(tmp_path / "text.txt*"), unit_bytes=100)
    (alone,) = all_jobs(corpus)
    whole = dict(read_job(alone, corpus))
    three = all_jobs(corpus, workers=3)
    assert [(job.unit, job.step) for job in three] == [(0, 3), (1, 3), (2, 3)]
    mine: dict[int, list[Found]] = {}
    for job in three:
        passed = []
        for unit, items in read(job, corpus):
            passed.append(unit)
            if unit % job.step == job.unit:  # the items of other units are passed over unread, as a build does
                assert unit not in mine
                mine[unit] = [take(item) for item in items]
        assert passed == list(whole)
    assert mine == whole
    assert [item.data for unit in sorted(mine) for item in mine[unit] if isinstance(item, Document)] == lines


def test_jobs_are_enough_for_the_workers_and_no_more(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"text\n"))
    (tmp_path / "c.txt").write_bytes(b"x" * 25)
    (tmp_path / "d.txt").write_bytes(b"")
    corpus = CorpusConfig(train=str(tmp_path / "*"), unit_bytes=10)
    found = [(job.file, job.unit, job.step) for job in all_jobs(corpus, workers=3)]
    assert found == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 0), (2, 1, 0), (2, 2, 0)]
    assert all_jobs(replace(corpus, train=str(tmp_path / "d.txt"))) == []


def test_small_files_share_a_unit_and_a_large_one_has_its_own(tmp_path: Path) -> None:
    sizes = {"a.txt": 100, "b.txt.gz": 0, "c.txt": 30, "d.txt": 30, "e.txt": 100, "f.txt": 10}
    for name, size in sizes.items():
        text = name[0].encode() * size if size else b"bbb"
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    corpus = CorpusConfig(train=str(tmp_path / "*"), unit_bytes=60, document="file")
    found = all_jobs(corpus, workers=7)
    assert [name for job in found for name in (source.name for source in job.sources)] == list(sizes), "once each"
    assert [job.sources[0].name for job in found if len(job.sources) == 1][:1] == ["a.txt"]
    assert [job.file for job in found] == [list(sizes).index(job.sources[0].name) for job in found]
    assert [len(job.sources) for job in found] == [1, 3, 1, 1]
    for job in found:
        ((unit, items),) = read_job(job, corpus)
        assert unit == job.unit == job.step == 0
        assert [item.name for item in items] == [source.name for source in job.sources]
        assert job.bytes(corpus) == sum(source.size for source in job.sources)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compression_is_an_error_not_a_shorter_corpus(tmp_path: Path, suffix: str, damage: str) -> None:
    data = "\n".join(f"line {i}" for i in range(5000)).encode()
    packed = bytearray(PACK[suffix](data))
    packed = packed[:-9] if damage == "cut" else packed
    packed[len(packed) // 2] ^= damage == "flipped"
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(packed)
    what = "damaged file" if damage == "cut" else "(damaged file|invalid UTF-8)"
    with pytest.raises(UserError, match=rf"text.txt{suffix}: record at byte \d+: {what} .*on_bad_record=skip"):
        read_all(path)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize("unit_bytes", [1000, 2**20])
def test_what_stands_before_the_damage_is_kept(tmp_path: Path, suffix: str, chunk: int, unit_bytes: int) -> None:
    data = b"".join(b"line %d\n" % number for number in range(400))
    half = len(data) // 2
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(PACK[suffix](data[:half]) + PACK[suffix](data[half:])[:-12])
    with pytest.MonkeyPatch.context() as patch:
        for module in (rnnlm.data.decompress, rnnlm.data.documents):
            patch.setattr(module, "CHUNK_BYTES", chunk)
        found = read_all(path, on_bad_record="skip", unit_bytes=unit_bytes)
    *kept, last = found
    assert isinstance(last, Rejected)
    assert (last.name, last.reason) == (path.name, "damaged file")
    lines = data.split(b"\n")
    assert [item.data for item in kept if isinstance(item, Document)] == lines[: len(kept)], "as they were, no gap"
    assert len(b"\n".join(lines[: len(kept) + 1])) >= half, "all lines of the whole first member"
    assert last.offset == len(b"".join(line + b"\n" for line in lines[: len(kept)]))


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("content", ["garbage", "cut"])
def test_each_job_of_a_damaged_file_passes_each_unit_once(tmp_path: Path, suffix: str, content: str) -> None:
    data = b"".join(b"line %d\n" % number for number in range(400))
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(b"no such format" * 9 if content == "garbage" else PACK[suffix](data) + PACK[suffix](data)[:-12])
    corpus = CorpusConfig(train=str(path), unit_bytes=1000, on_bad_record="skip")
    (alone,) = all_jobs(corpus)
    whole = read_job(alone, corpus)
    assert [unit for unit, _ in whole] == list(range(len(whole)))
    assert whole[-1][1][-1].__class__ is Rejected
    mine = {}
    for job in all_jobs(corpus, workers=3):
        passed = []
        for unit, items in read(job, corpus):
            passed.append(unit)
            if unit % job.step == job.unit:
                mine[unit] = [take(item) for item in items]
        assert passed == [unit for unit, _ in whole]
    assert sorted(mine.items()) == whole


@pytest.mark.parametrize(
    ("record", "document", "reason"),
    [
        (b"caf\xe9", "line", "invalid UTF-8"),
        (b"caf\xe9", "paragraph", "invalid UTF-8"),
        (b"caf\xe9", "file", "invalid UTF-8"),
        (b'{"text": ', "jsonl", "invalid JSON or field"),
        (b'{"other": "x"}', "jsonl", "invalid JSON or field"),
        (b'{"text": 3}', "jsonl", "invalid JSON or field"),
        (b'{"text": "\\ud800"}', "jsonl", "invalid JSON or field"),
        (b"[1]", "jsonl", "invalid JSON or field"),
        (b"[" * 100_000, "jsonl", "invalid JSON or field"),
        (json.dumps({"text": "x" * 200_001}).encode(), "jsonl", "oversized document"),
    ],
)
def test_bad_records_name_file_and_byte_or_are_counted(
    tmp_path: Path, record: bytes, document: str, reason: str
) -> None:
    good = b"" if document == "file" else b'{"text": "good"}\n\n'
    after = b"" if document == "file" else b'\n\n{"text": "after"}'
    path = tmp_path / "bad.txt"
    path.write_bytes(good + record + after)
    options = {"document": document, "max_document_bytes": 200_000, "max_whole_bytes": 200_000}
    with pytest.raises(UserError, match=rf"bad.txt: record at byte {len(good)}: {reason} .*on_bad_record=skip"):
        read_all(path, **options)
    found = read_all(path, **options, on_bad_record="skip")
    assert [item for item in rejected(found) if item[1] != "empty"] == [(len(good), reason)]
    assert len(texts(found)) == (0 if document == "file" else 2), "what stands around it is kept"
    if reason != "invalid UTF-8":
        assert read_all(path, **options, on_bad_record="replace") == found


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_invalid_text_is_mended_and_marked(tmp_path: Path, document: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 \xf0\x9f\n\nna\xc3\xafve")
    found = read_all(path, document=document, on_bad_record="replace")
    kept = [item for item in found if isinstance(item, Document)]
    assert "\n\n".join(texts(found)) == "caf\ufffd \ufffd\n\nnaïve"
    assert [item.mended for item in kept] == [True, False][: len(kept)], "only what had to be"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": \xe9}\n{"text": "fine"}')
    found = read_all(path, document="jsonl", on_bad_record="replace")
    assert found[0] == Document("text.txt", 0, "caf\ufffd".encode(), True)
    assert found[1] == Rejected("text.txt", 17, "invalid JSON or field")
    assert found[2] == Document("text.txt", 29, b"fine", False)


LONG = "a é漢\n".encode() * 10


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [0, 10, 40, 99])
def test_a_long_document_is_bad_as_a_whole(tmp_path: Path, document: str, suffix: str, place: int) -> None:
    text = LONG if document == "file" else LONG.replace(b"\n", b" ") if document == "line" else LONG + b"end"
    bad = text[:place] + b"\xff" + text[place:]
    before, after = (b"", b"") if document == "file" else (b"b\n\n", b"\n\nc")
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(PACK[suffix](before + bad + after))
    options = {"document": document, "max_whole_bytes": 20}

    message = rf"text.txt{suffix}: record at byte {len(before)}: invalid UTF-8 .*on_bad_record=skip"
    with pytest.raises(UserError, match=message):
        read_all(path, **options)

    found = read_all(path, **options, on_bad_record="skip")
    assert [item for item in rejected(found) if item[1] != "empty"] == [(len(before), "invalid UTF-8")]
    assert texts(found) == [each.strip().decode() for each in (before, after) if each], "none of it, all others"

    found = read_all(path, **options, on_bad_record="replace")
    (mended,) = [item for item in found if isinstance(item, Joined)]
    assert mended == Joined(path.name, len(before), bad.decode(errors="replace").encode(), True)
    assert texts(found)[-1] == ("c" if after else mended.data.decode())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_a_long_document_may_be_left_or_refused(tmp_path: Path, document: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(
        "\ufeff".encode() + b"long " * 20 + (b"" if document == "file" else b"\n\nshort\n\n" + b"more " * 9)
    )
    corpus = CorpusConfig(train=str(path), document=document, max_whole_bytes=20, on_bad_record="skip")  # type: ignore[arg-type]
    (job,) = all_jobs(corpus)
    for taken in (0, 1, 2):
        kinds = []
        for _, items in read(job, corpus):
            for item in items:
                kinds.append(type(item))
                if isinstance(item, LongDocument):
                    begin = b"".join(part for part, _ in zip(item.parts, range(taken), strict=False))
                    assert (b"long " * 20 if item.offset == 0 else b"more " * 9).startswith(begin)
                    assert item.reject(123) == Rejected("text.txt", item.offset, "oversized document")
        assert [kind for kind in kinds if kind is not Rejected] == [LongDocument, Document, LongDocument][
            : 1 if document == "file" else 3
        ]
    strict = replace(corpus, on_bad_record="fail")
    first = next(item for _, items in read(job, strict) for item in items)
    assert isinstance(first, LongDocument)
    with pytest.raises(UserError, match=r"text.txt: record at byte 0: oversized .*123 bytes.*max_whole_bytes=20"):
        first.reject(123)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("policy", ["fail", "skip", "replace"])
def test_damage_within_a_long_document(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"first\n" + b"long " * 200)[:-9])
    options = {"max_whole_bytes": 20, "on_bad_record": policy}
    if policy == "fail":
        with pytest.raises(UserError, match="text.txt.gz: record at byte 6: damaged file"):
            read_all(path, **options)
    else:
        found = read_all(path, **options)
        assert found == [Document(path.name, 0, b"first", False), Rejected(path.name, 6, "damaged file")]


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
    mended = Document(path.name, 2, "caf\ufffd".encode(), True)
    assert read_all(path, on_bad_record="replace") == [one, missing, mended, four]


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


@pytest.mark.parametrize("document", ["line", "paragraph", "file", "jsonl"])
@pytest.mark.parametrize("longest", [5, 100])
def test_nul_bytes_are_text(tmp_path: Path, document: str, longest: int) -> None:
    path = tmp_path / "text.txt"
    text = "a\0b\0\0 c\0"
    path.write_text(json.dumps({"text": text}) if document == "jsonl" else text)
    if document != "jsonl" or longest > len(text):
        assert texts(read_all(path, document=document, max_whole_bytes=longest)) == [text]
    path.write_bytes(b"\0\n")
    if document != "jsonl":
        assert texts(read_all(path, document=document)) == ["\0" if document != "file" else "\0\n"]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    for pattern, message in (("*.nothing", "no file matches"), ("gone.txt", "cannot be read"), ("", "is a directory")):
        with pytest.raises(UserError, match=rf"corpus.train=.*{message}"):
            sources(str(tmp_path / pattern), "corpus.train")
    with pytest.raises(UserError, match="corpus.valid=nowhere://text.txt: cannot be opened"):
        sources("nowhere://text.txt", "corpus.valid")
    (tmp_path / "text.txt").write_text("text")
    corpus = CorpusConfig(train=str(tmp_path / "text.txt"), on_bad_record="skip")
    (job,) = all_jobs(corpus)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match="text.txt: cannot be read"):
        read_job(job, corpus)


def test_sources_are_in_order_and_named_within_the_corpus(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = sources([str(tmp_path / "b" / "*.txt"), str(tmp_path / "a" / "3.txt")], "corpus.train")
    assert [source.name for source in found] == ["b/1.txt", "b/2.txt", "a/3.txt"]
    assert [source.size for source in found] == [7, 7, 7]
    assert all(source.stamp for source in found)
    again = sources(str(tmp_path / "a" / "3.txt"), "corpus.train")
    assert again[0].name == "3.txt"
    assert again[0].stamp == found[2].stamp


def test_fraction_is_uniform_keyed_and_pinned() -> None:
    draws = [fraction_of(b"text %d" % i, 0) for i in range(4000)]
    assert abs(sum(draws) / 4000 - 0.5) < 0.025
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert fraction_of(b"text", 0) != fraction_of(b"text", 1)
    assert round(fraction_of(b"text", 0), 12) == 0.387584095013, "a new version must split old corpora as before"
    hashed = keyed_hash(0)
    for part in (b"te", b"", b"xt"):
        hashed.update(part)
    assert fraction(hashed) == fraction_of(b"text", 0), "however it comes"


def test_any_url_of_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(b"one\ntwo\n")
    with fsspec.open("memory://corpus/b.txt", "wb") as file:
        file.write(b"three\n")
    corpus = CorpusConfig(train="memory://corpus/*.txt")
    found = sources(corpus.train, "corpus.train")
    assert [source.name for source in found] == ["a.txt", "b.txt"]
    items = [item for job in jobs("train", found, corpus, 1) for _, unit in read(job, corpus) for item in unit]
    assert [item.data for item in items if isinstance(item, Document)] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("place", range(0, 12, 3))
def test_a_damaged_header_of_a_second_part_is_not_the_end_of_the_file(tmp_path: Path, suffix: str, place: int) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    first, second = (pack[suffix](b"".join(b"%d line\n" % (i + k) for i in range(900))) for k in (0, 900))
    damaged = bytearray(second)
    damaged[0 if suffix == ".gz" else place] ^= 64
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(first + damaged)
    corpus = CorpusConfig(train=str(path))
    with pytest.raises(UserError, match="damaged file"):
        for job in jobs("train", sources(corpus.train, "corpus.train"), corpus, 1):
            for _, items in read(job, corpus):
                list(items)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="it is empty"):
        for job in jobs("train", sources(corpus.train, "corpus.train"), corpus, 1):
            for _, items in read(job, corpus):
                list(items)
