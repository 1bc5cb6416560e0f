"""Documents sorted externally: repeated ones found, all of them shuffled, in memory that does not grow with them.

Documents are numbered in the order of the corpus and cut into spans of equal size. A span is sorted and spilled; then
every task takes one range of the sorted keys out of all spill files, where it is one slice each:

    deduplicate   span -> (hash, number) by hash;  range of hashes -> numbers of repeats;  span -> what it drops
    shuffle       span -> its documents by their new places;  range of places -> a unit file

A pass reads and writes each document once. The price: the spill files take the place of the hashes, or of the tokens
once more, and a range opens every spill file: spans times spans slices, 55 million of them for a terabyte.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from rnnlm import files
from rnnlm.data.build.unit_file import (
    COPY_ROWS,
    COPY_TOKENS,
    FILE,
    HASH,
    LEVEL,
    TOKENS,
    Array,
    Selection,
    UnitFile,
    write_footer,
)
from rnnlm.data.stream_writer import write_array
from rnnlm.hashing import permuted

# columns of a document that is shuffled: its new place in place of its level; FILE as a line of sources.jsonl; behind
# AT where its tokens begin, and in which of the unit files
PLACE, BEGIN, OWNER = LEVEL, HASH, HASH + 1


@dataclass(frozen=True)
class Span:
    """Items first ... last - 1 of what some unit files hold, one behind the other; `before` others lie before those.

    Items are documents, or tokens where shards are cut.
    """

    index: int
    unit_files: Sequence[Path] | Sequence[Selection]
    first: int
    last: int
    before: int

    @property
    def numbers(self) -> Array:
        """(items,) int64: their numbers among all."""
        return np.arange(self.before + self.first, self.before + self.last)


def cut_spans(unit_files: Sequence[Any], sizes: Sequence[int], span_size: int) -> list[Span]:
    """Cut what unit files hold, one behind the other, into spans; `sizes` are the items in each."""
    ends, total = np.cumsum(sizes), sum(sizes)
    spans = []
    for index, first in enumerate(range(0, total, span_size)):
        last = min(first + span_size, total)
        begin, end = int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1
        before = int(ends[begin - 1]) if begin else 0
        spans.append(Span(index, unit_files[begin:end], first - before, last - before, before))
    return spans


def spill_path(stem: Path, kind: str, index: int) -> Path:
    """The name of a spill file; with arrays they are `.npy`, with documents unit files."""
    return stem.with_name(f"{stem.name}-{kind}-{index:06d}")


def spill_hashes(stem: Path, span: Span) -> None:
    """Write the hashes of a span, each once, in ascending order; the numbers of its repeats in a file of their own."""
    found, at = [np.empty((0, 2), np.uint64)], 0
    for path in span.unit_files:
        assert isinstance(path, Path)
        rows = UnitFile(path).rows
        found.append(np.array(rows[max(0, span.first - at) : max(0, span.last - at), HASH:]).view(np.uint64))
        at += len(rows)

    hashes, numbers = np.concatenate(found), span.numbers.astype(np.uint64)
    order, again = _by_hash(hashes)
    write_array(spill_path(stem, "again", span.index), [np.sort(numbers[order[again]])], "<i8")

    kept = order[~again]
    blocks = (kept[first : first + COPY_ROWS] for first in range(0, len(kept), COPY_ROWS))
    columns = (np.column_stack([hashes[block], numbers[block]]) for block in blocks)
    write_array(spill_path(stem, "hashes", span.index), columns, "<u8", (3,))


def _by_hash(hashes: Array) -> tuple[Array, Array]:
    """The order of hashes (n, 2) uint64, earlier ones first where they are equal, and which repeat the one before.

    Returns:
        order: (n,) int64, places in `hashes`.
        again: (n,) bool, in that order.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # is stable
    again = np.zeros(len(order), bool)
    again[1:] = True
    for column in hashes.T:
        again[1:] &= column[order[1:]] == column[order[:-1]]
    return order, again


