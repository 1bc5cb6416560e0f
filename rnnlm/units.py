"""Unit files: what became of one work unit, on disk; their documents deduplicated, shuffled, dealt out to streams.

A unit file is written once, under a temporary name, and renamed: what has its name is whole, and is never made again.
It holds the tokens of its documents, one row of numbers for each, and its totals:

    tokens   uint16 or uint32, each document ended by EOS
    rows     int64 (documents, columns): TOKENS, BYTES, WORDS, TO_VALID; with deduplication the two halves of a hash
    footer   JSON, and its length in eight bytes

Rows and tokens are mapped, hashes are compared in buckets, a shuffled order is computed and not stored: no step holds
more than a bounded part of the corpus in memory. The price: until the streams are committed the tokens lie on disk
twice, with a shuffle three times; each bucket of hashes reads the rows of all units, each shuffled unit those it takes
documents from, which are nearly all: beyond some hundred gigabytes shuffle the files before.
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

from rnnlm.config import Config
from rnnlm.corpus import BadRecordError, Document, Item, LongDocument, Rejected, fraction, fraction_of, hashing
from rnnlm.encoder import Encoder
from rnnlm.stream import fsync_directory, temporary

TOKENS, BYTES, WORDS, TO_VALID, HASH = range(5)  # columns of rows; HASH and the next one with deduplication
BATCH_BYTES = 2**20  # of documents encoded at once, or
BATCH_DOCUMENTS = 2**14
COPY_TOKENS = 2**20  # of a unit gathered at once, or
COPY_ROWS = 2**18
Array = npt.NDArray[Any]


def write_unit(path: Path, items: Iterable[Item], splits_off: bool, config: Config, encoder: Encoder) -> None:
    """Encode what is in a unit, and give the file its name when it is on disk.

    Raises:
        UserError: a document too long for the tokenizer, unless bad records are skipped.
    """
    partial = [temporary(path) for _ in range(3)]
    try:
        with partial[0].open("wb+") as tokens, partial[1].open("wb+") as rows, partial[2].open("wb+") as rejected:
            writer = _Writer(tokens, rows, rejected, config, encoder, splits_off)
            for item in items:
                writer.add(item)
            writer.finish()
            for file in (tokens, rejected):
                file.flush()
                os.fsync(file.fileno())
            listed = rejected.tell()
        if listed:
            partial[2].replace(rejected_path(path))
        partial[0].replace(path)
        fsync_directory(path.parent)
    finally:
        for each in partial:
            each.unlink(missing_ok=True)


def rejected_path(path: Path) -> Path:
    """Where the records that a unit rejected are listed, if there are any."""
    return path.with_suffix(".rejected")


@dataclass
class _Writer:
    """A unit file as it grows; rows wait in a file of their own."""

    tokens: IO[bytes]
    rows: IO[bytes]
    rejected: IO[bytes]
    config: Config
    encoder: Encoder
    splits_off: bool
    records: Counter[str] = field(default_factory=Counter)
    mended: Array = field(default_factory=lambda: np.zeros(2, np.int64))  # of train or valid
    waiting: list[Document] = field(default_factory=list)
    waiting_bytes: int = 0
    totals: Array = field(default_factory=lambda: np.zeros((2, 4), np.int64))  # (train or valid; documents, TOKENS ...)

    def add(self, item: Item) -> None:
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
            self.records[item.reason] += 1
            if item.reason != "empty":
                if any(document.mended for document in self.waiting):  # they are listed before it
                    self._flush()
                self._list(item.name, item.offset, item.reason)

    def _list(self, name: str, offset: int, reason: str) -> None:
        self.rejected.write(json.dumps({"file": name, "at": offset, "reason": reason}).encode() + b"\n")

    def _note_mended(self, item: Document | LongDocument, to_valid: bool) -> None:
        if item.mended:
            self.mended[int(to_valid)] += 1
            self._list(item.name, item.offset, "invalid UTF-8, mended")

    def _flush(self) -> None:
        texts = [document.data for document in self.waiting]
        ids, tokens, words = self.encoder.encode(texts)
        stream, seed = self.config.stream, self.config.stream.split_seed
        to_valid = [self.splits_off and fraction_of(text, seed) < stream.valid_fraction for text in texts]
        for document, side in zip(self.waiting, to_valid, strict=True):
            self._note_mended(document, side)
        columns = [tokens, list(map(len, texts)), words, to_valid]
        if self.config.corpus.deduplicate:
            hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
            columns += list(np.frombuffer(hashes, np.int64).reshape(-1, 2).T)
        self._append(ids, np.stack([np.asarray(column, np.int64) for column in columns], 1))
        self.waiting, self.waiting_bytes = [], 0

    def _append(self, ids: Array, rows: Array) -> None:
        self.tokens.write(ids.data)
        self.rows.write(np.ascontiguousarray(rows).data)
        self.records["kept"] += len(rows)
        for to_valid in (0, 1):
            chosen = rows[rows[:, TO_VALID] == to_valid]
            self.totals[to_valid] += [len(chosen), *chosen[:, :TO_VALID].sum(0)]

    def _add_long(self, document: LongDocument) -> None:
        begin, sizes = self.tokens.tell(), np.zeros(3, np.int64)
        split, whole = hashing(self.config.stream.split_seed), hashlib.blake2b(digest_size=16)

        def parts() -> Iterator[bytes]:
            for part in document.parts:
                sizes[BYTES] += len(part)
                split.update(part)
                whole.update(part)
                yield part

        item = None
        try:
            try:
                if self.encoder.why_not:
                    raise OverflowError(self.encoder.why_not)
                for ids, words in self.encoder.encode_long(parts(), self.config.corpus.max_document_bytes):
                    self.tokens.write(ids.data)
                    sizes += [len(ids), 0, words]
            except OverflowError:  # a text or a word too long to hold
                item = document.reject(int(sizes[BYTES]) + sum(map(len, document.parts)))
        except BadRecordError as error:
            item = error.rejected
        if item is not None or not sizes[WORDS]:
            self.tokens.seek(begin)
            self.tokens.truncate()
            self.records["read"] -= 1
            self.add(item or Rejected(document.name, document.offset, "empty"))
            return
        to_valid = self.splits_off and fraction(split) < self.config.stream.valid_fraction
        self._note_mended(document, to_valid)
        hashes = np.frombuffer(whole.digest(), np.int64).tolist() if self.config.corpus.deduplicate else []
        self._append(np.empty(0, self.encoder.dtype), np.array([[*sizes, to_valid, *hashes]], np.int64))

    def finish(self) -> None:
        self._flush()
        count = self.tokens.tell() // self.encoder.dtype.itemsize
        self.rows.seek(0)
        shutil.copyfileobj(self.rows, self.tokens, 2**20)
        footer = {
            "dtype": self.encoder.dtype.str, "tokens": count, "rows": self.records["kept"],
            "columns": HASH + 2 * self.config.corpus.deduplicate, "totals": self.totals.tolist(),
            "records": dict(self.records), "mended": self.mended.tolist(),
        }  # fmt: skip
        text = json.dumps(footer).encode()
        self.tokens.write(text + len(text).to_bytes(8, "little"))


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
        """All tokens, mapped."""
        return self._map(self.footer["dtype"], 0, (self.footer["tokens"],))

    @property
    def rows(self) -> Array:
        """(documents, columns), mapped."""
        begin = self.footer["tokens"] * np.dtype(self.footer["dtype"]).itemsize
        return self._map("<i8", begin, (self.footer["rows"], self.footer["columns"]))

    def _map(self, dtype: str, begin: int, shape: tuple[int, ...]) -> Array:
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(self.path, dtype, "r", begin, shape))


@dataclass(frozen=True)
class Part:
    """What one unit gives to one stream: the documents of one side of the split, without those dropped."""

    path: Path
    to_valid: int
    dropped: Path | None
    totals: tuple[int, int, int, int]  # documents, TOKENS, BYTES, WORDS

    def chosen(self, rows: Array) -> npt.NDArray[np.int64]:
        """The numbers of the rows that belong to it."""
        return np.concatenate([np.empty(0, np.int64), *(first + chosen for first, _, chosen in self.blocks(rows))])

    def blocks(self, rows: Array) -> Iterator[tuple[int, Array, npt.NDArray[np.int64]]]:
        """(number of the first, rows, which of them belong to it) of some rows at a time."""
        dropped = np.empty(0, np.int64) if self.dropped is None else np.load(self.dropped, mmap_mode="r")
        for first in range(0, len(rows), COPY_ROWS):
            block = np.asarray(rows[first : first + COPY_ROWS])
            mask = block[:, TO_VALID] == self.to_valid
            mask[dropped[slice(*np.searchsorted(dropped, [first, first + len(block)]))] - first] = False
            yield first, block, np.flatnonzero(mask)


def rows_of(part: Part) -> Iterator[Array]:
    """(documents, 3): TOKENS, BYTES, WORDS of a part's documents, some at a time."""
    for _, rows, chosen in part.blocks(UnitFile(part.path).rows):
        yield rows[chosen, :TO_VALID]


