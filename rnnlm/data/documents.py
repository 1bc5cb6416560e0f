"""Text files -> work units -> documents.

A work unit is the records that *start* in one fixed range of a file's decompressed bytes (of a parquet file: a row
group; where a document is a whole file: some consecutive files). It depends on the files alone, so that any worker can
find its unit's edges, and the result does not depend on how units are dealt out:

    bytes   0         32 MiB      64 MiB      96 MiB       plain file: a worker opens it at any edge
            |..a....b.|....c......|...........|.d..e..|    unit 0: a b    1: c (to its end)    2: nothing    3: d e

A compressed file has no edges to open it at: a job reads it from its start and encodes every n-th unit. The price: n
workers on one compressed file decompress it n times; many files share the work better than one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

from rnnlm.config import CorpusConfig
from rnnlm.data.decompress import CHUNK_BYTES, DamagedError, read_chunks
from rnnlm.data.sources import Source, is_parquet, is_streamed
from rnnlm.errors import UserError

ROWS = 256  # of a parquet file, likewise
SEPARATOR = re.compile(rb"\n\r?\n(?:\r?\n)*")  # blank lines, whatever their number


@dataclass(frozen=True)
class Job:
    """What one worker reads at a time: units `unit`, `unit + step`, ... of a file; unit 0 of several small files."""

    split: str
    file: int  # index of the first one among the files of its split
    sources: tuple[Source, ...]
    unit: int = 0
    step: int = 0  # 0: this unit alone

    def bytes(self, corpus: CorpusConfig) -> int:
        """What it reads from disk, about."""
        size = sum(source.size for source in self.sources)
        if corpus.document == "file":
            return size
        return size // self.step if self.step else min(size - self.unit * corpus.unit_bytes, corpus.unit_bytes)

    def __str__(self) -> str:
        files = self.sources[0].path + (f" and {len(self.sources) - 1} more files" if len(self.sources) > 1 else "")
        return f"{files}, unit {self.unit}" + (f" and every {self.step}th after it" if self.step > 1 else "")


class Document(NamedTuple):
    """One document: where it starts in the decompressed file, its text as valid UTF-8, whether it had to be mended."""

    name: str
    offset: int
    data: bytes
    mended: bool


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
    mended: bool = False  # known when all parts are taken


Item = Document | LongDocument | Rejected


class _Piece(NamedTuple):
    """Bytes of one unit: whole records, or a part of one record that goes on in the next piece if it is `open`."""

    unit: int
    offset: int
    data: bytes
    open: bool = False


def jobs(split: str, files: list[Source], corpus: CorpusConfig, workers: int) -> Iterator[Job]:
    """All there is to read, in corpus order; jobs enough for `workers`, also of files that open only at their start."""
    parquet = sum(map(is_parquet, files))
    if corpus.document == "file" and 0 < parquet < len(files):
        raise UserError("corpus.document=file: .parquet among other files; give them as a corpus of their own")
    if corpus.document == "file" and not parquet:
        yield from _file_jobs(split, files, corpus.unit_bytes)
        return
    streamed = sum(map(is_streamed, files))
    step = -(-workers // streamed) if streamed else 1
    for index, source in enumerate(files):
        if is_streamed(source):
            yield from (Job(split, index, (source,), unit, step) for unit in range(step))
        else:
            yield from (Job(split, index, (source,), unit) for unit in range(-(-source.size // corpus.unit_bytes)))


def _file_jobs(split: str, files: list[Source], unit_bytes: int) -> Iterator[Job]:
    first = size = 0
    for index, source in enumerate(files):
        size += source.size
        if size >= unit_bytes or index == len(files) - 1:
            yield Job(split, first, tuple(files[first : index + 1]))
            first, size = index + 1, 0


def read(job: Job, corpus: CorpusConfig) -> Iterator[tuple[int, Iterator[Item]]]:
    """Every unit that the job passes, with what is in it; with a step it passes also units that are other jobs'.

    Raises:
        UserError: a bad record or a damaged file, naming file and byte, unless corpus.on_bad_record is `skip`.
    """
    source = job.sources[0]
    if is_parquet(source):
        corpus = replace(corpus, document="line")  # a row is a record
    if corpus.document == "file":
        found = (_documents(_pieces(read_chunks(each), corpus), each, corpus) for each in job.sources)
        yield 0, chain.from_iterable(found)
    elif not job.step:
        back = 3 if corpus.document == "paragraph" else 1  # bytes that show whether a record starts at the very edge
        chunks = read_chunks(source, max(0, job.unit * corpus.unit_bytes - back))
        yield job.unit, _documents(_pieces(chunks, corpus, job.unit), source, corpus)
    else:
        unit = -1
        try:
            if is_parquet(source):
                yield from _row_groups(source, corpus)
            else:
                for unit, pieces in groupby(_pieces(read_chunks(source), corpus), key=lambda piece: piece.unit):
                    yield unit, _documents(pieces, source, corpus)
        except DamagedError as error:
            if unit < 0:  # else met while passing over a unit, whose own job says it
                yield 0, iter([_reject(source, 0, f"damaged file ({error})", "fetch it again", corpus)])


class BadRecordError(Exception):
    """A long document turns out to be bad after some of its parts."""

    def __init__(self, rejected: Rejected):
        super().__init__(rejected.reason)
        self.rejected = rejected


def _documents(pieces: Iterator[_Piece], source: Source, corpus: CorpusConfig) -> Iterator[Item]:
    """The documents of one unit in order."""
    offset = 0
    try:
        for piece in pieces:
            offset = piece.offset + len(piece.data)
            if piece.open:
                yield from _long(piece, pieces, source, corpus)
                continue
            valid = _is_utf8(piece.data)
            for start, record in _records(piece.data, piece.offset, corpus.document):
                yield _document(source, start, record, valid, corpus)
    except DamagedError as error:
        yield _reject(source, offset, f"damaged file ({error})", "fetch it again", corpus)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _reject(source: Source, offset: int, reason: str, way_out: str, corpus: CorpusConfig) -> Rejected:
    if corpus.on_bad_record == "fail":
        at = "row" if is_parquet(source) else "byte"
        raise UserError(
            f"{source.path}: record at {at} {offset}: {reason}; {way_out}, or set corpus.on_bad_record=skip"
        )
    return Rejected(source.name, offset, reason.split(" (")[0])


def _document(source: Source, offset: int, record: bytes, valid: bool, corpus: CorpusConfig) -> Item:
    """What a record of bytes is: a document, empty, or bad."""
    mended = False
    if offset == 0:
        record = record.removeprefix(codecs.BOM_UTF8)
    if not valid:
        try:
            record.decode()
        except UnicodeDecodeError as error:
            if corpus.on_bad_record != "replace":
                return _reject(source, offset, f"invalid UTF-8 ({error})", "mend it", corpus)
            record, mended = record.decode(errors="replace").encode(), True
    if corpus.document == "jsonl" and len(record) > corpus.max_document_bytes:
        return _oversized(source, offset, corpus, len(record), "max_document_bytes")
    if corpus.document == "jsonl" and record.strip():
        try:
            record = _json_field(record, corpus.field)
        except (ValueError, RecursionError) as error:
            return _reject(source, offset, f"invalid JSON or field ({error})", "mend it", corpus)
    return _checked(source, offset, record, mended, corpus)


def _checked(source: Source, offset: int, text: bytes, mended: bool, corpus: CorpusConfig) -> Item:
    begin = text.lstrip()[:1]
    if not begin or ((begin < b" " or begin >= b"\x80") and text.decode().isspace()):
        return Rejected(source.name, offset, "empty")
    if len(text) > corpus.max_document_bytes and (corpus.document == "jsonl" or is_parquet(source)):
        return _oversized(source, offset, corpus, len(text), "max_document_bytes")
    if len(text) > corpus.max_whole_bytes:
        return LongDocument(source.name, offset, iter([text]), partial(_oversized, source, offset, corpus), mended)
    return Document(source.name, offset, text, mended)


def _oversized(
    source: Source, offset: int, corpus: CorpusConfig, size: int, option: str = "max_whole_bytes"
) -> Rejected:
    reason = f"oversized document ({size:,} bytes, corpus.{option}={getattr(corpus, option):,})"
    return _reject(source, offset, reason, "raise that, if there is memory for some of them", corpus)


def _long(first: _Piece, pieces: Iterator[_Piece], source: Source, corpus: CorpusConfig) -> Iterator[Item]:
    """A record that is longer than a document may be in memory; its other pieces follow."""
    if corpus.document == "paragraph" and first.offset == 0:
        text = first.data.lstrip(b"\r\n")
        first = first._replace(offset=len(first.data) - len(text), data=text)

    def parts() -> Iterator[bytes]:
        piece = first
        while piece.open:
            yield piece.data
            piece = next(pieces)
        ends = {"file": b"", "paragraph": b"\r\n"}.get(corpus.document)
        yield piece.data.removesuffix(b"\n").removesuffix(b"\r") if ends is None else piece.data.rstrip(ends)

    raw = parts()

    def valid() -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for number, part in enumerate(chain(raw, [b""])):
            state = decoder.getstate()
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                if corpus.on_bad_record != "replace":
                    refuse(f"invalid UTF-8 ({error})", error)
                decoder, document.mended = codecs.getincrementaldecoder("utf-8")("replace"), True
                decoder.setstate(state)
                text = decoder.decode(part, final=not part)
            yield (text.removeprefix("\ufeff") if number == first.offset == 0 else text).encode()

    def whole() -> Iterator[bytes]:
        try:
            yield from valid()
        except DamagedError as error:
            refuse(f"damaged file ({error})", error)

    def refuse(reason: str, error: Exception) -> None:
        raise BadRecordError(_reject(source, first.offset, reason, "mend it", corpus)) from error

    if corpus.document == "jsonl":
        yield _oversized(source, first.offset, corpus, sum(map(len, raw)), "max_document_bytes")
    else:
        document = LongDocument(source.name, first.offset, whole(), partial(_oversized, source, first.offset, corpus))
        yield document
        with suppress(DamagedError):
            for _ in raw:  # what the consumer left
                pass


def _json_field(line: bytes, field: str) -> bytes:
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise ValueError(f"no text in corpus.field={field}")
    text: str = value[field]
    return text.encode()  # JSON can spell lone surrogates, which are no text: UnicodeEncodeError is a ValueError


def _records(data: bytes, offset: int, document: str) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each record; a line ends at a line feed, with or without a carriage return."""
    if document == "file":
        yield offset, data
        return
    if document == "paragraph":
        begin = 0 if offset else len(data) - len(data.lstrip(b"\r\n"))
        for separator in SEPARATOR.finditer(data, begin):
            yield offset + begin, data[begin : separator.start()].rstrip(b"\r\n")
            begin = separator.end()
        if begin < len(data):
            yield offset + begin, data[begin:].rstrip(b"\r\n")
        return
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        yield offset, line[:-1] if line.endswith(b"\r") else line
        offset += len(line) + 1


