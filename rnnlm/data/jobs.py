"""Text files -> jobs of work units: the ranges of input that workers read, in any order.

A unit is the records that *start* in one fixed range of a file's decompressed bytes (of a table: some of its rows;
where a document is a whole file: some consecutive files). It depends on the files alone, so any worker can find its
unit's edges, and the result does not depend on which worker reads what:

    bytes   0         32 MiB      64 MiB      96 MiB       plain file: a worker opens it at any edge
            |..a....b.|....c......|...........|.d..e..|    unit 0: a b    1: c (to its end)    2: nothing    3: d e

A compressed file has no edges to open it at: a job reads it from its start and encodes every n-th unit. The price: n
workers on one compressed file decompress it n times; many files share the work better than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rnnlm.config import CorpusConfig
from rnnlm.data.filetypes import is_streamed, is_table
from rnnlm.data.sources import Source
from rnnlm.errors import UserError


@dataclass(frozen=True)
class Job:
    """What one worker reads at a time: units `unit`, `unit + stride`, ... of a file; unit 0 of several small files."""

    split: str
    file: int  # index of the first one among the files of its split
    sources: tuple[Source, ...]
    unit: int = 0
    stride: int = 0  # 0: this unit alone

    def owns(self, unit: int) -> bool:
        """Whether a unit of its file is this job's to encode."""
        return unit % self.stride == self.unit if self.stride else unit == self.unit

    def bytes(self, corpus: CorpusConfig) -> int:
        """About how many bytes it reads from disk."""
        size = sum(source.size for source in self.sources)
        if corpus.document == "file":
            return size
        return size // self.stride if self.stride else min(size - self.unit * corpus.unit_bytes, corpus.unit_bytes)

    def __str__(self) -> str:
        files = self.sources[0].path + (f" and {len(self.sources) - 1} more files" if len(self.sources) > 1 else "")
        return f"{files}, unit {self.unit}" + (f" and every {self.stride}th after it" if self.stride > 1 else "")


def jobs(split: str, files: list[Source], corpus: CorpusConfig, workers: int) -> Iterator[Job]:
    """All there is to read, in corpus order; jobs enough for `workers`, also of files that open only at their start.

    Raises:
        UserError: tables among others, where a document is a whole file.
    """
    tables = sum(is_table(source.path) for source in files)
    if corpus.document == "file" and 0 < tables < len(files):
        raise UserError("corpus.document=file: tables among other files; give them as a corpus of their own")
    if corpus.document == "file" and not tables:
        yield from _jobs_of_whole_files(split, files, corpus.unit_bytes)
        return

    streamed = sum(is_streamed(source.path) for source in files)
    stride = -(-workers // streamed) if streamed else 1
    for index, source in enumerate(files):
        if is_streamed(source.path):  # how many units it has is not known before it is read
            yield from (Job(split, index, (source,), unit, stride) for unit in range(stride))
        else:
            yield from (Job(split, index, (source,), unit) for unit in range(-(-source.size // corpus.unit_bytes)))


def _jobs_of_whole_files(split: str, files: list[Source], unit_bytes: int) -> Iterator[Job]:
    """Consecutive files together until they have `unit_bytes`, so that a million small ones are not a million units."""
    first = size = 0
    for index, source in enumerate(files):
        size += source.size
        if size >= unit_bytes or index == len(files) - 1:
            yield Job(split, first, tuple(files[first : index + 1]))
            first, size = index + 1, 0
