"""A corpus of one document, as a novel in one file, split by position: its end is the valid stream, the rest is train.

    bytes   |......................................|.......|    valid_fraction of them behind the cut, which is at the
            first half: a unit of level 0           last half   first line end there: a unit of another level

Hashes of whole documents cannot hold out a part of one. So its record is read once more, and each half is encoded into
a unit file like any other: what comes behind the units sees two documents. With more documents than one, their hashes
decide. The price: a tokenizer that was trained on the corpus has seen the valid stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rnnlm.config import Config
from rnnlm.data.build.encode import check_unchanged
from rnnlm.data.build.external_sort import spill_path
from rnnlm.data.build.inputs import Inputs
from rnnlm.data.build.selections import ALL, CountedUnit, UnitChoice, valid_level
from rnnlm.data.build.shared_tasks import FileTask, SharedPool
from rnnlm.data.build.unit_file import AT, BYTES, FILE, LEVELS, Selection, UnitFile
from rnnlm.data.build.units import UnitOptions, write_unit
from rnnlm.data.documents import Document, Item, LongDocument, Rejected, read
from rnnlm.data.encoder import Encoder
from rnnlm.data.jobs import jobs
from rnnlm.data.sources import Source
from rnnlm.data.tokenizer import Tokenizer

FIRST, LAST = 0, 1  # the halves
NAMES = ("first", "last")
NOTHING = np.zeros((LEVELS, 4), np.int64)  # documents, TOKENS, BYTES, WORDS by level
LOOK_BYTES = 2**20  # behind its place in which a cut is looked for
CUTS = (re.compile(rb"\n"), re.compile(rb"\s"))  # behind which, the first kind that is there


@dataclass(frozen=True)
class OnlyDocument:
    """The one document of a corpus: where its record is."""

    config: Config
    source: Source
    at: int  # byte or row
    text_bytes: int

    def half(self, which: int, level: int) -> Iterator[Item]:
        """One of its halves, from its file; empty if there are not two.

        Args:
            level: the last half has valid_fraction / 2^(level - 1) of the bytes, about.
        """
        document = self._read()
        place = self.text_bytes - int(self.text_bytes * self.config.stream.valid_fraction / 2 ** (level - 1))
        whole = iter([document.data]) if isinstance(document, Document) else document.parts
        parts = (part for of, part in split_at(place, whole) if of == which)

        if isinstance(document, LongDocument):
            yield LongDocument(document.name, self.at, parts, document.reject)
        else:
            text = b"".join(parts)
            yield Document(document.name, self.at, text, False) if text else Rejected(document.name, self.at, "empty")
        check_unchanged([self.source])  # else this half gets no name

    def _read(self) -> Document | LongDocument:
        corpus = self.config.corpus
        units = chain.from_iterable(read(job, corpus) for job in jobs("train", [self.source], corpus, 1))
        return next(
            item
            for item in chain.from_iterable(items for _, items in units)
            if item.offset == self.at and not isinstance(item, Rejected)
        )


def split_at(place: int, parts: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Parts of a text, of whole characters each, with the half that they belong to; place >= 1 is about the cut's."""
    passed, part = 0, next(parts)
    while passed + len(part) < place:
        yield FIRST, part
        passed, part = passed + len(part), next(parts)

    begin = place - passed
    while len(part) < begin + LOOK_BYTES and (more := next(parts, b"")):
        part += more
    cut = find_cut(part, begin)
    yield FIRST, part[:cut]
    yield LAST, part[cut:]
    for part in parts:
        yield LAST, part