def _pieces(chunks: Iterator[bytes], corpus: CorpusConfig, only: int | None = None) -> Iterator[_Piece]:
    """Cut a file's bytes into pieces by the unit in which their records start; with `only`, those of this unit.

    With `only`, the chunks begin just before its range, most often in the middle of a record of an earlier unit.
    """
    document, size = corpus.document, 2**62 if corpus.document == "file" else corpus.unit_bytes
    longest = corpus.max_document_bytes if document == "jsonl" else corpus.max_whole_bytes
    buffer, begun, open_record = bytearray(), not only, False
    start = max(0, (only or 0) * size - (3 if document == "paragraph" else 1))  # offset of the buffer's first byte
    unit = only or 0
    for chunk in chain(chunks, [b""]):
        buffer += chunk
        final = not chunk
        if not begun:
            cut = _next_start(buffer, unit * size - start, document, False)
            begun = cut >= 0
            cut = cut if begun else max(0, _safe(buffer, document))
            del buffer[:cut]
            start += cut
            if start >= (unit + 1) * size:
                return  # one record from before it to behind it
        while begun and buffer:
            if open_record:
                cut = _next_start(buffer, 0, document, final)
                open_record = cut < 0
                blank = len(buffer) - len(buffer.lstrip(b"\r\n")) if start == 0 else 0  # before the first paragraph
                if open_record and (cut := min(_safe(buffer, document), max(CHUNK_BYTES, blank + 1))) <= 0:
                    break  # a separator may just have begun
                yield _Piece(unit, start, bytes(buffer[:cut]), open_record)
            else:
                if start // size != unit and only is not None:
                    return
                unit = start // size
                cut = _next_start(buffer, (unit + 1) * size - start, document, final)
                cut = cut if cut >= 0 else _last_start(buffer, document)
                if cut:
                    yield _Piece(unit, start, bytes(buffer[:cut]))
                else:
                    text = buffer if document == "file" else buffer.strip(b"\r\n")
                    open_record = len(text) > longest
                    if not open_record:
                        break
            del buffer[:cut]
            start += cut


