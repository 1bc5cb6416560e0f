"""Records -> documents: decoded, checked, or rejected with file, place and reason.

Whatever is read is one of four: a document, a long document (above corpus.max_whole_bytes, as an iterator of its
bytes), an empty record, or a rejected one. So everything can be counted: read = kept + empty + rejected. What a bad
record is depends on corpus.on_bad_record: an error that ends the build (`fail`), a rejected record (`skip`), or, where
its UTF-8 is invalid, a document with U+FFFD in place of that (`replace`). The price of exact counts: a long document
may turn out to be bad after most of it was taken, and its consumer must be able to undo what it did with it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

from rnnlm.config import CorpusConfig
from rnnlm.data.decompress import DamagedError, read_chunks
from rnnlm.data.filetypes import document_of, is_table
from rnnlm.data.jobs import Job
from rnnlm.data.records import Block, blocks, first_byte, leading_blank, split_records, without_end
from rnnlm.data.sources import Source
from rnnlm.data.tables import Values, table_units
from rnnlm.errors import UserError


class Document(NamedTuple):
    """One document: where it starts in the decompressed file, its text as valid UTF-8, whether that was repaired."""

    name: str
    offset: int
    data: bytes
    repaired: bool


class Rejected(NamedTuple):
    """A record that is no document: where it starts, and why; `empty` if it is white space alone."""

    name: str
    offset: int
    reason: str


@dataclass
class LongDocument:
    """A document above corpus.max_whole_bytes, in parts of valid UTF-8 as they are read.

    Taking a part may raise BadRecordError; `reject` is for a consumer that cannot take the document.
    """

    name: str
    offset: int
    parts: Iterator[bytes]
    reject: Callable[[int], Rejected]  # of its size in bytes
    repaired: bool = False  # known when all parts are taken


Item = Document | LongDocument | Rejected


class BadRecordError(Exception):
    """A long document turns out to be bad after some of its parts."""

    def __init__(self, rejected: Rejected):
        super().__init__(rejected.reason)
        self.rejected = rejected


def read(job: Job, corpus: CorpusConfig) -> Iterator[tuple[int, Iterator[Item]]]:
    """Every unit that the job reads through, with what is in it: of a compressed file also units of other jobs.

    Raises:
        UserError: a bad record or a damaged file, naming file and byte, unless corpus.on_bad_record is `skip`.
    """
    if job.whole:
        parsers = (_Parser(source, corpus_of(source, corpus)) for source in job.sources)
        yield 0, chain.from_iterable(each.documents(blocks(read_chunks(each.source), each.corpus)) for each in parsers)
        return

    source = job.sources[0]
    corpus = corpus_of(source, corpus)
    if is_table(source.path):
        parser = _Parser(source, corpus)
        for unit, first_row, values in table_units(source, corpus.field, corpus.unit_bytes):
            yield unit, parser.rows(values, first_row)
    elif job.stride:
        yield from _streamed_units(_Parser(source, corpus))
    else:
        chunks = read_chunks(source, first_byte(job.unit, corpus))
        yield job.unit, _Parser(source, corpus).documents(blocks(chunks, corpus, job.unit))


def corpus_of(source: Source, corpus: CorpusConfig) -> CorpusConfig:
    """The section as it holds for one file: corpus.document is never auto."""
    return replace(corpus, document=document_of(source.path, corpus.document))  # type: ignore[arg-type]


def _streamed_units(parser: _Parser) -> Iterator[tuple[int, Iterator[Item]]]:
    """The units of a file that can only be read from its start."""
    unit = -1
    try:
        found = blocks(read_chunks(parser.source), parser.corpus)
        for unit, inside in groupby(found, key=lambda block: block.unit):
            yield unit, parser.documents(inside)
    except DamagedError as error:
        if unit < 0:  # later damage was met while passing over a unit, and is reported by the job that owns it
            yield 0, iter([parser.damaged(0, error)])


@dataclass(frozen=True)
class _Parser:
    """Makes documents of the records of one file."""

    source: Source
    corpus: CorpusConfig

    def documents(self, found: Iterator[Block]) -> Iterator[Item]:
        """What is in the blocks of one unit, in order."""
        offset = 0
        try:
            for block in found:
                offset = block.offset + len(block.data)
                if block.unfinished:
                    yield from self._long_document(block, found)
                    continue

                valid = _is_utf8(block.data)  # once for all records, not for each
                for start, record in split_records(block, self.corpus.document):
                    yield self._document(start, record, valid)
        except DamagedError as error:
            yield self.damaged(offset, error)

    def rows(self, values: Values, first_row: int) -> Iterator[Item]:
        """What is in the rows of one row group, in order; a record's offset is its row."""
        row = first_row
        try:
            for value in values:
                if value is None:
                    yield self._reject(row, "missing field", "fix it")
                else:
                    yield self._document(row, value, valid=False)
                row += 1
        except DamagedError as error:
            yield self.damaged(row, error)

    def damaged(self, offset: int, error: DamagedError) -> Rejected:
        """The rest of a file that cannot be read to its end."""
        return self._reject(offset, f"{error.reason} ({error})", error.way_out)

    def _reject(self, offset: int, reason: str, way_out: str) -> Rejected:
        if self.corpus.on_bad_record == "fail":
            at = "row" if is_table(self.source.path) else "byte"
            raise UserError(
                f"{self.source.path}: record at {at} {offset}: {reason}; {way_out}, or set corpus.on_bad_record=skip"
            )
        return Rejected(self.source.name, offset, reason.split(" (")[0])

    def _oversized(self, offset: int, size: int, option: str = "max_whole_bytes") -> Rejected:
        reason = f"oversized document ({size:,} bytes, corpus.{option}={getattr(self.corpus, option):,})"
        return self._reject(offset, reason, "raise that, if there is memory for some of them")

    def _document(self, offset: int, record: bytes, valid: bool) -> Item:
        """What a record of bytes is: a document, empty, or bad; `valid`: it is known to be valid UTF-8."""
        repaired, jsonl = False, self.corpus.document == "jsonl"
        if offset == 0:
            record = record.removeprefix(codecs.BOM_UTF8)

        if not valid:
            try:
                record.decode()
            except UnicodeDecodeError as error:
                if self.corpus.on_bad_record != "replace":
                    return self._reject(offset, f"invalid UTF-8 ({error})", "fix it")
                record, repaired = record.decode(errors="replace").encode(), True

        if jsonl and len(record) > self.corpus.max_document_bytes:  # before the parser makes room for it
            return self._oversized(offset, len(record), "max_document_bytes")
        if jsonl and record.strip():
            try:
                record = _json_field(record, self.corpus.field)
            except (ValueError, RecursionError) as error:
                return self._reject(offset, f"invalid JSON or field ({error})", "fix it")
        return self._sized(offset, record, repaired)

    def _sized(self, offset: int, text: bytes, repaired: bool) -> Item:
        """What a text is, by its size."""
        begin = text.lstrip()[:1]
        # bytes know the white space of ASCII alone: behind a control character or another alphabet's, Unicode is asked
        if not begin or ((begin < b" " or begin >= b"\x80") and text.decode().isspace()):
            return Rejected(self.source.name, offset, "empty")

        if len(text) > self.corpus.max_document_bytes and (
            self.corpus.document == "jsonl" or is_table(self.source.path)
        ):
            return self._oversized(offset, len(text), "max_document_bytes")
        if len(text) > self.corpus.max_whole_bytes:
            return LongDocument(self.source.name, offset, iter([text]), partial(self._oversized, offset), repaired)
        return Document(self.source.name, offset, text, repaired)

    def _long_document(self, first: Block, others: Iterator[Block]) -> Iterator[Item]:
        """A record that is longer than a document in memory may be; the blocks behind its first one are the next."""
        if self.corpus.document == "paragraph" and first.offset == 0:  # blank lines that a file begins with
            begin = leading_blank(first.data)
            first = first._replace(offset=begin, data=first.data[begin:])
        raw = _raw_parts(first, others, self.corpus.document)

        if self.corpus.document == "jsonl":  # JSON can only be parsed whole
            yield self._oversized(first.offset, sum(map(len, raw)), "max_document_bytes")
            return

        document = LongDocument(self.source.name, first.offset, iter(()), partial(self._oversized, first.offset))
        document.parts = self._valid_parts(raw, document)
        yield document
        with suppress(DamagedError):
            for _ in raw:  # what the consumer left
                pass

    def _valid_parts(self, raw: Iterator[bytes], document: LongDocument) -> Iterator[bytes]:
        """The parts of a long document, their UTF-8 checked or repaired across the edges of parts."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for number, part in enumerate(chain(raw, [b""])):  # an empty one behind the last: a character must be whole
                state = decoder.getstate()  # the bytes of a character that the part before has begun
                try:
                    text = decoder.decode(part, final=not part)
                except UnicodeDecodeError as error:
                    if self.corpus.on_bad_record != "replace":
                        rejected = self._reject(document.offset, f"invalid UTF-8 ({error})", "fix it")
                        raise BadRecordError(rejected) from error
                    document.repaired = True
                    decoder = codecs.getincrementaldecoder("utf-8")("replace")
                    decoder.setstate(state)
                    text = decoder.decode(part, final=not part)

                yield (text.removeprefix("\ufeff") if number == document.offset == 0 else text).encode()
        except DamagedError as error:
            raise BadRecordError(self.damaged(document.offset, error)) from error


def _raw_parts(first: Block, others: Iterator[Block], document: str) -> Iterator[bytes]:
    """The bytes of a long record, without what ends it."""
    block = first
    while block.unfinished:
        yield block.data
        block = next(others)

    yield without_end(block.data, document)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _json_field(line: bytes, field: str) -> bytes:
    """The text at a field, or at a path of fields, of a JSON object."""
    text = _find(json.loads(line), field)
    if text is None:
        raise ValueError(f"no text in corpus.field={field}")
    return text.encode()  # lone surrogates, which JSON can hold, are no text: UnicodeEncodeError is a ValueError


def _find(value: Any, field: str) -> str | None:
    """The text of a field by its name, or by its path through objects, as a.b; a field called a.b comes first."""
    if not isinstance(value, dict):
        return None
    if field in value:
        return value[field] if isinstance(value[field], str) else None

    for at, character in enumerate(field):
        if character == "." and (text := _find(value.get(field[:at]), field[at + 1 :])) is not None:
            return text
    return None
