"""Evaluation: loss, perplexities and bits per byte of a stream, with carried hidden state.

The stream's ring is cut into `batch_size` substreams, so every token is scored once, the very first one after the last
EOS. A substream begins with the state that the tokens before it leave behind, WARM_UP of them, which are read and not
scored: if each began from zero, a short stream that is cut into many would have a higher loss than the same one uncut.
Processes share the work in blocks of a fixed shape, and losses are summed in fp64, row by row, in one order: the result
depends on `batch_size` alone, to the last bit on one kind of machine, not on the number of processes or on the windows
of training. The price: WARM_UP more tokens for each substream; more processes than blocks have nothing to do, and small
blocks use a large GPU less than fully.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnlm.data.ring import Positions, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_sources import SourceMap
from rnnlm.data.substreams import Batch, SubstreamDataset
from rnnlm.errors import UserError
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Hidden

BLOCK_ROWS = 16  # substreams computed together; part of what makes results comparable, so not an option
WINDOW = 64  # tokens at once, likewise
WARM_UP = 4 * WINDOW  # tokens before each substream, likewise


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a stream; `nats` is the loss summed over the `scored_tokens`."""

    nats: float
    scored_tokens: int
    words: int | None  # separated by white space; a document's end counts as one where EOS does; None: unknown
    text_bytes: int | None  # UTF-8 bytes of the original text, before any normalisation, EOS not counted
    documents: int
    count_eos: bool
    batch_size: int
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)  # figures of each, where the corpus names several

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.scored_tokens

    def to_dict(self) -> dict[str, Any]:
        """All counts and figures: loss (nats per token), perplexities per token and word, bits per byte.

        None for those of words and bytes where the stream does not know its text.
        """
        figures = {
            "loss": self.loss,
            "token_perplexity": exp(self.loss),
            "word_perplexity": exp(self.nats / self.words) if self.words else None,
            "bits_per_byte": self.nats / math.log(2) / self.text_bytes if self.text_bytes else None,
        }
        return {**figures, **asdict(self)}


def exp(x: float) -> float:
    """e ** x, infinite where that exceeds a float."""
    return math.exp(x) if x < 709 else math.inf


def evaluate(
    model: RecurrentLM,
    stream: TokenStream,
    batch_size: int,
    count_eos: bool,
    process: int = 0,
    processes: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda sums: sums,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score a stream in the model's own precision (fp32), without dropout.

    Args:
        batch_size: substreams; fewer where the stream has fewer tokens.
        count_eos: whether ends of documents are scored and counted.
        process, processes: this process computes blocks process, process + processes, ...
        gather: adds up a (batch_size, sources) fp64 tensor over the processes; in each all rows but its own are zero.
        beat: called after every batch, and as often by processes that have none left.

    Raises:
        UserError: there is nothing to score.
    """
    manifest = stream.manifest
    scored = manifest.tokens - (0 if count_eos else manifest.eos_tokens)
    if not scored:
        raise UserError(f"{stream.directory}: all its tokens are EOS, and eval.count_eos=false scores none of these")

    rows = min(batch_size, len(stream))
    ring = Ring(len(stream), rows, WINDOW)
    device = model.embedding.weight.device
    sources = SourceMap(stream) if len(stream.manifest.sources) > 1 else None
    sums = torch.zeros(rows, len(sources.names) if sources else 1, dtype=torch.float64, device=device)

    for turn in range(0, rows, processes * BLOCK_ROWS):
        first = turn + process * BLOCK_ROWS
        if first >= rows:  # nothing left for this process, which still meets the others
            for _ in range(1 + ring.windows_per_epoch):
                beat()
            continue

        last = min(first + BLOCK_ROWS, rows)
        hidden = _warm_up(model, stream, ring.edges(first, last)[:-1])
        beat()
        for batch in SubstreamDataset(stream, ring, first, last, 0, ring.windows_per_epoch):
            inputs, targets = batch.to(device)
            if not count_eos:
                targets = targets.masked_fill(targets == manifest.eos_id, -1)
            losses, hidden = model.token_losses(inputs, hidden, targets)
            sums[first:last] += _sum_by_source(losses.double(), batch, sources)
            beat()

    nats = gather(sums)  # (batch_size, sources)
    ends = manifest.eos_tokens if count_eos else 0
    return Evaluation(
        nats=math.fsum(nats.flatten().tolist()),
        scored_tokens=scored,
        words=manifest.words + ends if manifest.text_bytes else None,
        text_bytes=manifest.text_bytes or None,
        documents=manifest.documents,
        count_eos=count_eos,
        batch_size=batch_size,
        sources=_figures_by_source(nats, manifest, count_eos) if sources else {},
    )


def _sum_by_source(losses: Tensor, batch: Batch, sources: SourceMap | None) -> Tensor:
    """(B, sources) the sums of losses, (B, T) fp64, by the source that the target's document is from."""
    if sources is None:
        return losses.sum(dim=1, keepdim=True)
    positions = batch.positions[:, None] + 1 + torch.arange(losses.shape[1])  # (B, T) of the targets
    of_target = torch.from_numpy(sources.at(positions.numpy())).to(losses.device)
    each = [losses.masked_fill(of_target != number, 0).sum(dim=1) for number in range(len(sources.names))]
    return torch.stack(each, dim=1)


def _figures_by_source(nats: Tensor, manifest: Manifest, count_eos: bool) -> dict[str, dict[str, Any]]:
    """Of each source with tokens in the stream: loss, bits per byte, and the counts behind them."""
    found = {}
    for number, (name, counts) in enumerate(manifest.sources.items()):
        tokens = counts["tokens"] - (0 if count_eos else counts["documents"])
        if tokens:
            total = math.fsum(nats[:, number].tolist())
            bits = total / math.log(2) / counts["text_bytes"] if counts["text_bytes"] else None
            found[name] = {"loss": total / tokens, "bits_per_byte": bits, "nats": total, "scored_tokens": tokens}
    return found


def _warm_up(model: RecurrentLM, stream: TokenStream, begins: Positions) -> Hidden:
    """The state of substreams that begin at ring positions `begins`, (B,), after the WARM_UP tokens before each.

    Where there are fewer, after all of these; the stream's first token has the state zero before it.
    """
    device = model.embedding.weight.device
    hidden = model.zero_hidden(len(begins))
    for done in range(0, WARM_UP, WINDOW):
        tokens = torch.from_numpy(stream.windows(begins - (WARM_UP - done), WINDOW)).to(device)
        _, hidden = model.next_logits(tokens.to(torch.int64), hidden)

    # windows of those that begin too early have gone around the ring
    for row in np.flatnonzero(begins < WARM_UP).tolist():
        own = model.zero_hidden(1)
        if begins[row]:
            tokens = torch.from_numpy(stream.windows(np.array([0]), int(begins[row]))).to(device)
            _, own = model.next_logits(tokens.to(torch.int64), own)
        for name, state in own.items():
            hidden[name][row] = state[0]
    return hidden
