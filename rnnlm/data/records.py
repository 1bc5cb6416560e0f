r"""Bytes as they are read -> blocks of whole records -> records: lines, paragraphs, or whole files.

A line ends at a line feed, with or without a carriage return before it; a paragraph at blank lines, whatever their
number. Blank is a line without a character, or with at most 253 spaces and tabs: a bound, so that a worker who begins
in the middle of a file need not look far back. A file is cut in two stages: as it is read into *blocks*, each of whole
records that start in one unit, and a block into records, all at once by `bytes.split` or one expression:

    bytes      a \n b b \n c | c c \n d \n ...     a chunk ends anywhere, here within c
    blocks     a \n b b \n   | c c c \n d \n       it ends where its last record does; the rest waits for more bytes
    records    a,  b b       | c c c,  d

A record longer than corpus.max_whole_bytes is never held in memory: its bytes are several blocks, of which all but the
last one are `unfinished`. The price: the bytes that wait are copied once more, and what may be the beginning of a
separator waits as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from rnnlm.config import CorpusConfig
from rnnlm.data.decompress import CHUNK_BYTES

LOOK_BACK = 256  # bytes of the longest line end and blank line behind it
SEPARATOR = re.compile(rb"\n(?:[ \t]{0,253}\r?\n)+")  # blank lines, whatever their number
BLANK_LINES = re.compile(rb"(?:[ \t]{0,253}\r?\n)*")  # that a file begins with
BEGUN = re.compile(rb"[ \t]{0,253}\r?\Z")  # what may become one more blank line


class Block(NamedTuple):
    """Bytes of one unit: whole records, or a stretch of one long record, which the next block continues."""

    unit: int
    offset: int  # of its first byte in the decompressed file
    data: bytes
    unfinished: bool = False  # its record does not end in it


def first_byte(unit: int, corpus: CorpusConfig) -> int:
    """Where to start reading for a unit: so many bytes before it as show whether a record starts at its very edge."""
    return max(0, unit * corpus.unit_bytes - (LOOK_BACK if corpus.document == "paragraph" else 1))


def blocks(chunks: Iterator[bytes], corpus: CorpusConfig, only: int | None = None) -> Iterator[Block]:
    """Cut a file's bytes into blocks, by the unit in which their records start; with `only`, those of this unit.

    With `only`, the chunks begin at its `first_byte`, most often in the middle of a record of an earlier unit.
    """
    cutter = _Cutter(corpus, only)
    for chunk in chain(chunks, [b""]):  # an empty one behind the last: the file's end
        cutter.buffer += chunk
        if not cutter.at_record:
            cutter.skip_to_first_record(final=not chunk)

        while not cutter.is_past_unit() and (block := cutter.next_block(final=not chunk)):
            yield block
        if cutter.is_past_unit():
            return


def split_records(block: Block, document: str) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each record in a block of whole ones."""
    _, offset, data, _ = block
    if document == "file":
        yield offset, data
        return

    if document == "paragraph":
        begin = 0 if offset else leading_blank(data)
        for separator in SEPARATOR.finditer(data, begin):
            yield offset + begin, data[begin : separator.start()].rstrip(b"\r\n")
            begin = separator.end()
        if begin < len(data):
            yield offset + begin, data[begin:].rstrip(b"\r\n")
        return

    lines = data.split(b"\n")
    if not lines[-1]:  # behind the last line feed
        lines.pop()
    for line in lines:
        yield offset, line[:-1] if line.endswith(b"\r") else line
        offset += len(line) + 1


def leading_blank(data: bytes | bytearray) -> int:
    """Bytes of the blank lines with which a file begins."""
    found = BLANK_LINES.match(data)
    return found.end() if found else 0


def without_end(data: bytes, document: str) -> bytes:
    """The last bytes of a record, without what ends it."""
    if document == "file":
        return data
    if document == "paragraph":
        separator = SEPARATOR.search(data)
        return data[: separator.start() if separator else len(data)].rstrip(b"\r\n")
    return data.removesuffix(b"\n").removesuffix(b"\r")


