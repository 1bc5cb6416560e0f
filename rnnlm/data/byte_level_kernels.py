"""Segment a word as GPT-2's byte-level BPE does: cut it into pre-tokens, merge the bytes of each, write their ids.

    " don't"  ->  " don" "'t"  ->  bytes  ->  merges  ->  ids

A pre-token is what GPT-2's regular expression matches, the first alternative that does, as far as it reaches:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

Which characters are letters, numbers and spaces the tables say, as versions of Unicode differ. Nothing is checked here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rnnlm.data.bpe_kernels import MAX_BPE_BYTES, count_words, merge_symbols, put_merge, write_pieces
from rnnlm.data.word_keys import Array
from rnnlm.data.word_table import LAST, NEW
from rnnlm.kernels import inlined, kernel

LETTER, NUMBER, MARK, WHITE = 1, 2, 3, 4  # classes of characters; 0: not known


class ByteLevelTables(NamedTuple):
    """A byte-level BPE model as arrays; its pieces are numbered from 1 by their ids, and 0 is none."""

    piece_ids: Array  # (P + 1,) int64, the token of each piece
    single: Array  # (256,) int32, the piece of each byte
    double: Array  # (128, 128) int32, the merge of two ASCII characters
    merges: Array  # (2^k,) uint64, open addressing: two pieces and the number of their merge, the last one 1
    ranks: Array  # (merges + 1,) int32, 0, 1, 2, ...
    made: Array  # (merges + 1,) int32, the piece that each makes
    classes: Array  # (0x110000,) uint8, LETTER, NUMBER, MARK, WHITE of each character, or 0
    added_starts: Array  # (256,) bool, first bytes of added tokens: words that hold one are the library's


@kernel
def put_merges(found: Array, merges: Array) -> None:
    """Put the merges found (merges,) uint64 into an empty table (2^k,) uint64."""
    for merge in found:
        put_merge(merge, merges)


@inlined
def _class_at(keys: Array, place: Any, classes: Array) -> tuple[Any, Any]:
    """The class of the character at keys[place], and where it ends; keys (bytes,) uint8, classes as in the tables."""
    lead = np.int64(keys[place])
    if lead < 0x80:
        return np.int64(classes[lead]), place + 1
    if lead < 0xE0:
        return np.int64(classes[(lead & 0x1F) << 6 | (keys[place + 1] & 0x3F)]), place + 2
    if lead < 0xF0:
        code = (lead & 0x0F) << 12 | (np.int64(keys[place + 1]) & 0x3F) << 6 | (keys[place + 2] & 0x3F)
        return np.int64(classes[code]), place + 3
    code = (lead & 0x07) << 18 | (np.int64(keys[place + 1]) & 0x3F) << 12
    code |= (np.int64(keys[place + 2]) & 0x3F) << 6 | (keys[place + 3] & 0x3F)
    return np.int64(classes[code]), place + 4


@inlined
def _contraction_end(keys: Array, place: Any, end: Any) -> Any:
    """Where one of 's 't 're 've 'm 'll 'd at keys[place] ends, or `place` if there is none."""
    if keys[place] != 39 or place + 1 >= end:
        return place
    first = keys[place + 1]
    if first == 115 or first == 116 or first == 109 or first == 100:  # s t m d
        return place + 2
    second = keys[place + 2] if place + 2 < end else 0
    if (second == 101 and (first == 114 or first == 118)) or (first == 108 and second == 108):  # re ve ll
        return place + 3
    return place


@inlined
def _pretoken_end(keys: Array, start: Any, end: Any, classes: Array) -> tuple[Any, Any]:
    """Where the pre-token at keys[start] ends, `end` at most, and the class of its last character; 0: not known."""
    reach = _contraction_end(keys, start, end)
    if reach > start:
        return reach, np.int64(LETTER)

    kind, place = _class_at(keys, start, classes)
    if keys[start] == 32 and place < end:  # the space before letters, numbers or marks
        after, behind = _class_at(keys, place, classes)
        if after != WHITE:
            kind, place = after, behind
    before = start  # the last character of the run
    while place < end:
        after, behind = _class_at(keys, place, classes)
        if after != kind:
            break
        before, place = place, behind
    if kind == WHITE and place < end and before > start:  # white space leaves its last character to what follows
        return before, kind
    return place, kind


@kernel
def segment_pretokens(
    keys: Array, key_ends: Array, kinds: Array, first: int, last: int, tables: ByteLevelTables, byte_ids: Array,
    entries: Array, ids: Array, used: int,
) -> Any:  # fmt: skip
    """Find the ids of entries first ... last - 1 that are plain; the others get NEW; returns how many ids are used.

    Args:
        keys: (bytes,) uint8, the bytes of all entries of the table of words.
        key_ends: (entries,) int64, where those of each end.
        kinds: (entries,) uint8, FIRST | LAST of each.
        first: the first entry that is new.
        last: behind the last one.
        tables: the model.
        byte_ids: (0,) int64: no byte is without a piece.
        entries: (entries, 4) int32, written: of each its first id, number of ids, and words of str.split.
        ids: (ids,) uint16 or uint32, written from `used` on.
        used: how many ids there are.
    """
    begins = np.zeros(MAX_BPE_BYTES + 1, np.int32)
    after, before = np.zeros(MAX_BPE_BYTES + 1, np.int32), np.zeros(MAX_BPE_BYTES + 1, np.int32)
    piece, rank = np.zeros(MAX_BPE_BYTES + 1, np.int32), np.zeros(MAX_BPE_BYTES + 1, np.int32)
    joined = np.zeros(MAX_BPE_BYTES + 1, np.int32)

    for entry in range(first, last):
        start, end, kind = key_ends[entry - 1] if entry else 0, key_ends[entry], kinds[entry]
        entries[entry, 1] = NEW
        if end - start > MAX_BPE_BYTES or used + MAX_BPE_BYTES > len(ids):
            continue
        plain = True
        for place in range(start, end):
            plain &= not tables.added_starts[keys[place]]
        count = count_words(keys, start, end)
        if not plain or count < 0:
            continue

        written, place, final = used, start, 0
        while place < end:
            stop, final = _pretoken_end(keys, place, end, tables.classes)
            if final == 0:
                break
            symbols = stop - place
            for item in range(symbols):
                begins[item] = place + item
                piece[item] = tables.single[keys[place + item]]
            begins[symbols] = stop
            merge_symbols(
                keys, symbols, begins, piece, after, before, joined, rank, tables.double, tables.merges, tables.ranks,
                tables.made,
            )  # fmt: skip
            written = write_pieces(keys, symbols, begins, piece, after, ids, written, tables.piece_ids, byte_ids)
            place = stop

        # white space at the end may belong to what follows, unless nothing does
        if place < end or (final == WHITE and not kind & LAST):
            continue
        entries[entry, 0], entries[entry, 1], entries[entry, 2] = used, written - used, count
        used = written
    return used