def _safe(buffer: bytearray, document: str) -> int:
    """How much of an unended record holds no part of a separator."""
    end = len(buffer.rstrip(b"\r\n")) if document == "paragraph" else len(buffer)
    return min(end, len(buffer) - 3)


def _next_start(buffer: bytearray, low: int, document: str, final: bool) -> int:
    """The first place from `low` on where a record starts behind another; -1 if none is seen. A file's end is one."""
    if low <= len(buffer):
        if document in ("line", "jsonl") and (found := buffer.find(b"\n", max(low - 1, 0))) >= 0:
            return found + 1
        if document == "paragraph":
            for separator in SEPARATOR.finditer(buffer, max(low - 3, 0)):
                end = separator.end()
                if end >= low and (final or bytes(buffer[end : end + 2]) not in (b"", b"\r")):  # else it may go on
                    return end
    return len(buffer) if final else -1


def _last_start(buffer: bytearray, document: str) -> int:
    """The last place where a record starts behind another; 0 if there is none."""
    if document == "paragraph":
        end = len(buffer.rstrip(b"\r\n"))
        found = max(buffer.rfind(b"\n\n", 0, end), buffer.rfind(b"\n\r\n", 0, end))
        separator = SEPARATOR.match(buffer, found) if found >= 0 else None
        return separator.end() if separator else 0
    return 0 if document == "file" else buffer.rfind(b"\n") + 1


