"""Corpus: formats, record edges, and that units depend on the file alone."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rnnlm.config import CorpusConfig, UserError
from rnnlm.corpus import Document, Rejected, _ranges, documents, fraction_of, sources, units


def read(corpus: CorpusConfig) -> list[Document | Rejected]:
    found = units(sources(corpus.train, "corpus.train"), corpus, lambda size: None)
    return [document for unit in found for document in documents(unit, corpus)]


def texts(corpus: CorpusConfig) -> list[str]:
    return [document.text for document in read(corpus) if isinstance(document, Document)]


LINES = ["first", "  second with spaces  ", "", "Ünï 漢字", "\t ", "last without line feed"]
KEPT = [line for line in LINES if line.strip()]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("unit_bytes", [1, 7, 1000])
def test_lines_plain_and_compressed_in_any_units(tmp_path: Path, suffix: str, unit_bytes: int) -> None:
    data = "\n".join(LINES).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(pack(data[:20]) + pack(data[20:]))  # several members, as parallel compressors write them
    found = read(CorpusConfig(train=str(path), unit_bytes=unit_bytes))
    assert [d.text for d in found if isinstance(d, Document)] == KEPT
    assert [d.size for d in found if isinstance(d, Document)] == [len(line.encode()) for line in KEPT]
    assert [d.offset for d in found if isinstance(d, Rejected)] == [data.index(b"\n\n") + 1, data.index(b"\t ")]
    assert {d.reason for d in found if isinstance(d, Rejected)} == {"empty"}


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compression_is_an_error_not_a_shorter_corpus(tmp_path: Path, suffix: str, damage: str) -> None:
    data = "\n".join(f"line {i}" for i in range(5000)).encode()
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    packed = bytearray({".gz": gzip.compress, ".xz": lzma.compress, ".zst": checked}[suffix](data))
    packed = packed[:-9] if damage == "cut" else packed
    packed[len(packed) // 2] ^= damage == "flipped"
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(packed)
    with pytest.raises(UserError, match=f"text.txt{suffix}: cannot be read to its end"):
        read(CorpusConfig(train=str(path)))


def test_whole_files_and_json_fields(tmp_path: Path) -> None:
    for name, text in (("b.py", "x = 1\r\n\n"), ("a.py", "\ufeffy = 2"), ("c.py", " \n")):
        (tmp_path / name).write_bytes(text.encode())
    whole = CorpusConfig(train=str(tmp_path / "*.py"), document="file")
    assert texts(whole) == ["y = 2", "x = 1\r\n\n"]
    lines = [{"text": "one\ntwo", "n": 1}, {"text": ""}, {"text": "three"}]
    (tmp_path / "d.jsonl").write_text("\r\n".join(map(json.dumps, lines)))
    assert texts(CorpusConfig(train=str(tmp_path / "d.jsonl"), document="jsonl")) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("record", "document", "reason"),
    [
        (b"caf\xe9", "line", "invalid UTF-8"),
        (b"caf\xe9", "file", "invalid UTF-8"),
        (b'{"text": ', "jsonl", "invalid JSON or field"),
        (b'{"other": "x"}', "jsonl", "invalid JSON or field"),
        (b'{"text": 3}', "jsonl", "invalid JSON or field"),
        (b'{"text": "\\ud800"}', "jsonl", "invalid JSON or field"),
        (b"[1]", "jsonl", "invalid JSON or field"),
    ],
)
def test_bad_records_name_file_and_byte_or_are_counted(
    tmp_path: Path, record: bytes, document: str, reason: str
) -> None:
    good = b'{"text": "good"}\n'
    path = tmp_path / "bad.txt"
    path.write_bytes((b"" if document == "file" else good) + record)
    offset = 0 if document == "file" else len(good)
    with pytest.raises(UserError, match=rf"bad.txt: record at byte {offset}: {reason} .*on_bad_record=skip"):
        read(CorpusConfig(train=str(path), document=document))  # type: ignore[arg-type]
    found = read(CorpusConfig(train=str(path), document=document, on_bad_record="skip"))  # type: ignore[arg-type]
    assert found[-1] == Rejected(str(path), offset, reason)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    for pattern, message in (("*.nothing", "no file matches"), ("gone.txt", "cannot be read"), ("", "is a directory")):
        with pytest.raises(UserError, match=rf"corpus.train=.*{message}"):
            sources(str(tmp_path / pattern), "corpus.train")


@given(st.binary(max_size=200), st.integers(1, 40), st.lists(st.integers(1, 30), max_size=20))
def test_a_unit_holds_the_lines_that_start_in_its_range(data: bytes, unit_bytes: int, cuts: list[int]) -> None:
    data = data.replace(b"\x00", b"\n")
    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    found = list(_ranges(iter([piece for piece in [*pieces, rest] if piece]), unit_bytes))
    assert b"".join(part for _, part in found) == data
    starts = [0] + [place + 1 for place in range(len(data) - 1) if data[place] == 10]
    expected: dict[int, int] = {}
    for start in starts if data else []:
        expected.setdefault(start // unit_bytes, start)
    assert [offset for offset, _ in found] == list(expected.values()), "however the file was read"


def test_fraction_is_uniform_keyed_and_pinned() -> None:
    draws = [fraction_of(f"text {i}", 0) for i in range(4000)]
    assert abs(sum(draws) / 4000 - 0.5) < 0.025
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert fraction_of("text", 0) != fraction_of("text", 1)
    assert round(fraction_of("text", 0), 12) == 0.387584095013, "a new version must split old corpora as before"
