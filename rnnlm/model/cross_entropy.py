"""The cross entropy of a softmax over a large vocabulary, and its gradients, without all logits in memory.

    N tokens, n of a chunk, D width, V vocabulary

The logits of a chunk of tokens are made, replaced by their slope (softmax - one-hot, which needs only them), multiplied
into the gradients, and thrown away, as in the fused linear cross entropy of Hsu et al. 2024, "Liger Kernel". Memory is
n * V instead of N * V several times; nothing is computed twice. The price: the gradients are held from the forward to
the backward pass, one more copy of the matrix.

What is rounded in low precision: x and matrix; on CPUs the products x W' (on GPUs they stay fp32); the slope, once, for
the products of the two gradients; these products. The bias is added, exponentials and losses are formed, the bias's
gradient and sums over chunks are taken in fp32. The usual loop under autocast (F.linear, F.cross_entropy) rounds as
much, and the bias besides. Against fp64, for 256 tokens and 5,000 pieces, the gradients of x, weight and bias in bf16
are off by 2.4e-3, 2.3e-3 and 4e-5 (the usual loop's by 2.4e-3, 2.3e-3 and 1.2e-3), of a model trained for some minutes
by 3.2e-3, 5.2e-3 and 6.1e-3 (3.2e-3, 6.7e-3 and 8.2e-3); the test
`test_in_bf16_no_gradient_is_further_from_fp64_than_the_usual_loops` compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnnlm.model.liger import liger_softmax, liger_takes
from rnnlm.model.precision import cast, compute_dtype

LOGIT_BYTES = 2**28
"""Most memory for a chunk's logits where no number of tokens is asked for: 2,670 tokens of 50,257 pieces in bf16.

So many rows that the products run at full rate, and the sum of a second chunk's gradients costs little beside them."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of x (N, D), weight (V, D), bias (V,)."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int = 0, filtered: bool = False
) -> Tensor:
    """-log softmax(x W' + b)[target], summed over the tokens.

    Under autocast the products run in its precision; the softmax and all sums are in fp32, or fp64 for fp64 inputs.

    Args:
        x: (N, D)
        weight: (V, D)
        bias: (V,)
        targets: (N,) int64; tokens with target -1 count for nothing.
        chunk: tokens whose logits are in memory at once; 0: as many as LOGIT_BYTES hold.
        filtered: leave columns out of a chunk's products of the gradients whose slope is below `negligible` for all its
            tokens ("gradient filtering", Wijmans et al. 2024, "Cut your losses in large-vocabulary language models",
            section 4.3), and put one for all of them in their place; the gradient of the bias stays whole. Of 20,000
            words after 563 steps on film reviews (a loss of 6.2) 11 % were left in for 2,048 tokens in bf16: errors of
            2.1e-2 (x) and 1.5e-2 (weight) against 3e-3 and 5e-3 unfiltered; without the one column in their place 0.30
            and 0.08, after 270 steps. Smaller chunks leave in 9 % (512) and 8 % (128), and cost more than they save.
            A GPU is waited for, since the number of columns is not known.

    Returns:
        () the sum.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, targets, chunk, filtered
    )
    return loss


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """The same for each token, without gradients: (N,); 0 where the target is -1.

    `chunk` is no option of evaluation: another size may round otherwise.
    """
    parts = zip(torch.split(x, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([softmax_slope(part @ weight.T, bias, wanted)[0] for part, wanted in parts])


def negligible(dtype: torch.dtype) -> float:
    """The slope below which a column is left out: 2^-12 for bf16, as in section 4.3 of the paper; 2^-28 for fp32."""
    return float(torch.finfo(dtype).eps) / 32


def chunk_tokens(tokens: int, vocabulary: int, item_bytes: int) -> int:
    """Tokens of each of the fewest chunks, of one size but for the last, whose logits LOGIT_BYTES hold.

    Nor do they take more than two bytes for each logit of all tokens, where the usual loop takes eight or more.
    """
    at_once = min(LOGIT_BYTES // (vocabulary * item_bytes), -(-2 * tokens // item_bytes))
    chunks = -(-tokens // max(1, at_once))
    return -(-tokens // max(1, chunks)) or 1


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int, filtered: bool
    ) -> Tensor:
        dtype = compute_dtype(weight)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        wanted = any(ctx.needs_input_grad[:3])
        ctx.gradients = None

        with torch.autocast(x.device.type, enabled=False):
            x_cast, matrix = x.to(dtype), cast(weight, dtype)
            total = torch.zeros((), dtype=wide, device=x.device)
            size = chunk or chunk_tokens(len(x), len(weight), wide.itemsize if x.is_cuda else dtype.itemsize)
            if wanted:
                whole = torch.zeros_like if filtered or not len(x) else torch.empty_like  # else all is written
                ctx.gradients = torch.empty_like(x), whole(weight), torch.zeros_like(bias)

            for start in range(0, len(x), size):
                part, ids = x_cast[start : start + size], targets[start : start + size]
                logits = _product(part, matrix.T)  # (n, V)
                losses, slope, sums, most = softmax_slope(logits, bias, ids, filtered)
                total += losses.sum()
                if wanted:
                    ctx.gradients[2].add_(sums)
                    if most is None:
                        _accumulate(ctx.gradients, start, slope.to(dtype), part, matrix)
                    else:
                        _accumulate_filtered(ctx.gradients, start, slope.to(dtype), part, weight, sums, most)

        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # of the sum, and ours alone: handed on in their memory
        if gradients is None:
            raise RuntimeError("linear_cross_entropy: backward a second time; its gradients are formed once, forward")
        # `outer` is a scalar in full precision, and takes no part in the choice of theirs
        return *(each.mul_(outer[0]) for each in gradients), None, None, None


def softmax_slope(
    logits: Tensor, bias: Tensor, targets: Tensor, with_most: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The losses of logits + bias, and their slopes by the logits: softmax - one-hot, zero for masked tokens.

    Args:
        logits: (n, V), whose memory is written over.
        bias: (V,)
        targets: (n,) int64, -1 where masked.
        with_most: whether the last result is wanted.

    Returns:
        (n,) losses in nats in fp32, or fp64 for fp64 biases; (n, V) slopes, in at least the precision of the logits;
        (V,) their sum over the tokens; (V,) the largest absolute slope of each column.
    """
    # a fake tensor, of which operations are only counted, has no values that a kernel could read
    if type(logits) is Tensor and bias.dtype == torch.float32:
        if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
            return _compiled_slope(logits, bias, targets, with_most)
        if liger_takes(logits):
            slope = logits.to(torch.float32).add_(bias)
            losses = liger_softmax(slope, targets)
            return losses, slope, slope.sum(dim=0), slope.abs().amax(dim=0) if with_most else None
    return _plain_slope(logits, bias, targets, with_most)


