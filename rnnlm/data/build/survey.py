"""What a tokenizer is made of, read from the whole corpus by the workers of a build: a sample of it, or its words.

    jobs --workers--> a file for each job: excerpts and their numbers, or words and counts --> one Sample, one Counter

The parent adds the files up as they come and removes them. It writes down how small a number must be by now, so that a
job hands on a bounded part of what it read and the sample stays the same for any number of workers. The price: the
counts of all different words are in memory, MAX_WORDS of them at most.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rnnlm.config import Config
from rnnlm.data.build.executor import killed_twice, pool_of
from rnnlm.data.byte_tokenizer import ByteTokenizer
from rnnlm.data.documents import BadRecordError, Document, Item, LongDocument, read
from rnnlm.data.jobs import Job, jobs
from rnnlm.data.sample import Sample
from rnnlm.data.sources import sources
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_choice import tokenizer_path
from rnnlm.data.tokenizer_training import out_of_proportion, train, word_table
from rnnlm.errors import UserError
from rnnlm.hashing import fraction_of
from rnnlm.machine import cores

HELD_BACK_BYTES = 2**20  # enough for bytes per token to three digits
MAX_WORDS = 2**23  # different ones in memory, about 1 GB


class Trained(NamedTuple):
    """A tokenizer, and what is said of it: one line, and warnings."""

    tokenizer: Tokenizer
    summary: str
    warnings: list[str]


class NumberedJob(NamedTuple):
    """A job, and the number that its file has."""

    number: int
    job: Job


@dataclass(frozen=True)
class SurveyContext:
    """What a job needs to know; it travels with each."""

    config: Config
    work: Path  # for the files between workers and parent

    def path(self, task: NumberedJob) -> Path:
        """The file of a job: JSON, a value a line."""
        return self.work / f"{task.number}.jsonl"

    @property
    def limit_path(self) -> Path:
        """Where the parent writes the limit of its sample."""
        return self.work / "limit"

    def held_back(self, data: bytes) -> bool:
        """Whether a document is not to shape the tokenizer: valid's, and for SentencePiece 1 % at least, to measure."""
        split, counted = self.config.stream, self.config.tokenizer.kind == "word"
        share = 0.0 if counted and self.config.corpus.valid else split.valid_fraction
        return fraction_of(data, split.split_seed) < (share if counted else max(share, 0.01))


def train_on_corpus(
    config: Config, progress: Callable[[int], None], executor: Callable[[], Executor] | None = None
) -> Trained:
    """Make the tokenizer of a configuration from corpus.train; calls progress(bytes read from disk) on the way.

    Args:
        executor: makes the executor that reads, again if it breaks; None: what the build section says.

    Raises:
        UserError: no text, a vocabulary that it does not allow, a corpus that cannot be read.
    """
    if config.tokenizer.kind == "byte":
        return Trained(ByteTokenizer(), "257 ids: the bytes of UTF-8, and EOS", [])

    path = tokenizer_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.partial-", dir=path.parent) as work:
        context = SurveyContext(config, Path(work))
        survey = _count_words if config.tokenizer.kind == "word" else _train_on_sample
        return survey(context, lambda function, add: _run(context, function, add, progress, executor))


Surveyor = Callable[[Callable[[SurveyContext, NumberedJob], None], Callable[[list[Any]], None]], None]