class _Cutter:
    """What is read of a file and not yet cut off: the bytes, where they start, and what they belong to."""

    def __init__(self, corpus: CorpusConfig, only: int | None):
        self.document = corpus.document
        self.unit_bytes = 2**62 if corpus.document == "file" else corpus.unit_bytes
        self.longest = corpus.max_document_bytes if corpus.document == "jsonl" else corpus.max_whole_bytes
        self.only = only
        self.unit = only or 0  # that of the record at the buffer's start
        self.buffer = bytearray()
        self.start = first_byte(self.unit, corpus)  # offset of the buffer's first byte
        self.at_record = not only  # False: still within a record that starts before the unit
        self.in_long_record = False  # the buffer continues a record of which some blocks were cut off

    def is_past_unit(self) -> bool:
        """Whether what comes now starts behind the only unit that is asked for."""
        behind = self.only is not None and self.start >= (self.unit + 1) * self.unit_bytes
        return behind and not self.in_long_record

    def skip_to_first_record(self, final: bool) -> None:
        """Drop what belongs to a record before the unit, as far as it is read."""
        cut = _next_start(self.buffer, self.unit * self.unit_bytes - self.start, self.document, final)
        self.at_record = cut >= 0
        self._drop(cut if self.at_record else max(0, _sure_bytes(self.buffer, self.document)))

    def next_block(self, final: bool) -> Block | None:
        """Cut off the next block; None: more bytes must come first. `final`: no more will."""
        if not self.buffer or not self.at_record:
            return None

        if not self.in_long_record:
            if cut := self._end_of_whole_records(final):
                return self._cut_off(cut)
            if self._text_bytes() <= self.longest:
                return None
            self.in_long_record = True

        cut = _next_start(self.buffer, 0, self.document, final)
        self.in_long_record = cut < 0
        if self.in_long_record:
            # blank lines before a file's first paragraph go with some of its text, else it would be an empty one
            cut = min(_sure_bytes(self.buffer, self.document), max(CHUNK_BYTES, self._leading() + 1))
        return self._cut_off(cut) if cut > 0 else None

    def _leading(self) -> int:
        """Bytes of blank lines before the first paragraph of a file."""
        return leading_blank(self.buffer) if self.document == "paragraph" and self.start == 0 else 0

    def _text_bytes(self) -> int:
        """How long the record at the buffer's start is at least."""
        if self.document == "paragraph":
            return _before_line_ends(self.buffer) - self._leading()
        return len(self.buffer if self.document == "file" else self.buffer.strip(b"\r\n"))

    def _end_of_whole_records(self, final: bool) -> int:
        """Where the last whole record ends that starts in the same unit as the first; 0 if not even this one ends."""
        self.unit = self.start // self.unit_bytes
        cut = _next_start(self.buffer, (self.unit + 1) * self.unit_bytes - self.start, self.document, final)
        return cut if cut >= 0 else _last_start(self.buffer, self.document)

    def _cut_off(self, size: int) -> Block:
        block = Block(self.unit, self.start, bytes(self.buffer[:size]), self.in_long_record)
        self._drop(size)
        return block

    def _drop(self, size: int) -> None:
        del self.buffer[:size]
        self.start += size


def _before_line_ends(buffer: bytearray) -> int:
    """Where the line ends and blank lines begin with which the bytes end; those of the last one may be to come."""
    line_end = buffer.find(b"\n", len(buffer.rstrip(b" \t\r\n")))
    return len(buffer[:line_end].rstrip(b"\r")) if line_end >= 0 else len(buffer.rstrip(b"\r"))


def _sure_bytes(buffer: bytearray, document: str) -> int:
    """How many bytes of a record without an end can hold no part of a separator; below 0: none."""
    end = _before_line_ends(buffer) if document == "paragraph" else len(buffer)
    return min(end, len(buffer) - 3)


def _next_start(buffer: bytearray, low: int, document: str, final: bool) -> int:
    """The first place from `low` on where a record starts behind another; -1 if none is seen. A file's end is one."""
    if low <= len(buffer):
        if document in ("line", "jsonl") and (found := buffer.find(b"\n", max(low - 1, 0))) >= 0:
            return found + 1

        if document == "paragraph":
            # a separator that ends at `low` may begin so far before; of a longer one its end is enough
            for separator in SEPARATOR.finditer(buffer, max(low - LOOK_BACK, 0)):
                end = separator.end()
                if end >= low and (final or not BEGUN.match(buffer, end)):  # else the next chunk may prolong it
                    return end
    return len(buffer) if final else -1


def _last_start(buffer: bytearray, document: str) -> int:
    """The last place where a record starts behind another; 0 if there is none."""
    if document == "paragraph":
        return _last_paragraph(buffer, _before_line_ends(buffer))  # blank lines at the end may be continued
    return 0 if document == "file" else buffer.rfind(b"\n") + 1


def _last_paragraph(buffer: bytearray, end: int) -> int:
    """Where the last paragraph before `end` starts behind another; 0 if there is none."""
    size = 2**12
    while True:
        low, start = max(0, end - size), 0
        for separator in SEPARATOR.finditer(buffer, low, end):
            start = separator.end()
        if start or not low:
            return start
        size *= 8  # it is most often near
