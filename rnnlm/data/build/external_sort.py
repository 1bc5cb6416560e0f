"""Documents sorted externally: repeated ones found, all of them shuffled, in memory that does not grow with them.

Documents are numbered in the order of the corpus and cut into runs. A run is sorted and spilled; then every task takes
one range of the sorted keys out of all spill files, where it is one slice each:

    deduplicate   run -> (hash, number) by hash;  range of hashes -> numbers of repeats;  run -> what it drops
    shuffle       run -> its documents by their new places;  range of places -> a unit file

A pass reads and writes each document once. The price: the spill files take the place of the hashes, or of the tokens
once more, and a range opens every spill file: runs times runs slices, 55 million of them for a terabyte.
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnnlm.data.build.units import COPY_ROWS, COPY_TOKENS, HASH, TO_VALID, TOKENS, Array, Part, UnitFile
from rnnlm.data.stream_writer import write_array
from rnnlm.files import temporary_path
from rnnlm.hashing import permuted

PLACE, BEGIN, OWNER = 3, 4, 5  # of a document that is shuffled: where it goes, where its tokens begin in which file


@dataclass(frozen=True)
class Run:
    """Documents first ... last - 1 of some unit files, or of parts of them; `before` others lie before those files."""

    index: int
    files: Sequence[Path] | Sequence[Part]
    first: int
    last: int
    before: int

    @property
    def numbers(self) -> Array:
        """Their numbers among all documents."""
        return np.arange(self.before + self.first, self.before + self.last)


def spilled(stem: Path, kind: str, index: int) -> Path:
    """The name of a spill file; with arrays they are `.npy`, with documents unit files."""
    return stem.with_name(f"{stem.name}-{kind}-{index:06d}")


def spill_hashes(stem: Path, run: Run) -> None:
    """Write the hashes of a run, each once, in ascending order; the numbers of its repeats in a file of their own."""
    found, at = [np.empty((0, 2), np.uint64)], 0
    for path in run.files:
        assert isinstance(path, Path)
        rows = UnitFile(path).rows
        found.append(np.array(rows[max(0, run.first - at) : max(0, run.last - at), HASH:]).view(np.uint64))
        at += len(rows)
    hashes, numbers = np.concatenate(found), run.numbers.astype(np.uint64)
    order, again = _by_hash(hashes)
    write_array(spilled(stem, "again", run.index), [np.sort(numbers[order[again]])], "<i8")
    kept = order[~again]
    blocks = (kept[first : first + COPY_ROWS] for first in range(0, len(kept), COPY_ROWS))
    columns = (np.column_stack([hashes[block], numbers[block]]) for block in blocks)
    write_array(spilled(stem, "hashes", run.index), columns, "<u8", (3,))


def _by_hash(hashes: Array) -> tuple[Array, Array]:
    """(places in ascending order of hash, earlier ones first; which of these have the hash of the one before)."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # is stable
    again = np.zeros(len(order), bool)
    again[1:] = True
    for column in hashes.T:
        again[1:] &= column[order[1:]] == column[order[:-1]]
    return order, again


