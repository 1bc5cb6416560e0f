"""Dropout masks as a hash of where they apply: no history, no dependence on ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Multipliers and shifts of "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018): bias 0.17 against 0.5.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
SHIFTS = (16, 15, 16)


def mix(x: Tensor) -> Tensor:
    """A bijective hash of int32 values, elementwise; the same bits on CPU and GPU."""
    x = _fold(x, SHIFTS[0]) * MULTIPLIERS[0]
    x = _fold(x, SHIFTS[1]) * MULTIPLIERS[1]
    return _fold(x, SHIFTS[2])


def _fold(x: Tensor, shift: int) -> Tensor:
    return torch.bitwise_xor(x, (x >> shift) & (2 ** (32 - shift) - 1))  # int32 shifts copy the sign: mask it off


def hashed_bits(seed: int, site: int, step: Tensor, rows: Tensor, places: int, features: int) -> Tensor:
    """Random int32 values, uniform over all 2^32, that are a function of their coordinates alone.

    Args:
        seed, site: which run, and which place in the network.
        step: () int64; a tensor, so that a captured CUDA graph can be replayed with another step.
        rows: (B,) int64 global row numbers.
        places, features: sizes T and F of the other two coordinates.

    Returns:
        (T, B, F) int32
    """
    device = rows.device
    parts = [_mix_number(part) for part in (seed % 2**32, seed >> 32, site)]
    start = _mix_number(_mix_number(_mix_number(parts[0]) ^ parts[1]) ^ parts[2])
    key = mix(mix(_int32(step ^ start)) ^ _int32(step >> 32)).reshape(1)
    row = mix(mix(key ^ _int32(rows)))  # (B,)
    cell = mix(row[None, :] ^ mix(_int32(torch.arange(places, device=device)))[:, None])  # (T, B)
    feature = mix(_int32(torch.arange(features, device=device)) ^ key)  # (F,)
    # both sides are well mixed: one multiplication and one fold between them, and one to spread into the high bits
    bits = cell[:, :, None] + feature  # (T, B, F)
    bits *= MULTIPLIERS[0]
    bits ^= (bits >> SHIFTS[1]).bitwise_and_(2 ** (32 - SHIFTS[1]) - 1)
    bits *= MULTIPLIERS[1]
    return bits


def _mix_number(x: int) -> int:
    """`mix` of one number, 0 <= x < 2^32."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * multiplier % 2**32
    return x


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values."""
    return ((x + 2**31) % 2**32 - 2**31).to(torch.int32)


def dropout(x: Tensor, probability: float, locked: bool, seed: int, site: int, step: Tensor, rows: Tensor) -> Tensor:
    """Zero units with this probability and scale the others by 1 / (1 - probability) (Srivastava et al. 2014).

    Args:
        x: (T, B, F)
        locked: one mask for the whole window instead of one for each position (Gal & Ghahramani 2016).
        rows: (B,) int64 global numbers of the substreams; other arguments as in `hashed_bits`.
    """
    if probability == 0:
        return x
    bits = hashed_bits(seed, site, step, rows, 1 if locked else x.shape[0], x.shape[2])
    keep = bits >= math.floor(probability * 2**32) - 2**31  # (T, B, F) or (1, B, F)
    return x * keep.to(x.dtype).mul_(1 / (1 - probability))
