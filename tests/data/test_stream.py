"""The stream on disk: its literal bytes, ring reading across shards, and every kind of damage refused."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import HEADER_BYTES, Manifest, StreamError
from rnnlm.data.stream_writer import write_shard
from rnnlm.data.tokenizer import Tokenizer, token_dtype


def test_the_bytes_of_a_three_token_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_stream(tmp_path / "s", tokenizer, [299, 256, 1], shard_tokens=100)
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (3,)}"
    shard = (tmp_path / "s/shard-00000.npy").read_bytes()
    assert shard == header + b" " * (127 - len(header)) + b"\n" + b"\x2b\x01\x00\x01\x01\x00"
    assert np.load(tmp_path / "s/shard-00000.npy").tolist() == [299, 256, 1]
    assert np.load(tmp_path / "s/documents.npy").tolist() == [[3, 5, 2]]
    manifest = json.loads((tmp_path / "s/stream.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["tokens"]) == ("rnnlm-stream", 3, 3)
    assert not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize("token", [-1, 300, 70_000])
def test_fault_28_a_token_outside_the_vocabulary_is_never_wrapped(
    tmp_path: Path, tokenizer: Tokenizer, token: int
) -> None:
    with pytest.raises(StreamError, match=f"token {token} is outside the vocabulary of 300"):
        write_shard(tmp_path / "shard-00000.npy", [np.array([4, token, 1])], tokenizer)
    assert not (tmp_path / "shard-00000.npy").exists()


def test_verify_refuses_the_first_id_behind_the_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_stream(tmp_path / "s", tokenizer, [5, 298, 1], shard_tokens=9)
    manifest = Manifest.read(tmp_path / "s")
    for vocab_size in (299, 298):  # of a stream without a tokenizer, which would tell its own
        forged = replace(manifest, tokenizer="", vocab_size=vocab_size)
        (tmp_path / "s/stream.json").write_text(forged.to_json())
        (tmp_path / "s/tokenizer.model").unlink(missing_ok=True)
        if vocab_size == 299:
            assert list(TokenStream(tmp_path / "s").verify())
    with pytest.raises(StreamError, match=r"shard-00000.npy: a token outside the vocabulary"):
        list(TokenStream(tmp_path / "s").verify())


def test_dtype_holds_every_id() -> None:
    assert [token_dtype(size) for size in (2**16, 2**16 + 1)] == ["<u2", "<u4"]


@settings(deadline=None)
@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=9), st.integers(1, 300))
def test_windows_are_the_ring(streams_path: Path, starts: list[int], length: int) -> None:
    stream = TokenStream(streams_path / "train")
    everything = np.concatenate([stream.shard(0), stream.shard(1)])
    found = stream.windows(np.array(starts), length)
    expected = everything[(np.array(starts)[:, None] + np.arange(length)) % len(everything)]
    assert found.dtype == everything.dtype
    assert np.array_equal(found, expected)


@pytest.fixture(scope="module")
def streams_path(streams: Path) -> Path:
    return streams


def test_ten_lines_of_numpy_read_it(streams: Path, corpus: Path) -> None:
    directory = streams / "train"
    manifest = json.loads((directory / "stream.json").read_text())
    tokens = np.concatenate([np.load(directory / shard["name"], mmap_mode="r") for shard in manifest["shards"]])
    ends = np.load(directory / "documents.npy")[:, 0]
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    known = set(corpus.read_text(encoding="utf-8").splitlines())
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert tokens[end - 1] == tokenizer.eos_id
        assert tokenizer.decode(tokens[start : end - 1]) in known


def test_a_right_stream_verifies_and_documents_add_up(train_stream: TokenStream) -> None:
    names = [name for name, _ in train_stream.verify()]
    assert names == [
        "tokenizer.model", "shard-00000.npy", "shard-00001.npy", "documents.npy", "sources.jsonl", "origins.npy"
    ]  # fmt: skip
    totals = train_stream.documents
    assert totals[-1].tolist() == [len(train_stream), train_stream.manifest.text_bytes, train_stream.manifest.words]
    assert (np.diff(totals, axis=0) > 0).all()


@pytest.mark.parametrize(
    "name", ["stream.json", "tokenizer.model", "shard-00000.npy", "shard-00001.npy", "documents.npy"]
)
@pytest.mark.parametrize("fault", ["flipped", "flipped in header", "truncated", "removed", "zeroed tail"])
def test_fault_21_22_any_damage_is_refused_naming_the_file(
    streams: Path, tmp_path: Path, name: str, fault: str
) -> None:
    broken = tmp_path / "train"
    shutil.copytree(streams / "train", broken)

    path = broken / name
    data = bytearray(path.read_bytes())
    if fault == "flipped":
        data[-7] ^= 4
    elif fault == "flipped in header":
        data[HEADER_BYTES // 2] ^= 4
    elif fault == "truncated":
        del data[-7:]
    elif fault == "zeroed tail":
        data[-64:] = bytes(64)
    path.write_bytes(data)
    if fault == "removed":
        path.unlink()

    with pytest.raises(ValueError, match=name):
        for _ in TokenStream(broken).verify():
            pass


def test_swapped_shards_foreign_files_and_foreign_tokenizers(streams: Path, tmp_path: Path) -> None:
    broken = tmp_path / "train"
    shutil.copytree(streams / "train", broken)

    (broken / "shard-00002.npy").write_bytes(b"x")
    with pytest.raises(StreamError, match="no part of the stream: shard-00002.npy"):
        list(TokenStream(broken).verify())
    (broken / "shard-00002.npy").unlink()

    for first, second in (("shard-00000.npy", "shard-00001.npy"), ("tokenizer.model", "documents.npy")):
        saved = (broken / first).read_bytes(), (broken / second).read_bytes()
        (broken / first).write_bytes(saved[1])
        (broken / second).write_bytes(saved[0])
        with pytest.raises(ValueError, match=f"{first}|{second}"):
            list(TokenStream(broken).verify())
        (broken / first).write_bytes(saved[0])
        (broken / second).write_bytes(saved[1])

    assert list(TokenStream(broken).verify())


def test_a_manifest_cannot_lead_out_of_its_directory(streams: Path, tmp_path: Path) -> None:
    broken = tmp_path / "train"
    shutil.copytree(streams / "train", broken)
    manifest = Manifest.read(broken)
    manifest.shards[0]["name"] = "../secret.npy"
    (broken / "stream.json").write_text(manifest.to_json())
    with pytest.raises(StreamError, match="outside the directory"):
        TokenStream(broken)


def test_many_shards_are_mapped_a_few_at_a_time(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnnlm.data.stream.MAPPED_SHARDS", 3)
    tokens = np.arange(100) % 290 + 2
    write_stream(tmp_path / "s", tokenizer, tokens.tolist(), shard_tokens=7)
    stream = TokenStream(tmp_path / "s")
    assert len(stream.manifest.shards) == 15
    assert stream.windows(np.array([0, 90]), 40).tolist() == [tokens[:40].tolist(), np.roll(tokens, -90)[:40].tolist()]
    assert len(stream._maps) == 3


def test_unknown_tokens_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_stream(tmp_path / "s", tokenizer, [5, tokenizer.unknown_id, tokenizer.unknown_id, 1], shard_tokens=2)
    assert TokenStream(tmp_path / "s").manifest.unknown_tokens == 2


def test_fault_23_a_shard_removed_while_mapped_stays_and_a_later_one_is_named(streams: Path, tmp_path: Path) -> None:
    shutil.copytree(streams / "train", tmp_path / "train")
    stream = TokenStream(tmp_path / "train")
    expected = stream.shard(0).tolist()
    for path in (tmp_path / "train").glob("shard-*"):
        path.unlink()
    assert stream.windows(np.array([0]), 100)[0].tolist() == expected[:100], "what is mapped cannot be taken away"
    with pytest.raises(StreamError, match="shard-00001.npy: was removed since the stream was opened"):
        stream.windows(np.array([len(expected) - 1]), 2)


FAULTS = ["flip", "cut", "zeroes", "swap", "rename", "missing", "extra", "foreign", "dtype"]


def fault_of(
    kind: str, name: str, draw: random.Random, whole: dict[str, bytes], other: dict[str, bytes]
) -> tuple[dict[str, bytes | None], str]:
    """What a fault changes, by file (None: it is gone), and the file that the error must name.

    `whole` and `other` are what is in two streams.
    """
    expected, data = name, bytearray(whole[name])
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "zeroes":
        size = draw.randint(1, min(len(data), 4096))
        data[-size:] = bytes(size)

    elif kind == "swap":
        second = draw.choice(sorted(whole))
        return {name: whole[second], second: whole[name]}, f"{name}|{second}"
    elif kind == "rename":
        return {name: None, "shard-00009.npy": whole[name]}, f"{name}|shard-00009.npy"
    elif kind == "missing":
        return {name: None}, name
    elif kind == "extra":
        added = draw.choice(["shard-00002.npy", "notes.txt", ".hidden"])
        return {added: b"x"}, added

    elif kind == "foreign" and name in other:
        data = bytearray(other[name])
        expected = "documents.npy" if name == "stream.json" else name  # a right manifest of other files
    elif kind == "dtype" and name.startswith("shard"):
        wide = io.BytesIO()
        np.save(wide, np.load(io.BytesIO(data)).astype(np.uint32))
        data = bytearray(wide.getvalue())
    return {name: bytes(data)}, expected


def test_a_thousand_random_faults_are_refused_naming_the_file(streams: Path, tmp_path: Path) -> None:
    """Any one flipped bit, cut, zeroed tail, swap, renaming, loss, extra file, foreign file or stale manifest."""
    directory = tmp_path / "train"
    shutil.copytree(streams / "train", directory)
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    other = {path.name: path.read_bytes() for path in (streams / "valid").iterdir()}
    other["tokenizer.model"] = whole["tokenizer.model"][:-1]
    draw, refused = random.Random(7), Counter[str]()

    def write(contents: dict[str, bytes | None]) -> None:
        for name, data in contents.items():
            (directory / name).unlink(missing_ok=True)
            if data is not None:
                (directory / name).write_bytes(data)

    while refused.total() < 1000:
        kind = draw.choice([*FAULTS, "flip", "flip"])
        changed, expected = fault_of(kind, draw.choice(sorted(whole)), draw, whole, other)
        if all(whole.get(name) == data for name, data in changed.items()):
            continue

        write(changed)
        with pytest.raises(ValueError, match=expected):
            for _ in TokenStream(directory).verify():
                pass
        refused[kind] += 1
        write({name: whole.get(name) for name in changed})
    assert set(refused) == set(FAULTS)
    assert list(TokenStream(directory).verify())


@pytest.mark.parametrize("name", ["stream.json", "tokenizer.model", "shard-00000.npy", "documents.npy"])
@pytest.mark.parametrize("fault", ["pipe", "loop", "directory"])
def test_fault_30_what_is_no_file_is_not_opened(tmp_path: Path, tokenizer: Tokenizer, name: str, fault: str) -> None:
    write_stream(tmp_path / "s", tokenizer, [5, 299, 1], shard_tokens=100)
    path = tmp_path / "s" / name
    path.unlink()
    {"pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path), "directory": Path.mkdir}[fault](path)
    with pytest.raises(StreamError):
        list(TokenStream(tmp_path / "s").verify())
