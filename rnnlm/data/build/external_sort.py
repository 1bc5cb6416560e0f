"""Documents sorted externally: repeated ones found, all of them shuffled, in memory that does not grow with them.

Documents are numbered in the order of the corpus and cut into spans of equal size. A span is sorted and spilled; then
every task takes one range of the sorted keys out of all spill files, where it is one slice each:

    deduplicate   span -> (hash, number) by hash;  range of hashes -> numbers of repeats;  span -> what it drops
    shuffle       span -> its documents by their new places;  range of places -> a unit file

A pass reads and writes each document once, and a range opens every spill file. So spans grow with the corpus, up to
what fits into memory, and the number of opened files stays what any file system bears:

    documents    deduplicate: span   passes x spans^2 opened   memory    shuffle: span   opened             memory
    10^8         524,288             2 x 191^2  =  73,000      26 MB     262,144         382^2   = 146,000   28 MB
    10^9         1,666,667           2 x 600^2  = 720,000      83 MB     976,563         1,024^2 = 1.0 M    103 MB
    10^10        16,666,667          2 x 600^2  = 720,000     830 MB     8,388,608       1,193^2 = 1.4 M    880 MB

at 50 bytes of a worker's memory for each hash of a span, and 105 for each document that is shuffled; the tokens
themselves are copied from file to file. The price: the spill files take the place of the hashes, or of the tokens once
more.
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


SPANS_OF_HASHES, SPANS_OF_DOCUMENTS = 600, 1024  # as many, until spans have the largest size


def span_size(total: int, spans: int, smallest: int, largest: int) -> int:
    """Items in a span: of at least the smallest size, then so many that there are no more than `spans`, to the largest.

    It depends on the total alone, since all who share the tasks must cut the same; the result does not depend on it.
    """
    return max(smallest, min(-(-total // spans), largest))


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
    hashes, at, filled = np.empty((span.last - span.first, 2), np.uint64), 0, 0
    for path in span.unit_files:
        assert isinstance(path, Path)
        rows = UnitFile(path).rows
        taken = rows[max(0, span.first - at) : max(0, span.last - at), HASH:]
        hashes[filled : filled + len(taken)] = taken.view(np.uint64)
        at, filled = at + len(rows), filled + len(taken)

    order, again = _by_hash(hashes)
    number = span.before + span.first  # of the first one
    write_array(spill_path(stem, "again", span.index), [np.sort(order[again]) + number], "<i8")

    order = order[~again]
    blocks = (order[first : first + COPY_ROWS] for first in range(0, len(order), COPY_ROWS))
    columns = (np.column_stack([hashes[block], (block + number).astype(np.uint64)]) for block in blocks)
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
    del found  # half of the memory
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
    documents = np.empty((span.last - span.first, OWNER + 1), np.int64)
    at = filled = 0
    for owner, selection in enumerate(span.unit_files):
        assert isinstance(selection, Selection)
        for rows, begins in _rows_and_begins(selection):
            taken = slice(max(0, span.first - at), max(0, span.last - at))
            at += len(rows)
            rows, begins = rows[taken], begins[taken]

            block = documents[filled : filled + len(rows)]
            numbers = np.arange(filled, filled + len(rows), dtype=np.uint64) + np.uint64(span.before + span.first)
            block[:, :HASH], block[:, BEGIN], block[:, OWNER] = rows, begins, owner
            block[:, PLACE] = permuted(numbers, total, seed)
            filled += len(rows)
            if at >= span.last:
                break

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
    """Write the documents with places first ... last - 1 as a unit file, with its totals in the footer."""
    documents, filled = np.empty((last - first, OWNER + 1), np.int64), 0
    spills = [spill_path(stem, "places", span) for span in range(spans)]
    for owner, each in enumerate(spills):
        rows = UnitFile(each).rows
        begin, end = (bisect_left(rows[:, PLACE], edge) for edge in (first, last))
        block = documents[filled : filled + end - begin]
        block[:, :OWNER], block[:, OWNER] = rows[begin:end], owner
        filled += end - begin
    _write_documents(path, documents, spills, spill=False)


def _write_documents(path: Path, documents: Array, paths: Sequence[Path], spill: bool) -> None:
    """Write documents that lie in unit files at `paths` as a unit file, in the order of their places.

    Args:
        documents: (documents, OWNER + 1) int64, in the order of OWNER and of BEGIN, which is in paths[OWNER].
        spill: keep their places in the rows, for `gather_shuffled`.
    """
    order = np.argsort(documents[:, PLACE])
    begins = np.empty(len(order), np.int64)  # in the new file
    ends = np.cumsum(documents[order, TOKENS])
    begins[order] = ends - documents[order, TOKENS]
    tokens = int(ends[-1])
    del ends

    partial = files.temporary_path(path)
    try:
        with partial.open("wb") as file:
            dtype = _copy_tokens(file, documents, begins, paths)
            file.seek(tokens * dtype.itemsize)
            documents[:, BEGIN] = begins
            totals = np.array([len(documents), *documents[:, :LEVEL].sum(0)])
            if not spill:
                documents[:, LEVEL] = 0  # the same column as PLACE

            columns = OWNER if spill else HASH
            for first in range(0, len(order), COPY_ROWS):
                file.write(np.ascontiguousarray(documents[order[first : first + COPY_ROWS], :columns]).data)
            footer = {"dtype": dtype.str, "tokens": tokens, "rows": len(order), "columns": columns}
            write_footer(file, {**footer, "totals": {0: totals.tolist()}})
            file.flush()
            os.fsync(file.fileno())
        files.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _copy_tokens(file: IO[bytes], documents: Array, begins: Array, paths: Sequence[Path]) -> np.dtype[Any]:
    """Write the tokens of each document to its place in the file; their type.

    Args:
        documents: (documents, OWNER + 1) int64, with BEGIN in the unit file paths[OWNER].
        begins: (documents,) int64, where the tokens of each begin in `file`.
    """
    opened, tokens = -1, np.empty(0, np.uint16)
    for first in range(0, len(documents), COPY_ROWS):
        block = documents[first : first + COPY_ROWS]
        columns = (block[:, OWNER], block[:, BEGIN], block[:, TOKENS], begins[first : first + COPY_ROWS])
        for owner, begin, size, target in zip(*(column.tolist() for column in columns), strict=True):
            if owner != opened:
                opened, tokens = owner, UnitFile(paths[owner]).tokens

            for done in range(0, size, COPY_TOKENS):  # a call writes two gigabytes at most
                copied = tokens[begin + done : begin + min(done + COPY_TOKENS, size)]
                if os.pwrite(file.fileno(), copied.data, (target + done) * tokens.itemsize) < copied.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
    return tokens.dtype