def _plain_slope(
    logits: Tensor, bias: Tensor, targets: Tensor, with_most: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`softmax_slope` by PyTorch's operations: the reference, and for all devices."""
    logits = logits.to(bias.dtype).add_(bias)
    normaliser = logits.logsumexp(dim=1, keepdim=True)  # (n, 1)
    column = targets.clamp(min=0)[:, None]
    masked = (targets < 0)[:, None]
    losses = (normaliser - logits.gather(1, column)).masked_fill_(masked, 0.0)  # (n, 1)

    slope = logits.sub_(normaliser).exp_()
    slope.scatter_(1, column, torch.expm1(-losses))  # one a row: no adding scatter, which GPUs do in any order
    slope.masked_fill_(masked, 0.0)
    return losses[:, 0], slope, slope.sum(dim=0), slope.abs().amax(dim=0) if with_most else None


def _compiled_slope(
    logits: Tensor, bias: Tensor, targets: Tensor, with_most: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`softmax_slope` on a CPU, logits (n, V) in fp32 or bf16."""
    from rnnlm.model.cross_entropy_kernels import softmax_rows  # numba takes a while to import, and GPUs need none

    logits, most = logits.contiguous(), bias.new_empty(len(bias)) if with_most else None
    numbers = logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits
    losses, sums = softmax_rows(
        numbers.numpy(),
        bias.detach().contiguous().numpy(),
        targets.contiguous().numpy(),
        None if most is None else most.numpy(),
        torch.get_num_threads(),
    )
    return torch.from_numpy(losses), logits, torch.from_numpy(sums), most


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; where a GPU multiplies in low precision, the result is in the fp32 in which it is summed."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _accumulate(gradients: Gradients, start: int, slope: Tensor, part: Tensor, matrix: Tensor) -> None:
    """Add a chunk's share, from slope (n, V) and part (n, D), to the gradients of x and weight; the first begins it."""
    grad_x, grad_weight, _ = gradients
    grad_x[start : start + len(part)] = slope @ matrix
    if slope.dtype == grad_weight.dtype:
        torch.addmm(grad_weight, slope.T, part, beta=1 if start else 0, out=grad_weight)
    elif start:
        grad_weight += _product(slope.T, part)  # summed over chunks in fp32
    else:
        grad_weight.copy_(_product(slope.T, part))


def _accumulate_filtered(
    gradients: Gradients, start: int, slope: Tensor, part: Tensor, weight: Tensor, sums: Tensor, most: Tensor
) -> None:
    """The same by the columns that count, and by one for all others together: (n, K), (n, D), (V, D), (V,), (V,).

    The others' slopes, each negligible, are not so together. They enter as if all tokens shared their part out among
    them alike: as the product of what each token gives to all and of what all tokens give to each.
    """
    grad_x, grad_weight, _ = gradients
    columns = (most >= negligible(part.dtype)).nonzero()[:, 0]  # (K,)
    slope = slope.index_select(1, columns)
    own = slope @ weight.index_select(0, columns).to(part.dtype)
    grad_weight.index_add_(0, columns, _product(slope.T, part).to(grad_weight.dtype))  # each column once

    # a token's slopes sum to 0
    rest = -slope.sum(dim=1, dtype=sums.dtype)  # (n,)
    others = sums.index_fill(0, columns, 0.0)  # (V,)
    share = others / others.sum().clamp(min=torch.finfo(sums.dtype).tiny)  # sums to 1; 0 where there are none
    grad_x[start : start + len(part)] = torch.addr(own.to(sums.dtype), rest, share @ weight)
    grad_weight.addr_(share, rest @ part.to(sums.dtype))
