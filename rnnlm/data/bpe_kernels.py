"""Segment a word into the pieces of a BPE model, as SentencePiece does: normalise it, merge its symbols, write its ids.

    " Café"  ->  rules  ->  "▁Café"  ->  symbols  ->  ▁ C a f é  ->  merges  ->  ▁C af é  ->  ids

The model's tables are arrays (BpeTables), built once by tokenizer_rules. Words that are not plain are left to
SentencePiece: long ones, those with a NUL, those in which a rule makes white space. The kernels check nothing, and
their inlined helpers take arrays one by one: to hand on a tuple costs a count of references for each of its arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rnnlm.data.word_keys import ODD, Array, U, hash_key, make_key, mix, same_bytes
from rnnlm.data.word_table import FIRST, LAST, NEW, SPACE
from rnnlm.kernels import inlined, kernel

MAX_BPE_BYTES = 160  # of a word that is segmented here; longer ones are SentencePiece's
MAX_RUN_BYTES = 32  # of the white space before it
PIECE_BITS = 20  # enough for a million pieces
HIGH_BITS, LOW_BITS = U(0xFFFFFF) << U(40), (U(1) << U(40)) - U(1)


class BpeTables(NamedTuple):
    """A BPE model as arrays; its P pieces are numbered from 1 by their scores, the lowest first, and 0 is none."""

    piece_slots: Array  # (2^k,) uint64, open addressing: the high 24 bits of a piece's hash, and its number
    piece_bytes: Array  # (bytes,) uint8, UTF-8 of all pieces, and 24 more bytes
    piece_ends: Array  # (P + 1,) int64, where each ends in them
    piece_ids: Array  # (P + 1,) int64, the token of each
    ranks: Array  # (P + 1,) int32, of each how many scores are lower or equal: pieces of one score have one rank
    made: Array  # (P + 1,) int32, the piece that a merge makes, which has its number
    single: Array  # (128,) int32, the piece of an ASCII character
    double: Array  # (128, 128) int32, the piece of two ASCII characters
    merges: Array  # (2^k,) uint64, open addressing: two pieces and the one that they make, PIECE_BITS each
    byte_ids: Array  # (256,) int64, the token of each byte; (0,) without byte fallback
    ascii: Array  # (128,) uint8, what an ASCII character before another one becomes; 0: see the rules
    trie: Array  # (nodes,) int64, the texts that normalisation rules replace, or (0,); see tokenizer_rules
    replacements: Array  # (bytes,) uint8, what they write instead, each ended by 0
    dummy_prefix: bool  # a space is put before a text
    symbol_starts: Array  # (256,) bool, first bytes of user-defined symbols: words that hold one are SentencePiece's


@inlined
def _find_piece(text: Array, start: Any, end: Any, piece_slots: Array, piece_bytes: Array, piece_ends: Array) -> Any:
    """The number of the piece text[start:end], or 0; text (bytes,) uint8, the others as in BpeTables."""
    low, high = make_key(text, start, end, 0)
    value = hash_key(low, high)
    mask = len(piece_slots) - 1
    slot = np.int64(value) & mask

    while piece_slots[slot] != U(0):
        if ((piece_slots[slot] ^ value) & HIGH_BITS) == U(0):
            piece = np.int64(piece_slots[slot] & LOW_BITS)
            first = piece_ends[piece - 1]
            same_size = piece_ends[piece] - first == end - start
            if same_size and same_bytes(text, start, piece_bytes, first, end - start):
                return piece
        slot = (slot + 1) & mask
    return 0


@inlined
def _find_merge(left: Any, right: Any, merges: Array) -> Any:
    """The number of the merge of two pieces, or 0; merges as in BpeTables."""
    key = U(left) << U(PIECE_BITS) | U(right)
    mask = len(merges) - 1
    slot = np.int64(mix(key * ODD)) & mask
    while merges[slot] != U(0):
        if merges[slot] >> U(PIECE_BITS) == key:
            return np.int64(merges[slot] & U((1 << PIECE_BITS) - 1))
        slot = (slot + 1) & mask
    return 0


@inlined
def put_merge(merge: Any, merges: Array) -> None:
    """Put a merge, uint64, into a table of them."""
    slot = np.int64(mix((merge >> U(PIECE_BITS)) * ODD)) & (len(merges) - 1)
    while merges[slot] != U(0):
        slot = (slot + 1) & (len(merges) - 1)
    merges[slot] = merge


@kernel
def index_pieces(tables: BpeTables) -> bool:
    """Fill piece_slots and merges from piece_bytes and piece_ends.

    False if a piece has a character that is no piece: then two symbols might make a piece that is not in `merges`.
    """
    slots, texts, ends = tables.piece_slots, tables.piece_bytes, tables.piece_ends
    mask = len(slots) - 1
    for number in range(1, len(ends)):
        low, high = make_key(texts, ends[number - 1], ends[number], 0)
        value = hash_key(low, high)
        slot = np.int64(value) & mask
        while slots[slot] != U(0):
            slot = (slot + 1) & mask
        slots[slot] = (value & HIGH_BITS) | U(number)

    # each piece is cut in two at each of its characters: where both sides are pieces, they merge into it
    for number in range(1, len(ends)):
        start, end = ends[number - 1], ends[number]
        begin = start
        for place in range(start + 1, end + 1):
            if place < end and texts[place] & 0xC0 == 0x80:
                continue  # inside a character
            if not _find_piece(texts, begin, place, slots, texts, ends):
                return False
            begin = place
            if place < end:
                left = _find_piece(texts, start, place, slots, texts, ends)
                right = _find_piece(texts, place, end, slots, texts, ends)
                if left and right:
                    key = U(left) << U(PIECE_BITS) | U(right)
                    put_merge(key << U(PIECE_BITS) | U(number), tables.merges)
    return True


@kernel
def copy_merges(found: Array, merges: Array) -> None:
    """Put the merges found (merges,) uint64 into an empty table (2^k,) uint64."""
    for merge in found:
        put_merge(merge, merges)


@inlined
def count_words(text: Array, start: Any, end: Any) -> Any:
    """len(text.split()) of str.split, of text (bytes,) uint8: between Unicode's white space; -1 if there is a NUL."""
    count, inside, place = 0, False, start
    while place < end:
        byte, size, white = text[place], 1, False
        if byte < 0x80:
            white = byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31
            if byte == 0:
                return -1
        elif byte < 0xE0:
            size = 2
            white = byte == 0xC2 and (text[place + 1] == 0x85 or text[place + 1] == 0xA0)  # U+0085, U+00A0
        elif byte < 0xF0:
            size = 3
            second, third = text[place + 1], text[place + 2]
            if byte == 0xE2 and second == 0x80:  # U+2000 ... U+200A, U+2028, U+2029, U+202F
                white = third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF
            else:
                white = (byte == 0xE1 and second == 0x9A and third == 0x80) or (  # U+1680, U+205F, U+3000
                    (byte == 0xE2 and second == 0x81 and third == 0x9F)
                    or (byte == 0xE3 and second == 0x80 and third == 0x80)
                )
        else:
            size = 4

        count += not white and not inside
        inside = not white
        place += size
    return count


