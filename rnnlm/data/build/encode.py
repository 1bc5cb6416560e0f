"""The first phase of a build: jobs -> unit files, each known by what it was made from, and kept for the next build.

    build/units/<shape>/<key>-000003.unit   unit 3 of the file, or of the group of small files, that <key> stands for
    build/units/<shape>/<key>.json          which units a file has that can only be read from its start
    build/work-.../jobs/....json            jobs of this build are done: their units, and digests of the files' content

<shape> is a digest of what shapes every unit: the tokenizer and some options. <key> is one of path, size and stamp. So
a build makes only those units that no build before it has made, whatever else has changed: appending a file encodes
that file. The price: a file that was touched or moved is encoded again, even if nothing in it is new.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rnnlm import files
from rnnlm.config import Config, CorpusConfig
from rnnlm.data.build.executor import stopping
from rnnlm.data.build.shared_tasks import LOCKS, taken
from rnnlm.data.build.unit_file import DamagedUnitError, UnitFile, write_json
from rnnlm.data.build.units import UnitOptions, write_unit
from rnnlm.data.documents import Item, Rejected, read
from rnnlm.data.encoder import Encoder
from rnnlm.data.jobs import Job
from rnnlm.data.sources import Source, content_digest, unchanged
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest

UNIT_VERSION = 1  # of the format of unit files
_local = threading.local()  # each thread of a worker has an encoder of its own


class UnitOfFiles(NamedTuple):
    """A unit file, and the number of its first input file in sources.jsonl."""

    path: Path
    first_file: int


@dataclass(frozen=True)
class EncodeContext:
    """What encoding a job needs to know of its build; it travels with each."""

    corpus: CorpusConfig  # without its paths: there may be 300,000
    options: Mapping[str, UnitOptions]  # by split
    digest: str  # of the tokenizer
    units: Path  # directories of kept units
    work: Path  # the directory of this build

    @classmethod
    def of(cls, config: Config, splits: Iterable[str], hashes: bool, digest: str, work: Path) -> EncodeContext:
        """What a configuration asks for; `hashes`: whether later phases need those of the documents."""
        corpus, stream = config.corpus, config.stream

        def options(split: str) -> UnitOptions:
            fraction = stream.valid_fraction if split == "train" and not corpus.valid else 0.0
            return UnitOptions(fraction, stream.split_seed, corpus.max_whole_bytes, corpus.on_bad_record, hashes)

        light = replace(corpus, train="", valid="", test="")
        units = Path(stream.directory) / "build/units"
        return cls(light, {split: options(split) for split in splits}, digest, units, work)

    def directory(self, split: str) -> Path:
        """Where the units of a split lie, beside those of all builds that shape them alike."""
        options = asdict(self.options[split])
        del options["on_bad_record"]  # each unit says itself whether it depends on that
        shape = {
            "version": UNIT_VERSION,
            "tokenizer": self.digest,
            "document": self.corpus.document,
            "field": self.corpus.field,
            "max_document_bytes": self.corpus.max_document_bytes,
            "unit_bytes": self.corpus.unit_bytes,
            **options,
        }
        return self.units / json_digest(shape)[:16]

    def unit_path(self, job: Job, number: int) -> Path:
        """The unit file of a unit that a job reads."""
        return self.directory(job.split) / f"{job.key}-{number:06d}.unit"

    def listing_path(self, job: Job) -> Path:
        """Which units a file has that can only be read from its start."""
        return self.directory(job.split) / f"{job.key}.json"

    def entry_path(self, job: Job) -> Path:
        """What is there when all units are that a job, and any others that read the same file, have to encode."""
        unit = "" if job.stride else f"-{job.unit:06d}"
        return self.work / "jobs" / f"{job.split}-{job.key}{unit}.json"

    def serves(self, path: Path) -> bool:
        """Whether there is a unit file, and this build would make the same: where records are bad, policies differ."""
        try:
            footer = UnitFile(path).footer
        except DamagedUnitError:
            return False
        return not footer["rejected"] or footer["on_bad_record"] == self.corpus.on_bad_record


class Entry(NamedTuple):
    """What the end of a job leaves for the phases after it."""

    units: list[int]  # their numbers
    contents: list[str]  # digests of its files, from the job that begins them


@dataclass(frozen=True)
class EncodeTask:
    """A job, as a task of a phase."""

    job: Job
    path: Path  # its entry

    def is_done(self, exists: Callable[[Path], bool]) -> bool:
        """Whether its entry is there."""
        return exists(self.path)


def run_encode_task(context: EncodeContext, task: EncodeTask) -> None:
    """Encode those units of a job that are not there yet, then write its entry; nothing if someone else is at it.

    Raises:
        UserError: a bad record, unless those are skipped; a file that changes while it is read.
    """
    job, locks = task.job, context.work / LOCKS
    lock = task.path.with_suffix(f".reader-{job.unit}") if job.stride else task.path
    with taken(locks, lock, task.path.exists) as is_mine:
        if not is_mine:
            return
        numbers = _encode_streamed(context, job) if job.stride else _encode(context, job)
        if numbers is None or not all(context.serves(context.unit_path(job, number)) for number in numbers):
            return  # others are at some, or this worker has to stop

        contents = [content_digest(source) for source in job.sources] if job.stride or job.unit == 0 else []
        check_unchanged(job.sources)
        _write_entry(task.path, Entry(numbers, contents))


def _encode_streamed(context: EncodeContext, job: Job) -> list[int] | None:
    """Encode the units of a file that can only be read from its start, but for those that others are at; as _encode."""
    listing = context.listing_path(job)
    known = _read_json(listing)
    if isinstance(known, list):
        missing = [path for number in known if not context.serves(path := context.unit_path(job, number))]
        if not any(_is_free(context, path) for path in missing):
            return known

    passed = _encode(context, job)
    if passed is not None and known != passed:
        write_json(listing, passed)
    return passed


def _is_free(context: EncodeContext, path: Path) -> bool:
    """Whether a unit is neither there nor being written."""
    with taken(context.work / LOCKS, path, lambda: context.serves(path)) as is_mine:
        return is_mine


def _encode(context: EncodeContext, job: Job) -> list[int] | None:
    """Read a job through, and write those of its units that are not there and that nobody is at.

    Returns:
        The numbers of all that it passed; None: it had to stop before the end.
    """
    if not job.stride and context.serves(context.unit_path(job, job.unit)):
        return [job.unit]
    if getattr(_local, "digest", "") != context.digest:
        tokenizer = Tokenizer.load(context.work)
        assert tokenizer.digest == context.digest
        _local.encoder, _local.digest = Encoder(tokenizer), context.digest

    passed, names = [], [source.name for source in job.sources]
    for number, items in read(job, context.corpus):
        if stopping():
            return None
        path = context.unit_path(job, number)
        with taken(context.work / LOCKS, path, partial(context.serves, path)) as is_mine:  # else it is passed over
            if is_mine:
                write_unit(path, _whole(items, job.sources), names, context.options[job.split], _local.encoder)
        passed.append(number)
    return passed


def _whole(items: Iterator[Item], sources: Sequence[Source]) -> Iterator[Item]:
    """What is in a unit, and behind it the certainty that its files did not change meanwhile: else it gets no name."""
    yield from items
    check_unchanged(sources)


def check_unchanged(sources: Iterable[Source]) -> None:
    """Compare size and time of files with those that they had when the build found them.

    Raises:
        UserError: naming the first one that differs.
    """
    for source in sources:
        if not unchanged(source):
            raise UserError(
                f"{source.path}: was changed since the build began; let nobody write to it, and type the same command "
                "again: what is encoded of other files stays"
            )


def write_rejected_unit(context: EncodeContext, task: EncodeTask, encoder: Encoder) -> None:
    """Write a unit as one rejected record of each of its files: it has killed its workers."""
    job, begin = task.job, task.job.unit * context.corpus.unit_bytes
    rejected = [Rejected(source.name, begin, "its worker was killed") for source in job.sources]
    names = [source.name for source in job.sources]
    write_unit(context.unit_path(job, job.unit), rejected, names, context.options[job.split], encoder)
    contents = [content_digest(source) for source in job.sources] if job.unit == 0 else []
    _write_entry(task.path, Entry([job.unit], contents))


def _write_entry(path: Path, entry: Entry) -> None:
    """Write an entry as a whole, but not durably: after a power loss its job looks for its units again."""
    temporary = files.temporary_path(path)
    temporary.write_text(json.dumps(entry))
    files.rename(temporary, path)


def read_entry(path: Path) -> Entry | None:
    """The entry of a job; none: it is not there, or not whole."""
    found = _read_json(path)
    return Entry(*found) if isinstance(found, list) and len(found) == len(Entry._fields) else None


def _read_json(path: Path) -> Any:
    """What is in a file of JSON; nothing if it is missing or not whole."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
