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
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rnnlm import files
from rnnlm.config import Config, as_list
from rnnlm.data.build.assemble import SPAN_DOCUMENTS, SPAN_HASHES, SPAN_TOKENS, Assembler, BuildContext, UnitOfFiles
from rnnlm.data.build.executor import WorkerPool, dask_pool, process_pool
from rnnlm.data.build.inputs import Inputs
from rnnlm.data.build.unit_file import write_json
from rnnlm.data.build.units import write_unit
from rnnlm.data.documents import Rejected, read
from rnnlm.data.encoder import Encoder
from rnnlm.data.jobs import Job, jobs
from rnnlm.data.sources import Source, sources
from rnnlm.data.stream_format import Manifest
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest

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

    passed = []
    for number, items in read(job, context.config.corpus):
        path = context.unit_path(job, number)
        if job.owns(number) and not path.exists():
            names = [source.name for source in job.sources]
            write_unit(path, items, names, context.unit_options(job.split), _local.encoder)
        passed.append(number)
    if job.stride:
        write_json(context.listing_path(job), passed)


class Build:
    """One build: the streams of stream.directory from the files of the corpus section."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Look at the inputs; nothing is written yet.

        Raises:
            UserError: no stream.directory, no corpus, or inputs that cannot be read.
        """
        if not config.stream.directory:
            raise UserError("stream.directory is not set; give the directory for the streams")
        if not as_list(config.corpus.train):
            raise UserError("corpus.train is not set; give text files, as in --corpus.train=my.txt")

        self.config, self.tokenizer = config, tokenizer
        self.task = parse_task(config.build.task)
        given = {"train": config.corpus.train, "valid": config.corpus.valid, "test": config.corpus.test}
        self.inputs = {split: sources(paths, f"corpus.{split}") for split, paths in given.items() if as_list(paths)}
        self.context = BuildContext(config, self._work(config.corpus.on_bad_record), tokenizer.digest)
        self.splits = [*self.inputs, *(["valid"] if self.context.holds_out("train") else [])]

    def _work(self, on_bad_record: str) -> Path:
        """The directory of this build's own files: its name is a digest of all that they depend on."""
        stamps = [[file.path, file.stamp] for inputs in self.inputs.values() for file in inputs]
        other = {"on_bad_record": on_bad_record, "unit_bytes": self.config.corpus.unit_bytes, "stamps": stamps}
        other["spans"] = [SPAN_HASHES, SPAN_TOKENS, SPAN_DOCUMENTS]  # spill files of other sizes are of no use
        return Path(self.config.stream.directory) / "build.partial" / json_digest({**self._options(), **other})[:16]

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
            "valid_fraction": stream.valid_fraction,
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
        """Do what is left of the build, or of one task; calls progress(bytes read from disk) on the way.

        Args:
            executor: makes the executor that encodes, again if it breaks; None: what the build section says.

        Returns:
            The manifests of all streams; none after a task of an array.

        Raises:
            UserError: nothing to train on, a bad record, a unit that kills its worker, a foreign stream in the way,
                another build in the same directory.
        """
        done = self.finished()
        if set(done) == set(self.splits):
            shutil.rmtree(self.context.work.parent, ignore_errors=True)
            return done

        task, tasks = self.task
        workers = self.config.build.workers or len(os.sched_getaffinity(0))
        own_jobs = list(self._jobs(tasks if tasks > 1 else workers))[task::tasks]
        holder = self.context.work.parent / "builder"
        with (
            files.locked(Path(self.config.stream.directory), holder, "build", shared=tasks > 1),
            self._make_pool(executor, workers, len(own_jobs)) as pool,
        ):
            self._prepare_work()
            self._encode(own_jobs, pool, progress)
            if tasks > 1:  # the streams are for the one command without build.task
                return {}
            units = {split: self._units_of(split) for split in self.inputs}
            assembler = Assembler(self.context, self.tokenizer, self.source(), Inputs(self.inputs), units, pool)
            manifests = assembler.run(sorted(set(self.splits) - set(done)))
            shutil.rmtree(self.context.work.parent)
        return {**done, **manifests}

    def _make_pool(self, executor: Callable[[], Executor] | None, workers: int, job_count: int) -> WorkerPool:
        if executor is not None:
            return WorkerPool(executor, workers)
        if self.config.build.dask:
            return dask_pool(self.config.build.dask)
        return process_pool(min(workers, job_count))

    def _jobs(self, workers: int) -> Iterator[Job]:
        return chain.from_iterable(
            jobs(split, inputs, self.config.corpus, workers) for split, inputs in self.inputs.items()
        )

    def _prepare_work(self) -> None:
        """Continue in the work directory of the same build; another's is removed."""
        work, shared = self.context.work, self.task[1] > 1
        strict = self._work("fail")  # its units had no bad record: they serve under any policy
        others = [path for path in work.parent.iterdir() if path.is_dir() and path not in (work, strict)]
        if shared and others:
            raise UserError(f"{work.parent}: tasks of another build are there; wait for them, or remove it")

        if not work.exists() and strict.exists() and not shared:
            strict.rename(work)
        (work / "units").mkdir(parents=True, exist_ok=True)
        if not (work / "tokenizer.model").exists():
            files.write_file(work / "tokenizer.model", self.tokenizer.model)

        if not shared:  # else other tasks may be writing what seems left over
            for other in {*others, strict} - {work}:
                shutil.rmtree(other, ignore_errors=True)
            for leftover in chain(work.glob(".*"), work.glob("*/.*")):
                leftover.unlink()

    def _encode(self, own_jobs: Sequence[Job], pool: WorkerPool, progress: Callable[[int], None]) -> None:
        """Encode what is not encoded yet."""
        corpus = self.config.corpus
        left = []
        for job in own_jobs:
            if self._is_done(job):
                progress(job.bytes(corpus))
            else:
                left.append(job)
        failed = pool.run(encode_job, self.context, left, lambda job: progress(job.bytes(corpus)))
        self._reject_units(failed)

    def _is_done(self, job: Job) -> bool:
        if not job.stride:
            return self.context.unit_path(job, job.unit).exists()
        if not self.context.listing_path(job).exists():
            return False
        numbers = json.loads(self.context.listing_path(job).read_bytes())
        return all(self.context.unit_path(job, n).exists() for n in numbers if job.owns(n))

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
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"build.task={text}: expected a task of an array, from 0/16 to 15/16 if there are 16")
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
