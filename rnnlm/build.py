"""Corpus -> token streams: encode units in any order on any workers, then commit them in corpus order.

    files --jobs--> workers --> unit files --(deduplicate)--(shuffle)--> shards, documents.npy --> stream.json, rename

A unit file, a shuffled unit and a shard are each a pure function of what comes before, written under a temporary name
and renamed. So any number of workers, of kills and of repeats gives the same bytes, and the same command goes on where
it was: what has its name is not made again. The engine is any concurrent.futures.Executor; with build.task there is no
engine at all, only processes that see the same directory. A document of corpus.train belongs to the valid stream when
its keyed hash says so, wherever it stands; repeated documents stay on one side.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from rnnlm.config import Config, UserError, as_list
from rnnlm.corpus import Job, Rejected, Source, jobs, read, sources
from rnnlm.encoder import Encoder
from rnnlm.stream import Manifest, commit, json_digest, temporary, write_array, write_durably, write_shard
from rnnlm.tokenizer import Tokenizer, token_dtype
from rnnlm.units import (
    TO_VALID,
    Part,
    UnitFile,
    find_duplicates,
    rejected_path,
    rows_of,
    shuffle_unit,
    tokens_of,
    write_unit,
)
from rnnlm.workers import Workers, dask, pool

BUCKET_DOCUMENTS = 2**20  # whose hashes are compared at once
SHUFFLED_TOKENS = 2**23  # of a unit of shuffled documents, about, or
SHUFFLED_DOCUMENTS = 2**18
_here = threading.local()  # each thread of a worker has an encoder of its own


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
        if (not job.step or number % job.step == job.unit) and not path.exists():
            write_unit(path, items, setting.splits_off(job.split), setting.config, _here.encoder)
        passed.append(number)
    if job.step:
        _write_json(setting.listing(job), passed)


def shuffle_task(setting: Setting, task: tuple[Path, Sequence[Part], int, int]) -> None:
    """Write one unit of shuffled documents."""
    shuffle_unit(*task, seed=setting.config.corpus.shuffle_seed)


def duplicates_task(setting: Setting, task: tuple[Path, Sequence[Path], int, int]) -> None:
    """Find the repeated documents of one bucket of hashes."""
    path, units, bucket, buckets = task
    write_array(path, find_duplicates(units, bucket, buckets), "<i8")


def shard_task(setting: Setting, task: tuple[Path, Sequence[Part], int, int]) -> None:
    """Write one shard, then beside its directory what the manifest says of it."""
    path, parts, first, last = task
    tokenizer = Tokenizer.load(setting.work / "tokenizer.model")
    _write_json(_entry(path), write_shard(path, tokens_of(parts, first, last), tokenizer))


def _entry(shard: Path) -> Path:
    return shard.parent.with_name(f"{shard.parent.name}-{shard.stem}.json")


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value).encode())


def _write(path: Path, data: bytes) -> None:
    partial = temporary(path)
    write_durably(partial, data)
    partial.replace(path)


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
            "deduplicate": corpus.deduplicate,
            "shuffle_seed": corpus.shuffle_seed,
            "valid_fraction": stream.valid_fraction,
            "split_seed": stream.split_seed,
            "shard_tokens": stream.shard_tokens,
            "tokenizer": self.tokenizer.digest,
        }

    def directory(self, split: str) -> Path:
        """Where the stream of a split lies."""
        return Path(self.config.stream.directory) / split

    def finished(self) -> dict[str, Manifest]:
        """The streams that are already there, made from the same source.

        Raises:
            UserError: a stream is there that was made from something else.
        """
        found: dict[str, Manifest] = {}
        for split in ("train", "valid", "test"):
            if self.directory(split).exists():
                if not (self.directory(split) / "stream.json").exists():
                    raise UserError(f"{self.directory(split)}: is in the way and holds no stream; remove it")
                manifest = Manifest.read(self.directory(split))
                differing = [key for key, value in self.source().items() if manifest.source.get(key) != value]
                if differing or split not in self.splits:
                    raise UserError(
                        f"{self.directory(split)}: a stream is there with other {', '.join(differing) or 'splits'}; "
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
        with self._locked(), self._workers(executor, workers, len(mine)) as crew:
            self._prepare()
            for job in mine:
                if self._is_done(job):
                    progress(job.bytes(self.config.corpus))
            left = [job for job in mine if not self._is_done(job)]
            aside = crew.run(encode_job, self.setting, left, lambda job: progress(job.bytes(self.config.corpus)))
            self._set_aside(aside)
            if tasks > 1:
                return {}
            manifests = self._commit(crew, done)
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
        if not job.step:
            return self.setting.unit(job, job.unit).exists()
        if not self.setting.listing(job).exists():
            return False
        numbers = json.loads(self.setting.listing(job).read_bytes())
        return all(self.setting.unit(job, n).exists() for n in numbers if n % job.step == job.unit)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One build in a directory at a time, or the tasks of one array; the kernel frees the lock of the dead.

        It is the directory itself that is locked: a file would have to be removed, and that cannot be done safely.
        """
        root, shared = Path(self.config.stream.directory), self.task[1] > 1
        root.mkdir(parents=True, exist_ok=True)
        holder, handle = root / "build.partial" / "builder", os.open(root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                found = holder.read_text() if holder.is_file() else "a task of an array, perhaps"
                raise UserError(f"{root}: another build is working there ({found}); wait for it") from error
            except OSError:  # a file system without locks
                pass
            holder.parent.mkdir(exist_ok=True)
            if not shared:
                _write(holder, f"{socket.gethostname()}, process {os.getpid()}, {time.ctime()}".encode())
            else:
                holder.unlink(missing_ok=True)
            yield
        finally:
            os.close(handle)

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
            _write(work / "tokenizer.model", self.tokenizer.model)
        if not shared:
            for other in {*others, strict} - {work}:
                shutil.rmtree(other, ignore_errors=True)
            for leftover in chain(work.glob(".*"), work.glob("*/.*")):
                leftover.unlink()

    def _set_aside(self, aside: Sequence[Job]) -> None:
        """Units that killed two workers: an error, or with bad records skipped a rejected record each."""
        left = [job for job in aside if job.step or self.config.corpus.on_bad_record == "fail"]
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
        return "any of its units" if job.step else f"bytes {begin:,} to {begin + job.bytes(self.config.corpus):,}"

    def _unit_paths(self, split: str) -> list[Path]:
        paths = []
        for job in jobs(split, self.inputs[split], self.config.corpus, 1):
            numbers = json.loads(self.setting.listing(job).read_bytes()) if job.step else [job.unit]
            paths += [self.setting.unit(job, number) for number in numbers]
        return paths

    def _commit(self, crew: Workers, done: dict[str, Manifest]) -> dict[str, Manifest]:
        """Unit files -> streams."""
        parts: dict[str, list[Part]] = {}
        records: dict[str, dict[str, int]] = {}
        for split in self.inputs:
            paths = self._unit_paths(split)
            footers = [UnitFile(path).footer for path in paths]
            dropped = self._duplicates(crew, split, paths, footers) if self.config.corpus.deduplicate else {}
            for target, side in ((split, 0), *((("valid", 1),) if self.setting.splits_off(split) else ())):
                parts[target], records[target] = _side(paths, footers, dropped, side)
        for target in self.splits:
            if not sum(part.totals[1] for part in parts[target]):
                hint = ", or a larger stream.valid_fraction" if target == "valid" else ""
                found = f"{records[target]['read']} records, none kept"
                raise UserError(f"corpus.{target}: no text in it ({found}); give a corpus with text{hint}")
        order = sorted(set(self.splits) - set(done), key=lambda split: (split == "train", split))
        for target in order:  # the stream that training opens first comes last
            if self.config.corpus.shuffle_seed >= 0:
                parts[target] = self._shuffle(crew, target, parts[target])
        return {target: self._write_stream(crew, target, parts[target], records[target]) for target in order}

    def _duplicates(
        self, crew: Workers, split: str, paths: list[Path], footers: list[dict[str, Any]]
    ) -> dict[Path, tuple[Path, npt.NDArray[np.int64]]]:
        """By unit: a file with the numbers of its rows that are dropped, and (side, 4) what is lost with them."""
        ends = np.cumsum([footer["rows"] for footer in footers])
        buckets = -(-int(ends[-1]) // BUCKET_DOCUMENTS) if len(ends) else 0
        found = [self.setting.work / f"{split}-duplicates-{bucket:06d}.npy" for bucket in range(buckets)]
        left = [(path, paths, bucket, buckets) for bucket, path in enumerate(found) if not path.exists()]
        _no_strays(crew.run(duplicates_task, self.setting, left, lambda task: None))
        numbers = [np.load(path, mmap_mode="r") for path in found]
        dropped = {}
        for path, footer, end in zip(paths, footers, ends.tolist(), strict=True):
            begin = end - footer["rows"]
            slices = [each[slice(*np.searchsorted(each, [begin, end]))] - begin for each in numbers]
            if sum(map(len, slices)):
                gone = np.sort(np.concatenate(slices))
                rows, listed = UnitFile(path).rows, path.with_suffix(".dropped.npy")
                write_array(listed, [gone], "<i8")
                sides = [rows[gone[rows[gone, TO_VALID] == side], :TO_VALID] for side in (0, 1)]
                dropped[path] = listed, np.array([[len(lost), *lost.sum(0)] for lost in sides])
        return dropped

    def _shuffle(self, crew: Workers, target: str, parts: list[Part]) -> list[Part]:
        documents, tokens = (sum(part.totals[column] for part in parts) for column in (0, 1))
        step = min(max(1, documents * SHUFFLED_TOKENS // tokens), SHUFFLED_DOCUMENTS)
        name = f"{target}-shuffled"
        paths = [self.setting.work / f"{name}-{first:012d}.unit" for first in range(0, documents, step)]
        tasks = [(path, parts, index * step, min((index + 1) * step, documents)) for index, path in enumerate(paths)]
        left = [task for task in tasks if not task[0].exists()]
        _no_strays(crew.run(shuffle_task, self.setting, left, lambda task: None))
        shuffled = []
        for path in paths:
            rows = UnitFile(path).rows
            shuffled.append(Part(path, 0, None, (len(rows), *rows[:, :TO_VALID].sum(0).tolist())))
        return shuffled

    def _write_stream(self, crew: Workers, target: str, parts: list[Part], records: dict[str, int]) -> Manifest:
        partial, size = self.setting.work / target, self.config.stream.shard_tokens
        partial.mkdir(exist_ok=True)
        documents, tokens, text_bytes, words = (sum(part.totals[column] for part in parts) for column in range(4))
        ends = np.cumsum([part.totals[1] for part in parts])
        shards = [partial / f"shard-{index:05d}.npy" for index in range(-(-tokens // size))]
        left = []
        for index, shard in enumerate(shards):
            if not (_entry(shard).exists() and shard.exists()):
                first, last = index * size, min((index + 1) * size, tokens)
                begin, end = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last) + 1
                before = int(ends[begin - 1]) if begin else 0
                left.append((shard, parts[begin:end], first - before, last - before))
        _no_strays(crew.run(shard_task, self.setting, left, lambda task: None))
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
            source=self.source(),
            shards=entries,
            documents_sha256=write_array(partial / "documents.npy", _totals(parts), "<i8", (3,))[1],
            rejected_sha256=self._write_rejected(target, partial / "rejected.jsonl"),
        )
        write_durably(partial / "tokenizer.model", self.tokenizer.model)
        return commit(partial, self.directory(target), manifest)

    def _write_rejected(self, target: str, path: Path) -> str:
        """Join the lists of the units that were read for this stream; the digest, or nothing if there are none."""
        units = self._unit_paths(target) if target in self.inputs else []
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


def _side(
    paths: list[Path], footers: list[dict[str, Any]], dropped: dict[Path, Any], side: int
) -> tuple[list[Part], dict[str, int]]:
    """What units give to one side of a split, and the counts of records for its manifest."""
    parts, lost = [], 0
    for path, footer in zip(paths, footers, strict=True):
        totals, listed = np.array(footer["totals"][side]), None
        if path in dropped:
            listed = dropped[path][0]
            totals = totals - dropped[path][1][side]
            lost += int(dropped[path][1][side][0])
        parts.append(Part(path, side, listed, tuple(totals.tolist())))
    counted: Counter[str] = sum((Counter(footer["records"]) for footer in footers), Counter())
    here, there = (sum(footer["totals"][each][0] for footer in footers) for each in (side, 1 - side))
    rejected = {} if side else {name: n for name, n in counted.items() if name not in ("read", "kept", "empty")}
    records = {
        "read": here if side else counted["read"] - there,
        "kept": here - lost,
        "empty": 0 if side else counted["empty"],
        **({"duplicate": lost} if lost else {}),
        **dict(sorted(rejected.items())),
    }
    assert records["read"] == sum(records.values()) - records["read"], records
    return parts, {**records, "mended": sum(footer["mended"][side] for footer in footers)}


def _totals(parts: Iterable[Part]) -> Iterator[npt.NDArray[np.int64]]:
    """(documents, 3) running totals, part by part."""
    before = np.zeros(3, np.int64)
    for part in parts:
        for rows in rows_of(part):
            totals = before + np.cumsum(rows, axis=0)
            yield totals
            before = totals[-1] if len(totals) else before


def _no_strays(aside: Sequence[Any]) -> None:
    if aside:
        raise UserError(f"{aside[0][0]}: its worker was killed twice, out of memory perhaps; use fewer build.workers")


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
