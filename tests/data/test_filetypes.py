"""Kinds of files: told apart by name, resolved where corpus.document is auto, refused with the way out."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from reading import COMPRESSED, PACK, read_all, rejected, texts

from rnnlm.config import Config, CorpusConfig, StreamConfig
from rnnlm.data.build.build import Build
from rnnlm.data.filetypes import MAGICS, REFUSED, TABLES, UNCLEAR, disguised, document_of_all
from rnnlm.data.sources import corpus_sources, sources
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.texts import NamedSource

LINES = b'{"text": "one", "meta": {"body": "deep"}}\n'


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
@pytest.mark.parametrize("name", ["text.jsonl", "text.ndjson", "TEXT.JSONL"])
def test_json_lines_are_recognised_by_name(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACK[suffix](LINES))
    assert texts(read_all(path)) == ["one"]
    assert texts(read_all(path, field="meta.body")) == ["deep"]
    assert texts(read_all(path, document="line")) == [LINES.decode().strip()], "as told, where it is told"


def test_a_name_in_capitals_is_opened_alike(tmp_path: Path) -> None:
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"one\n"))
    assert texts(read_all(tmp_path / "A.TXT.GZ")) == ["one"]


def test_a_stream_records_what_auto_has_stood_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """So a stream that was built with corpus.document=line is the one that auto asks for."""
    (tmp_path / "a.txt").write_text("one\n")
    stream = StreamConfig(directory=str(tmp_path / "s"))
    for document in ("auto", "line"):
        config = Config(CorpusConfig(train=str(tmp_path / "a.txt"), document=document), stream=stream)  # type: ignore[arg-type]
        assert Build(config, tokenizer).source()["document"] == "line"

    assert document_of_all(["a.jsonl", "b.parquet"], "auto") == "jsonl"
    assert document_of_all(["b.parquet"], "auto") == "line"
    assert document_of_all(["a.jsonl"], "paragraph") == "paragraph"


def test_json_lines_among_others_are_a_mistake_within_a_source_and_none_between_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "c.parquet").touch()
    with pytest.raises(UserError, match=r"a.jsonl holds JSON lines, .*b.txt does not; name them as two sources"):
        sources(f"{tmp_path}/*", "corpus.train")
    assert len(sources(f"{tmp_path}/*", "corpus.train", "line")) == 3
    assert len(sources([f"{tmp_path}/a.jsonl", f"{tmp_path}/c.parquet"], "corpus.train")) == 2

    corpus = CorpusConfig(train={"a": NamedSource(f"{tmp_path}/a.jsonl"), "b": NamedSource(f"{tmp_path}/b.txt")})
    (found,) = corpus_sources(corpus).values()
    assert document_of_all([source.path for source in found], corpus.document) == "auto"
    assert [item for source in found for item in texts(read_all(source.path))] == ["one", "two"]


@pytest.mark.parametrize("document", ["auto", "line", "file"])
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, document: str) -> None:
    for suffix, name in ((each, name) for each in REFUSED for name in (f"text{each}", f"TEXT{each.upper()}.gz")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError) as caught:
            sources(str(tmp_path / name), "corpus.train", document)
        assert str(caught.value) == f"corpus.train: {tmp_path}/{name}: {suffix} files cannot be read; {REFUSED[suffix]}"


@pytest.mark.parametrize("suffix", UNCLEAR)
def test_what_may_be_documents_is_read_if_the_user_says_how(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(LINES)
    with pytest.raises(
        UserError, match=rf"text{suffix}: a {suffix} file is not documents as it stands; .*set corpus.doc"
    ):
        read_all(path)
    assert texts(read_all(path, document="jsonl")) == ["one"]
    assert texts(read_all(path, document="line")) == [LINES.decode().strip()]


def test_a_table_within_a_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet.gz").touch()
    with pytest.raises(UserError, match=r".parquet files are read as they are, not within .gz; decompress it"):
        sources(f"{tmp_path}/*.gz", "corpus.train")


def archive(kind: str) -> bytes:
    """An archive with a file, or a file of another kind."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as packed:
            packed.writestr("a.txt", "one\n" * 99)
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), out)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(out, pyarrow.schema([("text", pyarrow.string())])):
            pass
    elif kind == "npy":
        np.save(out, np.arange(9))
    else:
        return "one\n".encode(kind)

    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zip", r"no text \(a zip archive, by its first bytes\); unpack it, .*zip://\*.txt::file.zip"),
        ("tar", r"no text \(a tar archive, by its first bytes\); unpack it, .*"),
        ("parquet", r"no text \(parquet, by its first bytes\); give it a name that ends in .parquet"),
        ("arrow", r"no text \(an Arrow file, by its first bytes\); give it a name that ends in .arrow"),
        ("npy", r"no text \(an array of numpy, by its first bytes\); tokens go in by tools/adopt_stream.py.*"),
        ("utf-16", r"no text \(UTF-16, by its first bytes\); convert it, as iconv -f UTF-16 -t UTF-8 does"),
    ],
)
def test_a_name_that_lies_is_found_by_the_first_bytes(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(archive(kind))
    with pytest.raises(UserError, match=rf"text.txt: record at byte 0: {message}, or set corpus.on_bad_record=skip"):
        read_all(path)
    for policy in ("skip", "replace"):
        assert rejected(read_all(path, on_bad_record=policy)) == [(0, "no text")]


@pytest.mark.parametrize(("offset", "magic", "kind", "suffix"), MAGICS, ids=lambda value: str(value))
def test_every_magic_is_known_and_has_a_way_out(offset: int, magic: bytes, kind: str, suffix: str) -> None:
    begin = b"x" * offset + magic
    found = disguised("text.txt", begin + b"more")
    assert found is not None and found[0] == kind and found[1]
    if suffix in (*COMPRESSED, *TABLES):
        assert found[1] == f"give it a name that ends in {suffix}"
    assert disguised("text.txt", begin[:-1] + b"?more") is None
    assert disguised("text.txt", b"") is None


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_compressed_file_without_its_suffix_is_named_not_guessed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "text.txt").write_bytes(PACK[suffix](b"one\n"))
    with pytest.raises(UserError, match=rf"no text \(\w+, by its first bytes\); give it a name that ends in {suffix},"):
        read_all(tmp_path / "text.txt")

    twice = tmp_path / f"text.txt{suffix}"
    twice.write_bytes(PACK[suffix](PACK[suffix](b"one\n")))
    with pytest.raises(UserError, match=rf"no text \(\w+ within {suffix}, by its first bytes\); decompress it"):
        read_all(twice)


