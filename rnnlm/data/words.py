"""How texts are cut into words under a tokenizer, and what the ids of a word are: what an encoder must know of a kind.

A kind whose ids are known to depend on the word alone needs nothing else (TableWords). For others a subclass of Words
says where texts may be cut, and why that is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import numpy as np

from rnnlm.data.known_words import KnownWords
from rnnlm.data.tokenizer import Tokenizer, token_dtype
from rnnlm.data.word_keys import Array
from rnnlm.data.word_table import BEGINS, FIRST, NEW, NO_IDS, RUN, SPACE, WordTable
from rnnlm.data.word_tokenizer import WordTokenizer

ASCII_SPACES = (9, 10, 11, 12, 13, 32)


class Words(ABC):
    """The words of texts under one tokenizer."""

    why_whole = ""
    """Why texts must be encoded whole; empty where a text's ids are those of its words, one after the other."""
    why_not_compiled = ""
    """Why the tokenizer's library is asked for new words; empty where kernels find the ids of most of them."""

    white: Array  # (256,) uint8, RUN, BEGINS and SPACE of each byte
    keep_runs: bool  # a word begins with all the white space before it; else that is left out
    first_differs: bool  # the first word of a document may have other ids than the same word later

    @abstractmethod
    def encode(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """The ids of texts, each some words of a document, behind which other words stand.

        With FIRST in `kind` they open their documents, with LAST they are the white space that ends them.

        Returns:
            ids: all ids, one behind the other, uint16 or uint32.
            sizes: (texts,) int64, how many each has; no ids and NO_IDS where they depend on the words around it.
        """

    def fill(self, table: WordTable, first: int, last: int) -> None:
        """Find the ids of the entries first ... last - 1 that are plain words; the others get NEW."""
        if self.why_not_compiled:
            table.entries[first:last, 1] = NEW
        else:
            self.segment(table, first, last)

    @abstractmethod
    def segment(self, table: WordTable, first: int, last: int) -> None:
        """As `fill`, by kernels, where nothing is the reason why not."""


class NoWords(Words):
    """Of a tokenizer whose rules are not known, or that needs no words."""

    def __init__(self, tokenizer: Tokenizer):
        self.why_whole = f"its rules for {tokenizer.description} are not known"

    def encode(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """As Words: the ids depend on everything."""
        return np.empty(0, np.int64), np.full(len(texts), NO_IDS)

    def segment(self, table: WordTable, first: int, last: int) -> None:
        """As Words: there are none."""
        raise AssertionError(self.why_whole)


class TableWords(Words):
    """The words of a tokenizer that tells the ids of each."""

    keep_runs = False

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: KnownWords | None = None
        self.first_differs = True
        if isinstance(tokenizer, WordTokenizer) and not tokenizer.by_characters:
            self.first_differs = False
            self._known = KnownWords(tokenizer.known, tokenizer.unknown_id)
        else:
            self.why_not_compiled = "a word may have several"
        self.white = np.zeros(256, np.uint8)
        self.white[list(ASCII_SPACES)] = RUN | BEGINS | SPACE

    def encode(self, texts: Sequence[bytes], kind: int) -> tuple[Array, Array]:
        """As Words."""
        each = self._tokenizer.word_ids([text.decode() for text in texts], first=bool(kind & FIRST))
        nothing = NO_IDS if kind == FIRST else 0  # white space alone: the next word may be the first one
        sizes = [len(ids) or nothing for ids in each]
        return np.fromiter(chain.from_iterable(each), token_dtype(self._tokenizer.vocab_size)), np.array(sizes)

    def segment(self, table: WordTable, first: int, last: int) -> None:
        """As Words, from a table of all words."""
        assert self._known is not None
        self._known.fill(table, first, last)
