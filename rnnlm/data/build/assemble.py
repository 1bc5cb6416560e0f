"""Unit files -> streams, by tasks for any workers: deduplicate, take shares, shuffle, cut into shards, commit.

    unit files --(spill, find, drop)--(count)--(spill, gather)--> shards, documents.npy, origins.npy --> names

Every task is known by one file, which it writes under a temporary name and renames: what has its name is not made
again, and any number of processes share the tasks of each pass, and wait for its last one before the next. The commit
of a stream is the task of one of them. The price: a task of two files (a shard and its entry in the manifest) is
repeated if it died between them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rnnlm import files
from rnnlm.config import Config
from rnnlm.data.build.encode import UnitOfFiles
from rnnlm.data.build.external_sort import (
    SPANS_OF_DOCUMENTS,
    SPANS_OF_HASHES,
    cut_spans,
    drop_repeats,
    find_repeats,
    gather_shuffled,
    span_size,
    spill_hashes,
    spill_path,
    spill_shuffled,
)
from rnnlm.data.build.inputs import Inputs
from rnnlm.data.build.position import hold_out
from rnnlm.data.build.selections import (
    ALL,
    CountedUnit,
    StreamChoice,
    UnitChoice,
    choose,
    count_units,
    read_counts,
)
from rnnlm.data.build.shared_tasks import LOCKS, PAUSE_SECONDS, FileTask, Listing, SharedPool, taken
from rnnlm.data.build.stream_tasks import COLUMNS, entry_path, join_parts, make_array, make_part, make_shard
from rnnlm.data.build.unit_file import LEVELS, DamagedUnitError, Selection, UnitFile
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import finish, place
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.errors import UserError

AnyItem = TypeVar("AnyItem")
Call = tuple[Callable[..., None], tuple[Any, ...]]
SPAN_HASHES, MOST_HASHES = 2**19, 2**24  # of documents sorted at once: at least, and at most
SPAN_TOKENS, MOST_TOKENS = 2**24, 2**30  # of documents shuffled at once, about, and of a unit of shuffled ones, or
SPAN_DOCUMENTS, MOST_DOCUMENTS = 2**18, 2**23
PART_DOCUMENTS = 2**20  # whose rows are counted, or whose places are written, by one task, about


@dataclass(frozen=True)
class BuildContext:
    """Where a build does what."""

    config: Config
    work: Path  # the directory of the build's own files

    def holds_out(self, split: str) -> bool:
        """Whether some of this split's documents go to the valid stream."""
        return split == "train" and not self.config.corpus.valid and self.config.stream.valid_fraction > 0

    def stream_path(self, split: str) -> Path:
        """Where the stream of a split lies."""
        return Path(self.config.stream.directory) / split


