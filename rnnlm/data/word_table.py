"""The table of words: each distinct word of the texts is an entry, and knows its ids.

    texts --find_words--> the entry of each word --(ids of new entries, by the encoder)--> write_ids --> ids

Words are found in blocks, and only then looked up, so that the cache misses of many lookups overlap. The table is
bounded: when it is full, all but its oldest entries are forgotten. The kernels check nothing; all arrays are the
table's own or have room by construction. The price: about 40 MiB from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rnnlm.data.word_keys import HASHED, ONES, Array, U, hash_key, load, make_key, same_bytes
from rnnlm.kernels import inlined, kernel

BLOCK = 512  # words found before they are looked up together, so that their cache misses overlap
MAX_WORDS = 2**18  # held at once; beyond, the first quarter stays: the frequent ones come early
WORD_BYTES = 2**5  # of text for each of them, on average
RUN, BEGINS, SPACE = 1, 2, 4  # of a byte: it may stand in the white space before a word; it may begin that white space
# behind another word; it is a space to the model. A word goes on through white space that may not begin one.
FIRST, LAST = 1, 2  # a word's ids may depend on whether it begins its text, or is the white space at its end
SPARE_IDS = 2**11  # always free behind the last id: more than any word has that is segmented by bpe_kernels
NO_IDS = -1  # in place of a number of ids: they depend on what follows the word
NEW = -2  # likewise: not known yet
HIGHS = U(0x8080808080808080)


@inlined
def _before_low(word: Any) -> Any:
    """How many of eight bytes stand before the first that is at most 32; 8 if none is."""
    # minus 33 in each byte: the high bit is set then, and was not before, where the byte is at most 32; a borrow may
    # set it wrongly in bytes above one of these, but the lowest flag is exact
    low = (word - ONES * U(33)) & ~word & HIGHS
    below = ((low & (U(0) - low)) - U(1)) >> U(7)  # all bits below the lowest flag, of which each byte keeps one
    return np.int64(((below & ONES) * ONES) >> U(56)) if low != U(0) else 8


@inlined
def _word_end(data: Array, place: Any, end: Any, white: Array) -> Any:
    """Where white space begins in data (bytes,) uint8 from `place` on, or `end`; white (256,) uint8."""
    while place < end:
        size = _before_low(load(data, place))
        place += size
        if size < 8:
            if place >= end or white[data[place]] & BEGINS:
                break
            while place < end and white[data[place]]:  # white space that the word goes on through
                place += 1
            place += 1
    return min(place, end)


@inlined
def _fill_block(
    data: Array, place: Any, end: Any, opens: Any, flags: Any, white: Array, keep_runs: Any, first_differs: Any,
    block: Array,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Write (low, high, start, end) of the next words of a text to block; (how many, where they end, opens).

    Args: as find_words; opens: no word of the document was found yet.
    """
    filled = 0
    while filled < BLOCK:
        run = place
        while place < end and white[data[place]]:
            place += 1

        # white space at the end of a document is a word of its own where runs are kept, else nothing
        if place >= end and (not keep_runs or run == end or (flags & LAST) == 0):
            break
        start = run if keep_runs else place
        kind = (FIRST if opens and first_differs else 0) | (LAST if place >= end else 0)
        opens = False

        word = load(data, place)
        size = _before_low(word)
        length = place + size - start
        if length < 8 and size < 8 and white[data[place + size]] & BEGINS:  # most words: make_key without its branches
            if keep_runs:
                word = load(data, start)
            block[filled, 0] = word & ((U(1) << U(8 * length)) - U(1))
            block[filled, 1] = U(kind << 4 | length) << U(56)
            place += size
        else:
            place = _word_end(data, place, end, white)
            block[filled, 0], block[filled, 1] = make_key(data, start, place, kind)
        block[filled, 2], block[filled, 3] = U(start), U(place)
        filled += 1

    return filled, place, opens


