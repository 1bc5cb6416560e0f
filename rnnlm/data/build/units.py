"""Units encoded: records -> a unit file, written once under a temporary name and renamed.

What has its name is whole, with its list of rejected records beside it, and is not made again. The price: the rows wait
in a file of their own until all tokens are written.
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
from typing import IO

import numpy as np

from rnnlm import files
from rnnlm.data.build.unit_file import BYTES, HASH, LEVEL, LEVELS, WORDS, Array, rejected_path, write_footer
from rnnlm.data.documents import BadRecordError, Document, Item, LongDocument, Rejected
from rnnlm.data.encoder import Encoder
from rnnlm.hashing import fraction, fraction_of, keyed_hash

BATCH_BYTES = 2**20  # of documents encoded at once, or
BATCH_DOCUMENTS = 2**14


@dataclass(frozen=True)
class UnitOptions:
    """What of a configuration shapes a unit, besides its text and its tokenizer."""

    valid_fraction: float  # 0: no document is held out
    split_seed: int
    max_whole_bytes: int
    hashes: bool  # whether rows end with the hash of their document

    def level(self, fraction: float) -> int:
        """The level of a document whose keyed fraction this is."""
        level = 0
        while level < LEVELS - 1 and fraction < self.valid_fraction / 2**level:
            level += 1
        return level


def write_unit(path: Path, items: Iterable[Item], names: Sequence[str], options: UnitOptions, encoder: Encoder) -> None:
    """Encode what is in a unit, and give the file its name when it is on disk.

    Args:
        names: of the files that the items are from.

    Raises:
        UserError: a document too long for the tokenizer, unless bad records are skipped.
    """
    partial = [files.temporary_path(path) for _ in range(3)]
    try:
        with partial[0].open("wb+") as tokens, partial[1].open("wb+") as rows, partial[2].open("wb+") as rejected:
            writer = _UnitWriter(tokens, rows, rejected, names, options, encoder)
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


@dataclass
class _UnitWriter:
    """A unit file as it grows; its rows wait in a file of their own until all tokens are written."""

    tokens: IO[bytes]
    rows: IO[bytes]
    rejected: IO[bytes]
    names: Sequence[str]
    options: UnitOptions
    encoder: Encoder
    records: Counter[str] = field(default_factory=Counter)
    repaired: Counter[int] = field(default_factory=Counter)  # by level
    waiting: list[Document] = field(default_factory=list)
    waiting_bytes: int = 0
    places: dict[str, int] = field(init=False)  # FILE of each name
    totals: Array = field(default_factory=lambda: np.zeros((LEVELS, 4), np.int64))  # documents, TOKENS, BYTES, WORDS

    def __post_init__(self) -> None:
        self.places = {name: number for number, name in enumerate(self.names)}

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

    def _note_repair(self, item: Document | LongDocument, level: int) -> None:
        if item.repaired:
            self.repaired[level] += 1
            self._list(item.name, item.offset, "invalid UTF-8, mended")  # the format's word

    def _flush(self) -> None:
        """Encode and write the documents that wait."""
        texts = [document.data for document in self.waiting]
        ids, tokens, words = self.encoder.encode(texts)
        levels = [0] * len(texts)
        if self.options.valid_fraction:
            levels = [self.options.level(fraction_of(text, self.options.split_seed)) for text in texts]
        for document, level in zip(self.waiting, levels, strict=True):
            self._note_repair(document, level)

        places = [self.places[document.name] for document in self.waiting]
        columns = [tokens, list(map(len, texts)), words, levels, places, [each.offset for each in self.waiting]]
        if self.options.hashes:
            hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
            columns += list(np.frombuffer(hashes, np.int64).reshape(-1, 2).T)
        self._append(ids, np.stack([np.asarray(column, np.int64) for column in columns], 1))
        self.waiting, self.waiting_bytes = [], 0

    def _append(self, ids: Array, rows: Array) -> None:
        """Write documents: ids (tokens,) uint16 or uint32, rows (documents, columns) int64."""
        self.tokens.write(ids.data)
        self.rows.write(np.ascontiguousarray(rows).data)
        self.records["kept"] += len(rows)
        for level in np.unique(rows[:, LEVEL]):
            chosen = rows[rows[:, LEVEL] == level]
            self.totals[level] += [len(chosen), *chosen[:, :LEVEL].sum(0)]

    def _add_long(self, document: LongDocument) -> None:
        """Write a document as it is read; its tokens are taken back if it turns out to be bad or empty."""
        begin, sizes = self.tokens.tell(), np.zeros(3, np.int64)  # TOKENS, BYTES, WORDS
        split, whole = keyed_hash(self.options.split_seed), hashlib.blake2b(digest_size=16)

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

        level = self.options.level(fraction(split))
        self._note_repair(document, level)
        hashes = np.frombuffer(whole.digest(), np.int64).tolist() if self.options.hashes else []
        row = [*sizes, level, self.places[document.name], document.offset, *hashes]
        self._append(np.empty(0, self.encoder.dtype), np.array([row], np.int64))

    def _write_long(self, document: LongDocument, blocks: Iterator[bytes], sizes: Array) -> Rejected | None:
        """Write the tokens of a long document, whose text is `blocks`, and add to sizes (3,) int64.

        Returns:
            What it is instead, if it is bad, or longer than this tokenizer's texts or words can be.
        """
        try:
            try:
                if self.encoder.why_whole:
                    raise OverflowError(self.encoder.why_whole)
                for ids, words in self.encoder.encode_long(blocks, self.options.max_whole_bytes):
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
            "columns": HASH + 2 * self.options.hashes, "records": dict(self.records),
            "totals": {int(level): self.totals[level].tolist() for level in np.flatnonzero(self.totals[:, 0])},
            "repaired": self.repaired,
        }  # fmt: skip
        write_footer(self.tokens, footer)
