"""Prompts that end inside a token: which of their tokens are certain, and what the next ones must write.

A tokenizer joins what follows a prompt to its end: where the text has `ROMEO:` and a line end, the colon may be part of
a token that no prompt ending in a colon has, and after the token that this prompt has the text never continued. So the
tokens of a prompt are kept up to where a longer piece could begin, and the next ones are drawn among those that agree
with the bytes that are left:

    prompt   ROMEO:          pieces   ROMEO  :  :\n
    kept     ROMEO           rest     :               drawn among : and :\n, and what begins a colon's bytes

A space that a prompt ends with, and that the tokenizer takes away, is left in the same way. The price: a table of all
pieces' bytes, made once for each tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

from rnnlm.data.tokenizer import Tokenizer

SPACE_BYTE = "<0x20>"  # SentencePiece writes spaces otherwise, and takes only those away that begin a text


class Prompt(NamedTuple):
    """A prompt as the model reads it."""

    ids: list[int]  # certain, whatever follows
    rest: bytes  # what the next tokens must write first
    characters: int  # of the text that those bytes are: it is the prompt's own


class PieceTable:
    """All pieces of a tokenizer by the bytes that they write."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._ids = defaultdict[bytes, list[int]](list)
        for token in range(tokenizer.vocab_size):
            data = tokenizer.piece_bytes(token)  # control pieces write nothing
            if data and tokenizer.piece(token) != SPACE_BYTE:
                self._ids[data].append(token)
        self._sorted = sorted(self._ids)
        self._longest = max(map(len, self._sorted), default=0)
        self.agreeing = lru_cache(maxsize=4096)(self._agreeing)

    def _beginning_with(self, data: bytes) -> list[bytes]:
        first = last = bisect_left(self._sorted, data)
        while last < len(self._sorted) and self._sorted[last].startswith(data):
            last += 1
        return self._sorted[first:last]

    def _agreeing(self, rest: bytes) -> tuple[int, ...]:
        """The tokens that write these bytes and perhaps more, or their beginning where others can write what is left.

        In ascending order.
        """
        found = self._beginning_with(rest)
        for size in range(1, min(len(rest), self._longest + 1)):
            if rest[:size] in self._ids and self.agreeing(rest[size:]):
                found.append(rest[:size])
        return tuple(sorted(token for data in found for token in self._ids[data]))

    def split(self, text: str) -> Prompt:
        """Cut a prompt where its tokens stop being certain."""
        ids = self.tokenizer.encode(text)
        if not ids:
            return Prompt([], b"", 0)

        tail = b"".join(self.tokenizer.piece_bytes(token) for token in ids[-1:])
        rest = b" " if text[-1:].isspace() and not tail[-1:].isspace() and self._beginning_with(b" ") else b""
        cut, cut_rest, spaces = len(ids), rest, len(rest)

        # from the end, as far as a piece can reach
        for index in range(len(ids) - 1, -1, -1):
            rest = self.tokenizer.piece_bytes(ids[index]) + rest
            if len(rest) >= self._longest:
                break
            in_character = 0x80 <= rest[0] < 0xC0  # a byte of UTF-8 that continues one
            if not in_character and any(len(data) > len(rest) for data in self._beginning_with(rest)):
                cut, cut_rest = index, rest

        decoder = self.tokenizer.decoder([self.tokenizer.eos_id, *ids[:cut]])
        shown = "".join(map(decoder.push, ids[cut:])) + decoder.finish()
        return Prompt(ids[:cut], cut_rest, len(shown) + spaces)


@lru_cache(maxsize=4)
def piece_table(tokenizer: Tokenizer) -> PieceTable:
    """The table of a tokenizer."""
    return PieceTable(tokenizer)
