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
from rnnlm.config import Config
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
from rnnlm.data.build.units import (
    TO_VALID,
    Array,
    Selection,
    UnitFile,
    rejected_path,
    sizes_of,
    tokens_of,
    write_json,
)
from rnnlm.data.jobs import Job
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import commit, write_array, write_shard
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.errors import UserError

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
        return split == "train" and not self.config.corpus.valid and self.config.stream.valid_fraction > 0

    def stream_path(self, split: str) -> Path:
        """Where the stream of a split lies."""
        return Path(self.config.stream.directory) / split


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
    units: dict[str, list[Path]]  # by split, in the order of the corpus
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
        for split, paths in self.units.items():
            footers = [UnitFile(path).footer for path in paths]
            found = self._select_units(split, paths, footers)
            for to_valid, target in enumerate((split, "valid") if self.context.holds_out(split) else (split,)):
                selections[target] = [selection for selection in found if selection.to_valid == to_valid]
                records[target] = _count_records(footers, selections[target], to_valid)
        return selections, records

    def _select_units(self, split: str, paths: Sequence[Path], footers: Sequence[dict[str, Any]]) -> list[Selection]:
        """What each unit gives to each side of the split."""
        dropped = list[Path]()
        if self.context.config.corpus.deduplicate:
            dropped = self._deduplicate(split, cut_spans(paths, [footer["rows"] for footer in footers], SPAN_HASHES))

        selections, number = [], 0
        for path, footer in zip(paths, footers, strict=True):
            last = number + footer["rows"]
            of_unit = tuple(dropped[number // SPAN_HASHES : -(-last // SPAN_HASHES)])
            lost = _dropped_totals(path, number, of_unit)
            for to_valid in (0, 1):
                documents, tokens, text_bytes, words = (np.array(footer["totals"][to_valid]) - lost[to_valid]).tolist()
                selections.append(Selection(path, to_valid, (documents, tokens, text_bytes, words), number, of_unit))
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
            documents_sha256=write_array(partial / "documents.npy", _running_totals(selections), "<i8", (3,))[1],
            rejected_sha256=self._write_rejected(target, partial / "rejected.jsonl"),
        )

        files.write(partial / "tokenizer.model", Path.write_bytes, self.tokenizer.model)
        return commit(partial, self.context.stream_path(target), manifest)

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
        listed = [rejected_path(unit) for unit in self.units.get(target, []) if rejected_path(unit).exists()]
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
    for sizes in sizes_of(Selection(path, 0, (0, 0, 0, 0))):
        sums += [len(sizes), *sizes.sum(0)]
    documents, tokens, text_bytes, words = sums.tolist()
    return Selection(path, 0, (documents, tokens, text_bytes, words))


def _dropped_totals(path: Path, number: int, dropped: Sequence[Path]) -> Array:
    """Totals of the documents that are dropped from a unit, whose first document has `number`.

    Returns:
        (2, 4) int64: not to valid and to valid; documents, TOKENS, BYTES, WORDS.
    """
    lost = np.zeros((2, 1 + TO_VALID), np.int64)
    if dropped:
        rows = UnitFile(path).rows
        for numbers in (np.load(each, mmap_mode="r") for each in dropped):
            gone = np.array(numbers[slice(*np.searchsorted(numbers, [number, number + len(rows)]))]) - number
            for to_valid in (0, 1):
                here = rows[gone]
                here = here[here[:, TO_VALID] == to_valid, :TO_VALID]
                lost[to_valid] += [len(here), *here.sum(0)]
    return lost


def _count_records(footers: Sequence[dict[str, Any]], selections: Sequence[Selection], to_valid: int) -> dict[str, int]:
    """Counts of records for the manifest of one side of a split; `repaired` are among those kept."""
    counted: Counter[str] = sum((Counter(footer["records"]) for footer in footers), Counter())
    here, there = (sum(footer["totals"][side][0] for footer in footers) for side in (to_valid, 1 - to_valid))
    kept = _sum_totals(selections)[0]

    # what is no document was read for the split itself; the valid stream has read what is its own
    rejected = {} if to_valid else {name: n for name, n in counted.items() if name not in ("read", "kept", "empty")}
    records = {
        "read": here if to_valid else counted["read"] - there,
        "kept": kept,
        "empty": 0 if to_valid else counted["empty"],
        **({"duplicate": here - kept} if here > kept else {}),
        **dict(sorted(rejected.items())),
    }
    assert records["read"] == sum(records.values()) - records["read"], records
    return {**records, "repaired": sum(footer["repaired"][to_valid] for footer in footers)}


def _running_totals(selections: Iterable[Selection]) -> Iterator[Array]:
    """(documents, 3) int64, TOKENS, BYTES, WORDS up to the end of each document; some at a time."""
    before = np.zeros(3, np.int64)
    for selection in selections:
        for sizes in sizes_of(selection):
            totals = before + np.cumsum(sizes, axis=0)
            yield totals
            before = totals[-1] if len(totals) else before


def _remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
