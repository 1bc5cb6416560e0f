"""Heads: the seam through which a new kind of prediction enters, and the softmax over the vocabulary.

    B substreams, T window, N = T * B tokens, H width of the layers' output, D width of the head's matrix, V vocabulary

A head gives the summed loss of a window for training, without all logits in memory (`cross_entropy.py`), and exact
losses and log-probabilities of each token for evaluation and generation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnnlm.config import HEADS, ModelConfig
from rnnlm.model.cross_entropy import linear_cross_entropy, token_losses


class Head(nn.Module, ABC):
    """What is predicted from the output of the last layer, and what it costs to be wrong."""

    predicts_tokens = True
    """Whether `logits` are over the vocabulary, so that text can be generated."""

    static_shapes = True
    """Whether the shapes of all tensors in `loss` follow from those of its arguments, not from their values.

    Only then can a CUDA graph hold a training step; where not, a GPU is also waited for within the step.
    """

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


@dataclass(frozen=True)
class LossOptions:
    """How training forms the loss, at the price of neither its value nor what the model is.

    Args:
        chunk: train.loss_chunk_tokens, tokens whose logits are in memory at once; 0: as many as a budget holds.
        filtered: train.gradient_filter, whether products leave negligible slopes out.
    """

    chunk: int = 0
    filtered: bool = False


HeadFactory = Callable[[ModelConfig, int, nn.Embedding, LossOptions], Head]
_FACTORIES: dict[str, HeadFactory] = {}


def register_head(name: str, make: HeadFactory) -> None:
    """Let `model.head=name` stand for the head that `make(config, input_size, embedding, options)` gives.

    `embedding` holds the token vectors (V, E), to which a head may tie its own; `options` are those of the loss.
    """
    _FACTORIES[name] = make
    if name not in HEADS:
        HEADS.append(name)


def build_head(config: ModelConfig, input_size: int, embedding: nn.Embedding, options: LossOptions) -> Head:
    """The head that model.head names."""
    return _FACTORIES[config.head](config, input_size, embedding, options)


class SoftmaxHead(Head):
    """A softmax over the vocabulary.

    Its matrix is its own, or with `tied` the token vectors (Press & Wolf 2017), behind a projection H -> E where the
    two sizes differ (as in Melis et al. 2018).
    """

    def __init__(self, config: ModelConfig, input_size: int, embedding: nn.Embedding, options: LossOptions):
        super().__init__()
        self.options, self.tied = options, config.tied
        self.static_shapes = not options.filtered
        vocab_size, width = embedding.weight.shape
        projected = config.tied and width != input_size
        self.projection = nn.Parameter(torch.empty(width, input_size)) if projected else None
        self.weight = embedding.weight if config.tied else nn.Parameter(torch.empty(vocab_size, input_size))  # (V, D)
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The logits of a chunk of tokens at a time."""
        x = self._project(x).flatten(0, 1)  # (N, D)
        options = self.options
        return linear_cross_entropy(x, self.weight, self.bias, targets.flatten(), options.chunk, options.filtered)

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
