"""Which documents go to which stream, how often, and what that adds up to.

    unit's documents --deduplicate--> each once --share of their source--> so many copies --level--> train or valid

A share of 2.5 takes all documents twice, and once more those whose hash says so; the valid stream takes none twice. The
valid stream takes the levels of held out documents from the first one on, or from a later one, so that it has at most
stream.valid_max_tokens; those below go to train: a document is in one of the two whatever the ceiling. The price: with
deduplication or broken shares every row is read once more, by tasks, to count.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnlm.data.build.unit_file import LEVEL, LEVELS, Array, Selection, UnitFile, write_json

ALL = range(LEVELS)
Totals = tuple[int, int, int, int]  # documents, TOKENS, BYTES, WORDS


@dataclass(frozen=True)
class UnitChoice:
    """What is to be taken of a unit file, before the split into levels."""

    path: Path
    number: int  # of its first document among all of its split
    first_file: int  # number of its first input file in sources.jsonl
    source: str  # the named source of its files
    share: float  # how often each of its documents is taken
    dropped: tuple[Path, ...] = ()  # files of the numbers of repeated documents, ascending

    @property
    def part(self) -> float:
        """The share of documents that are taken once more than the others."""
        return self.share % 1

    def select(self, levels: range, totals: Totals, share: float = 1.0) -> Selection:
        """Its documents of some levels, or such a share of them, each once."""
        return Selection(self.path, levels, totals, self.number, self.dropped, self.first_file, share)


@dataclass(frozen=True)
class CountedUnit:
    """A unit file with the totals, (LEVELS, 4) int64, of its documents by level."""

    file: UnitFile
    choice: UnitChoice
    read: Array  # of all
    once: Array  # without repeats
    part: Array  # of those among them that `choice.part` takes

    @property
    def distinct(self) -> Array:
        """Of those that are taken at all."""
        return self.once if self.choice.share >= 1 else self.part


@dataclass(frozen=True)
class StreamChoice:
    """All documents of a stream, and what its manifest says of them."""

    selections: list[Selection]
    records: dict[str, int]  # read = the sum of all others
    repeated: int  # documents that are there once more
    mended: int  # documents repaired, also those that were then left out
    sources: dict[str, dict[str, int]]  # by named source: documents, text_bytes, tokens


def count_units(path: Path, choices: Sequence[UnitChoice]) -> None:
    """Write what is left of some units, and of that what their shares take, by level."""
    counts = []
    for choice in choices:
        rows = UnitFile(choice.path).rows
        found = (choice.select(ALL, (0, 0, 0, 0), share).blocks(rows) for share in (1.0, choice.part))
        counts.append([_by_level(blocks).tolist() for blocks in found])
    write_json(path, counts)


def _by_level(blocks: Iterable[tuple[Array, Array]]) -> Array:
    """Totals, (LEVELS, 4) int64, of the selected ones, (m,), among rows, (n, columns); a block at a time."""
    totals = np.zeros((LEVELS, 1 + LEVEL), np.int64)
    for rows, chosen in blocks:
        rows = rows[chosen]
        for level in np.unique(rows[:, LEVEL]):
            here = rows[rows[:, LEVEL] == level, :LEVEL]
            totals[level] += [len(here), *here.sum(0)]
    return totals


def read_counts(opened: Sequence[UnitFile], choices: Sequence[UnitChoice], counts: Sequence[Path]) -> list[CountedUnit]:
    """Units with their totals.

    Args:
        counts: files of `count_units`, of all units in order; none: all documents are taken.
    """
    if not counts:
        nothing = np.zeros((LEVELS, 1 + LEVEL), np.int64)
        pairs = zip(opened, choices, strict=True)
        return [CountedUnit(unit, choice, unit.totals, unit.totals, nothing) for unit, choice in pairs]
    tables = [np.array(tables, np.int64) for path in counts for tables in json.loads(path.read_bytes())]
    return [
        CountedUnit(unit, choice, unit.totals, once, part)
        for unit, choice, (once, part) in zip(opened, choices, tables, strict=True)
    ]


def valid_level(units: Sequence[CountedUnit], most_tokens: int) -> int:
    """The first level of the valid stream: the lowest with which it has at most so many tokens; 0: any number.

    It is never so high that nothing is left where there was something.
    """
    tokens = sum((unit.distinct[:, 1] for unit in units), np.zeros(LEVELS, np.int64))
    held_out = tokens[::-1].cumsum()[::-1]  # (LEVELS,): of each level and those above
    level = 1
    while most_tokens and held_out[level] > most_tokens and level + 1 < LEVELS and held_out[level + 1]:
        level += 1
    return level


def choose(units: Sequence[CountedUnit], levels: range) -> StreamChoice:
    """What goes to a stream of these levels: held out ones (from a level above 0 on) once at most."""
    is_held_out = levels.start > 0
    selections, sources = list[Selection](), dict[str, Array]()
    for selection, source in _in_rounds(units, levels, is_held_out):
        selections.append(selection)
        sources[source] = sources.get(source, 0) + np.array(selection.totals)

    distinct = sum(int(unit.distinct[levels.start : levels.stop, 0].sum()) for unit in units)
    return StreamChoice(
        selections=selections,
        records=_count_records(units, levels, distinct),
        repeated=sum(selection.totals[0] for selection in selections) - distinct,
        mended=sum(int(unit.file.repaired[levels.start : levels.stop].sum()) for unit in units),
        sources={
            name: {"documents": int(totals[0]), "text_bytes": int(totals[2]), "tokens": int(totals[1])}
            for name, totals in sources.items()
            if totals[0]
        },
    )


def _in_rounds(units: Sequence[CountedUnit], levels: range, once: bool) -> Iterator[tuple[Selection, str]]:
    """Selections with the named source of each: all units once, then those whose share is more than one, and so on.

    A document's number among all of them does not depend on where units end, and so neither does its place.
    """

    def totals(table: Array) -> Totals:
        documents, tokens, text_bytes, words = table[levels.start : levels.stop].sum(0).tolist()
        return documents, tokens, text_bytes, words

    rounds = max((math.ceil(unit.choice.share) for unit in units), default=0)
    for number in range(min(rounds, 1) if once else rounds):
        for unit in units:
            choice = unit.choice
            if number + 1 <= choice.share:
                yield choice.select(levels, totals(unit.once)), choice.source
            elif number < choice.share:
                yield choice.select(levels, totals(unit.part), choice.part), choice.source


def _count_records(units: Sequence[CountedUnit], levels: range, distinct: int) -> dict[str, int]:
    """Counts of records for the manifest of some levels of a split."""
    counted = sum((Counter[str](unit.file.footer["records"]) for unit in units), Counter[str]())
    read, once = (
        sum((table[:, 0] for table in tables), np.zeros(LEVELS, np.int64))
        for tables in ((unit.read for unit in units), (unit.once for unit in units))
    )
    here = int(read[levels.start : levels.stop].sum())
    duplicate = here - int(once[levels.start : levels.stop].sum())
    left_out = here - duplicate - distinct

    # what is no document was read for the split itself; held out documents are all that the valid stream has read
    is_held_out = levels.start > 0
    rejected = {} if is_held_out else {n: count for n, count in counted.items() if n not in ("read", "kept", "empty")}
    records: dict[str, Any] = {
        "read": here if is_held_out else here + counted["read"] - counted["kept"],
        "kept": distinct,
        "empty": 0 if is_held_out else counted["empty"],
        **({"duplicate": duplicate} if duplicate else {}),
        **({"left out by share": left_out} if left_out else {}),
        **dict(sorted(rejected.items())),
    }
    assert records["read"] == sum(records.values()) - records["read"], records
    return records
