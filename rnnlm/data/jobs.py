"""Text files -> jobs of work units: the ranges of input that workers read, in any order.

A unit is the records that *start* in one fixed range of a file's decompressed bytes (of a parquet file: a row group;
where a document is a whole file: some consecutive files). It depends on the files alone, so any worker can find its
unit's edges, and the result does not depend on which worker reads what:

    bytes   0         32 MiB      64 MiB      96 MiB       plain file: a worker opens it at any edge
            |..a....b.|....c......|...........|.d..e..|    unit 0: a b    1: c (to its end)    2: nothing    3: d e

A compressed file has no edges to open it at: a job reads it from its start, and where there are more workers than such
files, several jobs read each and share its units. The price: n workers on one compressed file decompress it n times;
many files share the work better than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rnnlm.config import CorpusConfig
from rnnlm.data.decompress import is_streamed
from rnnlm.data.sources import Source, is_parquet
from rnnlm.errors import UserError


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

    def bytes(self, corpus: CorpusConfig) -> int:
        """About how many bytes it reads from disk."""
        size = sum(source.size for source in self.sources)
        if corpus.document == "file":
            return size
        return size // self.stride if self.stride else min(size - self.unit * corpus.unit_bytes, corpus.unit_bytes)

    def __str__(self) -> str:
        files = self.sources[0].path + (f" and {len(self.sources) - 1} more files" if len(self.sources) > 1 else "")
        return files if self.stride else f"{files}, unit {self.unit}"


def jobs(split: str, files: list[Source], corpus: CorpusConfig, workers: int) -> Iterator[Job]:
    """All there is to read, in corpus order; jobs enough for `workers`, also of files that open only at their start.

    Raises:
        UserError: parquet files among others, where a document is a whole file.
    """
    parquet = sum(map(is_parquet, files))
    if corpus.document == "file" and 0 < parquet < len(files):
        raise UserError("corpus.document=file: .parquet among other files; give them as a corpus of their own")
    if corpus.document == "file" and not parquet:
        yield from _jobs_of_whole_files(split, files, corpus.unit_bytes)
        return

    streamed = sum(map(is_streamed, files))
    stride = -(-workers // streamed) if streamed else 1
    for index, source in enumerate(files):
        if is_streamed(source):  # how many units it has is not known before it is read
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
