"""Heads: the seam through which a new kind of prediction enters, and the softmax over the vocabulary.

    B substreams, T window, N = T * B tokens, H width of the layers' output, D width of the head's matrix, V vocabulary

The softmax's cross entropy never holds the (N, V) logits: those of `chunk` tokens at a time are made, reduced, and
thrown away; when gradients are wanted they are formed in the same pass, since softmax minus one-hot needs only those
logits (as in the fused linear cross entropy of Hsu et al. 2024, "Liger Kernel"). Memory is chunk * V instead of N * V;
nothing is computed twice. The price: the gradients of the head are held from the forward to the backward pass, one more
copy of the head in fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rnnlm.config import HEADS, ModelConfig
from rnnlm.model.precision import compute_dtype


class Head(nn.Module, ABC):
    """What is predicted from the output of the last layer, and what it costs to be wrong."""

    predicts_tokens = True
    """Whether `logits` are over the vocabulary, so that text can be generated."""

    @abstractmethod
    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The summed loss in nats, () fp32, of x (T, B, H) and targets (T, B) int64, -1 where masked."""

    @abstractmethod
    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target, (T, B), 0 where masked; without gradients, in full precision."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities (N, classes) of x (N, H), in full precision."""

    @abstractmethod
    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        """Fill the parameters that are its own, as a layer does; `generator(name)` is the randomness of that name."""


HeadFactory = Callable[[ModelConfig, int, nn.Embedding, int], Head]
_FACTORIES: dict[str, HeadFactory] = {}


def register_head(name: str, make: HeadFactory) -> None:
    """Let `model.head=name` stand for the head that `make(config, input_size, embedding, chunk)` gives.

    `embedding` holds the token vectors (V, E), to which a head may tie its own; `chunk` is train.loss_chunk_tokens.
    """
    _FACTORIES[name] = make
    if name not in HEADS:
        HEADS.append(name)


def build_head(config: ModelConfig, input_size: int, embedding: nn.Embedding, chunk: int) -> Head:
    """The head that model.head names."""
    return _FACTORIES[config.head](config, input_size, embedding, chunk)


class SoftmaxHead(Head):
    """A softmax over the vocabulary.

    Its matrix is its own, or with `tied` the token vectors (Press & Wolf 2017), behind a projection H -> E where the
    two sizes differ (as in Melis et al. 2018).
    """

    def __init__(self, config: ModelConfig, input_size: int, embedding: nn.Embedding, chunk: int):
        super().__init__()
        self.chunk, self.tied = chunk, config.tied
        vocab_size, width = embedding.weight.shape
        projected = config.tied and width != input_size
        self.projection = nn.Parameter(torch.empty(width, input_size)) if projected else None
        self.weight = embedding.weight if config.tied else nn.Parameter(torch.empty(vocab_size, input_size))  # (V, D)
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The logits of a chunk of tokens at a time."""
        x = self._project(x).flatten(0, 1)  # (N, D)
        return linear_cross_entropy(x, self.weight, self.bias, targets.flatten(), self.chunk)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The logits of a chunk of tokens at a time."""
        losses = token_losses(self._project(x).flatten(0, 1), self.weight, self.bias, targets.flatten())
        return losses.view(targets.shape)

    def logits(self, x: Tensor) -> Tensor:
        """(N, V)"""
        return nn.functional.linear(self._project(x), self.weight, self.bias)

    def _project(self, x: Tensor) -> Tensor:
        """(..., D) of x (..., H)"""
        return x if self.projection is None else nn.functional.linear(x, self.projection)

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        """Uniform in +-init_range, the bias zero (Zaremba et al. 2014)."""
        spread = config.init_range
        if self.projection is not None:
            self.projection.data.uniform_(-spread, spread, generator=generator("projection"))
        if not self.tied:
            self.weight.data.uniform_(-spread, spread, generator=generator("head"))
        self.bias.data.zero_()


register_head("softmax", SoftmaxHead)


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """-log softmax(x W' + b)[target], summed over the tokens.

    Under autocast the products run in its precision; the softmax and all sums are in fp32, or fp64 for fp64 inputs.

    Args:
        x: (N, D)
        weight: (V, D)
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
    """(losses (n,), log-normaliser (n, 1)) of logits (n, V) and targets (n,)."""
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
                    _accumulate(grads, start, _slope(logits, normaliser, ids), part, matrix)

        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Any) -> Any:
        x, weight, bias = ctx.saved_tensors  # gradients of the sum; `outer` is a scalar in full precision
        return (x.to(outer[0].dtype) * outer[0]).to(x.dtype), weight * outer[0], bias * outer[0], None, None


def _slope(logits: Tensor, normaliser: Tensor, ids: Tensor) -> Tensor:
    """The loss's gradient by the logits (n, V), in their memory: softmax - one-hot, zero for masked tokens."""
    slope = logits.sub_(normaliser).exp_()
    column = ids.clamp(min=0)[:, None]  # one a row: no adding scatter, which GPUs do in any order
    slope.scatter_(1, column, slope.gather(1, column) - 1)
    return slope.masked_fill_((ids < 0)[:, None], 0.0)


def _accumulate(grads: tuple[Tensor, ...], start: int, slope: Tensor, part: Tensor, matrix: Tensor) -> None:
    """Add a chunk's share, from slope (n, V) and part (n, D), to the gradients of x, weight and bias."""
    grad_x, grad_weight, grad_bias = grads
    narrow = slope.to(matrix.dtype)
    grad_x[start : start + len(part)] = narrow @ matrix
    if matrix.dtype == grad_weight.dtype:
        grad_weight.addmm_(narrow.T, part)
    else:
        grad_weight += narrow.T @ part  # summed over chunks in fp32
    grad_bias += slope.sum(dim=0)
