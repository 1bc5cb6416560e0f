"""The encoder's kernels: find the words of texts in a table, spell new words by BPE, write out their ids.

A word is a key of two 64-bit registers: up to 15 bytes its bytes, its length and its kind; beyond, a hash, and then
its bytes are compared too. Words are found in blocks, and only then looked up, so that the cache misses of many lookups
overlap. All arrays belong to the caller; nothing is checked here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

INLINE_BYTES = 15  # words up to this are compared in two registers, longer ones by hash and then byte by byte
MAX_SPELLED = 160  # bytes of a word that is spelt here; longer ones are SentencePiece's
PIECE_BITS = 20  # enough for a million pieces
BLOCK = 512  # words found before they are looked up together, so that their cache misses overlap
FIRST, LAST = 1, 2  # what a word's ids may depend on besides its bytes: it opens the text; it is spaces that end it
Array = npt.NDArray[Any]
U = np.uint64
ONES, HIGHS = U(0x0101010101010101), U(0x8080808080808080)
HASHED = U(0x80) << U(56)  # marks the keys of long words; kind and length of a short one stay below
HIGH_BITS, LOW_BITS = U(0xFFFFFF) << U(40), (U(1) << U(40)) - U(1)


class Speller(NamedTuple):
    """A BPE model as arrays; pieces are numbered from 1 by their scores, the lowest first."""

    table: Array  # open addressing: the high 24 bits of a piece's hash, and its number
    spellings: Array  # UTF-8 of all pieces
    ends: Array  # where each ends; 0 for the piece 0 that is not
    ids: Array
    single: Array  # (128,) the piece of an ASCII character, or 0
    double: Array  # (128, 128) the piece of two ASCII characters
    pairs: Array  # open addressing: two pieces and the one that they make, PIECE_BITS each
    byte_ids: Array  # (256,), or (0,) without byte fallback
    ascii: Array  # (128,) what an ASCII character before another one becomes; 0: see the rules
    units: Array  # normalisation rules: the trie's units, or none
    targets: Array  # what they write, each ended by 0
    dummy_prefix: bool


@numba.njit(inline="always")
def _load(data: Array, place: Any) -> Any:
    """Eight bytes, the first one lowest."""
    word = U(0)
    for shift in range(8):
        word |= U(data[place + shift]) << U(8 * shift)
    return word


@numba.njit(inline="always")
def _mix(value: Any) -> Any:
    """A bijection that spreads every bit over the low ones."""
    value ^= value >> U(32)
    value *= U(0xD6E8FEB86659FD93)  # odd, half of its bits set: the same holds for the next two
    return value ^ (value >> U(32))


@numba.njit(inline="always")
def _hash(low: Any, high: Any) -> Any:
    return _mix((low * U(0x9E3779B97F4A7C15)) ^ (high * U(0xC2B2AE3D27D4EB4F)))


@numba.njit(inline="always")
def _before_low(word: Any) -> Any:
    """How many of eight bytes stand before the first that is at most 32; 8 if none is."""
    low = (word - ONES * U(33)) & ~word & HIGHS  # the lowest flag is exact: no borrow comes from below it
    below = ((low & (U(0) - low)) - U(1)) >> U(7)
    return np.int64(((below & ONES) * ONES) >> U(56)) if low != U(0) else 8


@numba.njit(inline="always")
def _word_end(data: Array, place: Any, end: Any, white: Array) -> Any:
    """The first white byte from `place` on, or `end`."""
    while place < end:
        size = _before_low(_load(data, place))
        place += size
        if size < 8:
            if place >= end or white[data[place]]:
                break
            place += 1
    return min(place, end)


@numba.njit(inline="always")
def _key(data: Array, start: Any, end: Any, kind: Any) -> tuple[Any, Any]:
    """Two registers that stand for a word: its bytes if it is short, else a hash and its length."""
    length = end - start
    low = _load(data, start)
    high = U(0)
    if length < 8:
        low &= (U(1) << U(8 * length)) - U(1)
    elif length > 8:
        high = _load(data, start + 8)
        if length <= INLINE_BYTES:
            high &= (U(1) << U(8 * (length - 8))) - U(1)
    if length > INLINE_BYTES:
        value = _mix(low ^ _mix(high + U(length)))
        for place in range(start + 16, end, 8):
            word = _load(data, place)
            if end - place < 8:
                word &= (U(1) << U(8 * (end - place))) - U(1)
            value = _mix(value ^ word) + ONES
        return value, HASHED | U(kind) << U(60) | U(length)
    return low, high | U(kind << 4 | length) << U(56)


@numba.njit(inline="always")
def _same(data: Array, start: Any, keys: Array, offset: Any, length: Any) -> Any:
    place = 0
    while place < length and data[start + place] == keys[offset + place]:
        place += 1
    return place == length


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def find_words(
    data: Array, starts: Array, ends: Array, flags: int, white: Array, keep_runs: bool, marked: bool, table: Array,
    keys: Array, key_ends: Array, kinds: Array, counts: Array, words: Array, found: Array, block: Array,
) -> None:  # fmt: skip
    """Write the entry of each word of each text to `words`, how many to `found`; new words become entries.

    Args: data: texts, each followed by a space, and 24 more spaces; flags: FIRST | LAST, whether the texts open and
    end their documents; keep_runs: a word begins with the spaces before it; marked: the first word is another key than
    the same word later; counts: entries and bytes of keys, so far.
    """
    mask = U(len(table) - 1)
    written = 0
    for text in range(len(starts)):
        place, end, begun = starts[text], ends[text], written
        opens = (flags & FIRST) != 0
        while place < end:
            filled = 0
            while filled < BLOCK:
                run = place
                while place < end and white[data[place]]:
                    place += 1
                if place >= end and (not keep_runs or run == end or (flags & LAST) == 0):
                    break
                start = run if keep_runs else place
                kind = (FIRST if opens and marked else 0) | (LAST if place >= end else 0)
                opens = False
                word = _load(data, place)
                size = _before_low(word)
                length = place + size - start
                if length < 8 and size < 8 and white[data[place + size]]:  # most words
                    if keep_runs:
                        word = _load(data, start)
                    block[filled, 0] = word & ((U(1) << U(8 * length)) - U(1))
                    block[filled, 1] = U(kind << 4 | length) << U(56)
                    place += size
                else:
                    place = _word_end(data, place, end, white)
                    block[filled, 0], block[filled, 1] = _key(data, start, place, kind)
                block[filled, 2], block[filled, 3] = U(start), U(place)
                filled += 1
            for item in range(filled):  # no branch depends on another word here: the processor looks up many at once
                slot = np.int64(_hash(block[item, 0], block[item, 1]) & mask)
                hit = table[slot, 0] == block[item, 0] and table[slot, 1] == block[item, 1]
                short = block[item, 1] < HASHED
                words[written + item] = np.int32(table[slot, 2]) if hit and short else np.int32(-1)
            for item in range(filled):
                if words[written + item] >= 0:
                    continue
                low, high = block[item, 0], block[item, 1]
                start, stop = np.int64(block[item, 2]), np.int64(block[item, 3])
                slot = np.int64(_hash(low, high) & mask)
                while table[slot, 1] != U(0):
                    entry: Any = np.int64(table[slot, 2])
                    if table[slot, 0] == low and table[slot, 1] == high:
                        offset = key_ends[entry - 1] if entry else 0
                        if high < HASHED or _same(data, start, keys, offset, stop - start):
                            break
                    slot = (slot + 1) & np.int64(mask)
                else:
                    entry = counts[0]
                    table[slot, 0], table[slot, 1], table[slot, 2] = low, high, U(entry)
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


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def keep_first(table: Array, entries: int) -> None:
    """Rebuild the table with its first entries alone, in place of all: linear probing allows no holes."""
    kept = np.empty((entries, 3), np.uint64)
    slot: Any
    for slot in range(len(table)):
        if table[slot, 1] != U(0) and table[slot, 2] < U(entries):
            kept[table[slot, 2]] = table[slot, :3]
    table[:] = U(0)
    mask = U(len(table) - 1)
    for entry in range(entries):
        slot = np.int64(_hash(kept[entry, 0], kept[entry, 1]) & mask)
        while table[slot, 1] != U(0):
            slot = (slot + 1) & np.int64(mask)
        table[slot, :3] = kept[entry]


@numba.njit(inline="always")
def _piece(text: Array, start: Any, end: Any, speller: Speller) -> Any:
    """The number of the piece text[start:end], or 0."""
    low, high = _key(text, start, end, 0)
    value = _hash(low, high)
    mask = len(speller.table) - 1
    slot = np.int64(value) & mask
    while speller.table[slot] != U(0):
        if ((speller.table[slot] ^ value) & HIGH_BITS) == U(0):
            entry = np.int64(speller.table[slot] & LOW_BITS)
            first = speller.ends[entry - 1]
            if speller.ends[entry] - first == end - start and _same(text, start, speller.spellings, first, end - start):
                return entry
        slot = (slot + 1) & mask
    return 0


@numba.njit(inline="always")
def _merged(left: Any, right: Any, pairs: Array) -> Any:
    """The number of the piece that two pieces make, or 0."""
    key = U(left) << U(PIECE_BITS) | U(right)
    mask = len(pairs) - 1
    slot = np.int64(_mix(key * U(0x9E3779B97F4A7C15))) & mask
    while pairs[slot] != U(0):
        if pairs[slot] >> U(PIECE_BITS) == key:
            return np.int64(pairs[slot] & U((1 << PIECE_BITS) - 1))
        slot = (slot + 1) & mask
    return 0


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def index_pieces(speller: Speller) -> bool:
    """Fill the tables: each piece's hash and number, and every two pieces that make one.

    False if a piece has a character that is no piece: then two symbols might make a piece that is not in `pairs`.
    """
    mask = len(speller.table) - 1
    for number in range(1, len(speller.ends)):
        low, high = _key(speller.spellings, speller.ends[number - 1], speller.ends[number], 0)
        value = _hash(low, high)
        slot = np.int64(value) & mask
        while speller.table[slot] != U(0):
            slot = (slot + 1) & mask
        speller.table[slot] = (value & HIGH_BITS) | U(number)
    mask = len(speller.pairs) - 1
    for number in range(1, len(speller.ends)):
        start, end = speller.ends[number - 1], speller.ends[number]
        begin = start
        for place in range(start + 1, end + 1):
            if place < end and speller.spellings[place] & 0xC0 == 0x80:
                continue  # inside a character
            if not _piece(speller.spellings, begin, place, speller):
                return False
            begin = place
            if place < end:
                left = _piece(speller.spellings, start, place, speller)
                right = _piece(speller.spellings, place, end, speller)
                if left and right:
                    key = U(left) << U(PIECE_BITS) | U(right)
                    slot = np.int64(_mix(key * U(0x9E3779B97F4A7C15))) & mask
                    while speller.pairs[slot] != U(0):
                        slot = (slot + 1) & mask
                    speller.pairs[slot] = key << U(PIECE_BITS) | U(number)
    return True


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def index_pairs(entries: Array, pairs: Array) -> None:
    """Put the entries of one table of pairs into another."""
    for entry in entries:
        slot = np.int64(_mix((entry >> U(PIECE_BITS)) * U(0x9E3779B97F4A7C15))) & (len(pairs) - 1)
        while pairs[slot] != U(0):
            slot = (slot + 1) & (len(pairs) - 1)
        pairs[slot] = entry


@numba.njit(inline="always")
def _normalized(word: Array, place: int, end: int, written: int, out: Array, speller: Speller) -> Any:
    """Apply the longest rule at `place`, or copy one character; (next place, bytes in `out`)."""
    units, targets = speller.units, speller.targets
    longest: Any = 0
    target: Any = 0
    if len(units):
        node = (units[0] >> 10) << ((units[0] & 0x200) >> 6)
        for reach in range(place, end):
            node ^= word[reach]
            if node >= len(units) or (units[node] & 0x800000FF) != word[reach]:
                break
            leaf = (units[node] >> 8) & 1
            node ^= (units[node] >> 10) << ((units[node] & 0x200) >> 6)
            if leaf:
                longest, target = reach + 1 - place, units[node] & 0x7FFFFFFF
    if longest:
        while targets[target] != 0:
            out[written] = targets[target]
            written += 1
            target += 1
        return place + longest, written
    lead = word[place]
    size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    for step in range(size):
        out[written + step] = word[place + step]
    return place + size, written + size


@numba.njit(inline="always")
def _count_words(text: Array, start: Any, end: Any) -> Any:
    """len(text.split()) of str.split: between Unicode's white space; -1 if there is a NUL."""
    count, inside, place = 0, False, start
    while place < end:
        byte, size, white = text[place], 1, False
        if byte < 0x80:
            white = byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31
            if byte == 0:
                return -1
        elif byte < 0xE0:
            size = 2
            white = byte == 0xC2 and (text[place + 1] == 0x85 or text[place + 1] == 0xA0)
        elif byte < 0xF0:
            size = 3
            second, third = text[place + 1], text[place + 2]
            if byte == 0xE2 and second == 0x80:
                white = third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF
            else:
                white = (byte == 0xE1 and second == 0x9A and third == 0x80) or (
                    (byte == 0xE2 and second == 0x81 and third == 0x9F)
                    or (byte == 0xE3 and second == 0x80 and third == 0x80)
                )
        else:
            size = 4
        count += not white and not inside
        inside = not white
        place += size
    return count


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def spell_words(
    keys: Array, key_ends: Array, kinds: Array, first: int, last: int, white: Array, speller: Speller,
    entries: Array, ids: Array, used: int,
) -> Any:  # fmt: skip
    """Encode the new entries that are plain: rules leave no white space in them, pieces are found by BPE's merges.

    Of two adjacent symbols those whose piece has the highest score become one, the leftmost of equals first, until no
    two make a piece (Sennrich et al. 2016, section 3.2; SentencePiece's bpe_model.cc). Others get the size -2.
    """
    text = np.zeros(8 * MAX_SPELLED, np.uint8)
    begins = np.zeros(MAX_SPELLED + 1, np.int32)  # of symbols
    after = np.zeros(MAX_SPELLED + 1, np.int32)  # the next one, and
    before = np.zeros(MAX_SPELLED + 1, np.int32)  # the one before, of those that are left
    piece = np.zeros(MAX_SPELLED + 1, np.int32)
    rank = np.zeros(MAX_SPELLED + 1, np.int32)  # the piece that it makes with the next one, above 255 - its own place
    for entry in range(first, last):
        start, end, kind = key_ends[entry - 1] if entry else 0, key_ends[entry], kinds[entry]
        entries[entry, 1] = -2
        if end - start > MAX_SPELLED or kind & LAST or used + len(text) > len(ids):  # no room for the longest
            continue
        spaces = 0
        while start < end and white[keys[start]]:
            start, spaces = start + 1, spaces + 1
        if not kind & FIRST:
            spaces = max(spaces, 1)
        elif speller.dummy_prefix:
            spaces += 1
        count = _count_words(keys, start, end)
        if count < 0 or spaces > 8:
            continue
        size = 0
        for _ in range(spaces):
            text[size], text[size + 1], text[size + 2] = 0xE2, 0x96, 0x81
            size += 3
        bare, place = size, start
        while place < end and size <= 4 * MAX_SPELLED:
            byte = keys[place]
            if byte < 0x80 and speller.ascii[byte] and (place + 1 == end or keys[place + 1] < 0x80):
                text[size] = speller.ascii[byte]
                place, size = place + 1, size + 1
            else:
                place, size = _normalized(keys, place, end, size, text, speller)
        if place < end or size == bare:
            continue
        symbols, plain, place = 0, True, 0
        while place < size and symbols < MAX_SPELLED:
            lead = text[place]
            if place >= bare and (lead == 32 or (lead == 0xE2 and text[place + 1] == 0x96 and text[place + 2] == 0x81)):
                plain = False
            begins[symbols] = place
            place += 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            piece[symbols] = speller.single[lead] if lead < 0x80 else _piece(text, begins[symbols], place, speller)
            symbols += 1
        if place != size or not plain:
            continue
        begins[symbols] = size
        for item in range(symbols):
            after[item], before[item], rank[item] = item + 1, item - 1, 0
            if item + 1 < symbols:
                left, right = text[begins[item]], text[begins[item + 1]]
                if left < 0x80 and right < 0x80:
                    number = np.int64(speller.double[left, right])
                else:
                    number = _merged(piece[item], piece[item + 1], speller.pairs)
                rank[item] = number << 8 | (255 - item) * (number != 0)
        while True:
            top = np.int32(0)
            for item in range(symbols):
                top = max(top, rank[item])
            if top == 0:
                break
            best = np.int64(255 - (top & 255))
            gone = np.int64(after[best])
            piece[best] = top >> 8
            rank[best], rank[gone] = 0, 0
            following, previous = np.int64(after[gone]), np.int64(before[best])
            after[best] = following
            if following < symbols:
                before[following] = best
                number = _merged(piece[best], piece[following], speller.pairs)
                rank[best] = number << 8 | (255 - best) * (number != 0)
            if previous >= 0:
                number = _merged(piece[previous], piece[best], speller.pairs)
                rank[previous] = number << 8 | (255 - previous) * (number != 0)
        written = used
        item = 0
        while item < symbols:
            if piece[item]:
                ids[written] = speller.ids[piece[item]]
                written += 1
            elif len(speller.byte_ids):
                for place in range(begins[item], begins[after[item]]):
                    ids[written] = speller.byte_ids[text[place]]
                    written += 1
            else:
                written = -1
                break
            item = after[item]
        if written < 0:
            continue
        entries[entry, 0], entries[entry, 1], entries[entry, 2] = used, written - used, count
        used = written
    return used


@numba.njit(cache=True, boundscheck=False, error_model="numpy")
def write_ids(
    words: Array, found: Array, entries: Array, ids: Array, eos: int, out: Array, tokens: Array, counted: Array
) -> Any:  # fmt: skip
    """Write the ids of all words, and EOS behind each text if >= 0; per text how many ids, and words of str.split.

    A text with an entry whose ids depend on what follows it gets -1 tokens, and no ids.
    """
    place = written = 0
    for text in range(len(found)):
        begun, total = written, 0
        for word in words[place : place + found[text]]:
            first, size = entries[word, 0], entries[word, 1]
            if size < 0:
                written, total = begun, 0
                break
            for step in range(4):  # four always, more if need be: the usual word then costs no branch
                out[written + step] = ids[first + step]
            for step in range(4, size):
                out[written + step] = ids[first + step]
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