def tokens_of(parts: Sequence[Part], first: int, last: int) -> Iterator[Array]:
    """Tokens first ... last - 1 of the parts, one behind the other, in blocks."""
    place = 0
    for part in parts:
        if place < last and place + part.totals[1] > first:
            at = place
            for block in _blocks(part):
                begin, end = max(first - at, 0), min(last - at, len(block))
                if begin < end:
                    yield block[begin:end]
                at += len(block)
        place += part.totals[1]


def _blocks(part: Part) -> Iterator[Array]:
    """The tokens of a part: runs of neighbouring documents, small ones gathered."""
    unit = UnitFile(part.path)
    tokens, before = unit.tokens, 0
    waiting: list[Array] = []
    size = 0
    for _, rows, chosen in part.blocks(unit.rows):
        ends = before + np.cumsum(rows[:, TOKENS])
        before = int(ends[-1])
        first = np.diff(chosen, prepend=-2) > 1  # of a run
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


def find_duplicates(paths: Sequence[Path], bucket: int, buckets: int) -> Iterator[npt.NDArray[np.int64]]:
    """Numbers, over all units and ascending, of documents whose hash an earlier one has; of one bucket of hashes."""
    known, before = np.empty(0, "S16"), 0
    for path in paths:
        rows = UnitFile(path).rows
        for start in range(0, len(rows), COPY_ROWS):
            hashes = np.ascontiguousarray(rows[start : start + COPY_ROWS, HASH:])
            mine = np.flatnonzero(hashes.view(np.uint64)[:, 0] % np.uint64(buckets) == bucket)
            keys = hashes[mine].view("S16").reshape(-1)
            new, firsts = np.unique(keys, return_index=True)
            again = np.ones(len(keys), bool)
            again[firsts[~np.isin(new, known)]] = False
            yield before + start + mine[again]
            known = np.union1d(known, new)
        before += len(rows)


