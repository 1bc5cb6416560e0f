"""How texts are cut into words under a SentencePiece model, and what the ids of a word are.

Under a BPE model with SentencePiece's default whitespace splitting no piece has a space behind another character, so
no merge crosses from a word into the space before the next one, and a text's ids are those of its words, one after the
other. Where the model is not of that kind, or one of its normalisation rules touches white space, `why_whole` says so.
New words are segmented by the model's own rules and merges (bpe_kernels), or, where those are not plain, SentencePiece
is asked for each between two others: " cat" -> encode("x cat y") without the ids of x and y.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from rnnlm.data.bpe_kernels import segment_words
from rnnlm.data.sentencepiece_tokenizer import META, SentencePieceTokenizer
from rnnlm.data.tokenizer import token_dtype
from rnnlm.data.tokenizer_rules import bpe_tables, rule_bytes
from rnnlm.data.word_keys import Array
from rnnlm.data.word_table import BEGINS, FIRST, LAST, NO_IDS, RUN, SPACE, WordTable
from rnnlm.data.words import ASCII_SPACES, Words


class SentencePieceWords(Words):
    """The words of texts under one model."""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        self._tokenizer = tokenizer
        self.why_whole, self.why_not_compiled = why_whole(tokenizer), ""
        if self.why_whole:
            return

        spec = tokenizer.proto().normalizer_spec
        self.white = white_bytes(tokenizer)
        self.keep_runs = not spec.remove_extra_whitespaces
        self.first_differs = self.keep_runs or not spec.add_dummy_prefix

        # words that SentencePiece is asked for stand between these: "x cat y"
        self._ids_before = tokenizer.encode("x")
        self._ids_after = tokenizer.encode("x y")[len(self._ids_before) :]
        # ids that may not end a word before another one: the white space might reach over
        run = (META, *(f"<0x{byte:02X}>" for byte in np.flatnonzero(self.white)), *_characters(self.white))
        self._open_ended = np.array([tokenizer.piece(token).endswith(run) for token in range(tokenizer.vocab_size)])

        tables = bpe_tables(tokenizer)
        if isinstance(tables, str):
            self.why_not_compiled = tables
        else:
            self._tables = tables

    def segment(self, table: WordTable, first: int, last: int) -> None:
        """As Words, by the model's own merges."""
        table.used = segment_words(
            table.keys, table.key_ends, table.kinds, first, last, self.white, self._tables, table.entries,
            table.ids, table.used,
        )  # fmt: skip

    def encode(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """As Words, of texts between the words x and y (not x with FIRST, not y with LAST)."""
        before = "" if kind & FIRST or not self.first_differs else "x" if self.keep_runs else "x "
        after = "" if kind & LAST else " y"
        found = self._tokenizer.encode_each([f"{before}{text.decode()}{after}" for text in texts])
        head, tail = np.array(self._ids_before if before else [], int), np.array(self._ids_after if after else [], int)

        # all ids one behind the other; those of text i lie in ids[begins[i]:stops[i]], between head and tail
        totals = np.array(list(map(len, found)), np.int64)
        ids = np.fromiter(chain.from_iterable(found), np.int64, int(totals.sum()))
        ends = np.cumsum(totals)
        begins, stops = ends - totals + len(head), ends - len(tail)
        sizes = np.maximum(stops - begins, 0)

        # right where head and tail are there, and nothing between them could have merged with another neighbour
        padded = np.concatenate([ids, np.zeros(len(head) + len(tail) + 1, np.int64)])  # a text may have fewer ids
        right = stops >= begins
        right &= (padded[(begins - len(head))[:, None] + np.arange(len(head))] == head).all(1)
        right &= (padded[np.maximum(stops, 0)[:, None] + np.arange(len(tail))] == tail).all(1)
        some = sizes > 0
        if after:
            right &= ~(some & self._open_ended[padded[stops - 1]])
        if before:
            right &= ~(some & (padded[begins] == self._tokenizer.unknown_id))  # one run of unknown would be one id

        sizes[~right] = 0
        middle = np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))
        dtype = token_dtype(self._tokenizer.vocab_size)
        return ids[middle].astype(dtype), np.where(right, sizes, NO_IDS)


