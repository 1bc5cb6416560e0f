"""Deduplication and shuffling: the first of each document stays, whole documents change places, in any memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from build_helpers import build, decoded, digests_of_arrays, write_text
from hypothesis import given
from hypothesis import strategies as st

from rnnlm.data.build import external_sort, unit_file
from rnnlm.data.build.assemble import MOST_DOCUMENTS, MOST_HASHES, SPAN_DOCUMENTS, SPAN_HASHES
from rnnlm.data.build.external_sort import (
    SPANS_OF_DOCUMENTS,
    SPANS_OF_HASHES,
    Span,
    drop_repeats,
    find_repeats,
    gather_shuffled,
    span_size,
    spill_hashes,
    spill_path,
    spill_shuffled,
)
from rnnlm.data.build.unit_file import HASH, LEVEL, LEVELS, Selection, write_footer
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


def test_shuffling_is_the_keyed_permutation_of_the_corpus(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The slow way: all documents in memory, each put into its place."""
    build(text, tmp_path / "a", tokenizer, valid_fraction=0)
    build(text, tmp_path / "b", tokenizer, valid_fraction=0, shuffle_seed=5)
    plain, found = (decoded(tmp_path / name, "train", tokenizer) for name in "ab")
    places = permuted(np.arange(len(plain), dtype=np.uint64), len(plain), 5).tolist()
    assert found == [document for _, document in sorted(zip(places, plain, strict=True))]


@pytest.mark.parametrize("documents", [0, 1, 10**5, 10**8, 10**9, 10**10, 10**11])
def test_spans_keep_the_number_of_opened_files_and_the_memory_in_bounds(documents: int) -> None:
    """The table in the module's docstring."""
    for wanted, smallest, largest in (
        (SPANS_OF_HASHES, SPAN_HASHES, MOST_HASHES),
        (SPANS_OF_DOCUMENTS, SPAN_DOCUMENTS, MOST_DOCUMENTS),
    ):
        size = span_size(documents, wanted, smallest, largest)
        spans = -(-documents // size)
        assert smallest <= size <= largest
        assert spans <= wanted or size == largest
        assert spans**2 <= 1.5e6 or documents > 10**10
    assert MOST_HASHES * HASH_BYTES < 1e9 and MOST_DOCUMENTS * DOCUMENT_BYTES < 1e9


HASH_BYTES, DOCUMENT_BYTES = 52, 112  # of memory for each of a span; measured below


@pytest.fixture
def unit(tmp_path: Path) -> tuple[Path, int]:
    """A unit file of 2^14 documents of one token each, with hashes all over the range, and how many it has."""
    count, path = 2**14, tmp_path / "many.unit"
    rows = np.ones((count, HASH + 2), np.int64)
    rows[:, LEVEL:HASH] = 0
    rows[:, HASH:] = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (count, 2))
    with path.open("wb") as file:
        file.write(np.ones(count, np.uint16).data)
        file.write(rows.data)
        footer = {"dtype": "<u2", "tokens": count, "rows": count, "columns": HASH + 2}
        write_footer(file, {**footer, "totals": {0: [count, count, count, count]}})
    return path, count


def test_the_memory_of_a_span_grows_with_its_documents_as_stated(
    unit: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (external_sort, unit_file):  # so that it is not the blocks of rows that are measured
        monkeypatch.setattr(module, "COPY_ROWS", 2**9)

    path, count = unit
    stem, whole = tmp_path / "train", Span(0, [path], 0, count, 0)
    select = Selection(path, range(LEVELS), (count, count, count, count))
    tasks: list[tuple[Callable[[], None], int]] = [
        (lambda: spill_hashes(stem, whole), HASH_BYTES),
        (lambda: find_repeats(stem, 1, 0), HASH_BYTES),
        (lambda: drop_repeats(stem, 1, whole), HASH_BYTES),
        (
            lambda: spill_shuffled(spill_path(stem, "places", 0), Span(0, [select], 0, count, 0), count, 1),
            DOCUMENT_BYTES,
        ),
        (lambda: gather_shuffled(stem, 1, 0, count, tmp_path / "shuffled"), DOCUMENT_BYTES),
    ]

    for task, stated in tasks:
        tracemalloc.start()
        task()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < count * stated
    assert np.array_equal(np.load(spill_path(stem, "dropped", 0)), np.empty(0))


PINNED = [402, 548, 919, 180, 312, 508]


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_the_keyed_permutation_is_one(size: int, seed: int) -> None:
    out = permuted(np.arange(size, dtype=np.uint64), size, seed)
    assert sorted(out.tolist()) == list(range(size))


def test_the_keyed_permutation_is_pinned() -> None:
    assert permuted(np.arange(6, dtype=np.uint64), 1000, 0).tolist() == PINNED, "a new version must shuffle as before"
