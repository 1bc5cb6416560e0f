"""Unit files -> streams, by tasks for any workers: deduplicate, shuffle, cut into shards, commit.

    unit files --(spill, find, drop)--(spill, gather)--> shards, documents.npy --> stream.json, rename

Every task writes one file under a temporary name and renames it: what has its name is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rnnlm import files
from rnnlm.config import Config, as_list
from rnnlm.data.build.executor import Workers
from rnnlm.data.build.external_sort import (
    Run,
    drop_repeats,
    find_repeats,
    gather_shuffled,
    spill_hashes,
    spill_shuffled,
    spilled,
)
from rnnlm.data.build.units import TO_VALID, Array, Part, UnitFile, rejected_path, rows_of, tokens_of, write_json
from rnnlm.data.jobs import Job
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import commit, write_array, write_shard
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.errors import UserError

RUN_HASHES = 2**19  # of documents sorted at once
RUN_TOKENS = 2**24  # of documents shuffled at once, about, and of a unit of shuffled ones, or
RUN_DOCUMENTS = 2**18


@dataclass(frozen=True)
class Setting:
    """What a task needs to know; it travels with each."""

    config: Config
    work: Path
    digest: str  # of the tokenizer

    def unit(self, job: Job, number: int) -> Path:
        """The unit file of a unit that a job reads."""
        return self.work / "units" / f"{job.split}-{job.file:06d}-{number:06d}.unit"

    def listing(self, job: Job) -> Path:
        """Which units a file has that can only be read from its start."""
        return self.work / "units" / f"{job.split}-{job.file:06d}.json"

    def splits_off(self, split: str) -> bool:
        """Whether a part of this split's documents goes to the valid stream."""
        return split == "train" and not as_list(self.config.corpus.valid) and self.config.stream.valid_fraction > 0

    def directory(self, split: str) -> Path:
        """Where the stream of a split lies."""
        return Path(self.config.stream.directory) / split


class Task(NamedTuple):
    """What makes one file."""

    path: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def do_task(setting: Setting, task: Task) -> None:
    """Make the file of a task."""
    task.function(*task.arguments)


def make_shard(work: Path, path: Path, parts: Sequence[Part], first: int, last: int) -> None:
    """Write one shard, then beside its directory what the manifest says of it."""
    tokenizer = Tokenizer.load(work / "tokenizer.model")
    write_json(_entry(path), write_shard(path, tokens_of(parts, first, last), tokenizer))


def _entry(shard: Path) -> Path:
    return shard.parent.with_name(f"{shard.parent.name}-{shard.stem}.json")