@inlined
def _apply_rule(
    word: Array, place: Any, end: Any, out: Array, written: Any, trie: Array, replacements: Array
) -> tuple[Any, Any]:
    """Apply the longest rule at word[place], or copy one character, to out[written]; (next place, bytes in out).

    word and out are (bytes,) uint8, trie and replacements as in BpeTables.
    """
    longest: Any = 0
    target: Any = 0
    if len(trie):
        node = (trie[0] >> 10) << ((trie[0] & 0x200) >> 6)
        for reach in range(place, end):
            node ^= word[reach]
            if node >= len(trie) or (trie[node] & 0x800000FF) != word[reach]:
                break
            is_end = (trie[node] >> 8) & 1  # a rule ends at this node; what it writes stands at the child by byte 0
            node ^= (trie[node] >> 10) << ((trie[node] & 0x200) >> 6)
            if is_end:
                longest, target = reach + 1 - place, trie[node] & 0x7FFFFFFF

    if longest:
        while replacements[target] != 0:
            out[written] = replacements[target]
            written += 1
            target += 1
        return place + longest, written

    lead = word[place]
    size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    for offset in range(size):
        out[written + offset] = word[place + offset]
    return place + size, written + size


@inlined
def merge_symbols(
    text: Array, symbols: Any, begins: Array, piece: Array, after: Array, before: Array, joined: Array, rank: Array,
    double: Array, merges: Array, ranks: Array, made: Array,
) -> None:  # fmt: skip
    """Merge symbols until no two make a piece; piece and after then hold what is left, from symbol 0 on.

    Args:
        text: (bytes,) uint8.
        begins: (MAX_BPE_BYTES + 1,) int32, where each symbol begins in text.
        piece: (MAX_BPE_BYTES + 1,) int32, the piece of each, or 0.
        after: (MAX_BPE_BYTES + 1,) int32, for use here: the next symbol that is left.
        before: (MAX_BPE_BYTES + 1,) int32, for use here: the one before.
        joined: (MAX_BPE_BYTES + 1,) int32, for use here: the merge with the next one; 0: none.
        rank: (MAX_BPE_BYTES + 1,) int32, for use here: the rank of that merge, above 255 - the symbol's place, so that
            the greatest is the highest score, and of equal scores the leftmost; 0 if there is none.
        double: as in BpeTables.
        merges: as in BpeTables.
        ranks: as in BpeTables.
        made: as in BpeTables.
    """
    for item in range(symbols):
        after[item], before[item], rank[item] = item + 1, item - 1, 0
        if item + 1 < symbols:
            left, right = text[begins[item]], text[begins[item + 1]]
            if left < 0x80 and right < 0x80:
                number = np.int64(double[left, right])
            else:
                number = _find_merge(piece[item], piece[item + 1], merges)
            joined[item] = number
            rank[item] = ranks[number] << 8 | (255 - item) * (number != 0)

    while True:
        top = np.int32(0)
        for item in range(symbols):
            top = max(top, rank[item])
        if top == 0:
            break

        best = np.int64(255 - (top & 255))
        gone = np.int64(after[best])
        piece[best] = made[joined[best]]
        rank[best], rank[gone] = 0, 0
        following, previous = np.int64(after[gone]), np.int64(before[best])
        after[best] = following

        if following < symbols:
            before[following] = best
            number = _find_merge(piece[best], piece[following], merges)
            joined[best] = number
            rank[best] = ranks[number] << 8 | (255 - best) * (number != 0)
        if previous >= 0:
            number = _find_merge(piece[previous], piece[best], merges)
            joined[previous] = number
            rank[previous] = ranks[number] << 8 | (255 - previous) * (number != 0)


