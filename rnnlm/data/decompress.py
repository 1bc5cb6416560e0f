"""Files as decompressed bytes, a chunk at a time, with every damage seen.

The readers of .bz2, .xz and .zst are loops of our own around the libraries' decompressors: the libraries' file objects
take a damaged second stream, or a frame that is cut short, for the end of the file, and the corpus would silently be
shorter. The price is the code here. No chunk is much larger than CHUNK_BYTES, however well the file was compressed.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from rnnlm.data.filetypes import disguised, is_streamed, suffix_of
from rnnlm.data.sources import Source
from rnnlm.errors import UserError

CHUNK_BYTES = 2**20  # read and handed on at once, about
LONGEST_WINDOW = 2**31  # of zstd: the library's own limit, that of --long=31; so much memory only where a file needs it


class DamagedError(Exception):
    """A file that cannot be read to its end: `reason` is what rejected.jsonl says, the message tells more."""

    def __init__(self, message: str, reason: str = "damaged file", way_out: str = "fetch it again"):
        super().__init__(message)
        self.reason, self.way_out = reason, way_out


def read_chunks(source: Source, offset: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a file, from an offset on if it is not compressed.

    Raises:
        DamagedError: the file is damaged, ends in the middle, or is no text by its first bytes.
        UserError: it cannot be read, vanished, or has another size than when it was found.
    """
    try:
        if not source.size and is_streamed(source.path):
            raise EOFError("it is empty")  # no compressed file is, whatever is in it

        with source.open() as raw:
            if offset:
                raw.seek(offset)
            decompress = DECOMPRESSORS.get(suffix_of(source.path))
            chunks = decompress(raw) if decompress else _plain(raw, source, offset)
            yield from chunks if offset else _checked(chunks, source)
    except UserError:  # a ValueError as well
        raise
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DamagedError(f"cannot be read to its end: {error}") from error
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror or error})") from error


def _checked(chunks: Iterator[bytes], source: Source) -> Iterator[bytes]:
    """The chunks of a file from its beginning, unless that shows it to be no text."""
    for number, chunk in enumerate(chunks):
        if number == 0 and (found := disguised(source.path, chunk)):
            kind, way_out = found
            raise DamagedError(f"{kind}, by its first bytes", "no text", way_out)
        yield chunk


def _plain(raw: IO[bytes], source: Source, offset: int) -> Iterator[bytes]:
    """A file that is not compressed, from an offset on."""
    size = offset
    while chunk := raw.read(CHUNK_BYTES):
        size += len(chunk)
        yield chunk

    # a broken connection looks like the end of the file as well
    if size != source.size:
        raise UserError(
            f"{source.path}: reading ended at byte {size:,}, and it had {source.size:,} bytes when it was found; let "
            "nobody write to it, and type the same command again"
        )


def _gzip(raw: IO[bytes]) -> Iterator[bytes]:
    """All members of a .gz file."""
    with gzip.GzipFile(fileobj=raw) as file:
        yield from iter(lambda: file.read1(CHUNK_BYTES), b"")


def _xz(raw: IO[bytes]) -> Iterator[bytes]:
    """All streams of an .xz file; zeros may stand between them."""
    return _streams(raw, lzma.LZMADecompressor, b"\0")


def _bzip2(raw: IO[bytes]) -> Iterator[bytes]:
    """All streams of a .bz2 file."""
    return _streams(raw, bz2.BZ2Decompressor, b"")


def _streams(raw: IO[bytes], make: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """Streams that stand one behind the other, as parallel compressors write them, of a library's decompressor."""
    data, stream = b"", None
    while data or (data := raw.read(CHUNK_BYTES)):
        if stream is None and not (data := data.lstrip(padding) if padding else data):
            continue

        stream = stream or make()
        chunk, data = _decompressed(stream, data), b""
        while chunk:
            yield chunk
            # more of what it was given, if that makes more than one chunk
            chunk = b"" if stream.eof or stream.needs_input else _decompressed(stream, b"")

        if stream.eof:
            data, stream = stream.unused_data, None
    if stream is not None:
        raise EOFError("the last stream in it is cut short")


def _decompressed(stream: Any, data: bytes) -> bytes:
    """At most a chunk of what comes next."""
    try:
        chunk: bytes = stream.decompress(data, CHUNK_BYTES)
    except OSError as error:  # bz2 has no error of its own, and this one is not the disk's
        raise ValueError(str(error)) from error
    return chunk


def _zstd(raw: IO[bytes]) -> Iterator[bytes]:
    """All frames of a .zst file."""
    import zstandard

    data, frame, size = b"", None, 512  # size: compressed bytes decompressed at once
    while data or (data := raw.read(CHUNK_BYTES)):
        frame = frame or zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()
        try:
            chunk = frame.decompress(data[:size])
        except zstandard.ZstdError as error:
            if "memory" not in str(error):
                raise ValueError(str(error)) from error
            way_out = "pack it anew with --long=31 or less, or use fewer build.workers"
            raise DamagedError(f"its window does not fit: {error}", "too large a window", way_out) from error

        data = data[size:]
        if frame.eof:
            data, frame = frame.unused_data + data, None

        yield from (chunk[start : start + CHUNK_BYTES] for start in range(0, len(chunk), CHUNK_BYTES))
        # what makes about one chunk: the library has no limit, and a few bytes may hold a thousand times as many
        size = min(max(64, size * CHUNK_BYTES // max(1, len(chunk))), 2**17)
    if frame is not None:
        raise EOFError("the last zstd frame is cut short")


DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    ".gz": _gzip, ".bz2": _bzip2, ".xz": _xz, ".zst": _zstd,
}  # fmt: skip
"""By the end of a file's name: an opened file -> its decompressed bytes, in chunks; raises EOFError or ValueError
where the file is damaged or cut short."""