def _characters(white: Array) -> str:
    """The characters of the white bytes in (256,) uint8."""
    return bytes(np.flatnonzero(white).tolist()).decode()


def why_whole(tokenizer: SentencePieceTokenizer) -> str:
    """Why texts must be encoded whole under this model; empty where a text's ids are those of its words."""
    model = tokenizer.proto()
    kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type).lower()
    if kind not in ("bpe", "char"):
        return f"a {kind} model weighs a text as a whole"
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        return "the model does not write white space before words"

    if any(piece.type == piece.UNUSED for piece in model.pieces):
        return "into what the model cuts its unused pieces may depend on other words"

    white = white_bytes(tokenizer)
    run = META + _characters(white)
    pieces = _texts(model)
    if META not in pieces:
        return "the model has no piece for a space"
    for piece in pieces:
        inside = piece.lstrip(run)
        if any(character in inside for character in run) or any(white[ord(c)] & SPACE for c in piece if c in run[1:]):
            return f"the piece {piece!r} reaches over white space"

    if white[list(chain(*rule_bytes(model.normalizer_spec.precompiled_charsmap)))].any():
        return "a normalisation rule reaches over white space"
    if model.normalizer_spec.remove_extra_whitespaces and tokenizer.normalize("  x  y ") != tokenizer.normalize("x y"):
        return "the rules make something else of a space, so that it is kept where others are removed"
    before = tokenizer.encode("x")
    if not tokenizer.normalize("x y").endswith(f"x{META}y") or tokenizer.encode("x y")[: len(before)] != before:
        return "the rules change the words x and y, between which others are tried"
    return ""


def white_bytes(tokenizer: SentencePieceTokenizer) -> Array:
    """(256,) uint8: RUN, BEGINS and SPACE of each byte.

    Besides what is a space to the model: where runs of white space are kept, also what is nothing special to it, but
    stands in no piece behind a character that is not white (line ends in models of single lines). No merge crosses
    from a word into it, and texts are cut there too.
    """
    model = tokenizer.proto()
    spaces = [byte for byte in ASCII_SPACES if _is_space(tokenizer, chr(byte))]
    white = np.zeros(256, np.uint8)
    white[spaces] = RUN | BEGINS | SPACE
    if model.normalizer_spec.remove_extra_whitespaces:
        return white

    ruled = set(chain(*rule_bytes(model.normalizer_spec.precompiled_charsmap)))
    candidates = [byte for byte in ASCII_SPACES if not white[byte] and byte not in ruled]
    others = {chr(byte) for byte in candidates if _is_plain_byte(tokenizer, byte)}
    while True:  # what is left in one piece behind another character is none, and then others may be left there too
        run = META + "".join(others)
        wrong = {character for piece in _texts(model) for character in others & set(piece.lstrip(run))}
        if not wrong:
            break
        others -= wrong
    white[[ord(character) for character in others]] = RUN | BEGINS
    return white


def _texts(model: Any) -> set[str]:
    """The pieces that a text is made of."""
    return {piece.piece for piece in model.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED)}


def _is_space(tokenizer: SentencePieceTokenizer, character: str) -> bool:
    """Whether a character is to this model what a space is, at both ends of a text, alone, and beside a space."""
    texts = (" x y", "x  y", "x y ", "  x   y  ")
    return all(
        tokenizer.normalize(text) == tokenizer.normalize(text.replace(" ", character, times))
        for text in texts
        for times in range(1, 8)
    )


def _is_plain_byte(tokenizer: SentencePieceTokenizer, byte: int) -> bool:
    """Whether no rule changes an ASCII character, and the model can write it."""
    known = tokenizer.unknown_id not in tokenizer.encode(f"x{chr(byte)}y")
    return known and tokenizer.normalize(f"x{chr(byte)}y").endswith(f"x{chr(byte)}y")
