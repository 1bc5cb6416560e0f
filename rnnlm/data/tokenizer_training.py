"""Training a tokenizer: a SentencePiece model from a bounded sample of the corpus.

Byte fallback is always on, so no text is ever unknown. The sample is chosen by a keyed hash of the text: bounded in
memory, and the same for any order or split of the files. The price: the whole corpus is read once to choose it, while
SentencePiece needs the sample alone. Some documents are held back to measure bytes per token on text it has not seen.
"""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import chain

import sentencepiece

from rnnlm.config import Config, TokenizerConfig
from rnnlm.data.documents import BadRecordError, Document, LongDocument, read
from rnnlm.data.jobs import jobs
from rnnlm.data.sources import sources
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import fraction_of

EXCERPT_CHARACTERS = 16384  # longer documents enter the sample as several excerpts, so that none fills it alone
HELD_BACK_BYTES = 2**20  # enough for bytes per token to three digits


class Sample:
    """The excerpts with the smallest keyed hashes that fit into `max_bytes`, whatever order they come in."""

    def __init__(self, max_bytes: int, seed: int):
        self.max_bytes = max_bytes
        self.seen_bytes = self.kept_bytes = 0
        self._seed = seed
        self._heap: list[tuple[float, str]] = []  # (-hash, text): the largest hash is dropped first
        self._limit = 1.0  # a text with a larger hash has no chance any more

    def add(self, text: str) -> None:
        """Offer a document; a long one is cut into excerpts, after white space where there is any."""
        start = 0
        while start < len(text):
            end = start + EXCERPT_CHARACTERS
            if end < len(text):
                space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
                end = space + 1 if space > start else end
            self._add_excerpt(text[start:end])
            start = end

    def _add_excerpt(self, text: str) -> None:
        data = text.encode()
        size = len(data)
        self.seen_bytes += size
        rank = fraction_of(data, self._seed)
        if rank >= self._limit:
            return

        heapq.heappush(self._heap, (-rank, text))
        self.kept_bytes += size
        while self.kept_bytes > self.max_bytes:
            rank, dropped = heapq.heappop(self._heap)
            self._limit = -rank
            self.kept_bytes -= len(dropped.encode())

    def texts(self) -> list[str]:
        """The sample, in an order that depends on nothing but its texts."""
        return [text for _, text in sorted(self._heap)]


def train(texts: list[str], config: TokenizerConfig) -> Tokenizer:
    """Train a model on `texts`; the same texts give the same model.

    Raises:
        UserError: no text, or a vocabulary size that the text does not allow.
    """
    if not texts:
        raise UserError("corpus.train: no text in it that fits into tokenizer.sample_bytes; give a corpus with text")

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalization,
            remove_extra_whitespaces=not config.keep_whitespace,
            allow_whitespace_only_pieces=config.keep_whitespace,
            add_dummy_prefix=not config.keep_whitespace,
            user_defined_symbols=config.user_defined_symbols,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=2**30,  # the default silently skips documents above 4192 bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_error(str(error), config.vocab_size)) from error
    return Tokenizer(model.getvalue())


def train_on_corpus(config: Config, progress: Callable[[int], None]) -> tuple[Tokenizer, dict[str, float]]:
    """Train on a sample of corpus.train; the documents of the valid split, at least 1 % of all, are held back.

    Returns:
        The tokenizer, and figures: bytes of the corpus and the sample, bytes per token on held-back documents.

    Raises:
        UserError: as in `train`, or a corpus that cannot be read.
    """
    sample, held_back = _sample_corpus(config, progress)
    # a corpus of a few documents may be held back whole
    tokenizer = train(sample.texts() or held_back.texts(), config.tokenizer)

    figures = {
        "corpus_bytes": sample.seen_bytes + held_back.seen_bytes,
        "sample_bytes": sample.kept_bytes,
        "held_back_bytes": held_back.kept_bytes,
        "bytes_per_token": held_back.kept_bytes / max(1, sum(map(len, map(tokenizer.encode, held_back.texts())))),
    }
    return tokenizer, figures


def _sample_corpus(config: Config, progress: Callable[[int], None]) -> tuple[Sample, Sample]:
    """What a tokenizer is trained on, and what is held back: the documents that the split gives to valid."""
    sample = Sample(config.tokenizer.sample_bytes, config.tokenizer.seed)
    held_back = Sample(HELD_BACK_BYTES, config.tokenizer.seed)
    share = max(config.stream.valid_fraction, 0.01)
    for job in jobs("train", sources(config.corpus.train, "corpus.train", config.corpus.document), config.corpus, 1):
        for item in chain.from_iterable(items for _, items in read(job, config.corpus)):
            if isinstance(item, Document):
                held = fraction_of(item.data, config.stream.split_seed) < share
                (held_back if held else sample).add(item.data.decode())
            elif isinstance(item, LongDocument):
                with suppress(BadRecordError):  # what came before is text all the same
                    for part in item.parts:
                        sample.add(part.decode())
        progress(job.bytes(config.corpus))
    return sample, held_back


def _training_error(message: str, vocab_size: int) -> str:
    """SentencePiece's error, with what the text allows."""
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        way_out = f"use at most {found[1]}, or give more text"
        return f"tokenizer.vocab_size={vocab_size}: larger than this text allows; {way_out}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.vocab_size={vocab_size}: too small; the bytes and characters alone need {found[1]}"
    return f"tokenizer: SentencePiece cannot train: {message}"
