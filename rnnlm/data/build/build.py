"""Corpus -> token streams: encode units in any order on any workers, then commit them in corpus order.

    files --jobs--> workers --> unit files --assemble--> streams

A unit file, a shuffled unit and a shard are each a pure function of what comes before, written under a temporary name
and renamed. So any number of workers, of kills and of repeats gives the same bytes, and the same command continues
where the last one stopped: what has its name is not made again. The engine is any concurrent.futures.Executor; with
build.task there is no engine at all, only processes that see the same directory. A document of corpus.train belongs to
the valid stream when its keyed hash says so, wherever it stands; repeated documents stay on one side. The price: every
token is written twice, once to a unit file.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rnnlm import files
from rnnlm.config import Config
from rnnlm.data.build.assemble import Assembler, BuildContext, UnitOfFiles
from rnnlm.data.build.executor import WorkerPool, dask_pool, process_pool, stopping
from rnnlm.data.build.inputs import Inputs
from rnnlm.data.build.shared_tasks import LOCKS, SharedPool, joined, taken
from rnnlm.data.build.unit_file import write_json
from rnnlm.data.build.units import write_unit
from rnnlm.data.documents import Rejected, read
from rnnlm.data.encoder import Encoder
from rnnlm.data.jobs import Job, jobs
from rnnlm.data.sources import Source, corpus_sources
from rnnlm.data.stream_format import Manifest
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest
from rnnlm.machine import cores

_local = threading.local()  # each thread of a worker has an encoder of its own


def encode_job(context: BuildContext, job: Job) -> None:
    """Encode the units of a job that are not there yet.

    Raises:
        UserError: a bad record, unless those are skipped.
    """
    if getattr(_local, "digest", "") != context.digest:
        tokenizer = Tokenizer.load(context.work / "tokenizer.model")
        assert tokenizer.digest == context.digest
        _local.encoder, _local.digest = Encoder(tokenizer), context.digest

    locks, options = context.work / LOCKS, context.unit_options(job.split)
    names, passed = [source.name for source in job.sources], []
    for number, items in read(job, context.config.corpus):
        if stopping():
            return
        path = context.unit_path(job, number)
        with taken(locks, path) as is_mine:  # else it is passed over
            if is_mine:
                write_unit(path, items, names, options, _local.encoder)
        passed.append(number)
    if job.stride:
        write_json(context.listing_path(job), passed)


@dataclass(frozen=True)
class EncodeTask:
    """A job, as processes share it."""

    context: BuildContext
    job: Job

    @property
    def path(self) -> Path:
        """The file that tells that the job is done, or at least that all its units are known."""
        if self.job.stride:
            return self.context.listing_path(self.job)
        return self.context.unit_path(self.job, self.job.unit)

    def is_done(self, exists: Callable[[Path], bool]) -> bool:
        """Whether all its units are there."""
        if not exists(self.path):
            return False
        numbers = json.loads(self.path.read_bytes()) if self.job.stride else []
        return all(exists(self.context.unit_path(self.job, number)) for number in numbers)


def run_encode_task(context: BuildContext, task: EncodeTask) -> None:
    """Do a job, unless it is done; a file that can only be read from its start has so many readers, not more."""
    if not task.job.stride:
        encode_job(context, task.job)
    elif not task.is_done(Path.exists):
        reader = task.path.with_suffix(f".reader-{task.job.unit}")
        with taken(context.work / LOCKS, reader) as is_mine:
            if is_mine:
                encode_job(context, task.job)


class Build:
    """One build: the streams of stream.directory from the files of the corpus section."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Look at the inputs; nothing is written yet.

        Raises:
            UserError: no stream.directory, no corpus, or inputs that cannot be read.
        """
        if not config.stream.directory:
            raise UserError("stream.directory is not set; give the directory for the streams")
        if not config.corpus.train:
            raise UserError("corpus.train is not set; give text files, as in --corpus.train=my.txt")

        self.config, self.tokenizer = config, tokenizer
        self.task = parse_task(config.build.task)
        self.inputs = corpus_sources(config.corpus)
        self.context = BuildContext(config, self._work(config.corpus.on_bad_record), tokenizer.digest)
        self.splits = [*self.inputs, *(["valid"] if self.context.holds_out("train") else [])]

    def _work(self, on_bad_record: str) -> Path:
        """The directory of this build's own files: its name is a digest of all that they depend on."""
        stamps = [[file.path, file.stamp] for inputs in self.inputs.values() for file in inputs]
        other = {"on_bad_record": on_bad_record, "unit_bytes": self.config.corpus.unit_bytes, "stamps": stamps}
        name = f"work-{json_digest({**self._options(), **other})[:16]}"
        return Path(self.config.stream.directory) / "build" / name

    def source(self) -> dict[str, Any]:
        """What the streams are made from; recorded in the manifest, so that a finished build is known again."""
        return {"sources_sha256": Inputs(self.inputs).digest(), **self._options()}

    def _options(self) -> dict[str, Any]:
        """The options that a stream depends on; what changes the units alone, as unit_bytes, changes no stream."""
        corpus, stream = self.config.corpus, self.config.stream
        return {
            "document": corpus.document,
            "field": corpus.field,
            "on_bad_record": corpus.on_bad_record,
            "max_document_bytes": corpus.max_document_bytes,
            "max_whole_bytes": corpus.max_whole_bytes,
            "deduplicate": corpus.deduplicate,
            "shuffle_seed": corpus.shuffle_seed,
            "shares": corpus.shares,
            "valid_fraction": stream.valid_fraction,
            "valid_max_tokens": stream.valid_max_tokens,
            "split_seed": stream.split_seed,
            "shard_tokens": stream.shard_tokens,
            "tokenizer": self.tokenizer.digest,
        }

    def finished(self) -> dict[str, Manifest]:
        """The streams that are already there, made from the same source.

        Raises:
            UserError: a stream is there that was made from something else.
        """
        found: dict[str, Manifest] = {}
        for split in ("train", "valid", "test"):
            path = self.context.stream_path(split)
            if not path.exists():
                continue
            if not (path / "stream.json").exists():
                raise UserError(f"{path}: is in the way and holds no stream; remove it")

            manifest = Manifest.read(path)
            differing = [key for key, value in self.source().items() if manifest.source.get(key) != value]
            if differing or split not in self.splits:
                raise UserError(
                    f"{path}: a stream is there with other {', '.join(differing) or 'splits'}; "
                    "remove it, or choose another stream.directory"
                )
            found[split] = manifest
        return found

    def run(
        self, progress: Callable[[int], None], executor: Callable[[], Executor] | None = None
    ) -> dict[str, Manifest]:
        """Do what is left of the build, with all others who do; calls progress(bytes read from disk) on the way.

        Args:
            executor: makes the executor that encodes, again if it breaks; None: what the build section says.

        Returns:
            The manifests of all streams.

        Raises:
            UserError: nothing to train on, a bad record, a unit that kills its worker, a foreign stream in the way,
                another build in the same directory.
        """
        done = self.finished()
        if set(done) == set(self.splits):
            self._clean()
            return done

        work, directory = self.context.work, self.config.stream.directory
        workers = self.config.build.workers or cores()
        tasks = self._tasks(workers * self.task[1])
        with (
            joined(work.parent / "lock", work.name, directory) as leave,
            self._make_pool(executor, min(workers, len(tasks))) as pool,
        ):
            done = self.finished()  # another process may have committed in between
            if left := sorted(set(self.splits) - set(done)):
                self._prepare_work()
                shared = SharedPool(pool, work, self.task)
                self._encode(shared, tasks, progress)
                units = {split: self._units_of(split) for split in self.inputs}
                assembler = Assembler(self.context, self.tokenizer, self.source(), Inputs(self.inputs), units, shared)
                done |= assembler.run(left)
            if leave():  # the last one
                self._clean()
        return done

    def _clean(self) -> None:
        """Remove what no build needs any more."""
        shutil.rmtree(self.context.work, ignore_errors=True)

    def _make_pool(self, executor: Callable[[], Executor] | None, workers: int) -> WorkerPool:
        if executor is not None:
            return WorkerPool(executor, workers)
        if self.config.build.dask:
            return dask_pool(self.config.build.dask)
        return process_pool(workers)

    def _tasks(self, workers: int) -> list[EncodeTask]:
        """All jobs, with readers enough for so many workers: the largest first, further readers of a file last."""
        corpus = self.config.corpus
        every = chain.from_iterable(jobs(split, inputs, corpus, workers) for split, inputs in self.inputs.items())
        order = sorted(every, key=lambda job: (job.unit if job.stride else 0, -job.bytes(corpus)))
        return [EncodeTask(self.context, job) for job in order]

    def _prepare_work(self) -> None:
        """Continue in the work directory of the same build."""
        (self.context.work / "units").mkdir(parents=True, exist_ok=True)
        if not (self.context.work / "tokenizer.model").exists():
            files.write_file(self.context.work / "tokenizer.model", self.tokenizer.model)

    def _encode(self, shared: SharedPool, tasks: Sequence[EncodeTask], progress: Callable[[int], None]) -> None:
        """Have all units encoded."""
        corpus = self.config.corpus

        def report(task: EncodeTask) -> None:
            progress(task.job.bytes(corpus))

        failed = shared.run("encode", tasks, run_encode_task, self.context, report)
        self._reject_units([task.job for task in failed])

    def _reject_units(self, failed: Sequence[Job]) -> None:
        """Units that killed two workers: an error, or with bad records skipped a rejected record each."""
        left = [job for job in failed if job.stride or self.config.corpus.on_bad_record == "fail"]
        if left:
            raise UserError(
                f"{'; '.join(f'{job} ({self._range(job)})' for job in left)}: killed its worker twice, out of memory "
                "perhaps; all others are done. Use fewer build.workers, fix the file, or set corpus.on_bad_record=skip"
            )
        for job in failed:
            begin = job.unit * self.config.corpus.unit_bytes
            rejected = [Rejected(source.name, begin, "its worker was killed") for source in job.sources]
            path, names = self.context.unit_path(job, job.unit), [source.name for source in job.sources]
            write_unit(path, rejected, names, self.context.unit_options(job.split), Encoder(self.tokenizer))

    def _range(self, job: Job) -> str:
        begin = job.unit * self.config.corpus.unit_bytes
        return "any of its units" if job.stride else f"bytes {begin:,} to {begin + job.bytes(self.config.corpus):,}"

    def _units_of(self, split: str) -> list[UnitOfFiles]:
        """All unit files of a split, in the order of the corpus."""
        units, first_file = [], Inputs(self.inputs).first_line(split)
        for job in jobs(split, self.inputs[split], self.config.corpus, 1):
            numbers = json.loads(self.context.listing_path(job).read_bytes()) if job.stride else [job.unit]
            units += [UnitOfFiles(self.context.unit_path(job, number), first_file + job.file) for number in numbers]
        return units


def parse_task(text: str) -> tuple[int, int]:
    """'3/16' -> (3, 16); nothing -> (0, 1).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", text or "0/1")
    if not found:
        raise UserError(f"build.task={text}: expected a task and how many there are, as in 3/16")
    return int(found[1]), int(found[2])


def tokenizer_path(config: Config) -> str:
    """Where the tokenizer lies: tokenizer.model, or in stream.directory.

    Raises:
        UserError: neither is set.
    """
    if not config.tokenizer.model and not config.stream.directory:
        raise UserError("stream.directory is not set; give the directory for tokenizer and streams")
    return config.tokenizer.model or str(Path(config.stream.directory) / "tokenizer.model")


@contextmanager
def progress_bar(inputs: Iterable[Source], verb: str) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes just read; shows MB/s and time left on a terminal."""
    total = sum(file.size for file in inputs)
    with tqdm(total=total, desc=verb, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def progress(size: int) -> None:
            bar.update(size)

        yield progress
