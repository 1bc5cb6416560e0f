"""The files of a stream, each written by one task: shards, and the arrays with a row for each document.

A row of documents.npy depends on all documents before it, but only by their totals, which are known of every unit: so
the rows are written in parts, by any workers, which one of them joins. The price: these rows are written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rnnlm.data.build.external_sort import spill_path
from rnnlm.data.build.unit_file import COPY_ROWS, Array, Selection, origins_of, sizes_of, tokens_of, write_json
from rnnlm.data.stream_writer import write_array, write_shard
from rnnlm.data.tokenizer import Tokenizer

COLUMNS = {"documents": 3, "origins": 2}  # of the arrays with a row for each document, by name


def make_shard(work: Path, path: Path, selections: Sequence[Selection], first: int, last: int) -> None:
    """Write one shard, then beside its directory what the manifest says of it."""
    tokenizer = Tokenizer.load(work)
    write_json(entry_path(path), write_shard(path, tokens_of(selections, first, last), tokenizer))


def make_array(path: Path, selections: Sequence[Selection]) -> None:
    """Write documents.npy or origins.npy at once, then beside the directory what the manifest says of it."""
    _write(path, path.stem, _rows(path.stem, selections, np.zeros(3, np.int64)))


def make_part(stem: Path, index: int, selections: Sequence[Selection], before: Array) -> None:
    """Write the origins, then the running totals, of some documents; `before`, (3,) int64, are the totals before."""
    for name in ("origins", "documents"):
        write_array(spill_path(stem, name, index), _rows(name, selections, before), "<i8", (COLUMNS[name],))


def join_parts(path: Path, parts: Sequence[Path]) -> None:
    """Write arrays one behind the other, then beside the directory what the manifest says of all."""
    _write(path, path.stem, (block for part in parts for block in _blocks_of(np.load(part, mmap_mode="r"))))


def _write(path: Path, name: str, blocks: Iterator[Array]) -> None:
    write_json(entry_path(path), {"sha256": write_array(path, blocks, "<i8", (COLUMNS[name],))[1]})


def _rows(name: str, selections: Sequence[Selection], before: Array) -> Iterator[Array]:
    """The rows of documents.npy or origins.npy, some at a time."""
    if name == "documents":
        return _running_totals(selections, before)
    return (block for selection in selections for block in origins_of(selection))


def entry_path(path: Path) -> Path:
    """Where it stands what the manifest says of a file: beside the directory of the stream that grows."""
    return path.parent.with_name(f"{path.parent.name}-{path.stem}.json")


def _running_totals(selections: Iterable[Selection], before: Array) -> Iterator[Array]:
    """(documents, 3) int64, TOKENS, BYTES, WORDS up to the end of each document, from (3,) on; some at a time."""
    for selection in selections:
        for sizes in sizes_of(selection):
            totals = before + np.cumsum(sizes, axis=0)
            yield totals
            before = totals[-1] if len(totals) else before


def _blocks_of(array: Array) -> Iterator[Array]:
    """The rows of a mapped array, some at a time."""
    return (array[first : first + COPY_ROWS] for first in range(0, len(array), COPY_ROWS))
