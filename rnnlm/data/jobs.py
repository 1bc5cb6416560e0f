"""Text files -> jobs of work units: the ranges of input that workers read, in any order.

A unit is the records that *start* in one fixed range of a file's decompressed bytes (of a table: some of its rows), or
some consecutive small files. It depends on the files alone, so any worker can find its unit's edges, and the result
does not depend on which worker reads what:

    bytes   0         32 MiB      64 MiB      96 MiB       plain file: a worker opens it at any edge
            |..a....b.|....c......|...........|.d..e..|    unit 0: a b    1: c (to its end)    2: nothing    3: d e

A compressed file has no edges to open it at: a job reads it from its start, and where there are more workers than such
files, several jobs read each and share its units. Small files of one named source are read together, up to a unit's
size, or up to a file whose name says so: so a file more changes its own group and few behind it. The price: n workers
on one compressed file decompress it n times; many files share the work better than one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rnnlm.config import CorpusConfig
from rnnlm.data.filetypes import is_streamed, is_table
from rnnlm.data.sources import Source
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest

SMALL_PART = 8  # a compressed file is small if it has less than this part of a unit's bytes


@dataclass(frozen=True)
class Job:
    """What one worker reads at a time: one unit, some small files as unit 0, or a file from its start.

    Several jobs read such a file, each of which encodes those units that no other has begun.
    """

    split: str
    file: int  # index of the first one among the files of its split
    sources: tuple[Source, ...]
    unit: int = 0  # or which of the jobs that read the file from its start
    stride: int = 0  # how many of these there are; 0: it is opened where the unit begins
    whole: bool = False  # its one unit is all that is in its files

    @cached_property
    def key(self) -> str:
        """What it reads, as a digest: another one when a file has another path, size or time."""
        return json_digest([[source.path, source.size, source.stamp] for source in self.sources])[:24]

    def bytes(self, corpus: CorpusConfig) -> int:
        """About how many bytes it reads from disk."""
        size = sum(source.size for source in self.sources)
        if self.whole:
            return size
        return size // self.stride if self.stride else min(size - self.unit * corpus.unit_bytes, corpus.unit_bytes)

    def __str__(self) -> str:
        files = self.sources[0].path + (f" and {len(self.sources) - 1} more files" if len(self.sources) > 1 else "")
        return files if self.stride else f"{files}, unit {self.unit}"


def jobs(split: str, files: Sequence[Source], corpus: CorpusConfig, workers: int) -> Iterator[Job]:
    """All there is to read, in corpus order; jobs enough for `workers`, also of files that open only at their start.

    Raises:
        UserError: tables among others, where a document is a whole file.
    """
    tables = sum(is_table(source.path) for source in files)
    if corpus.document == "file" and 0 < tables < len(files):
        raise UserError("corpus.document=file: tables among other files; give them as a corpus of their own")

    streamed = sum(is_streamed(source.path) and not _is_small(source, corpus) for source in files)
    stride = -(-workers // streamed) if streamed else 1
    first = size = 0  # of the small files that wait for others
    for index, source in enumerate(files):
        if first < index and source.group != files[first].group:  # each unit belongs to one named source
            yield Job(split, first, tuple(files[first:index]), whole=True)
            first, size = index, 0
        if _is_small(source, corpus):
            size += source.size
            if size >= corpus.unit_bytes or _ends_group(source):
                yield Job(split, first, tuple(files[first : index + 1]), whole=True)
                first, size = index + 1, 0
            continue

        if first < index:
            yield Job(split, first, tuple(files[first:index]), whole=True)
        first, size = index + 1, 0
        if is_streamed(source.path):  # how many units it has is not known before it is read
            yield from (Job(split, index, (source,), unit, stride) for unit in range(stride))
        else:
            yield from (Job(split, index, (source,), unit) for unit in range(-(-source.size // corpus.unit_bytes)))
    if first < len(files):
        yield Job(split, first, tuple(files[first:]), whole=True)


def _is_small(source: Source, corpus: CorpusConfig) -> bool:
    """Whether a file is read as a whole, together with others; a compressed one may hold some times its size."""
    if is_table(source.path):
        return False
    limit = corpus.unit_bytes // SMALL_PART if is_streamed(source.path) else corpus.unit_bytes
    return corpus.document == "file" or source.size < limit


def _ends_group(source: Source) -> bool:
    """Whether a file is the last of its group, about one in 256: behind it groups are the same, whatever is before."""
    return hashlib.blake2b(source.path.encode(errors="surrogateescape"), digest_size=1).digest() == b"\0"
