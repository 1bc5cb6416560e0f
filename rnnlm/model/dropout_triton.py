"""Dropout on GPUs: the hash of a mask and the product with it in one kernel, by Triton.

    N = T * B cells (position and substream), F features

Bits and roundings are those of the eager form in `dropout.py`. Block sizes are fixed: nothing is chosen by timing.
Triton comes with PyTorch's CUDA packages. Under TRITON_INTERPRET=1, set before the first import, it runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnlm.model.random_bits import MULTIPLIERS, SHIFTS

jit: Any = triton.jit
FIRST, SECOND = (tl.constexpr(multiplier % 2**32) for multiplier in MULTIPLIERS)
SHIFT_0, SHIFT_1, SHIFT_2 = (tl.constexpr(shift) for shift in SHIFTS)
CELLS, FEATURES = 16, 128  # of a program: 16 elements for each of its 128 threads, features beside each other in memory


@jit
def mix(x):  # type: ignore[no-untyped-def]
    """`random_bits.mix` of uint32."""
    x = (x ^ (x >> SHIFT_0)) * tl.full((), FIRST, tl.uint32)
    x = (x ^ (x >> SHIFT_1)) * tl.full((), SECOND, tl.uint32)
    return x ^ (x >> SHIFT_2)


@jit
def float32_of(x):  # type: ignore[no-untyped-def]
    """bf16 widened by its bits, as below, since Triton's interpreter loses the smallest and does not round."""
    return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@jit
def bfloat16_of(x):  # type: ignore[no-untyped-def]
    """fp32 rounded to the nearest bf16, of two to the even one."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit(do_not_specialize=["start", "least", "cells", "substreams"])  # type: ignore[untyped-decorator]
def drop_block(  # type: ignore[no-untyped-def]
    x, out, start, step, rows, least, scale, cells, features, substreams,
    locked: tl.constexpr, cell_block: tl.constexpr, feature_block: tl.constexpr,
):  # fmt: skip
    """A block of cells and features of x (N, F) into out; step () and rows (B,) int64; start and
    least lessened by 2^31, so that they are int32 whatever they are."""
    now = tl.load(step)
    key = mix(mix((now ^ (start.to(tl.int64) + 2**31)).to(tl.uint32)) ^ (now >> 32).to(tl.uint32))

    cell = tl.program_id(0) * cell_block + tl.arange(0, cell_block)
    feature = tl.program_id(1) * feature_block + tl.arange(0, feature_block)
    inside = (cell < cells)[:, None] & (feature < features)[None, :]

    row = mix(mix(key ^ tl.load(rows + cell % substreams, mask=cell < cells, other=0).to(tl.uint32)))
    position = cell * 0 if locked else cell // substreams
    bits = mix(row ^ mix(position.to(tl.uint32)))[:, None] + mix(feature.to(tl.uint32) ^ key)[None, :]
    bits = bits * tl.full((), FIRST, tl.uint32)
    bits = (bits ^ (bits >> SHIFT_1)) * tl.full((), SECOND, tl.uint32)
    keep = bits.to(tl.int32, bitcast=True) >= least  # as signed numbers, as the eager form compares

    place = cell.to(tl.int64)[:, None] * features + feature[None, :]
    # a product even with 0, as in the eager form: NaN stays NaN, and -1 becomes -0
    factor, old = tl.where(keep, scale, 0.0), tl.load(x + place, mask=inside)
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + place, bfloat16_of(float32_of(old) * factor), mask=inside)
    else:
        tl.store(out + place, (old.to(tl.float32) * factor).to(out.dtype.element_ty), mask=inside)


def find(dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """`drop`, if it has this precision; None for fp64, whose scale Triton would hand over in fp32."""
    return drop if dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def drop(x: Tensor, start: int, step: Tensor, rows: Tensor, locked: bool, least: int, scale: float) -> Tensor:
    """x (T, B, F) scaled where its bits are at least `least`, else times zero.

    Args:
        start: as `random_bits.start_number` gives it.
        step, rows: () and (B,) int64 on x's device.
        scale: already rounded to x's precision.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    length, substreams, features = x.shape
    cells = length * substreams
    grid = (triton.cdiv(cells, CELLS), triton.cdiv(features, FEATURES))
    if x.numel():
        drop_block[grid](
            x, out, start - 2**31, step, rows.contiguous(), least - 2**31, scale, cells, features, substreams,
            locked, CELLS, FEATURES,
        )  # fmt: skip
    return out
