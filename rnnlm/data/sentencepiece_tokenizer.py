"""SentencePiece models: its own library does the work, so any model of its format serves, also one trained elsewhere.

Tokens that are drawn one at a time are decoded as they come. The price: `piece_bytes` repeats in Python what
SentencePiece does for a whole text, which a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sentencepiece

from rnnlm.data.tokenizer import TRAIN, StreamDecoder, Tokenizer
from rnnlm.errors import UserError

META = "\u2581"  # SentencePiece writes a space so


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with an end-of-sentence piece."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """As Tokenizer: the bytes are a serialized model."""
        super().__init__(model, name)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = int(self._processor.vocab_size())
            self.eos_id = int(self._processor.eos_id())
            self.unknown_id = int(self._processor.unk_id())
            self._processor.id_to_piece(list(range(self.vocab_size)))  # raises where a piece is no text
            first = self.encode("a")[:1]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: not a SentencePiece model; {TRAIN}") from error

        if self.eos_id < 0:
            raise UserError(f"{name}: has no EOS piece; name the piece that ends texts with tokenizer.eos_piece")
        if not first:
            raise UserError(f"{name}: makes nothing of a text; train another with tools/train_tokenizer.py")
        # whether a text is encoded as if a space stood before it, which a decoder takes away again
        self._dummy_prefix = self.piece(first[0]).startswith(META)

    @property
    def description(self) -> str:
        """bpe, unigram, char, or word of SentencePiece's own."""
        spec = self.proto().trainer_spec
        return str(spec.ModelType.Name(spec.model_type).lower())

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
        return parse(self.model)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; EOS and other control pieces vanish, broken UTF-8 becomes U+FFFD."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def decoder(self, context: Iterable[int] = ()) -> StreamDecoder:
        """A decoder of ids that come one at a time after those of `context`."""
        return StreamDecoder(self, at_start=self._dummy_prefix and all(i == self.eos_id for i in context))

    def opens_with_space(self, token: int) -> bool:
        """Whether a piece begins with U+2581; a space that is written as a byte belongs to the text."""
        return self.piece(token).startswith(META)

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


def parse(model: bytes, name: str = "tokenizer") -> Any:
    """A serialized model as SentencePiece's protocol buffer.

    Raises:
        UserError: it is none.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError has no place of its own in all versions
        raise UserError(f"{name}: not a SentencePiece model ({error}); {TRAIN}") from error
    return proto