@dataclass(frozen=True)
class Assembler:
    """Makes streams of unit files, when all of these are there."""

    context: BuildContext
    tokenizer: Tokenizer
    source: dict[str, Any]  # for the manifests
    inputs: Inputs
    units: dict[str, list[UnitOfFiles]]  # by split, in the order of the corpus
    shared: SharedPool

    def run(self, targets: Sequence[str], check: Callable[[], None]) -> None:
        """Write these streams, and give them their names when all are whole, together with any others who do.

        Args:
            check: called before they get their names; raises if they may not.

        Raises:
            UserError: a stream without text, a task that kills its workers.
            DamagedUnitError: a unit file is not what was written.
        """
        chosen, source = self._choose()
        kept = {target: choice.records["kept"] for target, choice in chosen.items()}
        for target, choice in chosen.items():
            if not kept[target]:
                raise UserError(_why_empty(target, kept, choice.records["read"], self.context))

        order = sorted(targets, key=lambda split: (split == "train", split))  # what training opens first comes last
        for target in order:
            self._write_stream(target, chosen[target], source)

        def place_all() -> None:
            check()
            for target in order:
                if not self._is_at(self.context.stream_path(target), source):
                    place(self.context.work / target, self.context.stream_path(target))

        self._share("place", place_all, lambda: all(self._is_at(self.context.stream_path(t), source) for t in order))

    def _share(self, name: str, function: Callable[[], None], is_done: Callable[[], bool]) -> None:
        """Have something done by one process that does not go through the pool; return when it is."""
        pause = 0.0
        while not is_done():
            time.sleep(pause)  # the first time nobody else may be at it
            pause = min(2 * pause + 0.01, PAUSE_SECONDS)
            with taken(self.context.work / LOCKS, self.context.work / name, is_done) as is_mine:
                if is_mine:
                    function()

    def _choose(self) -> tuple[dict[str, StreamChoice], dict[str, Any]]:
        """By stream what goes into it; and what the manifests say all of it is made from."""
        chosen, source = dict[str, StreamChoice](), dict(self.source)
        for split, units in self.units.items():
            counted = self._count(split, [UnitFile(unit.path) for unit in units])
            if not self.context.holds_out(split):
                chosen[split] = choose(counted, ALL)
                continue

            held_out = hold_out(self.context.config, self.context.work / split, self.inputs, counted, self.shared)
            source |= held_out.source
            chosen[split] = choose(held_out.units, range(held_out.level))
            chosen["valid"] = choose(held_out.units, range(held_out.level, LEVELS))
        return chosen, source

    def _count(self, split: str, opened: Sequence[UnitFile]) -> list[CountedUnit]:
        """All units of a split, with the totals of what may be taken of each."""
        corpus, groups = self.context.config.corpus, self.inputs.groups()
        sizes = [unit.footer["rows"] for unit in opened]
        numbers = [0, *np.cumsum(sizes).tolist()]
        size = span_size(numbers[-1], SPANS_OF_HASHES, SPAN_HASHES, MOST_HASHES)
        dropped = self._deduplicate(split, [unit.path for unit in opened], sizes, size) if corpus.deduplicate else []

        shares = corpus.shares if split == "train" else {}
        choices = []
        for (path, first_file), begin, end in zip(self.units[split], numbers, numbers[1:], strict=False):
            of_unit = tuple(dropped[begin // size : -(-end // size)])
            source = groups[first_file]
            choices.append(UnitChoice(path, begin, first_file, source, shares.get(source, 1.0), of_unit))

        counts = list[Path]()
        if dropped or any(choice.part for choice in choices):
            parts = _cut_into_parts(choices, sizes)
            counts = [spill_path(self.context.work / split, "counts", index) for index in range(len(parts))]
            self.shared.write(
                f"{split} count",
                [FileTask(path, count_units, (path, part)) for path, part in zip(counts, parts, strict=True)],
            )
        return read_counts(opened, choices, counts)

    def _deduplicate(self, split: str, paths: Sequence[Path], sizes: Sequence[int], size: int) -> list[Path]:
        """By span of so many documents: the file of the numbers of those that are dropped."""
        stem, spans = self.context.work / split, cut_spans(paths, sizes, size)
        count, dropped = len(spans), [spill_path(stem, "dropped", span.index) for span in spans]

        # three passes, each over all files of the one before; after the last one these are removed, so look there first
        if not all(path.exists() for path in dropped):
            self.shared.write(
                f"{split} sort hashes",
                [FileTask(spill_path(stem, "hashes", s.index), spill_hashes, (stem, s)) for s in spans],
            )
            self.shared.write(
                f"{split} find repeats",
                [FileTask(spill_path(stem, "repeats", s.index), find_repeats, (stem, count, s.index)) for s in spans],
            )
            self.shared.write(
                f"{split} drop repeats", [FileTask(dropped[s.index], drop_repeats, (stem, count, s)) for s in spans]
            )
        _remove_files(spill_path(stem, kind, s.index) for s in spans for kind in ("hashes", "again", "repeats"))
        return dropped

    def _shuffle(self, target: str, selections: Sequence[Selection]) -> list[Selection]:
        """The same documents in the order of a keyed permutation, in unit files of their own."""
        stem, seed = self.context.work / target, self.context.config.corpus.shuffle_seed
        total, tokens = (sum(selection.totals[column] for selection in selections) for column in (0, 1))
        smallest, largest = (
            min(max(1, total * most // tokens), documents)
            for most, documents in ((SPAN_TOKENS, SPAN_DOCUMENTS), (MOST_TOKENS, MOST_DOCUMENTS))
        )
        size = span_size(total, SPANS_OF_DOCUMENTS, smallest, largest)
        spans = cut_spans(selections, [selection.totals[0] for selection in selections], size)
        spills = [spill_path(stem, "places", span.index) for span in spans]
        shuffled = [spill_path(stem, "shuffled", span.index) for span in spans]

        if not all(path.exists() for path in shuffled):
            self.shared.write(
                f"{target} sort by new places",
                [FileTask(path, spill_shuffled, (path, s, total, seed)) for path, s in zip(spills, spans, strict=True)],
            )
            edges = [min(index * size, total) for index in range(len(spans) + 1)]
            self.shared.write(
                f"{target} shuffle",
                [
                    FileTask(path, gather_shuffled, (stem, len(spans), begin, end, path))
                    for path, begin, end in zip(shuffled, edges, edges[1:], strict=False)
                ],
            )
        _remove_files(spills)
        return [_select_all(path) for path in shuffled]

    def _write_stream(self, target: str, choice: StreamChoice, source: dict[str, Any]) -> None:
        """Write all files of a stream, unless others have."""

        def is_whole() -> bool:
            paths = (self.context.work / target, self.context.stream_path(target))
            return any(self._is_at(path, source) for path in paths)

        if is_whole():
            return
        try:
            selections = choice.selections
            if self.context.config.corpus.shuffle_seed >= 0:
                selections = self._shuffle(target, selections)
            arrays = self._write_arrays(target, selections)
            shards = self._write_shards(target, selections)
            self._share(f"{target}-manifest", lambda: self._finish(target, choice, source, shards, arrays), is_whole)
        except (FileNotFoundError, DamagedUnitError):
            if not is_whole():  # else others have finished it unseen, and it has its name
                raise

    def _is_at(self, path: Path, source: dict[str, Any]) -> bool:
        """Whether a stream that was made from this source lies there."""
        return path in Listing() and path / "stream.json" in Listing() and Manifest.read(path).source == source

    def _partial(self, target: str) -> Path:
        """The directory in which a stream grows."""
        partial = self.context.work / target
        partial.mkdir(exist_ok=True)
        return partial

    def _write_entries(self, phase: str, paths: Sequence[Path], calls: Sequence[Call]) -> list[dict[str, Any]]:
        """What the manifest says of some files, which these calls write if they are not there."""
        _remove_files(entry_path(path) for path in paths if not path.exists())  # of a stream that was removed
        entries = [entry_path(path) for path in paths]
        self.shared.write(phase, [FileTask(entry, *call) for entry, call in zip(entries, calls, strict=True)])
        return [json.loads(entry.read_bytes()) for entry in entries]

    def _write_shards(self, target: str, selections: Sequence[Selection]) -> list[dict[str, Any]]:
        """What the manifest says of each shard, with its count of unknown tokens."""
        partial, size = self._partial(target), self.context.config.stream.shard_tokens
        sizes = [selection.totals[1] for selection in selections]
        spans = cut_spans(selections, sizes, size)
        shards = [partial / f"shard-{span.index:05d}.npy" for span in spans]

        return self._write_entries(
            f"{target} shards",
            shards,
            [
                (make_shard, (self.context.work, s, p.unit_files, p.first, p.last))
                for s, p in zip(shards, spans, strict=True)
            ],
        )

    def _write_arrays(self, target: str, selections: Sequence[Selection]) -> dict[str, str]:
        """The digests of documents.npy and origins.npy by their stems; large ones are written in parts, and joined."""
        stem, paths = self.context.work / target, [self._partial(target) / f"{name}.npy" for name in COLUMNS]
        parts = _cut_into_parts(selections, [selection.totals[0] for selection in selections])
        pieces = {name: [spill_path(stem, name, index) for index in range(len(parts))] for name in COLUMNS}
        if len(parts) == 1:
            calls: list[Call] = [(make_array, (path, parts[0])) for path in paths]
        else:
            calls = [(join_parts, (path, pieces[path.stem])) for path in paths]
            if not all(entry_path(path).exists() and path.exists() for path in paths):
                before, tasks = np.zeros(3, np.int64), []
                for index, (path, part) in enumerate(zip(pieces["documents"], parts, strict=True)):
                    tasks.append(FileTask(path, make_part, (stem, index, part, before)))
                    before = before + np.sum([selection.totals[1:] for selection in part], axis=0)
                self.shared.write(f"{target} documents", tasks)

        entries = self._write_entries(f"{target} documents joined", paths, calls)
        _remove_files(path for paths in pieces.values() for path in paths)
        return {name: entry["sha256"] for name, entry in zip(COLUMNS, entries, strict=True)}

    def _finish(
        self,
        target: str,
        choice: StreamChoice,
        source: dict[str, Any],
        shards: list[dict[str, Any]],
        arrays: dict[str, str],
    ) -> None:
        """Write what is left of a stream, its manifest last."""
        partial = self._partial(target)
        documents, tokens, text_bytes, words = np.sum([each.totals for each in choice.selections], axis=0).tolist()
        manifest = Manifest(
            dtype=token_dtype(self.tokenizer.vocab_size),
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            tokenizer=self.tokenizer.digest,
            tokens=tokens,
            documents=documents,
            text_bytes=text_bytes,
            words=words,
            unknown_tokens=sum(shard["unknown"] for shard in shards),
            records=choice.records,
            repeated=choice.repeated,
            mended=choice.mended,
            source=source,
            sources=choice.sources,
            shards=[{key: value for key, value in shard.items() if key != "unknown"} for shard in shards],
            documents_sha256=arrays["documents"],
            origins_sha256=arrays["origins"],
            rejected_sha256=self._write_rejected(target, partial / "rejected.jsonl"),
        )

        files.write(partial / self.tokenizer.file_name, Path.write_bytes, self.tokenizer.model)
        files.write(partial / "sources.jsonl", _write_lines, self.inputs.lines())
        finish(partial, manifest)

    def _write_rejected(self, target: str, path: Path) -> str:
        """Join the lists of the units that were read for this stream; the digest, or nothing if there are none."""
        listed = [
            (unit, first_file)
            for path, first_file in self.units.get(target, [])
            if (unit := UnitFile(path)).footer["rejected"]
        ]
        if not listed:
            return ""
        sha256, names = hashlib.sha256(), [source.name for source in self.inputs.all()]

        def join(target: Path) -> None:
            with target.open("wb") as out:
                for unit, first_file in listed:
                    for file, at, reason in unit.rejected():
                        line = {"file": names[first_file + file], "at": at, "reason": reason}
                        data = json.dumps(line).encode() + b"\n"
                        sha256.update(data)
                        out.write(data)

        files.write(path, join)
        return sha256.hexdigest()


def _why_empty(target: str, kept: dict[str, int], read: int, context: BuildContext) -> str:
    """What to say of a stream without a document; `kept` are the documents of all streams, `read` its own records."""
    documents, stream = kept.get("train", 0) + kept.get("valid", 0), context.config.stream
    if not context.holds_out("train") or target == "test" or not documents:
        return f"corpus.{target}: no text in it ({read} records, none kept); give a corpus with text"

    other = "valid" if target == "train" else "train"
    what = f"has {documents} documents, whose hashes give all of them to {other}"
    if documents == 1:
        what = "is one document, too short to be cut in two"
    return (
        f"corpus.train {what} (stream.valid_fraction={stream.valid_fraction}), so {target} would be empty; "
        "give corpus.valid text of its own, cut the text into more documents, as with corpus.document=line or "
        "paragraph, or set stream.valid_fraction=0 to have no valid stream"
    )


def _cut_into_parts(items: Sequence[AnyItem], documents: Sequence[int]) -> list[list[AnyItem]]:
    """Consecutive items together until they have PART_DOCUMENTS."""
    parts, size = list[list[AnyItem]](), PART_DOCUMENTS
    for item, count in zip(items, documents, strict=True):
        if size >= PART_DOCUMENTS:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += count
    return parts


def _select_all(path: Path) -> Selection:
    """All documents of a shuffled unit file."""
    documents, tokens, text_bytes, words = UnitFile(path).totals.sum(0).tolist()
    return Selection(path, ALL, (documents, tokens, text_bytes, words))


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)


def _remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
