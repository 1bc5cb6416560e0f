"""Tokenizers: what every kind can do, and how the one in a file is found.

A tokenizer is the bytes of one file, `model`, whose sha256 ties streams, checkpoints and runs to it. Its kind is told
by these bytes, and within a stream, a run or a build by the name of the file:

    tokenizer.model   SentencePiece          words.txt   words, or another program's table of tokens
    bytes.txt         the bytes of UTF-8         tokenizer.json   Hugging Face's

Every document ends with the EOS token, which also stands before the first document, so there is none without an EOS.
The price of one file for each: a model and a table that belong together are joined into one model (token_table).
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from rnnlm.errors import UserError

MODEL_BYTES = 2**28  # a million pieces take about 20 MB
TRAIN = "train one with tools/train_tokenizer.py"

# The name of the file in a stream -> the module and the class of the kind. Imported when one is met: each has libraries
# of its own, which need not be there for the others.
KINDS = {
    "tokenizer.model": ("rnnlm.data.sentencepiece_tokenizer", "SentencePieceTokenizer"),
    "tokenizer.json": ("rnnlm.data.hugging_face_tokenizer", "HuggingFaceTokenizer"),
    "words.txt": ("rnnlm.data.word_tokenizer", "WordTokenizer"),
    "bytes.txt": ("rnnlm.data.byte_tokenizer", "ByteTokenizer"),
}
# How the files begin that are told by that; any other is a SentencePiece model.
BEGINS = {b"{": "tokenizer.json", b"# rnnlm words": "words.txt", b"# rnnlm bytes": "bytes.txt"}


class Tokenizer(ABC):
    """Text to ids and back. A kind has a class, an entry in KINDS, and, unless it is the default, in BEGINS."""

    file_name: ClassVar[str]  # in a stream, a run or a build
    encodes: ClassVar[Literal["texts", "words", "bytes"]] = "texts"
    """What an id depends on: the text by rules of the kind's own; only the word that it belongs to, in the sense of
    str.split, whose ids `word_ids` tells; or only a byte, which is its id."""

    vocab_size: int  # ids are below it
    eos_id: int  # at the end of every document, never made of a text
    unknown_id: int  # of what the tokenizer does not know; -1: it knows everything

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """Load the bytes of a file; `name` is what errors call it.

        Raises:
            UserError: not a file of this kind, or without an EOS.
        """
        self.model, self.name = model, name
        self.digest = hashlib.sha256(model).hexdigest()

    @property
    def description(self) -> str:
        """Its kind in a word, as tokenizer.kind has it where that makes it."""
        return self.file_name

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without EOS."""

    def encode_each(self, texts: list[str], add_eos: bool = False) -> list[list[int]]:
        """The ids of several texts, in this thread."""
        end = [self.eos_id] if add_eos else []
        return [self.encode(text) + end for text in texts]

    def word_ids(self, words: Sequence[str], first: bool) -> list[list[int]]:
        """The ids of each word, where it begins its text (`first`) or stands behind others; see `encodes`."""
        return [self.encode(word) for word in words]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; EOS and what else has no text vanishes, broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """The entry of the vocabulary with this id, as it is shown to a reader."""

    @abstractmethod
    def piece_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character."""

    def opens_with_space(self, token: int) -> bool:
        """Whether the first of these bytes is a space that separates it from the text before it, if there is any."""
        return False

    def decoder(self, context: Iterable[int] = ()) -> StreamDecoder:
        """A decoder of ids that come one at a time after those of `context`."""
        return StreamDecoder(self, at_start=all(i == self.eos_id for i in context))

    @staticmethod
    def load(path: str | Path, digest: str = "") -> Tokenizer:
        """The tokenizer in a file, or in a directory under the name of its kind.

        Where `digest` is given, another file is refused before any library sees it.

        Raises:
            UserError: missing, no usable tokenizer, or not that of the digest.
        """
        path = find(path, digest) if Path(path).is_dir() else Path(path)
        model = read_bounded(path)
        if digest and hashlib.sha256(model).hexdigest() != digest:
            raise UserError(f"{path}: not the model that this was made with; put the right one back")
        return class_of(model, path.name)(model, str(path))


def class_of(model: bytes, name: str) -> type[Tokenizer]:
    """The kind of tokenizer whose file has these bytes and this name."""
    kind = next((kind for begin, kind in BEGINS.items() if model.startswith(begin)), "tokenizer.model")
    module, class_name = KINDS[kind]
    found: type[Tokenizer] = getattr(importlib.import_module(module), class_name)
    return found


def find_all(directory: str | Path) -> Iterator[Path]:
    """The files of tokenizers in a directory."""
    return (Path(directory) / name for name in KINDS if (Path(directory) / name).exists())


def find(directory: str | Path, digest: str = "") -> Path:
    """The file of the tokenizer in a directory; of several, the one of this digest; tokenizer.model if there is none.

    Raises:
        UserError: several, and no digest that tells which.
    """
    found = list(find_all(directory))
    if len(found) > 1 and digest:
        found = [path for path in found if hashlib.sha256(read_bounded(path)).hexdigest() == digest] or found[:1]
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found))}: which one is the tokenizer? Remove the others")
    return found[0] if found else Path(directory) / "tokenizer.model"


def read_bounded(path: Path, key: str = "tokenizer.model", way_out: str = TRAIN) -> bytes:
    """The bytes of a tokenizer's file; `key` is the option that names it.

    Raises:
        UserError: missing, empty, no file, or larger than any model.
    """
    try:
        size = path.stat().st_size
        usable = path.is_file() and size <= MODEL_BYTES  # opening a pipe would wait for its writer
        model = path.read_bytes() if usable else b""
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}; {way_out}") from error
    if not model:
        raise UserError(f"{path}: {size} bytes are no tokenizer; {way_out}")
    return model


class StreamDecoder:
    """Turns tokens into text as they come; the bytes of a character wait until it is whole."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = at_start  # no text yet: a space that separates from what is before is not part of it

    def push(self, token: int) -> str:
        """The text that is certain once `token` has come."""
        data = self._tokenizer.piece_bytes(token)
        if self._at_start and data:
            if self._tokenizer.opens_with_space(token):
                data = data[1:]
            self._at_start = not data
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id, as a little-endian numpy name."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