def find_repeats(stem: Path, spans: int, index: int) -> None:
    """Write the numbers, ascending, of documents whose hash an earlier span has too, of one of `spans` hash ranges.

    No span has a hash twice: a range holds about as many as a span, whatever is repeated.
    """
    found = [np.empty((0, 3), np.uint64)]
    limits = [2**64 * edge // spans for edge in (index, index + 1)]
    for span in range(spans):
        rows = np.load(spill_path(stem, "hashes", span), mmap_mode="r")
        begin, end = (bisect_left(rows[:, 0], limit, key=int) for limit in limits)
        found.append(np.array(rows[begin:end]))

    hashes = np.concatenate(found)
    order, again = _by_hash(hashes[:, :2])
    write_array(spill_path(stem, "repeats", index), [np.sort(hashes[order[again], 2])], "<i8")


def drop_repeats(stem: Path, spans: int, span: Span) -> None:
    """Write which documents of a span are repeats: their numbers, ascending."""
    found = [np.load(spill_path(stem, "again", span.index))]
    limits = [span.before + span.first, span.before + span.last]
    for index in range(spans):
        numbers = np.load(spill_path(stem, "repeats", index), mmap_mode="r")
        found.append(np.array(numbers[slice(*np.searchsorted(numbers, limits))]))
    write_array(spill_path(stem, "dropped", span.index), [np.sort(np.concatenate(found))], "<i8")


def spill_shuffled(path: Path, span: Span, total: int, seed: int) -> None:
    """Write the documents of a span in the order of their places in a keyed permutation of all `total`."""
    found = [np.empty((0, OWNER + 1), np.int64)]
    at = 0
    for owner, selection in enumerate(span.unit_files):
        assert isinstance(selection, Selection)
        for rows, begins in _rows_and_begins(selection):
            taken = slice(max(0, span.first - at), max(0, span.last - at))
            at += len(rows)
            rows, begins = rows[taken], begins[taken]
            found.append(np.column_stack([rows, begins, np.full(len(rows), owner)]))
            if at >= span.last:
                break

    documents = np.concatenate(found)
    documents[:, PLACE] = permuted(span.numbers.astype(np.uint64), total, seed)
    paths = [selection.path for selection in span.unit_files if isinstance(selection, Selection)]
    _write_documents(path, documents, paths, spill=True)


def _rows_and_begins(selection: Selection) -> Iterator[tuple[Array, Array]]:
    """Of the selected documents, some at a time: their rows (n, HASH) int64; their first tokens, (n,) int64."""
    before = 0
    for rows, chosen in selection.blocks(UnitFile(selection.path).rows):
        ends = before + np.cumsum(rows[:, TOKENS])
        before = int(ends[-1])
        taken = rows[chosen, :HASH]
        taken[:, FILE] += selection.first_file
        yield taken, (ends - rows[:, TOKENS])[chosen]


def gather_shuffled(stem: Path, spans: int, first: int, last: int, path: Path) -> None:
    """Write the documents with places first ... last - 1 as a unit file."""
    found = [np.empty((0, OWNER + 1), np.int64)]
    spills = [spill_path(stem, "places", span) for span in range(spans)]
    for owner, each in enumerate(spills):
        rows = UnitFile(each).rows
        begin, end = (bisect_left(rows[:, PLACE], edge) for edge in (first, last))
        found.append(np.column_stack([rows[begin:end], np.full(end - begin, owner)]))
    _write_documents(path, np.concatenate(found), spills, spill=False)


def _write_documents(path: Path, documents: Array, paths: Sequence[Path], spill: bool) -> None:
    """Write documents that lie in unit files at `paths` as a unit file, in the order of their places.

    Args:
        documents: (documents, OWNER + 1) int64.
        spill: keep their places in the rows, for `gather_shuffled`.
    """
    documents = documents[np.argsort(documents[:, PLACE])]
    ends = np.cumsum(documents[:, TOKENS])
    begins = ends - documents[:, TOKENS]
    partial = files.temporary_path(path)
    with partial.open("wb") as file:
        dtype = _copy_tokens(file, documents, begins, paths)

        documents[:, BEGIN] = begins
        if not spill:
            documents[:, LEVEL] = 0  # the same column as PLACE
        rows = documents[:, : OWNER if spill else HASH]
        file.seek(int(ends[-1]) * dtype.itemsize)
        file.write(np.ascontiguousarray(rows).data)
        footer = {"dtype": dtype.str, "tokens": int(ends[-1]), "rows": len(rows), "columns": rows.shape[1]}
        write_footer(file, footer)
        file.flush()
        os.fsync(file.fileno())
    files.rename(partial, path)


def _copy_tokens(file: IO[bytes], documents: Array, begins: Array, paths: Sequence[Path]) -> np.dtype[Any]:
    """Write the tokens of each document to its place in the file; their type.

    Args:
        documents: (documents, OWNER + 1) int64, with BEGIN in the unit file paths[OWNER].
        begins: (documents,) int64, where the tokens of each begin in `file`.
    """
    owner, tokens = -1, np.empty(0, np.uint16)
    for number in np.lexsort((documents[:, BEGIN], documents[:, OWNER])).tolist():  # in the order of the disk
        if documents[number, OWNER] != owner:
            owner = int(documents[number, OWNER])
            tokens = UnitFile(paths[owner]).tokens

        begin, size = int(documents[number, BEGIN]), int(documents[number, TOKENS])
        for done in range(0, size, COPY_TOKENS):  # a call writes two gigabytes at most
            block = tokens[begin + done : begin + min(done + COPY_TOKENS, size)]
            if os.pwrite(file.fileno(), block.data, (int(begins[number]) + done) * tokens.itemsize) < block.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
    return tokens.dtype
