"""Deduplication and shuffling: the first of each document stays, whole documents change places, in any memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from build_helpers import build, decoded, digests_of_arrays, write_text
from hypothesis import given
from hypothesis import strategies as st

from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import permuted


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_deduplication_keeps_the_first_of_each(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnnlm.data.build.assemble.SPAN_HASHES", 100)
    lines = text.read_text(encoding="utf-8").split("\n")
    build(text, tmp_path / "a", tokenizer)
    build(text, tmp_path / "b", tokenizer, deduplicate=True)
    build(text, tmp_path / "c", tokenizer, lambda: ThreadPoolExecutor(3), deduplicate=True, unit_bytes=1000)

    for split in ("train", "valid"):
        every, once = decoded(tmp_path / "a", split, tokenizer), decoded(tmp_path / "b", split, tokenizer)
        assert once == list(dict.fromkeys(every))
        records = TokenStream(tmp_path / "b" / split).manifest.records
        assert records["duplicate"] == len(every) - len(once) > 0
        assert records["read"] == records["kept"] + records["empty"] + records["duplicate"]

    assert sum(len(decoded(tmp_path / "b", split, tokenizer)) for split in ("train", "valid")) == len(set(lines))
    assert digests_of_arrays(tmp_path / "b") == digests_of_arrays(tmp_path / "c")


def test_an_empty_input_that_is_deduplicated_is_an_error_of_the_user(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"\n")
    with pytest.raises(UserError, match="corpus.train: no text in it"):
        build(tmp_path / "empty.txt", tmp_path / "s", tokenizer, deduplicate=True)


def test_shuffling_permutes_whole_documents(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(3)

    build(text, tmp_path / "a", tokenizer)
    build(text, tmp_path / "b", tokenizer, shuffle_seed=0, deduplicate=True)
    monkeypatch.setattr("rnnlm.data.build.assemble.SPAN_TOKENS", 500)
    build(text, tmp_path / "c", tokenizer, threads, shuffle_seed=0, unit_bytes=1000, deduplicate=True)
    build(text, tmp_path / "d", tokenizer, shuffle_seed=1, deduplicate=True)

    for split in ("train", "valid"):
        plain = list(dict.fromkeys(decoded(tmp_path / "a", split, tokenizer)))
        b, c, d = (decoded(tmp_path / name, split, tokenizer) for name in "bcd")
        assert b == c != d
        assert plain != b
        assert sorted(b) == sorted(d) == sorted(plain)
        assert list(TokenStream(tmp_path / "c" / split).verify())
        neighbours = set(pairwise(plain)) & set(pairwise(b))
        assert len(neighbours) < 0.05 * len(plain)


PINNED = [402, 548, 919, 180, 312, 508]


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_the_keyed_permutation_is_one(size: int, seed: int) -> None:
    out = permuted(np.arange(size, dtype=np.uint64), size, seed)
    assert sorted(out.tolist()) == list(range(size))


def test_the_keyed_permutation_is_pinned() -> None:
    assert permuted(np.arange(6, dtype=np.uint64), 1000, 0).tolist() == PINNED, "a new version must shuffle as before"
