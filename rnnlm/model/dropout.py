"""Dropout whose mask is a hash of where it applies, and is kept nowhere.

    T window, B substreams, F features

The bits are those of `random_bits.py`, of a place in the network hashed from its name, so that a new place changes no
other mask. The backward pass makes the same mask again. One kernel each way hashes and multiplies: compiled by numba
on CPUs, by Triton on GPUs. Their reference, with which they share every bit, is the eager form here; it serves where
neither is to be had, and tensors without values. The price of the kernels: numba is loaded by the first step that drops
anything, half a second.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnlm.model.random_bits import hashed_bits, start_number


class Site(NamedTuple):
    """Where something is dropped, and how much.

    Args:
        locked: one mask for the whole window instead of one for each position (Gal & Ghahramani 2016).
        place: as `place_number` gives it.
    """

    probability: float
    locked: bool
    seed: int
    place: int


Kernel = Callable[[Tensor, int, Tensor, Tensor, bool, int, float], Tensor]
"""Of x (T, B, F), the number that all bits start from, step () and rows (B,) int64, whether the mask is locked, the
least bits that are kept, as an unsigned number, and the scale, as x's precision has it: what is left of x."""


def dropout(x: Tensor, probability: float, locked: bool, seed: int, place: int, step: Tensor, rows: Tensor) -> Tensor:
    """Set features to zero with this probability, scale the others by 1 / (1 - probability) (Srivastava et al. 2014).

    Args:
        x: (T, B, F)
        locked, place: as `Site` has them.
        step: () int64
        rows: (B,) int64 global numbers of the substreams.
    """
    if probability == 0:
        return x

    site = Site(probability, locked, seed, place)
    # a subclass stands for a tensor that has no values
    kernel = find_kernel(x.device.type, x.dtype) if type(x) in (Tensor, nn.Parameter) else None
    if kernel is None:
        return eager_dropout(x, site, step, rows)
    dropped: Tensor = _Dropout.apply(x, step, rows, site, kernel)  # type: ignore[no-untyped-call]
    return dropped


def eager_dropout(x: Tensor, site: Site, step: Tensor, rows: Tensor) -> Tensor:
    """The same by PyTorch's operations alone, which keep the mask for the backward pass."""
    bits = hashed_bits(site.seed, site.place, step, rows, 1 if site.locked else x.shape[0], x.shape[2])
    keep = bits >= _least(site.probability) - 2**31  # (T, B, F) or (1, B, F)
    return x * keep.to(x.dtype).mul_(1 / (1 - site.probability))


@cache
def place_number(name: str) -> int:
    """The number, 0 <= n < 2^32, that stands for a place in the network such as `layer0.output`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


@cache
def find_kernel(device: str, dtype: torch.dtype) -> Kernel | None:
    """What drops in one pass on a type of device, compiled when it is first called; None: only the eager form does."""
    try:
        if device == "cpu":
            from rnnlm.model import dropout_kernels  # here: numba takes half a second

            return dropout_kernels.find(dtype)
        if device == "cuda":
            from rnnlm.model import dropout_triton  # Triton is not there on every platform

            return dropout_triton.find(dtype)
    except Exception as error:  # whatever a compiler may raise on a machine that is not as it expects
        print(f"warning: dropout runs in its slow form, with the same masks ({error!r})", file=sys.stderr, flush=True)
    return None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, rows: Tensor, site: Site, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(step, rows)
        ctx.site, ctx.kernel = site, kernel
        start, least = start_number(site.seed, site.place), _least(site.probability)
        return kernel(x, start, step, rows, site.locked, least, _scale(site.probability, x.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        step, rows = ctx.saved_tensors  # the mask is its own derivative, of any order
        return _Dropout.apply(*outer, step, rows, ctx.site, ctx.kernel), None, None, None, None  # type: ignore[no-untyped-call]


def _least(probability: float) -> int:
    """The least bits, as a number 0 <= n < 2^32, that are kept."""
    return math.floor(probability * 2**32)


@cache
def _scale(probability: float, dtype: torch.dtype) -> float:
    """1 / (1 - probability) as the precision has it."""
    return torch.ones((), dtype=dtype).mul_(1 / (1 - probability)).item()
