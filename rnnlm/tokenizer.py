"""The tokenizer: train a SentencePiece model on a bounded sample, load one, encode and decode.

SentencePiece with byte fallback: no text is ever unknown. Every document ends with the EOS token, which also stands
before the first document, so the model needs an EOS. The sample is chosen by a keyed hash of the text: bounded in
memory, the same for any order or split of the files. The price: the whole corpus is read once to choose it.
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import io
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import sentencepiece

from rnnlm.config import Config, TokenizerConfig, UserError
from rnnlm.corpus import BadRecordError, Document, LongDocument, fraction_of, jobs, read, sources

META = "\u2581"  # SentencePiece writes a space so
PIECE_CHARACTERS = 16384  # longer documents enter the sample in pieces, so that none fills it alone
MODEL_BYTES = 2**28  # a million pieces take about 20 MB
HELD_BACK_BYTES = 2**20  # enough for bytes per token to three digits


class Tokenizer:
    """A SentencePiece model. `digest` (sha256 of its bytes) ties streams, checkpoints and runs to it."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """Load a serialised model; `name` is what errors call it.

        Raises:
            UserError: not a SentencePiece model, or one without an end-of-sentence piece.
        """
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = int(self._processor.vocab_size())
            self.eos_id = int(self._processor.eos_id())
            self.unknown_id = int(self._processor.unk_id())
            self._processor.id_to_piece(list(range(self.vocab_size)))  # raises where a piece is no text
            first = self.encode("a")[:1]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: not a SentencePiece model; train one with tools/train_tokenizer.py") from error
        if self.eos_id < 0:
            raise UserError(f"{name}: has no EOS piece; train it with --eos_id, or use tools/train_tokenizer.py")
        if not first:
            raise UserError(f"{name}: makes nothing of a text; train another with tools/train_tokenizer.py")
        self._dummy_prefix = self.piece(first[0]).startswith(META)

    @classmethod
    def load(cls, path: str | Path, digest: str = "") -> Tokenizer:
        """The model in a file; where `digest` is given, another file is refused before SentencePiece sees it.

        Raises:
            UserError: the file is missing, no usable model, or not that of the digest.
        """
        try:
            size = Path(path).stat().st_size
            usable = Path(path).is_file() and size <= MODEL_BYTES  # to open a pipe would wait for its writer
            model = Path(path).read_bytes() if usable else b""
        except OSError as error:
            raise UserError(
                f"tokenizer.model={path}: {error.strerror}; train one with tools/train_tokenizer.py"
            ) from error
        if not model:
            raise UserError(f"{path}: {size} bytes are no SentencePiece model; train one with tools/train_tokenizer.py")
        if digest and hashlib.sha256(model).hexdigest() != digest:
            raise UserError(f"{path}: not the model that this was made with; put the right one back")
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without EOS."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_each(self, texts: list[str], add_eos: bool = False) -> list[list[int]]:
        """The ids of several texts, in this thread."""
        if len(texts) < 64:  # for a list it starts threads, which takes as long as so many calls
            return [self._processor.encode(text, add_eos=add_eos) for text in texts]
        ids: list[list[int]] = self._processor.encode(texts, add_eos=add_eos, num_threads=1)
        return ids

    def normalize(self, text: str) -> str:
        """What SentencePiece's rules make of a text before it is cut, spaces as U+2581."""
        normalized: str = self._processor.normalize(text)
        return normalized

    def piece(self, token: int) -> str:
        """The piece of an id as the model spells it: spaces as U+2581, bytes as <0x0A>."""
        piece: str = self._processor.id_to_piece(token)
        return piece

    def proto(self) -> Any:
        """The model itself, as SentencePiece's protocol buffer: pieces, trainer_spec, normalizer_spec."""
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self.model)
        return proto

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; EOS and other control pieces vanish, broken UTF-8 becomes U+FFFD."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def decoder(self, context: Iterable[int] = ()) -> StreamDecoder:
        """A decoder of ids that come one at a time after those of `context`."""
        return StreamDecoder(self, at_start=self._dummy_prefix and all(i == self.eos_id for i in context))

    def _piece_bytes(self, token: int) -> bytes:
        if self._processor.is_control(token):
            return b""
        piece = self.piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        if self._processor.is_unknown(token):
            return self.decode([token]).encode()
        return piece.replace(META, " ").encode()


