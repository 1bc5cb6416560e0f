"""The tokenizer: load a SentencePiece model, encode and decode.

SentencePiece's own library does the work, so any model of its format serves, also one trained elsewhere. Every document
ends with the EOS token, which also stands before the first document, so a model without an EOS is refused. Tokens that
are drawn one at a time are decoded as they come: `StreamDecoder` holds back the bytes of a character that is not whole.
The price: it repeats in Python what SentencePiece does for a whole text, which a test compares.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from rnnlm.errors import UserError

META = "\u2581"  # SentencePiece writes a space so
MODEL_BYTES = 2**28  # a million pieces take about 20 MB


class Tokenizer:
    """A SentencePiece model. `digest` (sha256 of its bytes) ties streams, checkpoints and runs to it."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """Load a serialized model; `name` is what errors call it.

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
        # whether a text is encoded as if a space stood before it, which a decoder takes away again
        self._dummy_prefix = self.piece(first[0]).startswith(META)

    @classmethod
    def load(cls, path: str | Path, digest: str = "") -> Tokenizer:
        """The model in a file; where `digest` is given, another file is refused before SentencePiece sees it.

        Raises:
            UserError: the file is missing, no usable model, or not that of the digest.
        """
        try:
            size = Path(path).stat().st_size
            usable = Path(path).is_file() and size <= MODEL_BYTES  # opening a pipe would wait for its writer
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
        """The piece of an id as the model writes it: spaces as U+2581, bytes as <0x0A>."""
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

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character."""
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
        data = self._tokenizer.piece_bytes(token)
        if self._at_start and data:
            if self._tokenizer.piece(token).startswith(META):  # a space written as a byte stays
                data = data[1:]
            self._at_start = not data
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id, as a little-endian numpy name."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
