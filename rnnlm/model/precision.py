"""In which precision products run: what autocast asks for in training, full fp32 where a model is measured.

The weights that products in a low precision take are cast once for all micro-batches of an update, within `cast_once`.
It is an explicit stretch of time, not a comparison of versions: those are not counted where a captured CUDA graph
changes the weights. The price: the copies are in memory from the first micro-batch to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by train.precision


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The precision that products with `weight` run in: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


Made = TypeVar("Made")
_made: ContextVar[dict[Hashable, Any] | None] = ContextVar("made", default=None)  # None: outside of `cast_once`


@contextmanager
def cast_once() -> Iterator[None]:
    """Within, until they are updated, weights stay as they are: `made_once` makes once what it makes of them.

    It is forgotten at the end.
    """
    outer = _made.set({})
    try:
        yield
    finally:
        _made.reset(outer)


def made_once(owner: object, name: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` makes of an owner's weights, under a name that is the owner's choice.

    It may be made with its history: each micro-batch's gradient then passes through it on its way to the weights, since
    casts, concatenations and views keep nothing that a backward pass frees.
    """
    made = _made.get()
    if made is None:
        return make()
    key = (id(owner), name, torch.is_grad_enabled())
    if key not in made:
        made[key] = owner, make()  # held, so that no other object can have its id
    found: Made = made[key][1]
    return found


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a precision, within `cast_once` always the same copy."""
    return weight if weight.dtype == dtype else made_once(weight, dtype, lambda: weight.to(dtype))


BF16_CUDNN, BF16_CAPABILITY = 91300, (8, 0)  # from here on PyTorch gives bf16 to cuDNN's recurrent kernels (RNN.cpp)


def slow_recurrence(precision: str, cudnn: int | None, capability: tuple[int, int]) -> str:
    """What to print before a run on a GPU whose recurrent layers cannot use cuDNN's kernels; empty where they can.

    Args:
        precision: train.precision.
        cudnn: as torch.backends.cudnn.version() gives it: 8902 for 8.9.2, 91002 for 9.10.2; None: there is none.
        capability: compute capability of the GPU.
    """
    if cudnn is None:
        return "warning: PyTorch has no cuDNN here: recurrent layers run step by step, many times slower; install one"
    if precision != "bf16" or (cudnn >= BF16_CUDNN and capability >= BF16_CAPABILITY):
        return ""

    major, rest = divmod(cudnn, 10_000 if cudnn >= 90_000 else 1000)
    way_out = "or a newer cuDNN" if capability >= BF16_CAPABILITY else "which this GPU has kernels for"
    return (
        f"warning: train.precision=bf16: cuDNN {major}.{rest // 100}.{rest % 100} with compute capability "
        f"{capability[0]}.{capability[1]} runs recurrent layers step by step, many times slower; bf16 needs cuDNN 9.13 "
        f"and compute capability 8.0: use train.precision=fp16 or fp32, {way_out}"
    )


def cudnn_version() -> int | None:
    """As PyTorch numbers it, 91300 for 9.13.0; None where there is none."""
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, not in TF32: what is scored or generated does not depend on how training was sped up."""
    if not torch.cuda.is_available():
        yield
        return

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