def find_cut(text: bytes, begin: int) -> int:
    """Where to cut a text, from `begin` >= 1 on: behind a line end, or else white space, or else a character.

    Something other than white space is left behind it; where there is nothing else, the end of the text.
    """
    # at the place itself if it is behind a line end
    window = text[begin - 1 : begin + LOOK_BYTES]
    for kind in CUTS:
        if (found := kind.search(window)) and window[found.end() :].strip():
            return begin - 1 + found.end()

    end = len(text.rstrip())
    while begin < end and _is_inside(text[begin]):
        begin += 1
    if not end:
        return len(text)
    if begin >= end:  # before the last character
        begin = end - 1
        while begin > 0 and _is_inside(text[begin]):
            begin -= 1
    return begin


def _is_inside(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character."""
    return byte & 0xC0 == 0x80


def write_half(path: Path, work: Path, document: OnlyDocument, which: int, level: int) -> None:
    """Write one half as a unit file of one document, whose level is 0, or for the last half above."""
    corpus, stream = document.config.corpus, document.config.stream
    share = 1.0 if which == LAST else 0.0
    options = UnitOptions(share, stream.split_seed, corpus.max_whole_bytes, corpus.on_bad_record, hashes=False)
    write_unit(path, document.half(which, level), [document.source.name], options, Encoder(Tokenizer.load(work)))


@dataclass(frozen=True)
class HeldOut:
    """Units of which documents below a level go to train, and those from it on to valid."""

    units: list[CountedUnit]
    level: int
    source: dict[str, Any]  # what the manifests say of it


def hold_out(config: Config, stem: Path, inputs: Inputs, units: Sequence[CountedUnit], shared: SharedPool) -> HeldOut:
    """Decide which documents are valid, those of stream.valid_max_tokens at most; one alone is split by position.

    Args:
        stem: what the names of its halves begin with.
        inputs: the files that the numbers in the units are of.
    """
    found = [unit for unit in units if unit.distinct.any()]
    if sum(int(unit.distinct[:, 0].sum()) for unit in found) != 1:
        level = valid_level(units, config.stream.valid_max_tokens)
        return HeldOut(list(units), level, {"valid_level": level})

    level, halves = _split(config, stem, list(inputs.all()), found[0], shared)
    others = [unit if unit is not found[0] else _without_it(unit) for unit in units]
    return HeldOut(others + halves, 1, {"valid_level": level, "valid_split": "by position"})


def _split(
    config: Config, stem: Path, sources: Sequence[Source], unit: CountedUnit, shared: SharedPool
) -> tuple[int, list[CountedUnit]]:
    """The level as in OnlyDocument.half, and a unit for each half of the one document that is taken of a unit."""
    row = next(block[chosen[0]].tolist() for block, chosen in _taken(unit).blocks(unit.file.rows) if len(chosen))
    line = unit.choice.first_file + row[FILE]
    document = OnlyDocument(config, sources[line], row[AT], row[BYTES])

    def write(which: int, level: int) -> UnitFile:
        path = spill_path(stem, NAMES[which], level)
        arguments = (path, stem.parent, document, which, level)
        shared.write(f"{stem.name} {NAMES[which]} {level}", [FileTask(path, write_half, arguments)])
        return UnitFile(path)

    level, most = 1, config.stream.valid_max_tokens
    while (last := write(LAST, level)).footer["tokens"] > most > 0 and level + 1 < LEVELS:
        level += 1

    copies = unit.choice.share // 1 + bool(unit.part.any())
    return level, [
        CountedUnit(half, UnitChoice(half.path, 0, line, unit.choice.source, share), half.totals, half.totals, NOTHING)
        for half, share in ((write(FIRST, level), copies), (last, 1.0))
    ]


def _taken(unit: CountedUnit) -> Selection:
    """All documents that are taken of a unit."""
    choice = unit.choice
    return choice.select(ALL, (0, 0, 0, 0), 1.0 if choice.share >= 1 else choice.part)


def _without_it(unit: CountedUnit) -> CountedUnit:
    """A unit of which nothing is taken; what is, is as if it had not been read."""
    choice = replace(unit.choice, share=0.0)
    return CountedUnit(unit.file, choice, unit.read - unit.distinct, unit.once - unit.distinct, NOTHING)