@kernel
def find_words(
    data: Array, starts: Array, ends: Array, flags: int, white: Array, keep_runs: bool, first_differs: bool,
    slots: Array, keys: Array, key_ends: Array, kinds: Array, counts: Array, words: Array, found: Array, block: Array,
) -> None:  # fmt: skip
    """Write the entry of each word of each text to `words`, how many to `found`; new words become entries.

    Args:
        data: (bytes,) uint8, the texts, each followed by a space, and then 24 more spaces.
        starts: (texts,) int64, where each text begins in data.
        ends: (texts,) int64, where it ends.
        flags: FIRST | LAST, whether the texts open and end their documents.
        white: (256,) uint8, RUN, BEGINS and SPACE of each byte.
        keep_runs: a word begins with all the white space before it; else that is left out.
        first_differs: the first word of a document has another key than the same word later.
        slots: (2^k, 4) uint64, low, high, entry, and one unused; high is 0 where a slot is free.
        keys: (bytes,) uint8, the bytes of all entries.
        key_ends: (entries,) int64, where those of each end.
        kinds: (entries,) uint8, FIRST | LAST of each.
        counts: (2,) int64, how many entries there are, and how many bytes of keys.
        words: (len(data) // 2 + BLOCK,) int32, written: the entry of each word.
        found: (texts,) int64, written: how many words each text has.
        block: (BLOCK, 4) uint64, for use here: low, high, start and end of words.
    """
    mask = U(len(slots) - 1)
    written = 0
    for text in range(len(starts)):
        place, end, begun = starts[text], ends[text], written
        opens = (flags & FIRST) != 0
        while place < end:
            filled, place, opens = _fill_block(data, place, end, opens, flags, white, keep_runs, first_differs, block)

            for item in range(filled):  # no branch depends on another word here: the processor looks up many at once
                slot = np.int64(hash_key(block[item, 0], block[item, 1]) & mask)
                hit = slots[slot, 0] == block[item, 0] and slots[slot, 1] == block[item, 1]
                short = block[item, 1] < HASHED
                words[written + item] = np.int32(slots[slot, 2]) if hit and short else np.int32(-1)

            for item in range(filled):  # the few that are new, long, or not in their first slot
                if words[written + item] >= 0:
                    continue
                low, high = block[item, 0], block[item, 1]
                start, stop = np.int64(block[item, 2]), np.int64(block[item, 3])

                # linear probing: the word lies before the first free slot, or nowhere
                slot = np.int64(hash_key(low, high) & mask)
                while slots[slot, 1] != U(0):
                    entry: Any = np.int64(slots[slot, 2])
                    if slots[slot, 0] == low and slots[slot, 1] == high:
                        offset = key_ends[entry - 1] if entry else 0
                        if high < HASHED or same_bytes(data, start, keys, offset, stop - start):
                            break
                    slot = (slot + 1) & np.int64(mask)
                else:
                    entry = counts[0]
                    slots[slot, 0], slots[slot, 1], slots[slot, 2] = low, high, U(entry)
                    keys[counts[1] : counts[1] + stop - start] = data[start:stop]
                    counts[0] += 1
                    counts[1] += stop - start
                    key_ends[entry] = counts[1]
                    kinds[entry] = (high >> U(60)) & U(3)
                words[written + item] = entry

            written += filled
            if filled < BLOCK:
                break
        found[text] = written - begun


@kernel
def keep_first(slots: Array, entries: int) -> None:
    """Rebuild slots (2^k, 4) uint64 with the first entries alone, in place of all: linear probing allows no holes."""
    kept = np.empty((entries, 3), np.uint64)
    slot: Any
    for slot in range(len(slots)):
        if slots[slot, 1] != U(0) and slots[slot, 2] < U(entries):
            kept[slots[slot, 2]] = slots[slot, :3]

    slots[:] = U(0)
    mask = U(len(slots) - 1)
    for entry in range(entries):
        slot = np.int64(hash_key(kept[entry, 0], kept[entry, 1]) & mask)
        while slots[slot, 1] != U(0):
            slot = (slot + 1) & np.int64(mask)
        slots[slot, :3] = kept[entry]


@kernel
def write_ids(
    words: Array, found: Array, entries: Array, ids: Array, eos: int, out: Array, tokens: Array, counted: Array
) -> Any:  # fmt: skip
    """Write the ids of all words, and EOS behind each text if >= 0; returns how many.

    A text with an entry whose ids depend on what follows it gets -1 tokens, and no ids.

    Args:
        words: (words,) int32, the entry of each word of all texts.
        found: (texts,) int64, how many words each text has.
        entries: (entries, 4) int32, of each its first id, number of ids, words of str.split, and one unused.
        ids: (ids,) uint16 or uint32, those of all entries, and three more.
        eos: the id behind each text, or -1.
        out: (ids of all texts + 4,), of the same type, written.
        tokens: (texts,) int64, written: how many ids each text has, EOS included.
        counted: (texts,) int64, written: its words of str.split.
    """
    place = written = 0
    for text in range(len(found)):
        begun, total = written, 0
        for word in words[place : place + found[text]]:
            first, size = entries[word, 0], entries[word, 1]
            if size < 0:
                written, total = begun, 0
                break
            for index in range(4):  # four always, more if need be: the usual word then costs no branch
                out[written + index] = ids[first + index]
            for index in range(4, size):
                out[written + index] = ids[first + index]
            written += size
            total += entries[word, 2]
        else:
            if eos >= 0:
                out[written] = eos
                written += 1
            tokens[text], counted[text] = written - begun, total
            place += found[text]
            continue

        tokens[text], counted[text] = -1, 0
        place += found[text]
    return written


