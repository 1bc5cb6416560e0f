"""Corpus -> token streams: read units, encode them, append them in corpus order, commit.

Reading and encoding a unit is a pure function of the unit, and only one writer appends, in order; so encoding may
move to any number of workers without changing a byte. A document of corpus.train belongs to the valid stream when
its keyed hash says so, wherever it stands; repeated documents stay on one side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from rnnlm.config import Config, UserError, as_list
from rnnlm.corpus import Document, Source, Unit, documents, fraction_of, sources, units
from rnnlm.stream import Manifest, StreamWriter, token_dtype
from rnnlm.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20  # encoded at once: bounds the memory of Python's lists of ids


@dataclass(frozen=True)
class Encoded:
    """What became of a unit, by split: tokens, (documents, 3) their tokens, bytes and words, and counts of records."""

    tokens: dict[str, npt.NDArray[Any]]
    documents: dict[str, npt.NDArray[np.int64]]
    records: dict[str, Counter[str]]


def encode_unit(unit: Unit, split: str, config: Config, tokenizer: Tokenizer) -> Encoded:
    """Encode the documents of a unit that was read for `split`.

    Raises:
        UserError: a bad record, unless those are skipped.
    """
    splits_off = split == "train" and not as_list(config.corpus.valid)
    kept: dict[str, list[Document]] = {split: [], **({"valid": []} if splits_off else {})}
    records = {name: Counter[str]() for name in kept}
    for document in documents(unit, config.corpus):
        if not isinstance(document, Document):
            records[split].update(("read", document.reason))
            continue
        to_valid = splits_off and fraction_of(document.text, config.stream.split_seed) < config.stream.valid_fraction
        target = "valid" if to_valid else split
        kept[target].append(document)
        records[target].update(("read", "kept"))
    encoded = {name: _encode(found, tokenizer) for name, found in kept.items()}
    return Encoded({n: e[0] for n, e in encoded.items()}, {n: e[1] for n, e in encoded.items()}, records)


def _encode(found: list[Document], tokenizer: Tokenizer) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    dtype = token_dtype(tokenizer.vocab_size)
    parts, rows = [np.empty(0, dtype)], []
    for batch in _batches(found):
        ids = tokenizer.encode_all([document.text for document in batch])
        parts.append(np.concatenate([np.asarray(each, dtype) for each in ids]))
        rows += [
            (len(each), document.size, len(document.text.split())) for each, document in zip(ids, batch, strict=True)
        ]
    return np.concatenate(parts), np.array(rows, dtype=np.int64).reshape(-1, 3)


def _batches(found: list[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
        given = {"train": config.corpus.train, "valid": config.corpus.valid, "test": config.corpus.test}
        self.inputs = {split: sources(paths, f"corpus.{split}") for split, paths in given.items() if as_list(paths)}
        self.splits = list(self.inputs)
        if "valid" not in self.splits and config.stream.valid_fraction > 0:
            self.splits.append("valid")

    def source(self) -> dict[str, Any]:
        """What the streams are made from; recorded in the manifest, so that a finished build is known again."""
        corpus, stream = self.config.corpus, self.config.stream
        return {
            "files": {split: [_name_and_size(file) for file in files] for split, files in self.inputs.items()},
            "document": corpus.document,
            "field": corpus.field if corpus.document == "jsonl" else "",
            "on_bad_record": corpus.on_bad_record,
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

    def run(self, progress: Callable[[int], None]) -> dict[str, Manifest]:
        """Build what is missing; calls progress(bytes read from disk) on the way.

        Raises:
            UserError: nothing to train on, a bad record, or a foreign stream in the way.
        """
        done = self.finished()
        if set(done) == set(self.splits):
            return done
        missing = [split for split in self.splits if split not in done]
        stream = self.config.stream
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(StreamWriter(self.directory(split), self.tokenizer, stream.shard_tokens))
                for split in missing
            }
            records = {split: Counter({"read": 0, "kept": 0, "empty": 0}) for split in self.splits}
            for split, files in self.inputs.items():
                for unit in units(files, self.config.corpus, progress):
                    self._append(encode_unit(unit, split, self.config, self.tokenizer), writers, records)
            return {**done, **self._commit(writers, records)}

    def _append(
        self, encoded: Encoded, writers: Mapping[str, StreamWriter], records: Mapping[str, Counter[str]]
    ) -> None:
        for split, counts in encoded.records.items():
            if split in records:
                records[split].update(counts)
            if split in writers:
                writers[split].append(encoded.tokens[split], encoded.documents[split])

    def _commit(self, writers: Mapping[str, StreamWriter], records: Mapping[str, Counter[str]]) -> dict[str, Manifest]:
        for split, writer in writers.items():
            if not writer.tokens:
                raise UserError(
                    f"corpus.{split}: no text in it ({records[split]['read']} records, none kept); give a corpus with "
                    f"text{', or a larger stream.valid_fraction' if split == 'valid' else ''}"
                )
        order = sorted(writers, key=lambda split: split == "train")  # the stream that training opens first comes last
        return {split: writers[split].commit(records[split], self.source()) for split in order}


def _name_and_size(file: Source) -> list[Any]:
    return [Path(file.path).name, file.size]


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
