"""Corpus -> token streams: encode units in any order on any workers, then commit them in corpus order.

    files --jobs--> workers --> unit files --assemble--> streams --rename--> train, valid, test

A unit file, a shuffled unit and a shard are each a pure function of what comes before, written under a temporary name
and renamed. So any number of workers, of kills and of repeats gives the same bytes, and the same command continues
where the last one stopped: what has its name is not made again. The engine is any concurrent.futures.Executor; with
build.task there is no engine at all, only processes that see the same directory. A document of corpus.train belongs to
the valid stream when its keyed hash says so, wherever it stands; repeated documents stay on one side; one document
alone is split by position. Units stay when the streams are there, so that the next build encodes what is new. The
price: every token lies on disk twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rnnlm import files
from rnnlm.config import Config
from rnnlm.data.build.assemble import Assembler, BuildContext
from rnnlm.data.build.encode import (
    EncodeContext,
    EncodeTask,
    UnitOfFiles,
    check_unchanged,
    read_entry,
    run_encode_task,
    write_rejected_unit,
)
from rnnlm.data.build.executor import killed_twice, pool_of
from rnnlm.data.build.inputs import Inputs
from rnnlm.data.build.kept import check_directory, say, tidy
from rnnlm.data.build.shared_tasks import LOCKS, SharedPool, joined
from rnnlm.data.build.unit_file import DamagedUnitError, forget_checked
from rnnlm.data.encoder import Encoder
from rnnlm.data.filetypes import document_of_all
from rnnlm.data.jobs import Job, jobs
from rnnlm.data.sources import Source, corpus_sources
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import REPLACED
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.machine import cores

EARLIER = {"shares": {"": 1.0}}  # options of streams of version 2


class Build:
    """One build: the streams of stream.directory from the files of the corpus section."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Look at the inputs; nothing is written yet.

        Raises:
            UserError: no stream.directory, or one of something else; no corpus, or inputs that cannot be read.
        """
        if not config.stream.directory:
            raise UserError("stream.directory is not set; give the directory for the streams")
        if not config.corpus.train:
            raise UserError("corpus.train is not set; give text files, as in --corpus.train=my.txt")

        self.config, self.tokenizer = config, tokenizer
        self.directory = Path(config.stream.directory)
        check_directory(self.directory)
        self.task = parse_task(config.build.task)
        self.inputs = Inputs(corpus_sources(config.corpus), self.directory / "build/inputs.jsonl")

        self.context = BuildContext(config, self._work())
        hashes = config.corpus.deduplicate or any(share % 1 for share in config.corpus.shares.values())
        splits = self.inputs.by_split
        self.encoding = EncodeContext.of(config, splits, hashes, tokenizer.digest, self.context.work)
        self.splits = [*splits, *(["valid"] if self.context.holds_out("train") else [])]

    def _work(self) -> Path:
        """The directory of this build's own files: its name is a digest of all that they depend on."""
        sha256 = hashlib.sha256(json.dumps(self.options(), sort_keys=True).encode())
        sha256.update(repr(self.config.corpus.unit_bytes).encode())
        for source in self.inputs.all():
            sha256.update(repr((source.group, source.path, source.size, source.stamp)).encode())
        return self.directory / "build" / f"work-{sha256.hexdigest()[:16]}"

    def source(self) -> dict[str, Any]:
        """What the streams are made from; recorded in the manifest, so that a finished build is known again."""
        return {"sources_sha256": self.inputs.digest(), **self.options()}

    def options(self) -> dict[str, Any]:
        """The options that a stream depends on; what changes the units alone, as unit_bytes, changes no stream."""
        corpus, stream = self.config.corpus, self.config.stream
        every = {
            "document": document_of_all([source.path for source in self.inputs.all()], corpus.document),
            "field": corpus.field,
            "on_bad_record": corpus.on_bad_record,
            "max_document_bytes": corpus.max_document_bytes,
            "max_whole_bytes": corpus.max_whole_bytes,
            "deduplicate": corpus.deduplicate,
            "shuffle_seed": corpus.shuffle_seed,
        }

        if isinstance(corpus.train, dict):
            every["shares"] = corpus.shares
        every |= {name: getattr(stream, name) for name in ("valid_fraction", "split_seed", "shard_tokens")}
        if not corpus.valid:
            every["valid_max_tokens"] = stream.valid_max_tokens
        return {**every, "tokenizer": self.tokenizer.digest}

    def finished(self) -> dict[str, Manifest]:
        """The streams that are already there, made from the same source.

        Raises:
            UserError: a stream is there that was made from something else, and build.replace is not set.
        """
        found: dict[str, Manifest] = {}
        for split in ("train", "valid", "test"):
            path = self.context.stream_path(split)
            if not path.exists():
                continue
            if not (path / "stream.json").exists():
                raise UserError(f"{path}: is in the way and holds no stream; remove it")

            manifest = Manifest.read(path)
            if split not in self.splits:
                raise UserError(f"{path}: a stream is there with other splits; remove it, or {self._way_out()}")
            if not (differing := self._differing(path, manifest)):
                found[split] = manifest
            elif not self.config.build.replace:
                raise UserError(
                    f"{path}: a stream is there with other {differing}; remove it, set build.replace=true, which keeps "
                    f"it until the new one is there{self._count_new()}, or {self._way_out()}"
                )
        return found

    def _way_out(self) -> str:
        return "choose another stream.directory"

    def _differing(self, path: Path, manifest: Manifest) -> str:
        """What a stream was made from and this build is not, in words."""
        theirs = {**self.options(), **EARLIER} if manifest.version < 3 else {}  # it does not say all of them
        theirs |= manifest.source
        options = [key for key, value in self.options().items() if theirs.get(key) != value]
        files_differ = self.inputs.differing(path, manifest)
        return ", ".join([*options, *([files_differ] if files_differ else [])])

    def _count_new(self) -> str:
        """How much a rebuild would encode, in words; nothing if that is all."""
        new = every = 0
        for job in self._jobs(1):
            first = self.encoding.listing_path(job) if job.stride else self.encoding.unit_path(job, job.unit)
            every, new = every + 1, new + (not first.exists())
        return f" and encodes {new:,} of {every:,} units" if new < every else ""

    def run(
        self, progress: Callable[[int], None], executor: Callable[[], Executor] | None = None
    ) -> dict[str, Manifest]:
        """Do what is left of the build, with all others who do; calls progress(bytes read from disk) on the way.

        Args:
            executor: makes the executor that encodes, again if it breaks; None: what the build section says.

        Returns:
            The manifests of all streams.

        Raises:
            UserError: nothing to train on, a bad record, a file that changes, a unit that kills its worker, a foreign
                stream in the way, another build in the same directory.
        """
        forget_checked()
        done = self.finished()
        if self.inputs.touched:
            more = f" and {len(self.inputs.touched) - 1:,} more" if len(self.inputs.touched) > 1 else ""
            say(f"{self.inputs.touched[0]}{more}: touched since, but the same as before, as far as samples tell")
        if set(done) == set(self.splits) and not self.context.work.exists() and self.config.build.keep_units:
            return done

        with joined(self.directory / "build/lock", self.context.work.name, str(self.directory)) as leave:
            if targets := sorted(set(self.splits) - set(self.finished())):  # others may have finished in between
                self._prepare()
                self._make(targets, progress, executor)
            if leave():  # the last one clears up
                self._end()
        return {split: Manifest.read(self.context.stream_path(split)) for split in self.splits}

    def _make(
        self, targets: Sequence[str], progress: Callable[[int], None], executor: Callable[[], Executor] | None
    ) -> None:
        """Encode what is not encoded, make these streams of it, and give them their names."""
        workers = self.config.build.workers or cores()
        tasks = [EncodeTask(job, self.encoding.entry_path(job)) for job in self._jobs(workers * self.task[1])]
        damaged = Counter[Path]()
        while True:
            try:
                # left after each try: ends what runs beside a failed task
                with pool_of(self.config.build, min(workers, len(tasks)), executor) as pool:
                    shared = SharedPool(pool, self.context.work, self.task)
                    self._encode(tasks, shared, progress)
                    units = self._units(tasks)
                    assembler = Assembler(self.context, self.tokenizer, self.source(), self.inputs, units, shared)
                    return assembler.run(targets, lambda: check_unchanged(self.inputs.all()))
            except DamagedUnitError as error:
                self._drop(error, damaged)

    def _jobs(self, workers: int) -> Iterator[Job]:
        for split, sources in self.inputs.by_split.items():
            yield from jobs(split, sources, self.config.corpus, workers)

    def _prepare(self) -> None:
        """Make the directories of the build, or continue in them; others' are named and left."""
        work = self.context.work
        others = [path for path in self.directory.glob("build/work-*") if path != work]
        for path in (*others, *self.directory.glob("build.partial")):
            say(f"{path}: of another build, or another version, that was not finished; remove it if nobody wants it")

        directories = {self.encoding.directory(split) for split in self.inputs.by_split}
        for path in (work / "jobs", work / LOCKS, *directories):
            files.make_directory(path)
            files.sync(path.parent)
            files.clear_temporaries(path)
        for path in (self.directory.parent, self.directory, work.parent, self.encoding.units):
            files.sync(path)  # names that someone made who died before they were on disk
        files.clear_temporaries(work)
        if not (work / self.tokenizer.file_name).exists():
            files.write_file(work / self.tokenizer.file_name, self.tokenizer.model)

    def _encode(self, tasks: Sequence[EncodeTask], shared: SharedPool, progress: Callable[[int], None]) -> None:
        """Have all units encoded: the largest jobs first, further readers of a file when all have one."""
        corpus = self.config.corpus
        order = sorted(tasks, key=lambda task: (task.job.unit if task.job.stride else 0, -task.job.bytes(corpus)))
        failed = shared.run(
            "encode", order, run_encode_task, self.encoding, lambda task: progress(task.job.bytes(corpus))
        )
        self._reject_units(failed)

    def _reject_units(self, failed: Sequence[EncodeTask]) -> None:
        """Units that killed two workers: an error, or with bad records skipped a rejected record each."""
        left = [task.job for task in failed if task.job.stride or self.config.corpus.on_bad_record == "fail"]
        if left:
            ways_out = ", fix the file, or set corpus.on_bad_record=skip; all others are done"
            raise killed_twice((f"{job} ({self._range(job)})" for job in left), ways_out)
        for task in failed:
            write_rejected_unit(self.encoding, task, Encoder(self.tokenizer))

    def _range(self, job: Job) -> str:
        if job.stride or len(job.sources) > 1:
            return "any of its units" if job.stride else "any of its files"
        begin = job.unit * self.config.corpus.unit_bytes
        return f"bytes {begin:,} to {begin + job.bytes(self.config.corpus):,}"

    def _units(self, tasks: Sequence[EncodeTask]) -> dict[str, list[UnitOfFiles]]:
        """By split: all unit files, in the order of the corpus; what is in their files is learnt on the way."""
        units: dict[str, list[UnitOfFiles]] = {split: [] for split in self.inputs.by_split}
        first_lines = {split: self.inputs.first_line(split) for split in units}
        for task in tasks:
            job = task.job
            if job.stride and job.unit:  # one of several readers, which have one entry
                continue
            if not (entry := read_entry(task.path)):
                raise DamagedUnitError(task.path, "is not whole")
            line = first_lines[job.split] + job.file
            units[job.split] += [UnitOfFiles(self.encoding.unit_path(job, number), line) for number in entry.units]
            self.inputs.learn(line, entry.contents)
        return units

    def _drop(self, error: DamagedUnitError, damaged: Counter[Path]) -> None:
        """Have a unit made again that is not what was written.

        Raises:
            UserError: it was, a moment ago.
        """
        damaged[error.path] += error.path.exists()  # a missing one may have been dropped for another task
        if damaged[error.path] > 2:
            raise UserError(f"{error.path}: {error.reason}, although it was made again twice; look at the disk")
        say(f"{error.path}: {error.reason}; it is made again")
        error.path.unlink(missing_ok=True)
        key = error.path.name.rpartition("-")[0]
        for entry in self.context.work.glob(f"jobs/*-{key}*.json"):
            entry.unlink(missing_ok=True)

    def _end(self) -> None:
        """Clear up behind a build whose streams are all there."""
        for split in self.splits:
            files.remove_tree(self.context.stream_path(split).with_name(split + REPLACED))
        self.inputs.remember()
        files.remove_tree(self.context.work)
        names: dict[Path, set[str]] = {self.encoding.directory(split): set() for split in self.inputs.by_split}
        for job in self._jobs(1):
            names[self.encoding.directory(job.split)].add(job.key)
        tidy(names, self.config.build.keep_units)


def parse_task(text: str) -> tuple[int, int]:
    """'3/16' -> (3, 16); nothing -> (0, 1).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", text or "0/1")
    if not found:
        raise UserError(f"build.task={text}: expected a task and how many there are, as in 3/16")
    return int(found[1]), int(found[2])


@contextmanager
def progress_bar(inputs: Iterable[Source], verb: str) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes just read; shows MB/s and time left on a terminal."""
    total = sum(file.size for file in inputs)
    with tqdm(total=total, desc=verb, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def progress(size: int) -> None:
            bar.update(size)

        yield progress
