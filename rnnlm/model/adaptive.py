"""The adaptive softmax: frequent pieces in full width, rare ones in narrow clusters that only their tokens pay for.

    B substreams, T window, N = T * B tokens, H width of the layers' output, V vocabulary, C cutoffs

Grave et al. 2017, "Efficient softmax approximation for GPUs", section 4. Pieces below the first cutoff, the shortlist,
share one softmax with one entry for each cluster of the others; cluster i holds the pieces from cutoff i up to the next
one or V, and has a softmax of its own over x P_i', where P_i has H / factor^i rows:

    p(piece | x) = softmax(x W' + b)[cluster] * softmax(x P_i' W_i' + b_i)[piece]

It is a model of its own, and exact: probabilities sum to 1 in training, evaluation and generation. It pays where ids go
from frequent to rare, as those of words do by construction and those of subwords by and large; with ids in another
order it is as right, but most tokens need a cluster, which costs time, and frequent pieces get narrow vectors. The
prices: rare pieces are told apart by few numbers, and how many tokens a cluster gets is known on the device alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rnnlm.config import ModelConfig
from rnnlm.errors import UserError
from rnnlm.model.cross_entropy import linear_cross_entropy, token_losses
from rnnlm.model.heads import Head, LossOptions, register_head

LONGEST_SHORTLIST = 20_000  # pieces, as Baevski & Auli 2019 have it for 267,735 words
FIRST_CLUSTER = 5  # times the shortlist


def default_cutoffs(vocab_size: int) -> list[int]:
    """An eighth of the pieces, and five times that; of 160,000 and more 20,000 and 100,000.

    With frequencies after Zipf, of 793,471 words: three of four tokens need the shortlist alone, and the products are
    1/28 of the softmax's. Part of what a run is: another rule would be another model.
    """
    shortlist = max(1, min(LONGEST_SHORTLIST, vocab_size // 8))
    return [cutoff for cutoff in (shortlist, FIRST_CLUSTER * shortlist) if cutoff < vocab_size]


def cluster_shapes(config: ModelConfig, vocab_size: int, width: int) -> list[tuple[int, int]]:
    """(pieces, width) of the shortlist with an entry for each cluster, then of each cluster.

    Raises:
        UserError: cutoffs beyond the vocabulary.
    """
    cutoffs = config.adaptive_cutoffs or default_cutoffs(vocab_size)
    if cutoffs[-1] >= vocab_size:
        raise UserError(
            f"model.adaptive_cutoffs={cutoffs}: the vocabulary has {vocab_size} pieces; all must be below, or leave it "
            "empty"
        )

    shapes = [(cutoffs[0] + len(cutoffs), width)]
    for number, (low, high) in enumerate(itertools.pairwise([*cutoffs, vocab_size]), 1):
        shapes.append((high - low, max(1, width // config.adaptive_factor**number)))
    return shapes


def adaptive_parameters(config: ModelConfig, vocab_size: int, width: int) -> int:
    """Parameters of the head."""
    first, *others = cluster_shapes(config, vocab_size, width)
    own = first[0] * (width + 1)
    return own + sum(pieces * (narrow + 1) + narrow * width for pieces, narrow in others)


class Cluster(nn.Module):
    """The rare pieces from id `low` on: their vectors (pieces, narrow), and the projection (narrow, H) onto it."""

    def __init__(self, low: int, pieces: int, narrow: int, width: int):
        super().__init__()
        self.low = low
        self.projection = nn.Parameter(torch.empty(narrow, width))
        self.weight = nn.Parameter(torch.empty(pieces, narrow))
        self.bias = nn.Parameter(torch.empty(pieces))


class AdaptiveHead(Head):
    """A shortlist, and clusters of rare pieces."""

    static_shapes = False

    def __init__(self, config: ModelConfig, input_size: int, embedding: nn.Embedding, options: LossOptions):
        super().__init__()
        self.options = options
        first, *others = cluster_shapes(config, embedding.num_embeddings, input_size)
        self.shortlist = first[0] - len(others)
        self.weight = nn.Parameter(torch.empty(first))
        self.bias = nn.Parameter(torch.empty(first[0]))

        lows = itertools.accumulate([pieces for pieces, _ in others[:-1]], initial=self.shortlist)
        self.clusters = nn.ModuleList(
            Cluster(low, pieces, narrow, input_size) for low, (pieces, narrow) in zip(lows, others, strict=True)
        )

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The shortlist's loss of all tokens, and each cluster's of those with a target in it."""
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, H), (N,)
        chunk, filtered = self.options.chunk, self.options.filtered

        total = linear_cross_entropy(x, self.weight, self.bias, self._entries(targets), chunk, filtered)
        for cluster in self._clusters():
            rows, own = _within(cluster, targets)
            narrow = nn.functional.linear(x.index_select(0, rows), cluster.projection)
            total = total + linear_cross_entropy(narrow, cluster.weight, cluster.bias, own, chunk, filtered)
        return total

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The same for each token."""
        shape, x, targets = targets.shape, x.flatten(0, 1), targets.flatten()
        losses = token_losses(x, self.weight, self.bias, self._entries(targets))  # (N,)
        for cluster in self._clusters():
            rows, own = _within(cluster, targets)
            if len(rows):
                narrow = nn.functional.linear(x.index_select(0, rows), cluster.projection)
                losses[rows] += token_losses(narrow, cluster.weight, cluster.bias, own)
        return losses.view(shape)

    def logits(self, x: Tensor) -> Tensor:
        """(N, V), normalised."""
        first = nn.functional.linear(x, self.weight, self.bias).log_softmax(dim=1)
        parts = [first[:, : self.shortlist]]
        for number, cluster in enumerate(self._clusters()):
            narrow = nn.functional.linear(x, cluster.projection)
            inner = nn.functional.linear(narrow, cluster.weight, cluster.bias).log_softmax(dim=1)
            parts.append(inner + first[:, self.shortlist + number, None])
        return torch.cat(parts, dim=1)

    def _entries(self, targets: Tensor) -> Tensor:
        """(N,) int64 entries of the first softmax for targets (N,): the piece, or that of its cluster; -1 stays."""
        entries = targets
        for number, cluster in enumerate(self._clusters()):
            entries = entries.masked_fill(targets >= cluster.low, self.shortlist + number)
        return entries

    def _clusters(self) -> list[Cluster]:
        return [cluster for cluster in self.clusters if isinstance(cluster, Cluster)]

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        """Uniform in +-init_range, biases zero, as the softmax's; a cluster's entry is as likely as all its pieces."""
        spread = config.init_range
        self.weight.data.uniform_(-spread, spread, generator=generator("head"))
        self.bias.data.zero_()
        for number, cluster in enumerate(self._clusters()):
            cluster.projection.data.uniform_(-spread, spread, generator=generator(f"cluster{number}.projection"))
            cluster.weight.data.uniform_(-spread, spread, generator=generator(f"cluster{number}.head"))
            cluster.bias.data.zero_()
            self.bias.data[self.shortlist + number] = math.log(len(cluster.bias))  # else rare pieces begin far too rare


def _within(cluster: Cluster, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(rows (R,) int64 of targets (N,) that are in the cluster, these counted from its first piece)."""
    own = targets - cluster.low
    rows = ((own >= 0) & (own < len(cluster.bias))).nonzero()[:, 0]
    return rows, own[rows]


register_head("adaptive", AdaptiveHead)