def test_a_file_within_a_zip_archive_is_named_by_a_chained_url(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as packed:
            packed.writestr("text.txt", f"{name}\n")
    found = sources([f"zip://*.txt::{tmp_path}/{name}.zip" for name in ("a", "b")], "corpus.train")
    assert [source.name for source in found] == [f"zip://text.txt::{tmp_path}/{name}.zip" for name in ("a", "b")]
    assert texts(read_all(f"zip://*.txt::{tmp_path}/a.zip")) == ["a"]


@pytest.mark.parametrize(
    ("record", "field", "text"),
    [
        ({"a": {"b": "x"}}, "a.b", "x"),
        ({"a": {"b": "x"}, "a.b": "y"}, "a.b", "y"),
        ({"a": {"b": {"c": "x"}}}, "a.b.c", "x"),
        ({"a.b": {"c": "x"}}, "a.b.c", "x"),
        ({"a": {"b": 1}, "a.b": {"c": "x"}}, "a.b.c", "x"),
        ({"a": {"b": 1}}, "a.b", None),
        ({"a": ["b"]}, "a.b", None),
        ({"a.b": 3, "a": {"b": "x"}}, "a.b", None),
    ],
)
def test_a_field_of_json_may_be_a_path(tmp_path: Path, record: object, field: str, text: str | None) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    found = read_all(tmp_path / "a.jsonl", field=field, on_bad_record="skip")
    assert texts(found) == ([text] if text else [])
    assert rejected(found) == ([] if text else [(0, "invalid JSON or field")])
