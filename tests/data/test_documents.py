"""Documents: what is kept, rejected or repaired, at any size, and by which policy."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from reading import PACK, Joined, all_jobs, chunks_of, read_all, rejected, texts

from rnnlm.config import CorpusConfig
from rnnlm.data.documents import Document, Item, LongDocument, Rejected, read
from rnnlm.errors import UserError
from rnnlm.hashing import fraction, fraction_of, keyed_hash


@pytest.fixture
def small_chunks() -> Iterator[None]:
    with chunks_of(7):
        yield


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
    assert rejected(found) == []


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
def test_invalid_text_is_repaired_and_marked(tmp_path: Path, document: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 \xf0\x9f\n\nna\xc3\xafve")
    found = read_all(path, document=document, on_bad_record="replace")
    kept = [item for item in found if isinstance(item, Document)]
    assert "\n\n".join(texts(found)) == "caf\ufffd \ufffd\n\nnaïve"
    assert [item.repaired for item in kept] == [True, False][: len(kept)], "only what had to be"

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
    (repaired,) = [item for item in found if isinstance(item, Joined)]
    assert repaired == Joined(path.name, len(before), bad.decode(errors="replace").encode(), True)
    assert texts(found)[-1] == ("c" if after else repaired.data.decode())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_a_long_document_may_be_left_or_refused(tmp_path: Path, document: str) -> None:
    path = tmp_path / "text.txt"
    others = b"" if document == "file" else b"\n\nshort\n\n" + b"more " * 9
    path.write_bytes("\ufeff".encode() + b"long " * 20 + others)
    corpus = CorpusConfig(train=str(path), document=document, max_whole_bytes=20, on_bad_record="skip")  # type: ignore[arg-type]
    (job,) = all_jobs(corpus)
    kinds = [LongDocument, Document, LongDocument] if others else [LongDocument]

    for taken in (0, 1, 2):
        found: list[Item] = []
        for _, items in read(job, corpus):
            for item in items:
                found.append(item)
                if isinstance(item, LongDocument):
                    begin = b"".join(part for part, _ in zip(item.parts, range(taken), strict=False))
                    assert (b"long " * 20 if item.offset == 0 else b"more " * 9).startswith(begin)
                    assert item.reject(123) == Rejected("text.txt", item.offset, "oversized document")
        assert [type(item) for item in found if not isinstance(item, Rejected)] == kinds

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
