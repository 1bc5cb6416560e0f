"""The bytes of UTF-8 as tokens: nothing is trained, every text comes back exactly.

The price: three to four times as many tokens as a BPE model of 16,000 pieces makes of English.
"""

from __future__ import annotations

from collections.abc import Iterable

from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError

MODEL = b"# rnnlm bytes 1: the ids 0 to 255 are the bytes of UTF-8, 256 ends a document\n"


class ByteTokenizer(Tokenizer):
    """Each byte of a text is its own id; EOS is 256."""

    file_name = "bytes.txt"
    encodes = "bytes"
    description = "byte"
    vocab_size, eos_id, unknown_id = 257, 256, -1

    def __init__(self, model: bytes = MODEL, name: str = "tokenizer"):
        """As Tokenizer; there is only one."""
        super().__init__(model, name)
        if model != MODEL:
            raise UserError(f"{name}: not the file of a byte tokenizer; write it with --tokenizer.kind=byte")

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; EOS vanishes, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.piece_bytes, ids)).decode(errors="replace")

    def piece(self, token: int) -> str:
        """A printable character of ASCII as it is, other bytes as <0x0A>, EOS as </s>."""
        return "</s>" if token == self.eos_id else chr(token) if 32 <= token < 127 else f"<0x{token:02X}>"

    def piece_bytes(self, token: int) -> bytes:
        """The byte itself; nothing for EOS."""
        return b"" if token == self.eos_id else bytes([token])