@dataclass(frozen=True)
class Assembly:
    """The last part of a build: all units are there."""

    setting: Setting
    tokenizer: Tokenizer
    source: dict[str, Any]  # for the manifests
    units: dict[str, list[Path]]  # by split, in the order of the corpus
    crew: Workers

    def run(self, targets: Sequence[str]) -> dict[str, Manifest]:
        """Write and commit these streams.

        Raises:
            UserError: a stream without text, a task that kills its workers.
        """
        corpus, parts, records = self.setting.config.corpus, {}, {}
        for split, paths in self.units.items():
            footers = [UnitFile(path).footer for path in paths]
            every = self._parts(split, paths, footers)
            for target, side in ((split, 0), *((("valid", 1),) if self.setting.splits_off(split) else ())):
                parts[target] = [part for part in every if part.to_valid == side]
                records[target] = _records(footers, parts[target], side)
        for target in parts:
            if not sum(part.totals[1] for part in parts[target]):
                hint = ", or a larger stream.valid_fraction" if target == "valid" else ""
                found = f"{records[target]['read']} records, none kept"
                raise UserError(f"corpus.{target}: no text in it ({found}); give a corpus with text{hint}")
        order = sorted(targets, key=lambda split: (split == "train", split))  # what training opens first comes last
        for target in order:
            if corpus.shuffle_seed >= 0:
                parts[target] = self._shuffle(target, parts[target])
        return {target: self._write_stream(target, parts[target], records[target]) for target in order}

    def _do(self, tasks: Iterable[Task]) -> None:
        """Make the files that are not there."""
        aside = self.crew.run(do_task, self.setting, [task for task in tasks if not task.path.exists()], _ignore)
        if aside:
            raise UserError(
                f"{aside[0].path}: its worker was killed twice, out of memory perhaps; use fewer build.workers"
            )

    def _parts(self, split: str, paths: Sequence[Path], footers: Sequence[dict[str, Any]]) -> list[Part]:
        """What each unit gives to each side of the split."""
        parts, number, dropped = [], 0, list[Path]()
        if self.setting.config.corpus.deduplicate:
            dropped = self._deduplicate(split, _runs(paths, [footer["rows"] for footer in footers], RUN_HASHES))
        for path, footer in zip(paths, footers, strict=True):
            last = number + footer["rows"]
            mine = tuple(dropped[number // RUN_HASHES : -(-last // RUN_HASHES)])
            gone = _lost(path, number, mine)
            for side in (0, 1):
                documents, tokens, text_bytes, words = (np.array(footer["totals"][side]) - gone[side]).tolist()
                parts.append(Part(path, side, (documents, tokens, text_bytes, words), number, mine))
            number = last
        return parts

    def _deduplicate(self, split: str, runs: Sequence[Run]) -> list[Path]:
        """By run: the file of the numbers of its documents that are dropped."""
        stem, count = self.setting.work / split, len(runs)
        dropped = [spilled(stem, "dropped", run.index) for run in runs]
        if not all(path.exists() for path in dropped):
            self._do(Task(spilled(stem, "hashes", run.index), spill_hashes, (stem, run)) for run in runs)
            self._do(Task(spilled(stem, "repeats", run.index), find_repeats, (stem, count, run.index)) for run in runs)
            self._do(Task(path, drop_repeats, (stem, count, run)) for path, run in zip(dropped, runs, strict=True))
        _remove(spilled(stem, kind, run.index) for run in runs for kind in ("hashes", "again", "repeats"))
        return dropped

    def _shuffle(self, target: str, parts: Sequence[Part]) -> list[Part]:
        stem, seed = self.setting.work / target, self.setting.config.corpus.shuffle_seed
        total, tokens = (sum(part.totals[column] for part in parts) for column in (0, 1))
        size = min(max(1, total * RUN_TOKENS // tokens), RUN_DOCUMENTS)
        runs = _runs(parts, [part.totals[0] for part in parts], size)
        spills = [spilled(stem, "places", run.index) for run in runs]
        shuffled = [spilled(stem, "shuffled", run.index) for run in runs]
        if not all(path.exists() for path in shuffled):
            self._do(
                Task(path, spill_shuffled, (path, run, total, seed)) for path, run in zip(spills, runs, strict=True)
            )
            self._do(
                Task(path, gather_shuffled, (stem, len(runs), index * size, min((index + 1) * size, total), path))
                for index, path in enumerate(shuffled)
            )
        _remove(spills)
        done = []
        for path in shuffled:
            totals = np.zeros(4, np.int64)
            for rows in rows_of(Part(path, 0, (0, 0, 0, 0))):
                totals += [len(rows), *rows.sum(0)]
            documents, tokens, text_bytes, words = totals.tolist()
            done.append(Part(path, 0, (documents, tokens, text_bytes, words)))
        return done

    def _write_stream(self, target: str, parts: Sequence[Part], records: dict[str, int]) -> Manifest:
        partial, size = self.setting.work / target, self.setting.config.stream.shard_tokens
        partial.mkdir(exist_ok=True)
        documents, tokens, text_bytes, words = (sum(part.totals[column] for part in parts) for column in range(4))
        shards = [partial / f"shard-{index:05d}.npy" for index in range(-(-tokens // size))]
        runs = _runs(parts, [part.totals[1] for part in parts], size)
        _remove(_entry(shard) for shard in shards if not shard.exists())
        self._do(
            Task(_entry(shard), make_shard, (self.setting.work, shard, run.files, run.first, run.last))
            for shard, run in zip(shards, runs, strict=True)
        )
        entries = [json.loads(_entry(shard).read_bytes()) for shard in shards]
        manifest = Manifest(
            dtype=token_dtype(self.tokenizer.vocab_size),
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            tokenizer=self.tokenizer.digest,
            tokens=tokens,
            documents=documents,
            text_bytes=text_bytes,
            words=words,
            unknown_tokens=sum(entry.pop("unknown") for entry in entries),
            records={name: count for name, count in records.items() if name != "mended"},
            mended=records["mended"],
            source=self.source,
            shards=entries,
            documents_sha256=write_array(partial / "documents.npy", _totals(parts), "<i8", (3,))[1],
            rejected_sha256=self._write_rejected(target, partial / "rejected.jsonl"),
        )
        files.write(partial / "tokenizer.model", Path.write_bytes, self.tokenizer.model)
        return commit(partial, self.setting.directory(target), manifest)

    def _write_rejected(self, target: str, path: Path) -> str:
        """Join the lists of the units that were read for this stream; the digest, or nothing if there are none."""
        units = self.units.get(target, [])
        listed = [rejected_path(unit) for unit in units if rejected_path(unit).exists()]
        if not listed:
            return ""
        sha256 = hashlib.sha256()
        with path.open("wb") as out:
            for each in listed:
                with each.open("rb") as file:
                    while block := file.read(2**20):
                        out.write(block)
                        sha256.update(block)
            out.flush()
            os.fsync(out.fileno())
        return sha256.hexdigest()


def _runs(files: Sequence[Any], sizes: Sequence[int], size: int) -> list[Run]:
    """Cut what files hold, one behind the other, into runs of this size."""
    ends, total = np.cumsum(sizes), sum(sizes)
    runs = []
    for index, first in enumerate(range(0, total, size)):
        last = min(first + size, total)
        begin, end = int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1
        before = int(ends[begin - 1]) if begin else 0
        runs.append(Run(index, files[begin:end], first - before, last - before, before))
    return runs


def _lost(path: Path, number: int, dropped: Sequence[Path]) -> Array:
    """(side, 4): documents, TOKENS, BYTES and WORDS of those dropped from a unit, whose first document has `number`."""
    lost = np.zeros((2, 1 + TO_VALID), np.int64)
    if dropped:
        rows = UnitFile(path).rows
        for numbers in (np.load(each, mmap_mode="r") for each in dropped):
            gone = np.array(numbers[slice(*np.searchsorted(numbers, [number, number + len(rows)]))]) - number
            for side in (0, 1):
                here = rows[gone]
                here = here[here[:, TO_VALID] == side, :TO_VALID]
                lost[side] += [len(here), *here.sum(0)]
    return lost


def _records(footers: Sequence[dict[str, Any]], parts: Sequence[Part], side: int) -> dict[str, int]:
    """Counts of records for the manifest of one side of a split."""
    counted: Counter[str] = sum((Counter(footer["records"]) for footer in footers), Counter())
    here, there = (sum(footer["totals"][each][0] for footer in footers) for each in (side, 1 - side))
    kept = sum(part.totals[0] for part in parts)
    rejected = {} if side else {name: n for name, n in counted.items() if name not in ("read", "kept", "empty")}
    records = {
        "read": here if side else counted["read"] - there,
        "kept": kept,
        "empty": 0 if side else counted["empty"],
        **({"duplicate": here - kept} if here > kept else {}),
        **dict(sorted(rejected.items())),
    }
    assert records["read"] == sum(records.values()) - records["read"], records
    return {**records, "mended": sum(footer["mended"][side] for footer in footers)}


def _totals(parts: Iterable[Part]) -> Iterator[npt.NDArray[np.int64]]:
    """(documents, 3) running totals, part by part."""
    before = np.zeros(3, np.int64)
    for part in parts:
        for rows in rows_of(part):
            totals = before + np.cumsum(rows, axis=0)
            yield totals
            before = totals[-1] if len(totals) else before


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _ignore(task: Any) -> None:
    pass
