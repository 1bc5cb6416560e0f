"""In which precision products run: what autocast asks for in training, full fp32 where a model is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The precision that products with `weight` run in: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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
