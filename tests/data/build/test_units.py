"""What becomes of a unit's records: long documents, bad ones, and tokenizers that need whole texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from build_helpers import build, decoded, digests_of_arrays, write_text
from conftest import make_text

from rnnlm.config import TokenizerConfig
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_training import train
from rnnlm.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_fault_27_a_document_too_long_for_memory_is_encoded_in_blocks(
    tmp_path: Path, tokenizer: Tokenizer, document: str
) -> None:
    words = " ".join(make_text(4000, seed=4))
    texts = ["short one", words, "short two", words[: len(words) // 2].replace(" ", "\u00a0 ")]
    join = {"line": "\n", "paragraph": "\n\n", "file": " "}[document]
    (tmp_path / "long.txt").write_text(join.join(texts), encoding="utf-8")

    for name, size in (("a", 2**30), ("b", 1000)):
        limits = {"document": document, "max_whole_bytes": size, "valid_fraction": 0, "unit_bytes": 50_000}
        limits["stream"] = {"shard_tokens": 100_000}
        build(tmp_path / "long.txt", tmp_path / name, tokenizer, **limits)
    found = [digests_of_arrays(tmp_path / name) for name in "ab"]
    assert found[0] == found[1]


def test_fault_27_a_long_word_with_a_bad_end_is_one_rejected_record(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "word.txt").write_bytes(b"good one\n" + b"x" * 3_000_000 + b"\xff\nanother good one\n")
    given = {"max_whole_bytes": 2**20, "valid_fraction": 0, "unit_bytes": 2**25}
    build(tmp_path / "word.txt", tmp_path / "s", tokenizer, on_bad_record="skip", **given)
    assert decoded(tmp_path / "s", "train", tokenizer) == ["good one", "another good one"]
    records = TokenStream(tmp_path / "s/train").manifest.records
    assert records == {"read": 3, "kept": 2, "empty": 0, "invalid UTF-8": 1}


def test_fault_27_every_rejected_record_is_counted_and_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = [json.dumps({"text": text}).encode() for text in make_text(300, seed=8)]
    bad = {
        20: (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        50: (b'{"text": ', "invalid JSON or field"),
        77: (b'{"other": 1}', "invalid JSON or field"),
        120: (json.dumps({"text": "x" * 3000}).encode(), "oversized document"),
        200: (b'{"text": "nul \\u0000 inside"}', ""),
        250: (json.dumps({"text": "y " * 9000}).encode(), "oversized document"),
        260: (b'{"text": "  "}', "empty"),
    }
    for place, (record, _) in bad.items():
        good[place] = record
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(good))

    offsets = np.cumsum([0, *(len(line) + 1 for line in good)])
    expected = [
        {"file": "data.jsonl", "at": int(offsets[place]), "reason": reason}
        for place, (_, reason) in bad.items() if reason not in ("", "empty")
    ]  # fmt: skip

    given = {"document": "jsonl", "max_document_bytes": 2000}
    with pytest.raises(UserError, match=r"data.jsonl: record at byte \d+: .*on_bad_record=skip"):
        build(tmp_path / "data.jsonl", tmp_path / "fail", tokenizer, **given)

    for policy in ("skip", "replace"):
        build(tmp_path / "data.jsonl", tmp_path / policy, tokenizer, **given, on_bad_record=policy)
        manifest = TokenStream(tmp_path / policy / "train").manifest
        listed = [json.loads(line) for line in (tmp_path / policy / "train/rejected.jsonl").read_text().splitlines()]
        if policy == "replace":
            assert listed.pop(0) == {**expected[0], "reason": "invalid UTF-8, mended"}
            assert manifest.mended + TokenStream(tmp_path / policy / "valid").manifest.mended == 1
        assert listed == expected[policy == "replace" :]

        records = dict(manifest.records)
        valid = TokenStream(tmp_path / policy / "valid").manifest.records["kept"]
        assert records.pop("read") == sum(records.values()) == 300 - valid
        assert records["empty"] == 1 and records["oversized document"] == 2

    damaged = tmp_path / "skip/train/rejected.jsonl"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"]\n")
    with pytest.raises(ValueError, match="rejected.jsonl"):
        list(TokenStream(tmp_path / "skip/train").verify())


def test_rejected_and_repaired_records_of_a_unit_are_listed_in_its_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [b'{"text": "one"}', b'{"text": "tw\xff"}', b'{"tex', b'{"text": "thr\xff"}', b"{}", b'{"text": "\xff"}']
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    build(tmp_path / "data.jsonl", tmp_path / "s", tokenizer, document="jsonl", on_bad_record="replace")
    listed = [json.loads(line) for line in (tmp_path / "s/train/rejected.jsonl").read_text().splitlines()]
    ends = np.cumsum([len(line) + 1 for line in lines]).tolist()
    assert [(each["at"], each["reason"][-7:]) for each in listed] == [
        (ends[0], " mended"), (ends[1], "r field"), (ends[2], " mended"), (ends[3], "r field"), (ends[4], " mended"),
    ]  # fmt: skip


def test_a_tokenizer_that_needs_whole_texts_gives_the_same_streams_and_refuses_long_ones(
    text: Path, tmp_path: Path
) -> None:
    unigram = train(make_text(400), TokenizerConfig(vocab_size=285, kind="unigram"))
    build(text, tmp_path / "s", unigram)
    found = decoded(tmp_path / "s", "train", unigram) + decoded(tmp_path / "s", "valid", unigram)
    assert sorted(found) == sorted(text.read_text(encoding="utf-8").split("\n"))
    with pytest.raises(UserError, match=r"record at byte \d+: oversized document \(\d+ bytes, corpus.max_whole_bytes"):
        build(text, tmp_path / "t", unigram, max_whole_bytes=60)
