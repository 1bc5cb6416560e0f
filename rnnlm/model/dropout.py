"""Dropout masks as a hash of where they apply.

    T window, B substreams, F features

A mask has no history: no generator to advance, no random state to save. Any rank computes the masks of its own
substreams alone, CPU and GPU agree, a run has the same masks on one process and on four, and a captured CUDA graph
takes the step as a tensor. A place in the network is hashed from its name, so that a new place changes no other mask.
The price: a few integer passes over the activations.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# Multipliers and shifts of "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018): bias 0.17 against 0.5.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
SHIFTS = (16, 15, 16)


def dropout(x: Tensor, probability: float, locked: bool, seed: int, place: int, step: Tensor, rows: Tensor) -> Tensor:
    """Set features to zero with this probability, scale the others by 1 / (1 - probability) (Srivastava et al. 2014).

    Args:
        x: (T, B, F)
        locked: one mask for the whole window instead of one for each position (Gal & Ghahramani 2016).
        place: as `place_number` gives it.
        step: () int64
        rows: (B,) int64 global numbers of the substreams.
    """
    if probability == 0:
        return x
    bits = hashed_bits(seed, place, step, rows, 1 if locked else x.shape[0], x.shape[2])
    keep = bits >= math.floor(probability * 2**32) - 2**31  # (T, B, F) or (1, B, F)
    return x * keep.to(x.dtype).mul_(1 / (1 - probability))


def place_number(name: str) -> int:
    """The number, 0 <= n < 2^32, that stands for a place in the network such as `layer0.output`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def hashed_bits(seed: int, place: int, step: Tensor, rows: Tensor, positions: int, features: int) -> Tensor:
    """Random int32 values, uniform over all 2^32, that are a function of their coordinates alone.

    Args:
        seed, place: which run, and which place in the network.
        step: () int64; a tensor, so that a captured CUDA graph can be replayed with another step.
        rows: (B,) int64 global row numbers.
        positions, features: sizes T and F of the other two coordinates.

    Returns:
        (T, B, F) int32
    """
    device = rows.device

    # what all values share: seed and place on the host, then the 64 bits of the step
    parts = [_mix_number(part) for part in (seed % 2**32, seed >> 32, place)]
    start = _mix_number(_mix_number(_mix_number(parts[0]) ^ parts[1]) ^ parts[2])
    key = mix(mix(_int32(step ^ start)) ^ _int32(step >> 32)).reshape(1)

    row = mix(mix(key ^ _int32(rows)))  # (B,)
    position = mix(_int32(torch.arange(positions, device=device)))  # (T,)
    cell = mix(row[None, :] ^ position[:, None])  # (T, B)
    feature = mix(_int32(torch.arange(features, device=device)) ^ key)  # (F,)

    # both sides are well mixed: one multiplication and one fold between them, and one to spread into the high bits
    bits = cell[:, :, None] + feature  # (T, B, F)
    bits *= MULTIPLIERS[0]
    bits ^= (bits >> SHIFTS[1]).bitwise_and_(2 ** (32 - SHIFTS[1]) - 1)
    bits *= MULTIPLIERS[1]
    return bits


def mix(x: Tensor) -> Tensor:
    """A bijective hash of int32 values, elementwise; the same bits on CPU and GPU."""
    x = _fold(x, SHIFTS[0]) * MULTIPLIERS[0]
    x = _fold(x, SHIFTS[1]) * MULTIPLIERS[1]
    return _fold(x, SHIFTS[2])


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^ (x >> shift) of unsigned values; int32 shifts copy the sign, so it is masked off."""
    return torch.bitwise_xor(x, (x >> shift) & (2 ** (32 - shift) - 1))


def _mix_number(x: int) -> int:
    """`mix` of one number, 0 <= x < 2^32."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * multiplier % 2**32
    return x


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values."""
    return ((x + 2**31) % 2**32 - 2**31).to(torch.int32)
