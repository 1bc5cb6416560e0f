"""Files as decompressed bytes, a chunk at a time, with every damage seen.

The readers of .xz and .zst are loops of our own around the libraries' decompressors: the libraries' file objects take a
damaged second stream, or a frame that is cut short, for the end of the file, and the corpus would silently be shorter.
The price is the code here. No chunk is much larger than CHUNK_BYTES, however well the file was compressed.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO

from rnnlm.data.sources import Source, is_parquet
from rnnlm.errors import UserError

CHUNK_BYTES = 2**20  # read and handed on at once, about


class DamagedError(Exception):
    """A file that ends in the middle or makes no sense."""


def read_chunks(source: Source, offset: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a file, from an offset on if it is not compressed.

    Raises:
        DamagedError: the file is damaged, or ends in the middle.
        UserError: it cannot be read, or vanished.
    """
    try:
        if not source.size and is_streamed(source):
            raise EOFError("it is empty")  # no compressed file is, whatever is in it

        with source.open() as raw:
            if offset:
                raw.seek(offset)
            decompress = DECOMPRESSORS.get(PurePosixPath(source.path).suffix, _plain)
            yield from decompress(raw)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DamagedError(f"cannot be read to its end: {error}") from error
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror or error})") from error


def is_streamed(source: Source) -> bool:
    """Whether a file can only be read from its start."""
    return is_parquet(source) or PurePosixPath(source.path).suffix in DECOMPRESSORS


def _plain(raw: IO[bytes]) -> Iterator[bytes]:
    """A file that is not compressed."""
    yield from iter(lambda: raw.read(CHUNK_BYTES), b"")


def _gzip(raw: IO[bytes]) -> Iterator[bytes]:
    """All members of a .gz file."""
    with gzip.GzipFile(fileobj=raw) as file:
        yield from iter(lambda: file.read1(CHUNK_BYTES), b"")


def _xz(raw: IO[bytes]) -> Iterator[bytes]:
    """All streams of an .xz file, one behind the other, as parallel compressors write them."""
    data, stream = b"", None
    while data or (data := raw.read(CHUNK_BYTES)):
        if stream is None and not (data := data.lstrip(b"\0")):  # padding between streams
            continue

        stream = stream or lzma.LZMADecompressor()
        chunk, data = stream.decompress(data, CHUNK_BYTES), b""
        while chunk:
            yield chunk
            # more of what it was given, if that makes more than one chunk
            chunk = b"" if stream.eof or stream.needs_input else stream.decompress(b"", CHUNK_BYTES)

        if stream.eof:
            data, stream = stream.unused_data, None
    if stream is not None:
        raise EOFError("the last xz stream is cut short")


def _zstd(raw: IO[bytes]) -> Iterator[bytes]:
    """All frames of a .zst file."""
    import zstandard

    data, frame, size = b"", None, 512  # size: compressed bytes decompressed at once
    while data or (data := raw.read(CHUNK_BYTES)):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            chunk = frame.decompress(data[:size])
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error

        data = data[size:]
        if frame.eof:
            data, frame = frame.unused_data + data, None

        yield from (chunk[start : start + CHUNK_BYTES] for start in range(0, len(chunk), CHUNK_BYTES))
        # what makes about one chunk: the library has no limit, and a few bytes may hold a thousand times as many
        size = min(max(64, size * CHUNK_BYTES // max(1, len(chunk))), 2**17)
    if frame is not None:
        raise EOFError("the last zstd frame is cut short")


DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}
"""By the end of a file's name: an opened file -> its decompressed bytes, in chunks; raises EOFError or ValueError
where the file is damaged or cut short."""
