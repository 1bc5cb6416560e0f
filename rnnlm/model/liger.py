"""The softmax kernel of liger-kernel (extra `gpu`; Hsu et al. 2024, "Liger Kernel: efficient Triton kernels").

Its fused linear cross entropy waits for the device at every call (it counts the targets that are not masked), keeps
logits in low precision, and chooses chunks by another rule; so only its kernel is taken: losses and slopes of logits in
their memory, two reads and one write. One program does a row from left to right in blocks whose size follows from V
alone: without atomics, nothing is chosen by timing (its version 0.8.5 was read), so that it may run under
train.deterministic. It has run here in Triton's interpreter, on a CPU; its bits are not those of the plain path.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGEST_BLOCK = 2**15  # columns at a time, as liger's own callers choose


def liger_takes(logits: Tensor) -> bool:
    """Whether these logits are on a GPU, and the library is installed."""
    return logits.is_cuda and _kernel() is not None


def liger_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Replace logits by the loss's slope by them, softmax - one-hot, zero where masked.

    Args:
        logits: (n, V) fp32, contiguous.
        targets: (n,) int64, -1 where masked.

    Returns:
        (n,) fp32 losses, 0 where masked.
    """
    losses = torch.zeros(len(logits), device=logits.device)
    columns = logits.shape[1]
    unused = dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr"))

    _kernel()[(len(logits),)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=targets.contiguous(),
        Y_stride=1,
        loss_ptr=losses,
        loss_stride=1,
        n_cols=columns,
        ignore_index=-1,
        reduction="sum",
        HAS_GRADIENTS=True,
        BLOCK_SIZE=min(LARGEST_BLOCK, 1 << (columns - 1).bit_length()),
        num_warps=32,
        # what is left out: class weights, label smoothing, means, a cap on logits, accuracy
        **unused,
        token_accuracy_stride=0,
        predicted_tokens_stride=0,
        n_non_ignore=1,
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
    )
    return losses


@cache
def _kernel() -> Any:
    """liger's compiled function; None where it is not installed."""
    try:
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    except ImportError:
        return None
    return liger_cross_entropy_kernel