def _row_groups(source: Source, corpus: CorpusConfig) -> Iterator[tuple[int, Iterator[Item]]]:
    """The row groups of a parquet file; a record's offset is its row."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{source.path}: reading parquet needs pyarrow; pip install 'rnnlm[parquet]'") from error

    def documents(group: int, row: int) -> Iterator[Item]:
        found = file.metadata.row_group(group)
        at_once = max(1, min(ROWS, found.num_rows * 2 * CHUNK_BYTES // max(1, found.total_byte_size)))
        try:
            for batch in file.iter_batches(at_once, row_groups=[group], columns=[corpus.field], use_threads=False):
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    if value is None:
                        yield _reject(source, row, "missing field", "mend it", corpus)
                    else:
                        yield _document(source, row, value, False, corpus)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk, not the file
            yield _reject(source, row, f"damaged file ({error})", "fetch it again", corpus)

    with source.open() as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedError(str(error)) from error
        names = file.schema_arrow.names
        if corpus.field not in names or not _is_text(file.schema_arrow.field(corpus.field).type):
            raise UserError(f"{source.path}: has no text column corpus.field={corpus.field}; its columns: {names}")
        row = 0
        for group in range(file.num_row_groups):
            yield group, documents(group, row)
            row += file.metadata.row_group(group).num_rows


def _is_text(kind: Any) -> bool:
    import pyarrow.types

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_binary(kind))