@inlined
def write_pieces(
    text: Array, symbols: Any, begins: Array, piece: Array, after: Array, ids: Array, used: Any,
    piece_ids: Array, byte_ids: Array,
) -> Any:  # fmt: skip
    """Write the ids of the symbols that are left to ids[used:]; where they end, or -1 if one is unknown.

    A symbol that is no piece is written as its bytes. ids is (ids,) uint16 or uint32; text ... after are as in
    merge_symbols, piece_ids and byte_ids as in BpeTables.
    """
    written, item = used, 0
    while item < symbols:
        if piece[item]:
            ids[written] = piece_ids[piece[item]]
            written += 1
        elif len(byte_ids):
            for place in range(begins[item], begins[after[item]]):
                ids[written] = byte_ids[text[place]]
                written += 1
        else:
            return -1
        item = after[item]
    return written


@kernel
def segment_words(
    keys: Array, key_ends: Array, kinds: Array, first: int, last: int, white: Array, tables: BpeTables,
    entries: Array, ids: Array, used: int,
) -> Any:  # fmt: skip
    """Find the ids of entries first ... last - 1 that are plain; the others get NEW; returns how many ids are used.

    Of two adjacent symbols those whose piece has the highest score become one, the leftmost of equals first, until no
    two make a piece (Sennrich et al. 2016, section 3.2; SentencePiece's bpe_model.cc).

    Args:
        keys: (bytes,) uint8, the bytes of all entries of the table of words.
        key_ends: (entries,) int64, where those of each end.
        kinds: (entries,) uint8, FIRST | LAST of each.
        first: the first entry that is new.
        last: behind the last one.
        white: (256,) uint8, the white bytes; see word_table.
        tables: the model.
        entries: (entries, 4) int32, written: of each its first id, number of ids, and words of str.split.
        ids: (ids,) uint16 or uint32, written from `used` on.
        used: how many ids there are.
    """
    text = np.zeros(8 * MAX_BPE_BYTES, np.uint8)
    begins = np.zeros(MAX_BPE_BYTES + 1, np.int32)
    after, before = np.zeros(MAX_BPE_BYTES + 1, np.int32), np.zeros(MAX_BPE_BYTES + 1, np.int32)
    piece, rank = np.zeros(MAX_BPE_BYTES + 1, np.int32), np.zeros(MAX_BPE_BYTES + 1, np.int32)
    joined = np.zeros(MAX_BPE_BYTES + 1, np.int32)

    for entry in range(first, last):
        start, end, kind = key_ends[entry - 1] if entry else 0, key_ends[entry], kinds[entry]
        entries[entry, 1] = NEW
        if end - start > MAX_BPE_BYTES or kind & LAST or used + len(text) > len(ids):  # no room for the longest
            continue

        # the white space before a word: each byte that is a space to the model is written as one, however it looks
        size = 0
        if tables.dummy_prefix if kind & FIRST else not white[keys[start]]:
            text[0], text[1], text[2] = 0xE2, 0x96, 0x81  # U+2581, which stands for a space
            size = 3
        run = start
        while start < end and white[keys[start]] and start - run < MAX_RUN_BYTES:
            if white[keys[start]] & SPACE:
                text[size], text[size + 1], text[size + 2] = 0xE2, 0x96, 0x81
                size += 3
            else:
                text[size] = keys[start]
                size += 1
            start += 1
        count = count_words(keys, start, end)
        if count < 0 or (start < end and white[keys[start]]):
            continue

        # the rules, most often none: an ASCII character before another one is looked up at once
        bare, place = size, start
        while place < end and size <= 4 * MAX_BPE_BYTES:
            byte = keys[place]
            if byte < 0x80 and tables.ascii[byte] and (place + 1 == end or keys[place + 1] < 0x80):
                text[size] = tables.ascii[byte]
                place, size = place + 1, size + 1
            else:
                place, size = _apply_rule(keys, place, end, text, size, tables.trie, tables.replacements)
        if place < end or size == bare:
            continue

        # its characters are the first symbols; user-defined ones come before them, in the text and in what rules made
        symbols, plain = 0, True
        for place in range(start, end):
            plain &= not tables.symbol_starts[keys[place]]
        for place in range(size):
            plain &= not tables.symbol_starts[text[place]]

        # white space among them was made by a rule, and might split the word
        place = 0
        while place < size and symbols < MAX_BPE_BYTES:
            lead = text[place]
            is_meta = lead == 0xE2 and text[place + 1] == 0x96 and text[place + 2] == 0x81
            plain &= place < bare or not (white[lead] or is_meta)
            begins[symbols] = place
            place += 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            if lead < 0x80:
                piece[symbols] = tables.single[lead]
            else:
                piece[symbols] = _find_piece(
                    text, begins[symbols], place, tables.piece_slots, tables.piece_bytes, tables.piece_ends
                )
            symbols += 1
        if place != size or not plain:
            continue
        begins[symbols] = size

        merge_symbols(
            text,
            symbols,
            begins,
            piece,
            after,
            before,
            joined,
            rank,
            tables.double,
            tables.merges,
            tables.ranks,
            tables.made,
        )
        written = write_pieces(text, symbols, begins, piece, after, ids, used, tables.piece_ids, tables.byte_ids)
        if written < 0:
            continue
        entries[entry, 0], entries[entry, 1], entries[entry, 2] = used, written - used, count
        used = written
    return used
