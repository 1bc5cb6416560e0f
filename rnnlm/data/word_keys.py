"""Words as keys: two 64-bit registers that stand for some bytes, and their hash.

The key of up to 15 bytes is these bytes, their number and a kind, so that two comparisons compare whole words; of more
bytes it is a hash, and who finds it must compare the bytes too. These functions are inlined into the kernels of
word_table and bpe_kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rnnlm.kernels import inlined

INLINE_BYTES = 15  # words up to this are compared in two registers, longer ones by hash and then byte by byte
Array = npt.NDArray[Any]
U = np.uint64  # the type of every register: numba makes a float of a sum of signed and unsigned
ODD = U(0x9E3779B97F4A7C15)  # the golden ratio, of 64 bits
OTHER_ODD = U(0xC2B2AE3D27D4EB4F)  # another number whose bits follow no pattern
ONES = U(0x0101010101010101)
HASHED = U(0x80) << U(56)  # marks the keys of long words; kind and length of a short one stay below


@inlined
def load(data: Array, place: Any) -> Any:
    """Eight bytes of data (bytes,) uint8 from `place` on, the first one lowest."""
    word = U(0)
    for shift in range(8):
        word |= U(data[place + shift]) << U(8 * shift)
    return word


@inlined
def mix(value: Any) -> Any:
    """A bijection that spreads every bit over the low ones."""
    value ^= value >> U(32)
    value *= U(0xD6E8FEB86659FD93)  # odd, so that nothing is lost; half of its bits are set
    return value ^ (value >> U(32))


@inlined
def hash_key(low: Any, high: Any) -> Any:
    """The hash of a key."""
    return mix((low * ODD) ^ (high * OTHER_ODD))


@inlined
def make_key(data: Array, start: Any, end: Any, kind: Any) -> tuple[Any, Any]:
    """The key (low, high) of data[start:end]; data (bytes,) uint8 has 16 more bytes behind `end` at least."""
    length = end - start
    low = load(data, start)
    high = U(0)

    # bytes behind the end are masked away; shifting by 64 is undefined, so eight bytes need no mask
    if length < 8:
        low &= (U(1) << U(8 * length)) - U(1)
    elif length > 8:
        high = load(data, start + 8)
        if length <= INLINE_BYTES:
            high &= (U(1) << U(8 * (length - 8))) - U(1)

    if length > INLINE_BYTES:
        value = mix(low ^ mix(high + U(length)))
        for place in range(start + 16, end, 8):
            word = load(data, place)
            if end - place < 8:
                word &= (U(1) << U(8 * (end - place))) - U(1)
            value = mix(value ^ word) + ONES
        return value, HASHED | U(kind) << U(60) | U(length)

    return low, high | U(kind << 4 | length) << U(56)


@inlined
def same_bytes(data: Array, start: Any, keys: Array, offset: Any, length: Any) -> Any:
    """Whether data (bytes,) uint8 from `start` on and keys (bytes,) uint8 from `offset` on hold the same bytes."""
    place = 0
    while place < length and data[start + place] == keys[offset + place]:
        place += 1
    return place == length
