"""Text files -> work units -> documents.

A work unit is the records that *start* in one fixed range of a file's decompressed bytes: it depends on the file
alone, so that any worker can find its unit's edges and the result does not depend on how units are dealt out. Where
a document is a whole file, consecutive small files share a unit. The price: a record longer than a unit makes the
unit longer, up to the record's size in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from rnnlm.config import CorpusConfig, UserError, as_list

CHUNK_BYTES = 2**20  # read at once


@dataclass(frozen=True)
class Source:
    """One input file: its name as shown to the user, its size on disk in bytes, and how to open it."""

    path: str
    size: int
    open: Callable[[], Any]


@dataclass(frozen=True)
class Unit:
    """Whole records, in corpus order: (path, offset of the first byte in the decompressed file, bytes) of each run."""

    runs: tuple[tuple[str, int, bytes], ...]


@dataclass(frozen=True)
class Document:
    """One document and its size in the file, in UTF-8 bytes."""

    text: str
    size: int


@dataclass(frozen=True)
class Rejected:
    """A record that is no document: where it starts and why."""

    path: str
    offset: int
    reason: str


def sources(paths: list[str] | str, key: str) -> list[Source]:
    """The files behind `paths`, in the order given, each glob's matches sorted.

    Raises:
        UserError: nothing matches, a directory, or a file that cannot be read; `key` is the option to name.
    """
    import fsspec  # 0.1 s, and only readers of text need it

    found = []
    for pattern in as_list(paths):
        try:
            matches = fsspec.open_files(pattern, mode="rb")
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"{key}={pattern}: cannot be opened ({error})") from error
        if not matches:
            raise UserError(f"{key}={pattern}: no file matches; give a path, a glob or a URL of text files")
        for file in matches:
            try:
                if file.fs.isdir(file.path):
                    raise UserError(f"{key}={pattern}: is a directory; name files, as in {pattern.rstrip('/')}/*.txt")
                found.append(Source(file.path, int(file.fs.size(file.path) or 0), file.open))
            except OSError as error:
                raise UserError(f"{key}={pattern}: cannot be read ({error.strerror or error})") from error
    return found


def units(files: list[Source], corpus: CorpusConfig, progress: Callable[[int], None]) -> Iterator[Unit]:
    """All work units of `files` in order; calls progress(bytes read from disk) on the way.

    Raises:
        UserError: naming a compressed file that is damaged or cut short.
    """
    if corpus.document != "file":
        for source in files:
            for offset, data in _ranges(_chunks(source, progress), corpus.unit_bytes):
                yield Unit(((source.path, offset, data),))
        return
    runs: list[tuple[str, int, bytes]] = []
    size = 0
    for source in files:
        data = b"".join(_chunks(source, progress))
        runs.append((source.path, 0, data))
        size += len(data)
        if size >= corpus.unit_bytes:
            yield Unit(tuple(runs))
            runs, size = [], 0
    if runs:
        yield Unit(tuple(runs))


def documents(unit: Unit, corpus: CorpusConfig) -> Iterator[Document | Rejected]:
    """The documents of a unit in order; a record of white space alone is rejected as `empty`.

    Raises:
        UserError: for a bad record, naming file and byte, unless corpus.on_bad_record is `skip`.
    """
    for path, start, data in unit.runs:
        for offset, record in _records(data, start, corpus.document):
            try:
                text = record.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
                if corpus.document == "jsonl" and text.strip():
                    text = _json_field(text, corpus.field)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                reason = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "invalid JSON or field"
                if corpus.on_bad_record == "fail":
                    raise UserError(
                        f"{path}: record at byte {offset}: {reason} ({error}); "
                        "mend it, or set corpus.on_bad_record=skip"
                    ) from error
                yield Rejected(path, offset, reason)
                continue
            if text.strip():
                yield Document(text, len(text.encode("utf-8", "surrogatepass")))
            else:
                yield Rejected(path, offset, "empty")


def fraction_of(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone: splits and samples ignore files and order."""
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _json_field(line: str, field: str) -> str:
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise ValueError(f"no text in corpus.field={field}")
    text: str = value[field]
    text.encode("utf-8")  # JSON can spell lone surrogates, which are no text: UnicodeEncodeError is a ValueError
    return text


def _records(data: bytes, start: int, document: str) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each record; a line ends at a line feed, with or without a carriage return."""
    if document == "file":
        yield start, data
        return
    position = 0
    while position < len(data):
        end = data.find(b"\n", position)
        end = len(data) if end < 0 else end
        yield start + position, data[position:end].removesuffix(b"\r")
        position = end + 1


def _ranges(chunks: Iterator[bytes], unit_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes): lines gathered by the fixed range of `unit_bytes` in which they start."""
    buffer = bytearray()
    start = searched = 0  # file offsets: of the buffer's first byte; up to where no cut was found
    edge = unit_bytes
    for chunk in chunks:
        buffer += chunk
        # a line that starts at `edge` belongs to the next range, so the line feed before it may end this one
        while cut := buffer.find(b"\n", max(edge - 1, searched) - start) + 1:
            yield start, bytes(buffer[:cut])
            del buffer[:cut]
            start += cut
            searched = start
            edge = (start // unit_bytes + 1) * unit_bytes
        searched = start + len(buffer)
    if buffer:
        yield start, bytes(buffer)


def _chunks(source: Source, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The decompressed bytes of a file.

    Raises:
        UserError: the file is damaged, ends in the middle, or vanishes.
    """
    try:
        with source.open() as raw:
            reader = _reader(raw, source.path)
            seen = 0
            while chunk := next(reader, b""):
                yield chunk
                progress(raw.tell() - seen)
                seen = raw.tell()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source.path}: cannot be read to its end ({error}); fetch or compress it again") from error


def _reader(raw: IO[bytes], path: str) -> Iterator[bytes]:
    if path.endswith(".zst"):
        yield from _zstd(raw)
    elif path.endswith(".gz"):
        with gzip.GzipFile(fileobj=raw) as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    elif path.endswith(".xz"):
        with lzma.LZMAFile(raw) as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    else:
        yield from iter(lambda: raw.read(CHUNK_BYTES), b"")


def _zstd(raw: IO[bytes]) -> Iterator[bytes]:
    """All frames of a .zst file; the library's own reader takes a cut frame for the end of the file."""
    import zstandard

    data = b""
    frame = None
    while data or (data := raw.read(CHUNK_BYTES)):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            chunk = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        data = b""
        if frame.eof:
            data, frame = frame.unused_data, None
        if chunk:
            yield chunk
    if frame is not None:
        raise EOFError("the last zstd frame is cut short")
