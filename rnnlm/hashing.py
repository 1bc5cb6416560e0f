"""Digests, and randomness without a state: keyed hashes of texts, a keyed permutation.

What is drawn depends on a seed and on what it is drawn for, never on what was drawn before, so any process can draw its
share in any order and there is no random state to save. The price: a hash for each, where a generator would be cheaper.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt


def json_digest(value: Any) -> str:
    """sha256 of a JSON value in its canonical form: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fraction_of(text: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone: splits and samples ignore files and order."""
    return fraction(keyed_hash(seed, text))


def keyed_hash(seed: int, text: bytes = b"") -> Any:
    """The hash behind `fraction_of`; a text that comes in blocks is added by its `update`."""
    return hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little", signed=True))


def fraction(hashed: Any) -> float:
    """The number in [0, 1) that a hash stands for."""
    return (int.from_bytes(hashed.digest(), "little") >> 11) / 2**53  # the 53 bits that a float holds exactly


def permuted(numbers: npt.NDArray[np.uint64], size: int, seed: int) -> npt.NDArray[np.uint64]:
    """Where a keyed permutation of 0 ... size - 1 takes these numbers, without storing it.

    A Feistel network (Luby & Rackoff 1988) of six rounds on the next even number of bits; what leaves the range goes
    through again (cycle walking, Black & Rogaway 2002).

    Args:
        numbers: of any shape (n,), each below `size`; the result has the same shape.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # bits of each of the two halves of a number
    mask = np.uint64((1 << int(half)) - 1)
    # six keys of 64 bits, one for each round
    keys = np.frombuffer(hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=48).digest(), "<u8")

    def six_rounds(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> half, value & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64, as arrays wrap
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    # The network permutes a range of up to four times `size`; on its cycle every number comes back below `size`.
    out = six_rounds(numbers)
    while len(outside := np.flatnonzero(out >= size)):
        out[outside] = six_rounds(out[outside])
    return out