def _run(
    context: SurveyContext,
    function: Callable[[SurveyContext, NumberedJob], None],
    add: Callable[[list[Any]], None],
    progress: Callable[[int], None],
    executor: Callable[[], Executor] | None,
) -> None:
    """Have function(context, job) write the file of each job, and hand the values in it to `add`."""
    corpus, build = context.config.corpus, context.config.build
    inputs = sources(corpus.train, "corpus.train", corpus.document)
    workers = build.workers or cores()
    tasks = [NumberedJob(number, job) for number, job in enumerate(jobs("train", inputs, corpus, workers))]

    def done(task: NumberedJob) -> None:
        path = context.path(task)
        add([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")])
        path.unlink()
        progress(task.job.bytes(corpus))

    with pool_of(build, min(workers, len(tasks)), executor) as pool:
        failed = pool.run(function, context, tasks, done)
    if failed:
        raise killed_twice((task.job for task in failed), ", or fix the file")


def _own_items(context: SurveyContext, job: Job) -> Iterator[Item]:
    """All that is in the units of a job; those who read a file from its start take turns."""
    readers = max(1, job.stride)
    found = read(job, context.config.corpus)
    return chain.from_iterable(items for number, items in found if number % readers == job.unit % readers)


def _write(context: SurveyContext, task: NumberedJob, values: list[Any]) -> None:
    """Write the values of a job; its file gets its name when it is whole."""
    partial = context.path(task).with_suffix(f".{os.getpid()}")
    partial.write_text("\n".join(json.dumps(value, ensure_ascii=False) for value in values), encoding="utf-8")
    partial.replace(context.path(task))


def draw_job(context: SurveyContext, task: NumberedJob) -> None:
    """Write [bytes seen, bytes held back], the excerpts to train on, and those held back, with their numbers.

    Raises:
        UserError: a bad record, unless those are skipped.
    """
    chosen = context.config.tokenizer
    limit = float(context.limit_path.read_text()) if context.limit_path.exists() else 1.0
    sample, held_back = Sample(chosen.sample_bytes, chosen.seed, limit), Sample(HELD_BACK_BYTES, chosen.seed)

    for item in _own_items(context, task.job):
        if isinstance(item, Document):
            of = held_back if context.held_back(item.data) else sample
            of.add([item.data.decode()], item.name, item.offset)
        elif isinstance(item, LongDocument):
            with suppress(BadRecordError):  # what came before is text all the same
                sample.add((part.decode() for part in item.parts), item.name, item.offset)
    _write(context, task, [[sample.seen_bytes, held_back.seen_bytes], [*sample.numbered()], [*held_back.numbered()]])


def _train_on_sample(context: SurveyContext, run: Surveyor) -> Trained:
    """Train SentencePiece on a sample of the corpus."""
    config = context.config.tokenizer
    sample, held_back = Sample(config.sample_bytes, config.seed), Sample(HELD_BACK_BYTES, config.seed)
    written = 1.0

    def add(values: list[Any]) -> None:
        nonlocal written
        for of, seen, excerpts in zip((sample, held_back), values[0], values[1:], strict=True):
            of.seen_bytes += seen
            for number, text in excerpts:
                of.keep(number, text)

        if sample.limit < 0.9 * written:  # jobs that begin from now on need not hand on more
            partial = context.limit_path.with_suffix(".partial")
            partial.write_text(repr(sample.limit))
            partial.replace(context.limit_path)
            written = sample.limit

    run(draw_job, add)
    texts = sample.texts() or held_back.texts()  # a corpus of a few documents may be held back whole
    corpus_bytes = sample.seen_bytes + held_back.seen_bytes
    tokenizer = train(texts, config, corpus_bytes)

    measured = held_back.texts() or texts
    tokens = sum(len(tokenizer.encode(text)) for text in measured)
    bytes_per_token = sum(len(text.encode()) for text in measured) / max(1, tokens)
    chosen = "" if config.vocab_size else ", chosen by the size of the text (tokenizer.vocab_size=0)"
    summary = (
        f"{tokenizer.vocab_size:,} pieces ({config.kind}){chosen} "
        f"from {sample.kept_bytes / 1e6:.3g} MB of {corpus_bytes / 1e6:.3g} MB; "
        f"{bytes_per_token:.3f} bytes per token on {held_back.kept_bytes / 1e6:.3g} MB held back"
    )
    wrong = out_of_proportion(tokenizer, texts, corpus_bytes, bytes_per_token) if config.vocab_size else ""
    return Trained(tokenizer, summary, [wrong] if wrong else [])


def count_job(context: SurveyContext, task: NumberedJob) -> None:
    """Write the words of a job and how often each occurs.

    Raises:
        UserError: as in draw_job.
    """
    counts = Counter[str]()
    for item in _own_items(context, task.job):
        if isinstance(item, Document) and not context.held_back(item.data):
            counts.update(item.data.decode().split())
        elif isinstance(item, LongDocument):
            rest = ""  # of a part that ends within a word
            with suppress(BadRecordError):
                for part in item.parts:
                    text = rest + part.decode()
                    *words, rest = (text + "|").split()  # the mark is behind the last word, or alone
                    rest = rest[:-1]
                    counts.update(words)
            counts.update(rest.split())
    _write(context, task, [counts])


def _count_words(context: SurveyContext, run: Surveyor) -> Trained:
    """Make a table of the words of the corpus."""
    counts = Counter[str]()

    def add(values: list[Any]) -> None:
        counts.update(values[0])
        if len(counts) > MAX_WORDS:
            raise UserError(
                f"tokenizer.kind=word: more than {MAX_WORDS:,} different words in corpus.train; is it tokenised? "
                "Use kind bpe, or make the table from some of the files"
            )

    run(count_job, add)
    tokenizer = word_table(counts, context.config.tokenizer)
    total = counts.total()
    unknown = sum(count for word, count in counts.items() if tokenizer.encode(word) == [tokenizer.unknown_id])
    summary = (
        f"{tokenizer.vocab_size:,} pieces (word), <unk> and EOS among them, of {len(counts):,} different words; "
        f"{unknown:,} of {total:,} words of the text are unknown ({unknown / total:.2%})"
    )
    return Trained(tokenizer, summary, [])
