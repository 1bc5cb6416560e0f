"""Dropout on CPUs: the hash of a mask and the product with it in one pass, compiled by numba.

    N = T * B cells (position and substream), F features

Bits and roundings are those of the eager form in `dropout.py`. Every sum, product and shift is of unsigned 32 bits,
cast back at once, since numba widens them: nothing overflows a signed number, and sixteen values fit into a register.
bf16 is handed over as its bits, for which NumPy has no type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnlm.kernels import inlined, on_threads, unlocked_kernel
from rnnlm.model.random_bits import MULTIPLIERS, SHIFTS

U = np.uint32
FIRST, SECOND = (U(multiplier % 2**32) for multiplier in MULTIPLIERS)
SHIFT_0, SHIFT_1, SHIFT_2 = (U(shift) for shift in SHIFTS)
SIGN, HIGH, HALF, ODD, NAN = U(2**31), U(16), U(0x7FFF), U(1), U(0x7FC0)

PER_THREAD = 2**20  # elements, about 0.2 ms of a core: a thread that is woken for fewer comes too late


@inlined
def mix(x: Any) -> Any:
    """`random_bits.mix` of a uint32."""
    x = U(U(x ^ U(x >> SHIFT_0)) * FIRST)
    x = U(U(x ^ U(x >> SHIFT_1)) * SECOND)
    return U(x ^ U(x >> SHIFT_2))


@inlined
def hash_of_step(start: Any, step: Any) -> Any:
    """The key that all bits of a step share: uint32, of start below 2^32 and a step int64."""
    return mix(U(mix(U(U(step) ^ U(start))) ^ U(step >> 32)))


@inlined
def hash_of_cell(key: Any, row: Any, position: Any) -> Any:
    """What the bits of a substream (int64) share at a position (int64): uint32."""
    return mix(U(mix(mix(U(key ^ U(row)))) ^ mix(U(position))))


@inlined
def hashes_of_features(key: Any, features: Any) -> Any:
    """(F,) uint32"""
    hashes = np.empty(features, np.uint32)
    for feature in range(features):
        hashes[feature] = mix(U(U(feature) ^ key))
    return hashes


@inlined
def is_kept(cell: Any, feature: Any, threshold: Any) -> Any:
    """Whether an element stays, of the hashes of its cell and feature; the eager form compares as signed numbers."""
    bits = U(U(cell + feature) * FIRST)
    bits = U(U(bits ^ U(bits >> SHIFT_1)) * SECOND)
    return U(bits ^ SIGN) >= threshold


@unlocked_kernel
def drop_floats(
    begin: int, end: int, x: Any, out: Any, start: int, step: int, rows: Any, locked: bool, limit: int, scale: float
) -> None:
    """Cells begin ... end - 1 of x (N, F) fp32 or fp64 into out, for rows (B,) int64."""
    key, threshold = hash_of_step(start, step), U(limit)
    features = hashes_of_features(key, x.shape[1])
    kept, dropped = x.dtype.type(scale), x.dtype.type(0)

    for n in range(begin, end):
        position = n // len(rows)
        cell = hash_of_cell(key, rows[n - position * len(rows)], 0 if locked else position)
        for feature in range(x.shape[1]):
            # a product even with 0, as in the eager form: NaN stays NaN, and -1 becomes -0
            out[n, feature] = x[n, feature] * (kept if is_kept(cell, features[feature], threshold) else dropped)


@unlocked_kernel
def drop_bfloat16(
    begin: int, end: int, x: Any, out: Any, start: int, step: int, rows: Any, locked: bool, limit: int, scale: float
) -> None:
    """The same of bf16, x and out (N, F) uint16: an fp32 product rounded to the nearest, of two to the even one."""
    key, threshold = hash_of_step(start, step), U(limit)
    features = hashes_of_features(key, x.shape[1])
    kept, dropped = np.float32(scale), np.float32(0)

    for n in range(begin, end):
        position = n // len(rows)
        cell = hash_of_cell(key, rows[n - position * len(rows)], 0 if locked else position)
        for feature in range(x.shape[1]):
            wide = U(U(x[n, feature]) << HIGH).view(np.float32)
            product = np.float32(wide * (kept if is_kept(cell, features[feature], threshold) else dropped))
            bits = np.float32(product).view(np.uint32)
            rounded = U(U(bits + U(HALF + U(U(bits >> HIGH) & ODD))) >> HIGH)
            out[n, feature] = np.uint16(rounded if product == product else NAN)


KERNELS: dict[torch.dtype, Callable[..., None]] = {
    torch.float32: drop_floats,
    torch.float64: drop_floats,
    torch.bfloat16: drop_bfloat16,
}


def find(dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """`drop`, compiled for a precision; None: there is none for it, as for fp16, in which nothing trains on CPUs."""
    if dtype not in KERNELS:
        return None
    drop(torch.ones((1, 1, 1), dtype=dtype), 0, torch.tensor(0), torch.tensor([0]), False, 0, 1.0)
    return drop


def drop(x: Tensor, start: int, step: Tensor, rows: Tensor, locked: bool, limit: int, scale: float) -> Tensor:
    """x (T, B, F) of a dtype in KERNELS, on a CPU, scaled where its bits are at least `limit`, else times zero.

    Args:
        start: as `random_bits.start_number` gives it.
        step, rows: () and (B,) int64.
        scale: already rounded to x's precision.
    """
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    cells, width = x.shape[0] * x.shape[1], x.shape[2]
    arrays = [each.view(torch.uint16) if x.dtype == torch.bfloat16 else each for each in (x, out)]
    ours, theirs = (each.view(cells, width).numpy() for each in arrays)
    arguments = (ours, theirs, start, step.item(), rows.contiguous().numpy(), locked, limit, scale)

    run = KERNELS[x.dtype]
    threads = min(torch.get_num_threads(), x.numel() // PER_THREAD)
    on_threads(lambda begin, end: run(begin, end, *arguments), cells, threads)
    return out