class StreamDecoder:
    """Turns tokens into text as they come; the bytes of a character wait until it is whole."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = at_start  # the space that SentencePiece puts before a text is not part of it

    def push(self, token: int) -> str:
        """The text that is certain once `token` has come."""
        data = self._tokenizer._piece_bytes(token)
        if self._at_start and data:
            if self._tokenizer.piece(token).startswith(META):  # a space spelt as a byte stays
                data = data[1:]
            self._at_start = not data
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


class Sample:
    """The documents with the smallest keyed hashes that fit into `max_bytes`, whatever order they come in."""

    def __init__(self, max_bytes: int, seed: int):
        self.max_bytes = max_bytes
        self.seen_bytes = self.kept_bytes = 0
        self._seed = seed
        self._heap: list[tuple[float, str]] = []  # (-hash, text): the largest hash is dropped first
        self._limit = 1.0  # a text with a larger hash has no chance any more

    def add(self, text: str) -> None:
        """Offer a document; long ones are cut into pieces after white space where there is any."""
        start = 0
        while start < len(text):
            end = start + PIECE_CHARACTERS
            if end < len(text):
                space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
                end = space + 1 if space > start else end
            self._add_piece(text[start:end])
            start = end

    def _add_piece(self, piece: str) -> None:
        data = piece.encode()
        size = len(data)
        self.seen_bytes += size
        rank = fraction_of(data, self._seed)
        if rank >= self._limit:
            return
        heapq.heappush(self._heap, (-rank, piece))
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
        raise UserError(_training_fault(str(error), config.vocab_size)) from error
    return Tokenizer(model.getvalue())


def train_on_corpus(config: Config, progress: Callable[[int], None]) -> tuple[Tokenizer, dict[str, float]]:
    """Train on a sample of corpus.train; the documents of the valid split, at least 1 % of all, are held back.

    Returns:
        The tokenizer, and figures: bytes of the corpus and the sample, bytes per token on held-back documents.

    Raises:
        UserError: as in `train`, or a corpus that cannot be read.
    """
    sample = Sample(config.tokenizer.sample_bytes, config.tokenizer.seed)
    held_back = Sample(HELD_BACK_BYTES, config.tokenizer.seed)
    share = max(config.stream.valid_fraction, 0.01)
    for job in jobs("train", sources(config.corpus.train, "corpus.train"), config.corpus, 1):
        for _, items in read(job, config.corpus):
            for item in items:
                if isinstance(item, Document):
                    held = fraction_of(item.data, config.stream.split_seed) < share
                    (held_back if held else sample).add(item.data.decode())
                elif isinstance(item, LongDocument):
                    with suppress(BadRecordError):
                        for part in item.parts:
                            sample.add(part.decode())
        progress(job.bytes(config.corpus))
    # a corpus of a few documents may be held back whole
    tokenizer = train(sample.texts() or held_back.texts(), config.tokenizer)
    figures = {
        "corpus_bytes": sample.seen_bytes + held_back.seen_bytes,
        "sample_bytes": sample.kept_bytes,
        "held_back_bytes": held_back.kept_bytes,
        "bytes_per_token": held_back.kept_bytes / max(1, sum(map(len, map(tokenizer.encode, held_back.texts())))),
    }
    return tokenizer, figures


def _training_fault(message: str, vocab_size: int) -> str:
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        way_out = f"use at most {found[1]}, or give more text"
        return f"tokenizer.vocab_size={vocab_size}: larger than this text allows; {way_out}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.vocab_size={vocab_size}: too small; the bytes and characters alone need {found[1]}"
    return f"tokenizer: SentencePiece cannot train: {message}"


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id, as a little-endian numpy name."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
