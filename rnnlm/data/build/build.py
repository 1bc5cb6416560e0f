"""Corpus -> token streams: encode units in any order on any workers, then commit them in corpus order.

    files --jobs--> workers --> unit files --assemble--> streams

A unit file, a shuffled unit and a shard are each a pure function of what comes before, written under a temporary name
and renamed. So any number of workers, of kills and of repeats gives the same bytes, and the same command goes on where
it was: what has its name is not made again. The engine is any concurrent.futures.Executor; with build.task there is no
engine at all, only processes that see the same directory. A document of corpus.train belongs to the valid stream when
its keyed hash says so, wherever it stands; repeated documents stay on one side.
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

from rnnlm.config import Config, as_list
from rnnlm.data.build.assemble import RUN_DOCUMENTS, RUN_HASHES, RUN_TOKENS, Assembly, Setting
from rnnlm.data.build.executor import Workers, dask, pool
from rnnlm.data.build.units import write_json, write_unit
from rnnlm.data.documents import Rejected, read
from rnnlm.data.encoder import Encoder
from rnnlm.data.jobs import Job, jobs
from rnnlm.data.sources import Source, sources
from rnnlm.data.stream_format import Manifest
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.files import locked, write_file
from rnnlm.hashing import json_digest

_here = threading.local()  # each thread of a worker has an encoder of its own


def encode_job(setting: Setting, job: Job) -> None:
    """Encode the units of a job that are not there yet.

    Raises:
        UserError: a bad record, unless those are skipped.
    """
    if getattr(_here, "digest", "") != setting.digest:
        tokenizer = Tokenizer.load(setting.work / "tokenizer.model")
        assert tokenizer.digest == setting.digest
        _here.encoder, _here.digest = Encoder(tokenizer), setting.digest
    passed = []
    for number, items in read(job, setting.config.corpus):
        path = setting.unit(job, number)
        if job.owns(number) and not path.exists():
            write_unit(path, items, setting.splits_off(job.split), setting.config, _here.encoder)
        passed.append(number)
    if job.stride:
        write_json(setting.listing(job), passed)


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
        self.setting = Setting(config, self._work(config.corpus.on_bad_record), tokenizer.digest)
        self.splits = [*self.inputs, *(["valid"] if self.setting.splits_off("train") else [])]

    def _work(self, on_bad_record: str) -> Path:
        """Where this build is done: its name says all that its files depend on, so that none is another build's."""
        stamps = [[file.path, file.stamp] for files in self.inputs.values() for file in files]
        other = {"on_bad_record": on_bad_record, "unit_bytes": self.config.corpus.unit_bytes, "stamps": stamps}
        other["runs"] = [RUN_HASHES, RUN_TOKENS, RUN_DOCUMENTS]  # spill files of other sizes are of no use
        return Path(self.config.stream.directory) / "build.partial" / json_digest({**self.source(), **other})[:16]

    def source(self) -> dict[str, Any]:
        """What the streams are made from; recorded in the manifest, so that a finished build is known again."""
        corpus, stream = self.config.corpus, self.config.stream
        return {
            "files": {split: [[file.name, file.size] for file in files] for split, files in self.inputs.items()},
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
            if self.setting.directory(split).exists():
                if not (self.setting.directory(split) / "stream.json").exists():
                    raise UserError(f"{self.setting.directory(split)}: is in the way and holds no stream; remove it")
                manifest = Manifest.read(self.setting.directory(split))
                differing = [key for key, value in self.source().items() if manifest.source.get(key) != value]
                if differing or split not in self.splits:
                    other = ", ".join(differing) or "splits"
                    raise UserError(
                        f"{self.setting.directory(split)}: a stream is there with other {other}; "
                        "remove it, or choose another stream.directory"
                    )
                found[split] = manifest
        return found

    def run(
        self, progress: Callable[[int], None], executor: Callable[[], Executor] | None = None
    ) -> dict[str, Manifest]:
        """Do what is left of the build, or of one task; calls progress(bytes read from disk) on the way.

        Args:
            executor: makes the executor that encodes, anew if it breaks; None: what the build section says.

        Returns:
            The manifests of all streams; none after a task of an array.

        Raises:
            UserError: nothing to train on, a bad record, a unit that kills its worker, a foreign stream in the way,
                another build in the same directory.
        """
        done = self.finished()
        if set(done) == set(self.splits):
            shutil.rmtree(self.setting.work.parent, ignore_errors=True)
            return done
        tasks, workers = self.task[1], self.config.build.workers or len(os.sched_getaffinity(0))
        work = list(self._jobs(tasks if tasks > 1 else workers))
        mine = work[self.task[0] :: tasks]
        holder = self.setting.work.parent / "builder"
        with (
            locked(Path(self.config.stream.directory), holder, "build", shared=tasks > 1),
            self._workers(executor, workers, len(mine)) as crew,
        ):
            self._prepare()
            for job in mine:
                if self._is_done(job):
                    progress(job.bytes(self.config.corpus))
            left = [job for job in mine if not self._is_done(job)]
            aside = crew.run(encode_job, self.setting, left, lambda job: progress(job.bytes(self.config.corpus)))
            self._set_aside(aside)
            if tasks > 1:
                return {}
            units = {split: self._unit_paths(split) for split in self.inputs}
            assembly = Assembly(self.setting, self.tokenizer, self.source(), units, crew)
            manifests = assembly.run(sorted(set(self.splits) - set(done)))
            shutil.rmtree(self.setting.work.parent)
        return {**done, **manifests}

    def _workers(self, executor: Callable[[], Executor] | None, workers: int, jobs: int) -> Workers:
        if executor is not None:
            return Workers(executor, workers)
        if self.config.build.dask:
            return dask(self.config.build.dask)
        return pool(min(workers, jobs))

    def _jobs(self, workers: int) -> Iterator[Job]:
        return chain.from_iterable(
            jobs(split, files, self.config.corpus, workers) for split, files in self.inputs.items()
        )

    def _is_done(self, job: Job) -> bool:
        if not job.stride:
            return self.setting.unit(job, job.unit).exists()
        if not self.setting.listing(job).exists():
            return False
        numbers = json.loads(self.setting.listing(job).read_bytes())
        return all(self.setting.unit(job, n).exists() for n in numbers if job.owns(n))

    def _prepare(self) -> None:
        """Go on in the work directory of the same build; another's is removed."""
        work, shared = self.setting.work, self.task[1] > 1
        strict = self._work("fail")  # its units had no bad record: they serve under any policy
        others = [path for path in work.parent.iterdir() if path.is_dir() and path not in (work, strict)]
        if shared and others:
            raise UserError(f"{work.parent}: tasks of another build are there; wait for them, or remove it")
        if not work.exists() and strict.exists() and not shared:
            strict.rename(work)
        (work / "units").mkdir(parents=True, exist_ok=True)
        if not (work / "tokenizer.model").exists():
            write_file(work / "tokenizer.model", self.tokenizer.model)
        if not shared:
            for other in {*others, strict} - {work}:
                shutil.rmtree(other, ignore_errors=True)
            for leftover in chain(work.glob(".*"), work.glob("*/.*")):
                leftover.unlink()

    def _set_aside(self, aside: Sequence[Job]) -> None:
        """Units that killed two workers: an error, or with bad records skipped a rejected record each."""
        left = [job for job in aside if job.stride or self.config.corpus.on_bad_record == "fail"]
        if left:
            raise UserError(
                f"{'; '.join(f'{job} ({self._range(job)})' for job in left)}: killed its worker twice, out of memory "
                "perhaps; all others are done. Use fewer build.workers, mend the file, or set corpus.on_bad_record=skip"
            )
        for job in aside:
            begin = job.unit * self.config.corpus.unit_bytes
            rejected = [Rejected(source.name, begin, "its worker was killed") for source in job.sources]
            write_unit(self.setting.unit(job, job.unit), rejected, False, self.config, Encoder(self.tokenizer))

    def _range(self, job: Job) -> str:
        begin = job.unit * self.config.corpus.unit_bytes
        return "any of its units" if job.stride else f"bytes {begin:,} to {begin + job.bytes(self.config.corpus):,}"

    def _unit_paths(self, split: str) -> list[Path]:
        paths = []
        for job in jobs(split, self.inputs[split], self.config.corpus, 1):
            numbers = json.loads(self.setting.listing(job).read_bytes()) if job.stride else [job.unit]
            paths += [self.setting.unit(job, number) for number in numbers]
        return paths


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
def progress_bar(files: Iterable[Source], verb: str) -> Iterator[Callable[[int], None]]:
    """A function to tell bytes read to; shows MB/s and time left on a terminal."""
    total = sum(file.size for file in files)
    with tqdm(total=total, desc=verb, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def progress(size: int) -> None:
            bar.update(size)

        yield progress