def shuffle_unit(path: Path, parts: Sequence[Part], first: int, last: int, seed: int) -> None:
    """Write the documents first ... last - 1 of the shuffled parts as a unit file."""
    ends = np.cumsum([part.totals[0] for part in parts])
    numbers = permuted(np.arange(first, last, dtype=np.uint64), int(ends[-1]), seed).astype(np.int64)
    owners = np.searchsorted(ends, numbers, side="right")
    rows, begins = np.zeros((len(numbers), HASH), np.int64), np.zeros(len(numbers), np.int64)
    for owner in np.unique(owners):
        mine, unit = owners == owner, UnitFile(parts[owner].path).rows
        chosen = parts[owner].chosen(unit)[numbers[mine] - (ends[owner] - parts[owner].totals[0])]
        rows[mine, :TO_VALID] = unit[chosen, :TO_VALID]
        begins[mine] = (np.cumsum(unit[:, TOKENS]) - unit[:, TOKENS])[chosen]
    places = np.cumsum(rows[:, TOKENS]) - rows[:, TOKENS]
    partial = temporary(path)
    with partial.open("wb") as file:
        for owner in np.unique(owners):  # in the order of the disk
            tokens = UnitFile(parts[owner].path).tokens
            mine = np.flatnonzero(owners == owner)
            for row in mine[np.argsort(begins[mine])].tolist():
                for first_token in range(0, int(rows[row, TOKENS]), COPY_TOKENS):  # a call writes two gigabytes at most
                    begin = int(begins[row]) + first_token
                    block = tokens[begin : min(begin + COPY_TOKENS, int(begins[row] + rows[row, TOKENS]))]
                    os.pwrite(file.fileno(), block.data, (int(places[row]) + first_token) * tokens.itemsize)
        size = int(rows[:, TOKENS].sum())
        file.seek(size * tokens.itemsize)
        footer = {"dtype": tokens.dtype.str, "tokens": size, "rows": len(rows), "columns": HASH}
        text = json.dumps(footer).encode()
        file.write(rows.tobytes() + text + len(text).to_bytes(8, "little"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def permuted(numbers: npt.NDArray[np.uint64], size: int, seed: int) -> npt.NDArray[np.uint64]:
    """Where a keyed permutation of 0 ... size - 1 takes these numbers, without storing it.

    A Feistel network (Luby & Rackoff 1988) of six rounds on the next even number of bits; what leaves the range goes
    through again (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.frombuffer(hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=48).digest(), "<u8")

    def once(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        mask = np.uint64((1 << int(half)) - 1)
        left, right = value >> half, value & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    out = once(numbers)
    while len(outside := np.flatnonzero(out >= size)):
        out[outside] = once(out[outside])
    return out