class WordTable:
    """The words met so far, each an entry, numbered in the order in which they came, and their ids."""

    def __init__(self, dtype: npt.DTypeLike, text_bytes: int, max_words: int = MAX_WORDS):
        """Take all memory.

        Args:
            dtype: of the ids, uint16 or uint32.
            text_bytes: of text looked up at once at most, which are half as many words.
            max_words: a power of two, how many are held between two batches.
        """
        self._max_words, self._max_bytes = max_words, max_words * WORD_BYTES
        entries = max_words + text_bytes // 2
        # of 32 bytes each, so that none lies in two cache lines, and not all of them taken
        self.slots = _touched((1 << max(max_words.bit_length(), entries.bit_length()), 4), np.uint64)
        self.keys = _touched(self._max_bytes + text_bytes, np.uint8)
        self.key_ends = _touched(entries, np.int64)
        self.kinds = _touched(entries, np.uint8)
        self.counts = np.zeros(2, np.int64)  # entries, bytes of keys
        self.entries = _touched((entries, 4), np.int32)  # first id, number of ids, words
        self.filled = 0  # entries whose ids are known
        self.ids, self.used = _touched(8 * max_words, dtype), 0
        self._block = np.zeros((BLOCK, 4), np.uint64)

    def find(
        self, texts: Sequence[bytes], flags: int, white: Array, keep_runs: bool, first_differs: bool
    ) -> tuple[Array, Array]:
        """(entry of each word, (words,) int32; how many each text has, (texts,) int64); see find_words."""
        data = np.frombuffer(b" ".join(texts) + b" " * 24, np.uint8)
        lengths = np.array(list(map(len, texts)), np.int64)
        ends = np.cumsum(lengths + 1) - 1
        words = np.empty(len(data) // 2 + BLOCK, np.int32)
        found = np.empty(len(texts), np.int64)
        find_words(
            data, ends - lengths, ends, flags, white, keep_runs, first_differs, self.slots, self.keys,
            self.key_ends, self.kinds, self.counts, words, found, self._block,
        )  # fmt: skip
        return words[: int(found.sum())], found

    def write(self, words: Array, found: Array, eos: int) -> tuple[Array, Array, Array]:
        """(ids; tokens and words of each text, (texts,) int64) of what `find` found; see write_ids."""
        ids = int(np.maximum(self.entries[:, 1][words], 0).sum())
        out = np.empty(ids + len(found) + 4, self.ids.dtype)
        tokens, counted = np.empty(len(found), np.int64), np.empty(len(found), np.int64)
        size = write_ids(words, found, self.entries, self.ids, eos, out, tokens, counted)
        return out[:size], tokens, counted

    def texts(self, entries: Array) -> list[bytes]:
        """The bytes of entries (n,) int64."""
        begins = np.where(entries > 0, self.key_ends[entries - 1], 0)
        spans = zip(begins.tolist(), self.key_ends[entries].tolist(), strict=True)
        return [self.keys[begin:end].tobytes() for begin, end in spans]

    def set_ids(self, entries: Array, ids: Array, counts: Array, words: Sequence[int]) -> None:
        """Give entries (n,) int64 their ids, one behind the other, `counts` (n,) int64 of each, NO_IDS where none."""
        self.reserve(len(ids))
        self.ids[self.used : self.used + len(ids)] = ids
        sizes = np.maximum(counts, 0)
        self.entries[entries, :3] = np.stack([self.used + np.cumsum(sizes) - sizes, counts, words], 1)
        self.used += len(ids)

    def reserve(self, ids: int) -> None:
        """Room for this many more ids."""
        while self.used + ids + SPARE_IDS > len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])

    def make_room(self) -> None:
        """Before a batch: forget all but the oldest entries, if there are too many."""
        if self.counts[0] <= self._max_words and self.counts[1] <= self._max_bytes:
            return

        kept = min(self._max_words // 4, int(np.searchsorted(self.key_ends[: self.filled], self._max_bytes // 4)))
        keep_first(self.slots, kept)
        self.filled = kept
        self.used = int((self.entries[:kept, 0] + np.maximum(self.entries[:kept, 1], 0)).max(initial=0))
        self.counts[:] = kept, self.key_ends[kept - 1] if kept else 0


def _touched(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros that take their memory now: what fits at the start fits at the end."""
    made = np.empty(shape, dtype)
    made.fill(0)
    return made
