"""Random bits as a hash of where they are used.

    T window, B substreams, F features

They have no history: no generator to advance, no random state to save. Any rank computes those of its own substreams
alone, CPU and GPU agree, a run has the same ones on one process and on four, and a captured CUDA graph takes the step
as a tensor. The price: a few integer passes over as many values.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Multipliers and shifts of "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018): bias 0.17 against 0.5.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
SHIFTS = (16, 15, 16)


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
    key = mix(mix(_int32(step ^ start_number(seed, place))) ^ _int32(step >> 32)).reshape(1)  # all 64 bits of the step

    row = mix(mix(key ^ _int32(rows)))  # (B,)
    position = mix(_int32(torch.arange(positions, device=device)))  # (T,)
    cell = mix(row.unsqueeze(0) ^ position.unsqueeze(1))  # (T, B)
    feature = mix(_int32(torch.arange(features, device=device)) ^ key)  # (F,)

    # both sides are well mixed: one multiplication and one fold between them, and one to spread into the high bits
    bits = cell.unsqueeze(2) + feature  # (T, B, F)
    bits *= MULTIPLIERS[0]
    bits ^= (bits >> SHIFTS[1]).bitwise_and_(2 ** (32 - SHIFTS[1]) - 1)
    bits *= MULTIPLIERS[1]
    return bits


@cache
def start_number(seed: int, place: int) -> int:
    """What all bits of a run and a place in the network start from, 0 <= n < 2^32."""
    parts = [_mix_number(part) for part in (seed % 2**32, seed >> 32, place)]
    return _mix_number(_mix_number(_mix_number(parts[0]) ^ parts[1]) ^ parts[2])


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
