"""Unit files: what became of one work unit, on disk, and which of its documents go to which stream.

A unit file is written once, under a temporary name, and renamed: what has its name is whole, and is not made again.
It holds the tokens of its documents, a table with a row for each document, and its totals:

    tokens   uint16 or uint32, each document ended by EOS
    rows     int64 (documents, columns): TOKENS, BYTES, WORDS, TO_VALID; with deduplication the two halves of a hash
    footer   JSON, and its length in eight bytes

Rows and tokens are mapped, a block at a time: no more than a bounded part of the corpus is in memory. The price: until
the streams are committed the tokens lie on disk twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rnnlm import files
from rnnlm.config import Config
from rnnlm.data.documents import BadRecordError, Document, Item, LongDocument, Rejected
from rnnlm.data.encoder import Encoder
from rnnlm.hashing import fraction, fraction_of, keyed_hash

TOKENS, BYTES, WORDS, TO_VALID, HASH = range(5)  # columns of rows; HASH and the next one with deduplication
BATCH_BYTES = 2**20  # of documents encoded at once, or
BATCH_DOCUMENTS = 2**14
COPY_TOKENS = 2**20  # of a unit gathered at once, or
COPY_ROWS = 2**16
Array = npt.NDArray[Any]


def write_unit(path: Path, items: Iterable[Item], holds_out: bool, config: Config, encoder: Encoder) -> None:
    """Encode what is in a unit, and give the file its name when it is on disk.

    Args:
        holds_out: documents whose hash says so are marked for the valid stream.

    Raises:
        UserError: a document too long for the tokenizer, unless bad records are skipped.
    """
    partial = [files.temporary_path(path) for _ in range(3)]
    try:
        with partial[0].open("wb+") as tokens, partial[1].open("wb+") as rows, partial[2].open("wb+") as rejected:
            writer = _UnitWriter(tokens, rows, rejected, config, encoder, holds_out)
            for item in items:
                writer.add(item)
            writer.finish()
            for file in (tokens, rejected):
                file.flush()
                os.fsync(file.fileno())
            is_listed = rejected.tell() > 0

        if is_listed:
            files.rename(partial[2], rejected_path(path))  # first: a unit that is there has its list
        files.rename(partial[0], path)
        files.sync(path.parent)
    finally:
        for each in partial:
            each.unlink(missing_ok=True)


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


@dataclass
class _UnitWriter:
    """A unit file as it grows; its rows wait in a file of their own until all tokens are written."""

    tokens: IO[bytes]
    rows: IO[bytes]
    rejected: IO[bytes]
    config: Config
    encoder: Encoder
    holds_out: bool
    records: Counter[str] = field(default_factory=Counter)
    repaired: Array = field(default_factory=lambda: np.zeros(2, np.int64))  # (not to valid, to valid)
    waiting: list[Document] = field(default_factory=list)
    waiting_bytes: int = 0
    totals: Array = field(default_factory=lambda: np.zeros((2, 4), np.int64))  # (TO_VALID; documents, TOKENS ...)

    def add(self, item: Item) -> None:
        """Count a record, and write it or have it wait for others."""
        self.records["read"] += 1
        if isinstance(item, Document):
            self.waiting.append(item)
            self.waiting_bytes += len(item.data)
            if self.waiting_bytes >= BATCH_BYTES or len(self.waiting) == BATCH_DOCUMENTS:
                self._flush()
        elif isinstance(item, LongDocument):
            self._flush()
            self._add_long(item)
        else:
            self._reject(item)

    def _reject(self, item: Rejected) -> None:
        """Count a record that is no document, and list it behind those before it."""
        self.records[item.reason] += 1
        if item.reason != "empty":
            if any(document.repaired for document in self.waiting):  # these are listed when they are written
                self._flush()
            self._list(item.name, item.offset, item.reason)

    def _list(self, name: str, offset: int, reason: str) -> None:
        self.rejected.write(json.dumps({"file": name, "at": offset, "reason": reason}).encode() + b"\n")

    def _note_repair(self, item: Document | LongDocument, to_valid: bool) -> None:
        if item.repaired:
            self.repaired[int(to_valid)] += 1
            self._list(item.name, item.offset, "invalid UTF-8, mended")  # the format's word

    def _flush(self) -> None:
        """Encode and write the documents that wait."""
        texts = [document.data for document in self.waiting]
        ids, tokens, words = self.encoder.encode(texts)
        stream, seed = self.config.stream, self.config.stream.split_seed
        to_valid = [self.holds_out and fraction_of(text, seed) < stream.valid_fraction for text in texts]
        for document, is_valid in zip(self.waiting, to_valid, strict=True):
            self._note_repair(document, is_valid)

        columns = [tokens, list(map(len, texts)), words, to_valid]
        if self.config.corpus.deduplicate:
            hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
            columns += list(np.frombuffer(hashes, np.int64).reshape(-1, 2).T)
        self._append(ids, np.stack([np.asarray(column, np.int64) for column in columns], 1))
        self.waiting, self.waiting_bytes = [], 0

    def _append(self, ids: Array, rows: Array) -> None:
        """Write documents: ids (tokens,) uint16 or uint32, rows (documents, columns) int64."""
        self.tokens.write(ids.data)
        self.rows.write(np.ascontiguousarray(rows).data)
        self.records["kept"] += len(rows)
        for to_valid in (0, 1):
            chosen = rows[rows[:, TO_VALID] == to_valid]
            self.totals[to_valid] += [len(chosen), *chosen[:, :TO_VALID].sum(0)]

    def _add_long(self, document: LongDocument) -> None:
        """Write a document as it is read; its tokens are taken back if it turns out to be bad or empty."""
        begin, sizes = self.tokens.tell(), np.zeros(3, np.int64)  # TOKENS, BYTES, WORDS
        split, whole = keyed_hash(self.config.stream.split_seed), hashlib.blake2b(digest_size=16)

        def measured() -> Iterator[bytes]:
            for block in document.parts:
                sizes[BYTES] += len(block)
                split.update(block)
                whole.update(block)
                yield block

        rejected = self._write_long(document, measured(), sizes)
        if rejected or not sizes[WORDS]:
            self.tokens.seek(begin)
            self.tokens.truncate()
            self.records["read"] -= 1  # `add` counts it once more
            self.add(rejected or Rejected(document.name, document.offset, "empty"))
            return

        to_valid = self.holds_out and fraction(split) < self.config.stream.valid_fraction
        self._note_repair(document, to_valid)
        hashes = np.frombuffer(whole.digest(), np.int64).tolist() if self.config.corpus.deduplicate else []
        self._append(np.empty(0, self.encoder.dtype), np.array([[*sizes, to_valid, *hashes]], np.int64))

    def _write_long(self, document: LongDocument, blocks: Iterator[bytes], sizes: Array) -> Rejected | None:
        """Write the tokens of a long document, whose text is `blocks`, and add to sizes (3,) int64.

        Returns:
            What it is instead, if it is bad, or longer than this tokenizer's texts or words can be.
        """
        try:
            try:
                if self.encoder.why_whole:
                    raise OverflowError(self.encoder.why_whole)
                for ids, words in self.encoder.encode_long(blocks, self.config.corpus.max_whole_bytes):
                    self.tokens.write(ids.data)
                    sizes += [len(ids), 0, words]
            except OverflowError:  # the message names its size, so the rest is read too
                return document.reject(int(sizes[BYTES]) + sum(map(len, document.parts)))
        except BadRecordError as error:  # from either reading
            return error.rejected
        return None

    def finish(self) -> None:
        """Write what waits, the rows behind the tokens, and the footer."""
        self._flush()
        count = self.tokens.tell() // self.encoder.dtype.itemsize
        self.rows.seek(0)
        shutil.copyfileobj(self.rows, self.tokens, 2**20)
        footer = {
            "dtype": self.encoder.dtype.str, "tokens": count, "rows": self.records["kept"],
            "columns": HASH + 2 * self.config.corpus.deduplicate, "totals": self.totals.tolist(),
            "records": dict(self.records), "repaired": self.repaired.tolist(),
        }  # fmt: skip
        write_footer(self.tokens, footer)


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


@dataclass(frozen=True)
class Selection:
    """The documents of one unit that go to one stream: those of one side of the split, without those dropped."""

    path: Path
    to_valid: int
    totals: tuple[int, int, int, int]  # documents, TOKENS, BYTES, WORDS
    number: int = 0  # of the unit's first document among all of its split
    dropped: tuple[Path, ...] = ()  # files of the numbers of those dropped, ascending

    def blocks(self, rows: Array) -> Iterator[tuple[Array, npt.NDArray[np.int64]]]:
        """(some of the unit's rows, int64 (n, columns); which of them are selected, their places in these rows)."""
        dropped = [np.load(path, mmap_mode="r") for path in self.dropped]
        for first in range(0, len(rows), COPY_ROWS):
            block = np.asarray(rows[first : first + COPY_ROWS])
            mask = block[:, TO_VALID] == self.to_valid
            number = self.number + first
            for numbers in dropped:
                mask[numbers[slice(*np.searchsorted(numbers, [number, number + len(block)]))] - number] = False
            yield block, np.flatnonzero(mask)


def sizes_of(selection: Selection) -> Iterator[Array]:
    """(documents, 3) int64: TOKENS, BYTES, WORDS of the selected documents, some at a time."""
    for rows, chosen in selection.blocks(UnitFile(selection.path).rows):
        yield rows[chosen, :TO_VALID]


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