def find_repeats(stem: Path, runs: int, index: int) -> None:
    """Write the numbers, ascending, of documents whose hash an earlier run has too, of one of `runs` ranges of hashes.

    No run has a hash twice: a range holds about as many as a run, whatever is repeated.
    """
    found = [np.empty((0, 3), np.uint64)]
    limits = [2**64 * edge // runs for edge in (index, index + 1)]
    for run in range(runs):
        rows = np.load(spilled(stem, "hashes", run), mmap_mode="r")
        begin, end = (bisect_left(rows[:, 0], limit, key=int) for limit in limits)
        found.append(np.array(rows[begin:end]))
    hashes = np.concatenate(found)
    order, again = _by_hash(hashes[:, :2])
    write_array(spilled(stem, "repeats", index), [np.sort(hashes[order[again], 2])], "<i8")


def drop_repeats(stem: Path, runs: int, run: Run) -> None:
    """Write which documents of a run are repeats: their numbers, ascending."""
    found = [np.load(spilled(stem, "again", run.index))]
    limits = [run.before + run.first, run.before + run.last]
    for index in range(runs):
        numbers = np.load(spilled(stem, "repeats", index), mmap_mode="r")
        found.append(np.array(numbers[slice(*np.searchsorted(numbers, limits))]))
    write_array(spilled(stem, "dropped", run.index), [np.sort(np.concatenate(found))], "<i8")


def spill_shuffled(path: Path, run: Run, total: int, seed: int) -> None:
    """Write the documents of a run in the order of their places in a keyed permutation of all `total`."""
    found = [np.empty((0, OWNER + 1), np.int64)]
    at = 0
    for owner, part in enumerate(run.files):
        assert isinstance(part, Part)
        for rows, begins in _places(part):
            taken = slice(max(0, run.first - at), max(0, run.last - at))
            at += len(rows)
            rows, begins = rows[taken], begins[taken]
            found.append(np.column_stack([rows, np.zeros(len(rows), np.int64), begins, np.full(len(rows), owner)]))
            if at >= run.last:
                break
    documents = np.concatenate(found)
    documents[:, PLACE] = permuted(run.numbers.astype(np.uint64), total, seed)
    paths = [part.path for part in run.files if isinstance(part, Part)]
    _write_documents(path, documents, paths, spill=True)


def _places(part: Part) -> Iterator[tuple[Array, Array]]:
    """(TOKENS, BYTES, WORDS; first token in the unit file) of a part's documents, some at a time."""
    before = 0
    for rows, chosen in part.blocks(UnitFile(part.path).rows):
        ends = before + np.cumsum(rows[:, TOKENS])
        before = int(ends[-1])
        yield rows[chosen, :PLACE], (ends - rows[:, TOKENS])[chosen]


def gather_shuffled(stem: Path, runs: int, first: int, last: int, path: Path) -> None:
    """Write the documents with places first ... last - 1 as a unit file."""
    found = [np.empty((0, OWNER + 1), np.int64)]
    spills = [spilled(stem, "places", run) for run in range(runs)]
    for owner, each in enumerate(spills):
        rows = UnitFile(each).rows
        begin, end = (bisect_left(rows[:, PLACE], edge) for edge in (first, last))
        found.append(np.column_stack([rows[begin:end], np.full(end - begin, owner)]))
    _write_documents(path, np.concatenate(found), spills, spill=False)


def _write_documents(path: Path, documents: Array, paths: Sequence[Path], spill: bool) -> None:
    """Write documents that lie in unit files at `paths` as a unit file, in the order of their places."""
    documents = documents[np.argsort(documents[:, PLACE])]
    ends = np.cumsum(documents[:, TOKENS])
    begins = ends - documents[:, TOKENS]
    partial, owner, tokens = temporary_path(path), -1, np.empty(0, np.uint16)
    with partial.open("wb") as file:
        for number in np.lexsort((documents[:, BEGIN], documents[:, OWNER])).tolist():  # in the order of the disk
            if documents[number, OWNER] != owner:
                owner = int(documents[number, OWNER])
                tokens = UnitFile(paths[owner]).tokens
            begin, size = int(documents[number, BEGIN]), int(documents[number, TOKENS])
            for done in range(0, size, COPY_TOKENS):  # a call writes two gigabytes at most
                block = tokens[begin + done : begin + min(done + COPY_TOKENS, size)]
                if os.pwrite(file.fileno(), block.data, (int(begins[number]) + done) * tokens.itemsize) < block.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        documents[:, BEGIN] = begins
        if not spill:
            documents[:, TO_VALID] = 0
        rows = documents[:, : OWNER if spill else HASH]
        file.seek(int(ends[-1]) * tokens.itemsize)
        file.write(np.ascontiguousarray(rows).data)
        footer = {"dtype": tokens.dtype.str, "tokens": int(ends[-1]), "rows": len(rows), "columns": rows.shape[1]}
        text = json.dumps(footer).encode()
        file.write(text + len(text).to_bytes(8, "little"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
