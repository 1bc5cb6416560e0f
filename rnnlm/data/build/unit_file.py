"""Unit files: what became of one work unit, on disk, and which of its documents go to which stream.

    tokens   uint16 or uint32, each document ended by EOS
    rows     int64 (documents, columns): TOKENS, BYTES, WORDS, LEVEL, FILE, AT; the two halves of a hash where wanted
    footer   JSON, and its length in eight bytes

LEVEL says how far a document is held out: 0 not at all; k where its keyed fraction lies in [v / 2^k, v / 2^(k-1)), v
being stream.valid_fraction. The valid stream takes the levels from some one on, so a smaller one needs no other
encoding. FILE is the number of the document's file among the unit's own; AT the byte, or row, where it starts there.

Rows and tokens are mapped, a block at a time: no more than a bounded part of the corpus is in memory. The price: until
the streams are committed the tokens lie on disk twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rnnlm import files

TOKENS, BYTES, WORDS, LEVEL, FILE, AT, HASH = range(7)  # columns of rows; HASH and the next one where wanted
LEVELS = 33  # 0, and 1 ... 32
COPY_TOKENS = 2**20  # of a unit gathered at once, or
COPY_ROWS = 2**16
Array = npt.NDArray[Any]


def rejected_path(path: Path) -> Path:
    """Where the records that a unit rejected are listed, if there are any."""
    return path.with_suffix(".rejected")


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON as a whole."""
    files.write_file(path, json.dumps(value).encode())


def write_footer(file: IO[bytes], footer: dict[str, Any]) -> None:
    """End a unit file that lies open at the end of its rows."""
    text = json.dumps(footer).encode()
    file.write(text + len(text).to_bytes(8, "little"))


class UnitFile:
    """A unit file, opened for reading."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            size = int.from_bytes(file.read(8), "little")
            file.seek(-8 - size, os.SEEK_END)
            self.footer: dict[str, Any] = json.loads(file.read(size))

    @property
    def totals(self) -> Array:
        """(LEVELS, 4) int64: documents, TOKENS, BYTES, WORDS by level."""
        return _by_level(self.footer["totals"], (LEVELS, 4))

    @property
    def repaired(self) -> Array:
        """(LEVELS,) int64: documents repaired, by level."""
        return _by_level(self.footer["repaired"], (LEVELS,))

    @property
    def tokens(self) -> Array:
        """(tokens,) uint16 or uint32, mapped."""
        return self._map(self.footer["dtype"], 0, (self.footer["tokens"],))

    @property
    def rows(self) -> Array:
        """(documents, columns) int64, mapped."""
        begin = self.footer["tokens"] * np.dtype(self.footer["dtype"]).itemsize
        return self._map("<i8", begin, (self.footer["rows"], self.footer["columns"]))

    def _map(self, dtype: str, begin: int, shape: tuple[int, ...]) -> Array:
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(self.path, dtype, "r", begin, shape))


def _by_level(sparse: dict[str, Any], shape: tuple[int, ...]) -> Array:
    """What a footer holds by level, of which most have nothing, as an array of int64."""
    found = np.zeros(shape, np.int64)
    for level, value in sparse.items():
        found[int(level)] = value
    return found


@dataclass(frozen=True)
class Selection:
    """The documents of one unit that go to one stream: those of some levels and of a share, without those dropped."""

    path: Path
    levels: range
    totals: tuple[int, int, int, int]  # documents, TOKENS, BYTES, WORDS
    number: int = 0  # of the unit's first document among all of its split
    dropped: tuple[Path, ...] = ()  # files of the numbers of those dropped, ascending
    first_file: int = 0  # number of the unit's first file in sources.jsonl
    share: float = 1.0  # below 1: documents whose hash, taken as a fraction, is below it

    def blocks(self, rows: Array) -> Iterator[tuple[Array, npt.NDArray[np.int64]]]:
        """(some of the unit's rows, int64 (n, columns); which of them are selected, their places in these rows)."""
        dropped = [np.load(path, mmap_mode="r") for path in self.dropped]
        for first in range(0, len(rows), COPY_ROWS):
            block = np.asarray(rows[first : first + COPY_ROWS])
            mask = (block[:, LEVEL] >= self.levels.start) & (block[:, LEVEL] < self.levels.stop)
            if self.share < 1:
                mask &= block[:, HASH].astype(np.uint64) < np.uint64(self.share * 2**64)

            number = self.number + first
            for numbers in dropped:
                mask[numbers[slice(*np.searchsorted(numbers, [number, number + len(block)]))] - number] = False
            yield block, np.flatnonzero(mask)


def sizes_of(selection: Selection) -> Iterator[Array]:
    """(documents, 3) int64: TOKENS, BYTES, WORDS of the selected documents, some at a time."""
    for rows, chosen in selection.blocks(UnitFile(selection.path).rows):
        yield rows[chosen, :LEVEL]


def origins_of(selection: Selection) -> Iterator[Array]:
    """(documents, 2) int64: line of sources.jsonl and AT of the selected documents, some at a time."""
    for rows, chosen in selection.blocks(UnitFile(selection.path).rows):
        yield rows[chosen, FILE:HASH] + [selection.first_file, 0]


def tokens_of(selections: Sequence[Selection], first: int, last: int) -> Iterator[Array]:
    """Tokens first ... last - 1 of the selected documents of all units, one behind the other, in blocks."""
    place = 0
    for selection in selections:
        if place < last and place + selection.totals[1] > first:
            at = place
            for block in _token_blocks(selection):
                begin, end = max(first - at, 0), min(last - at, len(block))
                if begin < end:
                    yield block[begin:end]
                at += len(block)
        place += selection.totals[1]


def _token_blocks(selection: Selection) -> Iterator[Array]:
    """The tokens of the selected documents: neighbours are copied as one, small copies are gathered."""
    unit = UnitFile(selection.path)
    tokens, before = unit.tokens, 0
    waiting: list[Array] = []
    size = 0
    for rows, chosen in selection.blocks(unit.rows):
        ends = before + np.cumsum(rows[:, TOKENS])
        before = int(ends[-1])

        # from the first to the last of documents that stand one behind the other
        first = np.diff(chosen, prepend=-2) > 1
        begins = (ends - rows[:, TOKENS])[chosen[first]]
        stops = ends[chosen[np.append(first[1:], True)]] if len(chosen) else begins

        for begin, stop in zip(begins.tolist(), stops.tolist(), strict=True):
            for start in range(begin, stop, COPY_TOKENS):
                waiting.append(tokens[start : min(start + COPY_TOKENS, stop)])
                size += len(waiting[-1])
                if size >= COPY_TOKENS or len(waiting) == COPY_ROWS:
                    yield np.concatenate(waiting)
                    waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)
