"""What the tests of reading a corpus share: files in every compression, and what is found in them."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

import rnnlm.data.decompress
import rnnlm.data.records
from rnnlm.config import CorpusConfig
from rnnlm.data.documents import BadRecordError, Document, Item, LongDocument, Rejected, read
from rnnlm.data.jobs import Job, jobs
from rnnlm.data.sources import sources


class Joined(NamedTuple):
    """What became of a LongDocument: its parts together."""

    name: str
    offset: int
    data: bytes
    repaired: bool


Found = Document | Joined | Rejected


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


COMPRESSED = [suffix for suffix in PACK if suffix]


def take(item: Item) -> Found:
    """What a consumer makes of an item."""
    if not isinstance(item, LongDocument):
        return item
    try:
        data = b"".join(item.parts)
    except BadRecordError as error:
        return error.rejected
    blank = not data.decode().strip()
    return Rejected(item.name, item.offset, "empty") if blank else Joined(item.name, item.offset, data, item.repaired)


def read_job(job: Job, corpus: CorpusConfig) -> list[tuple[int, list[Found]]]:
    """Every unit that a job passes, with what a consumer makes of it."""
    return [(unit, [take(item) for item in items]) for unit, items in read(job, corpus)]


def all_jobs(corpus: CorpusConfig, workers: int = 1) -> list[Job]:
    """The jobs of corpus.train."""
    return list(jobs("train", sources(corpus.train, "corpus.train", corpus.document), corpus, workers))


def read_all(path: Path | str, **options: Any) -> list[Found]:
    """All that is in the files, each unit by itself where that is possible."""
    corpus = CorpusConfig(train=str(path), **options)
    return [item for job in all_jobs(corpus) for _, items in read_job(job, corpus) for item in items]


def texts(found: list[Found]) -> list[str]:
    """The documents among what was found."""
    return [item.data.decode() for item in found if not isinstance(item, Rejected)]


def rejected(found: list[Found]) -> list[tuple[int, str]]:
    """(offset, reason) of what was found and is no document."""
    return [(item.offset, item.reason) for item in found if isinstance(item, Rejected)]


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Files are read so many bytes at once, whose edges fall everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rnnlm.data.decompress, rnnlm.data.records):
            patch.setattr(module, "CHUNK_BYTES", size)
        yield
