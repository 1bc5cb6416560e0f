"""Cross entropy of a linear head without the (tokens, vocabulary) logits.

    N tokens of a window, H width of the head's input, V vocabulary

The logits of `chunk` tokens at a time are made, reduced, and thrown away; when gradients are wanted they are formed in
the same pass, since softmax minus one-hot needs only those logits (as in the fused linear cross entropy of Hsu et al.
2024, "Liger Kernel"). Memory is chunk * V instead of N * V; nothing is computed twice. The price: the gradients of the
head are held from the forward to the backward pass, one more copy of the head in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnnlm.model.precision import compute_dtype


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """-log softmax(x W' + b)[target], summed over the tokens.

    Under autocast the products run in its precision; the softmax and all sums are in fp32, or fp64 for fp64 inputs.

    Args:
        x: (N, H)
        weight: (V, H)
        bias: (V,)
        targets: (N,) int64; tokens with target -1 count for nothing.
        chunk: tokens whose logits are in memory at once.

    Returns:
        () the sum.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """The same for each token, without gradients: (N,); 0 where the target is -1.

    `chunk` is no option of evaluation: another size may round otherwise.
    """
    return torch.cat(
        [
            _softmax(part @ weight.T + bias, wanted)[0]
            for part, wanted in zip(torch.split(x, chunk), torch.split(targets, chunk), strict=True)
        ]
    )


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(losses (n,), log-normaliser (n, 1)) of logits (n, V)."""
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    losses = normaliser - logits.gather(1, targets.clamp(min=0)[:, None])
    return losses[:, 0].masked_fill(targets < 0, 0.0), normaliser


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int) -> Tensor:
        dtype = compute_dtype(weight)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        wanted = any(ctx.needs_input_grad[:3])
        with torch.autocast(x.device.type, enabled=False):
            x_cast, matrix = x.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=wide, device=x.device)
            grads = (torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)) if wanted else ()
            for start in range(0, len(x), chunk):
                part, ids = x_cast[start : start + chunk], targets[start : start + chunk]
                logits = (part @ matrix.T).to(wide) + bias  # (chunk, V)
                losses, normaliser = _softmax(logits, ids)
                total += losses.sum()
                if wanted:
                    # in place: the logits become softmax - one-hot, zero for masked tokens
                    slope = logits.sub_(normaliser).exp_()
                    column = ids.clamp(min=0)[:, None]  # one a row: no adding scatter, which GPUs do in any order
                    slope.scatter_(1, column, slope.gather(1, column) - 1)
                    slope.masked_fill_((ids < 0)[:, None], 0.0)
                    _accumulate(grads, start, slope, part, matrix)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Any) -> Any:
        x, weight, bias = ctx.saved_tensors  # gradients of the sum; `outer` is a scalar in full precision
        return (x.to(outer[0].dtype) * outer[0]).to(x.dtype), weight * outer[0], bias * outer[0], None, None


def _accumulate(grads: Any, start: int, slope: Tensor, part: Tensor, matrix: Tensor) -> None:
    """Add a chunk's share to the gradients of x, weight and bias."""
    grad_x, grad_weight, grad_bias = grads
    narrow = slope.to(matrix.dtype)
    grad_x[start : start + len(part)] = narrow @ matrix
    if matrix.dtype == grad_weight.dtype:
        grad_weight.addmm_(narrow.T, part)
    else:
        grad_weight += narrow.T @ part  # summed over chunks in fp32
    grad_bias += slope.sum(dim=0)
