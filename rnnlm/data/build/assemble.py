"""Unit files -> streams, by tasks for any workers: deduplicate, shuffle, cut into shards, commit.

    unit files --(spill, find, drop)--(spill, gather)--> shards, documents.npy --> stream.json, rename

Every task is known by one file, which it writes under a temporary name and renames: what has its name is not made
again. The price: a task of two files (a shard and its entry in the manifest) is repeated if it died between them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rnnlm import files
from rnnlm.config import Config, as_list
from rnnlm.data.build.executor import WorkerPool
from rnnlm.data.build.external_sort import (
    Span,
    cut_spans,
    drop_repeats,
    find_repeats,
    gather_shuffled,
    spill_hashes,
    spill_path,
    spill_shuffled,
)
from rnnlm.data.build.inputs import Inputs
from rnnlm.data.build.unit_file import (
    LEVEL,
    LEVELS,
    Array,
    Selection,
    UnitFile,
    origins_of,
    rejected_path,
    sizes_of,
    tokens_of,
    write_json,
)
from rnnlm.data.build.units import UnitOptions
from rnnlm.data.jobs import Job
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import commit, write_array, write_shard
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.errors import UserError

ALL, TO_TRAIN, TO_VALID = range(LEVELS), range(1), range(1, LEVELS)  # levels
SPAN_HASHES = 2**19  # of documents sorted at once
SPAN_TOKENS = 2**24  # of documents shuffled at once, about, and of a unit of shuffled ones, or
SPAN_DOCUMENTS = 2**18


@dataclass(frozen=True)
class BuildContext:
    """What a task needs to know of its build; it travels with each."""

    config: Config
    work: Path  # the directory of the build's own files
    digest: str  # of the tokenizer

    def unit_path(self, job: Job, number: int) -> Path:
        """The unit file of a unit that a job reads."""
        return self.work / "units" / f"{job.split}-{job.file:06d}-{number:06d}.unit"

    def listing_path(self, job: Job) -> Path:
        """Which units a file has that can only be read from its start."""
        return self.work / "units" / f"{job.split}-{job.file:06d}.json"

    def holds_out(self, split: str) -> bool:
        """Whether some of this split's documents go to the valid stream."""
        return split == "train" and not as_list(self.config.corpus.valid) and self.config.stream.valid_fraction > 0

    def unit_options(self, split: str) -> UnitOptions:
        """What shapes the units of a split."""
        corpus, stream = self.config.corpus, self.config.stream
        fraction = stream.valid_fraction if self.holds_out(split) else 0.0
        return UnitOptions(fraction, stream.split_seed, corpus.max_whole_bytes, corpus.deduplicate)

    def stream_path(self, split: str) -> Path:
        """Where the stream of a split lies."""
        return Path(self.config.stream.directory) / split


class UnitOfFiles(NamedTuple):
    """A unit file, and the number of its first input file in sources.jsonl."""

    path: Path
    first_file: int


class FileTask(NamedTuple):
    """A call that writes one file."""

    path: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def run_file_task(context: BuildContext, task: FileTask) -> None:
    """Write the file of a task."""
    task.function(*task.arguments)


def make_shard(work: Path, path: Path, selections: Sequence[Selection], first: int, last: int) -> None:
    """Write one shard, then beside its directory what the manifest says of it."""
    tokenizer = Tokenizer.load(work / "tokenizer.model")
    write_json(_entry_path(path), write_shard(path, tokens_of(selections, first, last), tokenizer))


def _entry_path(shard: Path) -> Path:
    return shard.parent.with_name(f"{shard.parent.name}-{shard.stem}.json")


