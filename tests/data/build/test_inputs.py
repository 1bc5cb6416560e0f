"""Input files: one that changes is noticed, what a stream was made from is known again, documents know their origin."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build_helpers import build, decoded, digests
from conftest import make_text

from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig
from rnnlm.data.build import encode
from rnnlm.data.build.build import Build
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import Manifest
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest

OPTIONS = {"unit_bytes": 600}
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": lambda data: gzip.compress(data, mtime=0)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def edit(path: Path, data: bytes) -> None:
    """The same size, other letters."""
    path.write_bytes(data.replace(b"anna", b"otto") if b"anna" in data else data[::-1])


CHANGES: dict[str, Callable[[Path, bytes], object]] = {
    "cut short": lambda path, data: os.truncate(path, len(data) // 2),
    "edited": edit,
    "longer": lambda path, data: path.write_bytes(data + b"more\n"),
    "removed": lambda path, data: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("suffix", "when"), [("", "first"), ("", "last"), (".gz", "last")])
def test_a_file_that_changes_while_it_is_read_ends_the_build(
    tokenizer: Tokenizer, tmp_path: Path, change: Callable[[Path, bytes], object], suffix: str, when: str
) -> None:
    """After the first of its units, or when all are there: no stream gets a name, and the next build reads it anew."""
    path = tmp_path / f"text.txt{suffix}"
    data = PACK[suffix]("\n".join(make_text(60, seed=4)).encode())
    path.write_bytes(data)
    os.utime(path, (5, 5))
    config = Config(
        corpus=CorpusConfig(train=str(path), unit_bytes=100 if suffix else 600),
        stream=StreamConfig(directory=str(tmp_path / "s"), valid_fraction=0.2),
        build=BuildConfig(workers=1),
    )
    units, left = Build(config, tokenizer), [1 if suffix else -(-len(data) // 600)]

    def progress(size: int) -> None:
        left[0] -= 1
        if (when == "first" or not left[0]) and path.exists() and path.stat().st_mtime == 5:
            change(path, data)

    with pytest.raises(UserError, match=rf"text.txt{suffix}: (was changed|reading ended|cannot be read)"):
        units.run(progress)
    assert not (tmp_path / "s/train").exists() and not (tmp_path / "s/valid").exists()

    if path.exists():
        try:
            Build(config, tokenizer).run(lambda size: None)
        except UserError as error:  # half of a compressed file is none
            assert suffix and "damaged" in str(error)
            return
        (tmp_path / "t").mkdir()
        build(path, tmp_path / "t", tokenizer, unit_bytes=config.corpus.unit_bytes, stream={"shard_tokens": 2**27})
        assert decoded(tmp_path / "s", "train", tokenizer) == decoded(tmp_path / "t", "train", tokenizer)


@pytest.mark.parametrize("moment", ["read", "content_digest"])
def test_nothing_stays_of_a_change_that_was_undone(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A unit, or the digest of a file, that was taken of other text is not found again when size and time are back."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(make_text(40, seed=4)))
    os.utime(path, (5, 5))
    build(path, tmp_path / "whole", tokenizer, **OPTIONS)

    good, calls, honest = path.read_bytes(), [0], getattr(encode, moment)

    def meanwhile(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 1:
            edit(path, good)
        return honest(*arguments)

    monkeypatch.setattr(encode, moment, meanwhile)
    with pytest.raises(UserError, match="text.txt: was changed"):
        build(path, tmp_path / "s", tokenizer, **OPTIONS)
    path.write_bytes(good)
    os.utime(path, (5, 5))
    build(path, tmp_path / "s", tokenizer, **OPTIONS)
    assert digests(tmp_path / "s") == digests(tmp_path / "whole")


def test_the_streams_of_other_texts_under_the_same_names_are_not_taken_for_these(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in range(3):
            text = "\n".join(make_text(9, seed=file))
            (tmp_path / name / f"{file}.txt").write_text(text if name == "a" else text.replace("anna", "otto"))
    build(str(tmp_path / "a/*"), tmp_path / "s", tokenizer, **OPTIONS)
    whole = digests(tmp_path / "s")
    with pytest.raises(UserError, match=r"other input files \(0.txt, 1.txt, 2.txt edited\); remove it"):
        build(str(tmp_path / "b/*"), tmp_path / "s", tokenizer, **OPTIONS)

    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    build(str(tmp_path / "elsewhere/*"), tmp_path / "s", tokenizer, **OPTIONS)
    assert digests(tmp_path / "s") == whole, "the same files are the same stream wherever they lie"

    (tmp_path / "a/1.txt").unlink()
    (tmp_path / "a/3.txt").write_text("more")
    with pytest.raises(UserError, match=r"other input files \(3.txt added; 1.txt removed\)"):
        build(str(tmp_path / "a/*"), tmp_path / "s", tokenizer, **OPTIONS)


def test_what_is_in_a_file_is_read_once_for_as_long_as_its_time_stays(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(make_text(20)))
    os.utime(path, (5, 5))
    build(path, tmp_path / "s", tokenizer, **OPTIONS)
    edit(path, path.read_bytes())
    os.utime(path, (5, 5))
    build(path, tmp_path / "s", tokenizer, **OPTIONS)  # nobody can see this without reading it

    (tmp_path / "s/build/inputs.jsonl").unlink()
    with pytest.raises(UserError, match=r"other input files \(text.txt edited\)"):
        build(path, tmp_path / "s", tokenizer, **OPTIONS)


def test_a_stream_of_version_2_is_known_by_names_and_sizes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(make_text(20)))
    build(path, tmp_path / "s", tokenizer, **OPTIONS)
    for split in ("train", "valid"):
        stream = tmp_path / "s" / split
        body = json.loads((stream / "stream.json").read_text())
        for name in ("sources", "origins_sha256", "repeated", "digest"):
            body.pop(name, None)
        kept = {name: value for name, value in body["source"].items() if name not in ("shares", "valid_max_tokens")}
        del kept["sources_sha256"]
        kept.pop("valid_level", None)
        body |= {"version": 2, "source": {"files": {"train": [["text.txt", path.stat().st_size]]}, **kept}}
        (stream / "stream.json").write_text(json.dumps({**body, "digest": json_digest(body)}, indent=1))
        for name in ("sources.jsonl", "origins.npy"):
            (stream / name).unlink()

    before = digests(tmp_path / "s")
    assert list(TokenStream(tmp_path / "s/train").verify())
    build(path, tmp_path / "s", tokenizer, **OPTIONS)
    assert digests(tmp_path / "s") == before
    with path.open("a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="other input files; remove it"):
        build(path, tmp_path / "s", tokenizer, **OPTIONS)


def test_the_manifest_is_as_small_for_many_files_as_for_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(make_text(60)):
        (tmp_path / f"in/{number:03d}-{'a-long-name-' * 16}.txt").write_text(text)
    build(str(tmp_path / "in/*"), tmp_path / "s", tokenizer, valid_fraction=0)
    directory = tmp_path / "s/train"
    assert (directory / "stream.json").stat().st_size < 3000
    assert len((directory / "sources.jsonl").read_text().splitlines()) == Manifest.read(directory).documents == 60


@pytest.mark.parametrize("given", [{}, {"shuffle_seed": 3, "deduplicate": True}], ids=["in order", "shuffled"])
def test_the_origin_of_every_document_is_where_its_text_stands(
    tokenizer: Tokenizer, tmp_path: Path, given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of several units, small ones that share a unit, compressed ones; also where a file begins with a BOM."""
    monkeypatch.setattr("rnnlm.data.build.assemble.SPAN_TOKENS", 500)
    (tmp_path / "in").mkdir()
    contents: dict[str, bytes] = {}
    for number, suffix in enumerate(["", "", "", ".gz", ".gz", ""]):
        lines = make_text(5 if number < 3 else 60, seed=number)
        data = ("\ufeff" * (number == 1) + "\n\n".join([*lines, lines[0]])).encode()
        contents[f"{number}.txt{suffix}"] = data
        (tmp_path / f"in/{number}.txt{suffix}").write_bytes(PACK[suffix](data))
    build(str(tmp_path / "in/*"), tmp_path / "s", tokenizer, **OPTIONS, **given)

    found = 0
    for split in ("train", "valid"):
        stream = TokenStream(tmp_path / "s" / split)
        names = [json.loads(line)["file"] for line in (stream.directory / "sources.jsonl").read_text().splitlines()]
        assert names == list(contents)
        for text, (line, at) in zip(decoded(tmp_path / "s", split, tokenizer), stream.origins.tolist(), strict=True):
            data = contents[names[line]][at:].removeprefix("\ufeff".encode())
            assert data.startswith(text.encode() + b"\n") or data == text.encode()
            found += 1
    assert found > 150
