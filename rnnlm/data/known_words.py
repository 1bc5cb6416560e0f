"""The ids of new words under a table of words, by a compiled kernel: a hash table from a word's bytes to its id.

Words with a byte that may belong to white space beyond ASCII's are left to the tokenizer, which cuts them by str.split.
The price: the words of the vocabulary are in memory once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rnnlm.data.word_keys import HASHED, Array, U, hash_key, make_key, same_bytes
from rnnlm.data.word_table import NEW, WordTable
from rnnlm.kernels import kernel

SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]  # the last is U+3000
MARGIN = 24  # bytes that make_key may read behind a word


@kernel
def index_words(words: Array, word_ends: Array, slots: Array) -> None:
    """Put all words into the slots.

    Args:
        words: (bytes,) uint8, one behind the other, and MARGIN more.
        word_ends: (words + 1,) int64, 0 and where each ends.
        slots: (2^k, 3) uint64, zeros, written: low and high of the key, number; high is 0 where a slot is free.
    """
    mask = U(len(slots) - 1)
    for number in range(len(word_ends) - 1):
        low, high = make_key(words, word_ends[number], word_ends[number + 1], 0)
        slot = np.int64(hash_key(low, high) & mask)
        while slots[slot, 1] != U(0):
            slot = (slot + 1) & np.int64(mask)
        slots[slot, 0], slots[slot, 1], slots[slot, 2] = low, high, U(number)


@kernel
def find_known(
    keys: Array, key_ends: Array, first: int, last: int, odd: Array, slots: Array, words: Array, word_ends: Array,
    tokens: Array, unknown: int, entries: Array, ids: Array, used: int,
) -> Any:  # fmt: skip
    """Write the id of each entry first ... last - 1, or NEW where it is odd; returns how many ids are used then.

    Args:
        keys, key_ends, entries, ids: of the table of words, see word_table.
        odd: (256,) bool, bytes of words that are left out.
        slots, words, word_ends: see index_words.
        tokens: (words,) int64, the id of each.
        unknown: the id of a word that is not among them.
        used: how many of `ids` are.
    """
    mask = U(len(slots) - 1)
    for entry in range(first, last):
        start, end = key_ends[entry - 1] if entry else 0, key_ends[entry]
        plain = end + MARGIN <= len(keys)
        for place in range(start, end):
            plain = plain and not odd[keys[place]]
        if not plain:
            entries[entry, 1] = NEW
            continue

        low, high = make_key(keys, start, end, 0)
        slot = np.int64(hash_key(low, high) & mask)
        token = unknown
        while slots[slot, 1] != U(0):
            number: Any = np.int64(slots[slot, 2])
            if slots[slot, 0] == low and slots[slot, 1] == high:
                begin = word_ends[number]
                same = word_ends[number + 1] - begin == end - start
                if high < HASHED or (same and same_bytes(keys, start, words, begin, end - start)):
                    token = tokens[number]
                    break
            slot = (slot + 1) & np.int64(mask)

        ids[used] = token
        entries[entry, 0], entries[entry, 1], entries[entry, 2] = used, 1, 1
        used += 1
    return used


class KnownWords:
    """The words of a vocabulary, ready for the kernel."""

    def __init__(self, known: Mapping[str, int], unknown: int):
        """Words and their ids, and the id of all others."""
        texts = [word.encode() for word in known]
        self._words = np.frombuffer(b"".join(texts) + bytes(MARGIN), np.uint8)
        self._word_ends = np.cumsum([0, *map(len, texts)])
        self._tokens = np.array([*known.values(), 0], np.int64)  # one more: numba takes no array of nothing
        self._unknown = unknown
        self._odd = np.zeros(256, bool)
        self._odd[[space.encode()[0] for space in SPACES]] = True
        self._slots = np.zeros((1 << (2 * len(texts)).bit_length(), 3), np.uint64)
        index_words(self._words, self._word_ends, self._slots)

    def fill(self, table: WordTable, first: int, last: int) -> None:
        """Find the ids of the entries first ... last - 1 that are plain words; the others get NEW."""
        table.used = find_known(
            table.keys, table.key_ends, first, last, self._odd, self._slots, self._words, self._word_ends,
            self._tokens, self._unknown, table.entries, table.ids, table.used,
        )  # fmt: skip