@dataclass(frozen=True)
class Assembler:
    """Makes streams of unit files, when all of these are there."""

    context: BuildContext
    tokenizer: Tokenizer
    source: dict[str, Any]  # for the manifests
    inputs: Inputs
    units: dict[str, list[UnitOfFiles]]  # by split, in the order of the corpus
    pool: WorkerPool

    def run(self, targets: Sequence[str]) -> dict[str, Manifest]:
        """Write and commit these streams.

        Raises:
            UserError: a stream without text, a task that kills its workers.
        """
        selections, records = self._select()
        for target in selections:
            if not _sum_totals(selections[target])[1]:
                hint = ", or a larger stream.valid_fraction" if target == "valid" else ""
                found = f"{records[target]['read']} records, none kept"
                raise UserError(f"corpus.{target}: no text in it ({found}); give a corpus with text{hint}")

        order = sorted(targets, key=lambda split: (split == "train", split))  # what training opens first comes last
        if self.context.config.corpus.shuffle_seed >= 0:
            for target in order:
                selections[target] = self._shuffle(target, selections[target])
        return {target: self._write_stream(target, selections[target], records[target]) for target in order}

    def _run_tasks(self, tasks: Iterable[FileTask]) -> None:
        """Write the files that are not there."""
        failed = self.pool.run(run_file_task, self.context, [task for task in tasks if not task.path.exists()])
        if failed:
            raise UserError(
                f"{failed[0].path}: its worker was killed twice, out of memory perhaps; use fewer build.workers"
            )

    def _select(self) -> tuple[dict[str, list[Selection]], dict[str, dict[str, int]]]:
        """By stream: what is selected of each unit, and the counts of its records."""
        selections, records = {}, {}
        for split, units in self.units.items():
            opened = [UnitFile(path) for path, _ in units]
            targets = {split: TO_TRAIN, "valid": TO_VALID} if self.context.holds_out(split) else {split: ALL}
            found = self._select_units(split, opened, list(targets.values()))
            for target, levels in targets.items():
                selections[target] = [selection for selection in found if selection.levels == levels]
                records[target] = _count_records(opened, selections[target], levels)
        return selections, records

    def _select_units(self, split: str, opened: Sequence[UnitFile], targets: Sequence[range]) -> list[Selection]:
        """What each unit gives to each range of levels."""
        dropped = list[Path]()
        if self.context.config.corpus.deduplicate:
            sizes = [unit.footer["rows"] for unit in opened]
            dropped = self._deduplicate(split, cut_spans([unit.path for unit in opened], sizes, SPAN_HASHES))

        selections, number = [], 0
        for unit, (_, first_file) in zip(opened, self.units[split], strict=True):
            last = number + unit.footer["rows"]
            of_unit = tuple(dropped[number // SPAN_HASHES : -(-last // SPAN_HASHES)])
            left = unit.totals - _dropped_totals(unit, number, of_unit)
            for levels in targets:
                documents, tokens, text_bytes, words = left[levels.start : levels.stop].sum(0).tolist()
                totals = (documents, tokens, text_bytes, words)
                selections.append(Selection(unit.path, levels, totals, number, of_unit, first_file))
            number = last
        return selections

    def _deduplicate(self, split: str, spans: Sequence[Span]) -> list[Path]:
        """By span: the file of the numbers of its documents that are dropped."""
        stem, count = self.context.work / split, len(spans)
        dropped = [spill_path(stem, "dropped", span.index) for span in spans]

        # three passes, each over all files of the one before; after the last one these are removed, so look there first
        if not all(path.exists() for path in dropped):
            self._run_tasks(FileTask(spill_path(stem, "hashes", s.index), spill_hashes, (stem, s)) for s in spans)
            self._run_tasks(
                FileTask(spill_path(stem, "repeats", s.index), find_repeats, (stem, count, s.index)) for s in spans
            )
            self._run_tasks(FileTask(dropped[s.index], drop_repeats, (stem, count, s)) for s in spans)
        _remove_files(spill_path(stem, kind, s.index) for s in spans for kind in ("hashes", "again", "repeats"))
        return dropped

    def _shuffle(self, target: str, selections: Sequence[Selection]) -> list[Selection]:
        """The same documents in the order of a keyed permutation, in unit files of their own."""
        stem, seed = self.context.work / target, self.context.config.corpus.shuffle_seed
        total, tokens, _, _ = _sum_totals(selections)
        size = min(max(1, total * SPAN_TOKENS // tokens), SPAN_DOCUMENTS)
        spans = cut_spans(selections, [selection.totals[0] for selection in selections], size)
        spills = [spill_path(stem, "places", span.index) for span in spans]
        shuffled = [spill_path(stem, "shuffled", span.index) for span in spans]

        if not all(path.exists() for path in shuffled):
            self._run_tasks(
                FileTask(path, spill_shuffled, (path, span, total, seed))
                for path, span in zip(spills, spans, strict=True)
            )
            self._run_tasks(
                FileTask(path, gather_shuffled, (stem, len(spans), index * size, min((index + 1) * size, total), path))
                for index, path in enumerate(shuffled)
            )
        _remove_files(spills)
        return [_select_all(path) for path in shuffled]

    def _write_stream(self, target: str, selections: Sequence[Selection], records: dict[str, int]) -> Manifest:
        """Write all files of a stream, and commit it."""
        partial = self.context.work / target
        partial.mkdir(exist_ok=True)
        documents, tokens, text_bytes, words = _sum_totals(selections)
        shards = self._write_shards(partial, selections, tokens)
        manifest = Manifest(
            dtype=token_dtype(self.tokenizer.vocab_size),
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            tokenizer=self.tokenizer.digest,
            tokens=tokens,
            documents=documents,
            text_bytes=text_bytes,
            words=words,
            unknown_tokens=sum(shard.pop("unknown") for shard in shards),
            records={name: count for name, count in records.items() if name != "repaired"},
            mended=records["repaired"],
            source=self.source,
            shards=shards,
            sources=self._count_sources(selections),
            documents_sha256=write_array(partial / "documents.npy", _running_totals(selections), "<i8", (3,))[1],
            origins_sha256=write_array(partial / "origins.npy", _origins(selections), "<i8", (2,))[1],
            rejected_sha256=self._write_rejected(target, partial / "rejected.jsonl"),
        )

        files.write(partial / "tokenizer.model", Path.write_bytes, self.tokenizer.model)
        files.write(partial / "sources.jsonl", _write_lines, self.inputs.lines())
        return commit(partial, self.context.stream_path(target), manifest)

    def _count_sources(self, selections: Iterable[Selection]) -> dict[str, dict[str, int]]:
        """Documents, bytes and tokens of each named source, of all that has any."""
        groups = self.inputs.groups()  # by line of sources.jsonl
        names = sorted(set(groups))
        group_of = np.array([names.index(group) for group in groups])
        counts = np.zeros((len(names), 1 + LEVEL), np.int64)
        for selection in selections:
            for sizes, origins in zip(sizes_of(selection), origins_of(selection), strict=True):
                np.add.at(counts, group_of[origins[:, 0]], np.column_stack([np.ones(len(sizes), np.int64), sizes]))

        return {
            name: {"documents": documents, "text_bytes": text_bytes, "tokens": tokens}
            for name, (documents, tokens, text_bytes, _) in zip(names, counts.tolist(), strict=True)
            if documents
        }

    def _write_shards(self, partial: Path, selections: Sequence[Selection], tokens: int) -> list[dict[str, Any]]:
        """What the manifest says of each shard, with its count of unknown tokens."""
        size = self.context.config.stream.shard_tokens
        shards = [partial / f"shard-{index:05d}.npy" for index in range(-(-tokens // size))]
        spans = cut_spans(selections, [selection.totals[1] for selection in selections], size)

        _remove_files(_entry_path(shard) for shard in shards if not shard.exists())  # of a stream that was removed
        self._run_tasks(
            FileTask(_entry_path(shard), make_shard, (self.context.work, shard, span.unit_files, span.first, span.last))
            for shard, span in zip(shards, spans, strict=True)
        )
        return [json.loads(_entry_path(shard).read_bytes()) for shard in shards]

    def _write_rejected(self, target: str, path: Path) -> str:
        """Join the lists of the units that were read for this stream; the digest, or nothing if there are none."""
        listed = [rejected_path(path) for path, _ in self.units.get(target, []) if rejected_path(path).exists()]
        if not listed:
            return ""
        sha256 = hashlib.sha256()

        def join(target: Path) -> None:
            with target.open("wb") as out:
                for each in listed:
                    with each.open("rb") as file:
                        while block := file.read(2**20):
                            sha256.update(block)
                            out.write(block)

        files.write(path, join)
        return sha256.hexdigest()


def _sum_totals(selections: Sequence[Selection]) -> tuple[int, int, int, int]:
    """Documents, TOKENS, BYTES, WORDS of all."""
    documents, tokens, text_bytes, words = (sum(each.totals[column] for each in selections) for column in range(4))
    return documents, tokens, text_bytes, words


def _select_all(path: Path) -> Selection:
    """All documents of a shuffled unit file, which has no totals in its footer."""
    sums = np.zeros(4, np.int64)
    for sizes in sizes_of(Selection(path, ALL, (0, 0, 0, 0))):
        sums += [len(sizes), *sizes.sum(0)]
    documents, tokens, text_bytes, words = sums.tolist()
    return Selection(path, ALL, (documents, tokens, text_bytes, words))


def _dropped_totals(unit: UnitFile, number: int, dropped: Sequence[Path]) -> Array:
    """Totals of the documents that are dropped from a unit, whose first document has `number`.

    Returns:
        (LEVELS, 4) int64: by level; documents, TOKENS, BYTES, WORDS.
    """
    lost = np.zeros((LEVELS, 1 + LEVEL), np.int64)
    if dropped:
        rows = unit.rows
        for numbers in (np.load(each, mmap_mode="r") for each in dropped):
            gone = rows[np.array(numbers[slice(*np.searchsorted(numbers, [number, number + len(rows)]))]) - number]
            for level in np.unique(gone[:, LEVEL]):
                here = gone[gone[:, LEVEL] == level, :LEVEL]
                lost[level] += [len(here), *here.sum(0)]
    return lost


def _count_records(opened: Sequence[UnitFile], selections: Sequence[Selection], levels: range) -> dict[str, int]:
    """Counts of records for the manifest of some levels of a split; `repaired` are among those kept."""
    counted: Counter[str] = sum((Counter(unit.footer["records"]) for unit in opened), Counter())
    by_level = sum((unit.totals[:, 0] for unit in opened), np.zeros(LEVELS, np.int64))  # documents
    here = int(by_level[levels.start : levels.stop].sum())
    there = int(by_level.sum()) - here
    kept = _sum_totals(selections)[0]

    # what is no document was read for the split itself; the valid stream has read what is its own
    to_valid = levels.start > 0
    rejected = {} if to_valid else {name: n for name, n in counted.items() if name not in ("read", "kept", "empty")}
    records = {
        "read": here if to_valid else counted["read"] - there,
        "kept": kept,
        "empty": 0 if to_valid else counted["empty"],
        **({"duplicate": here - kept} if here > kept else {}),
        **dict(sorted(rejected.items())),
    }
    assert records["read"] == sum(records.values()) - records["read"], records
    return {**records, "repaired": sum(int(unit.repaired[levels.start : levels.stop].sum()) for unit in opened)}


def _running_totals(selections: Iterable[Selection]) -> Iterator[Array]:
    """(documents, 3) int64, TOKENS, BYTES, WORDS up to the end of each document; some at a time."""
    before = np.zeros(3, np.int64)
    for selection in selections:
        for sizes in sizes_of(selection):
            totals = before + np.cumsum(sizes, axis=0)
            yield totals
            before = totals[-1] if len(totals) else before


def _origins(selections: Iterable[Selection]) -> Iterator[Array]:
    """(documents, 2) int64, line of sources.jsonl and place in that file of each document; some at a time."""
    for selection in selections:
        yield from origins_of(selection)


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)


def _remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
