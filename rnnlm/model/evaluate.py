"""Evaluation: loss, perplexities and bits per byte of a stream, with carried hidden state.

The stream's ring is cut into `batch_size` substreams, so every token is scored once, the very first one after the last
EOS. A substream begins with the state that the tokens before it leave behind, WARM_UP of them, which are read and not
scored: if each began from zero, a short stream that is cut into many would have a higher loss than the same one uncut.
Losses are computed in blocks of a fixed shape and summed in fp64, row by row, in the order of the windows: the result
depends on `batch_size` alone, to the last bit on one kind of machine, not on the number of processes or on the windows
of training. Processes share the blocks; of the blocks that are left for fewer processes than there are, several compute
the same states, and each of them the losses of other windows, which are most of the work where the vocabulary is large:

    5 blocks, 4 processes     process 0   1   2   3
    turn 0                    block   0   1   2   3     all windows
    turn 1                    block   4   4   4   4     windows 0 4 8 ..., 1 5 9 ..., 2 6 10 ..., 3 7 11 ...

The price: WARM_UP more tokens for each substream; states that are computed twice; and small blocks use a large GPU less
than fully.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rnnlm.data.ring import Positions, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_sources import SourceMap
from rnnlm.data.substreams import Batch, SubstreamDataset, loader
from rnnlm.errors import UserError
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Hidden

Doubles = npt.NDArray[np.float64]
BLOCK_ROWS = 16  # substreams computed together; part of what makes results comparable, so not an option
WINDOW = 64  # tokens at once, likewise
WARM_UP = 4 * WINDOW  # tokens before each substream, likewise
EXCHANGED = 64  # windows between exchanges of what they sum up to; none waits for another process for longer


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
    prefetch_threads: int = 0,
) -> Evaluation:
    """Score a stream in the model's own precision (fp32), without dropout.

    Args:
        batch_size: substreams; fewer where the stream has fewer tokens.
        count_eos: whether ends of documents are scored and counted.
        process, processes: this process does its share, as `share_blocks` says.
        gather: adds up a (rows, windows, sources) fp64 tensor over the processes, all of which call it equally often;
            in each all numbers but its own are zero.
        beat: called after every window.
        prefetch_threads: read batches ahead; 0: each when it is wanted.

    Raises:
        UserError: there is nothing to score.
    """
    manifest, scored = stream.manifest, scored_tokens(stream, count_eos)
    rows = min(batch_size, len(stream))
    scoring = _Scoring(model, stream, Ring(len(stream), rows, WINDOW), -1 if count_eos else manifest.eos_id)
    nats = np.zeros((rows, len(scoring.names)))  # fp64
    for turn, (block, share, shares) in enumerate(share_blocks(-(-rows // BLOCK_ROWS), process, processes)):
        begin = turn * processes * BLOCK_ROWS
        of_turn = nats[begin : begin + processes * BLOCK_ROWS]
        first = block * BLOCK_ROWS - begin
        with closing(scoring.windows(block, share, shares, prefetch_threads)) as windows:
            for _ in range(0, scoring.ring.windows_per_epoch, EXCHANGED):
                sums = torch.zeros(len(of_turn), EXCHANGED, len(scoring.names), dtype=torch.float64)
                sums = sums.to(scoring.device)
                for place, own in enumerate(islice(windows, EXCHANGED)):
                    if own is not None:
                        sums[first : first + len(own), place] = own
                    beat()
                _add_in_order(of_turn, gather(sums).cpu().numpy())

    ends = manifest.eos_tokens if count_eos else 0
    return Evaluation(
        nats=math.fsum(nats.flatten().tolist()),
        scored_tokens=scored,
        words=manifest.words + ends if manifest.text_bytes else None,
        text_bytes=manifest.text_bytes or None,
        documents=manifest.documents,
        count_eos=count_eos,
        batch_size=batch_size,
        sources=_figures_by_source(nats, manifest, count_eos) if scoring.sources else {},
    )


def scored_tokens(stream: TokenStream, count_eos: bool) -> int:
    """How many tokens of a stream an evaluation scores.

    Raises:
        UserError: none.
    """
    scored = stream.manifest.tokens - (0 if count_eos else stream.manifest.eos_tokens)
    if not scored:
        raise UserError(f"{stream.directory}: all its tokens are EOS, and eval.count_eos=false scores none of these")
    return scored


def share_blocks(blocks: int, process: int, processes: int) -> list[tuple[int, int, int]]:
    """For each turn (block, share, shares): a process scores the windows share, share + shares, ... of this block.

    In turn t the blocks from t * processes on, one for each process; of the last turn's all processes have their share.
    """
    left = blocks % processes
    turns = [(block, 0, 1) for block in range(process, blocks - left, processes)]
    if left:
        own = [each * left // processes for each in range(processes)]  # which of the blocks that are left
        together = own.count(own[process])
        turns.append((blocks - left + own[process], process - own.index(own[process]), together))
    return turns


class _Scoring:
    """What the blocks of an evaluation have in common.

    Args:
        not_scored: the target that is not; -1: none.
    """

    def __init__(self, model: RecurrentLM, stream: TokenStream, ring: Ring, not_scored: int):
        self.model, self.stream, self.ring, self.not_scored = model, stream, ring, not_scored
        self.device = model.embedding.weight.device
        self.sources = SourceMap(stream) if len(stream.manifest.sources) > 1 else None
        self.names = self.sources.names if self.sources else ["all"]

    def windows(self, block: int, share: int, shares: int, threads: int) -> Generator[Tensor | None, None, None]:
        """The loss of each window of a block, (rows, sources) fp64, in their order; None for other processes'."""
        ring, first = self.ring, block * BLOCK_ROWS
        last = min(first + BLOCK_ROWS, ring.substreams)
        hidden = _warm_up(self.model, self.stream, ring.edges(first, last)[:-1])
        dataset = SubstreamDataset(self.stream, ring, first, last, 0, ring.windows_per_epoch)
        with closing(loader(dataset, threads, self.device.type == "cuda")) as batches:
            for batch in batches:
                inputs, targets = batch.to(self.device)
                if batch.step % shares != share:
                    hidden = self.model.advance(inputs, hidden)
                    yield None
                    continue

                targets = targets.masked_fill(targets == self.not_scored, -1)
                losses, hidden = self.model.token_losses(inputs, hidden, targets)
                yield _sum_by_source(losses.double(), batch, self.sources)


def _add_in_order(totals: Doubles, sums: Doubles) -> None:
    """Add windows, (rows, windows, sources), to the totals of their rows, (rows, sources), one after the other.

    In this order for any number of windows at once, as the last bit of a sum depends on it.
    """
    totals[:] = np.add.accumulate(np.concatenate([totals[:, None], sums], axis=1), axis=1)[:, -1]


def _sum_by_source(losses: Tensor, batch: Batch, sources: SourceMap | None) -> Tensor:
    """(B, sources) the sums of losses, (B, T) fp64, by the source that the target's document is from."""
    if sources is None:
        return losses.sum(dim=1, keepdim=True)
    positions = batch.positions[:, None] + 1 + torch.arange(losses.shape[1])  # (B, T) of the targets
    of_target = torch.from_numpy(sources.at(positions.numpy())).to(losses.device)
    each = [losses.masked_fill(of_target != number, 0).sum(dim=1) for number in range(len(sources.names))]
    return torch.stack(each, dim=1)


def _figures_by_source(nats: Doubles, manifest: Manifest, count_eos: bool) -> dict[str, dict[str, Any]]:
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
        hidden = model.advance(tokens.to(torch.int64), hidden)

    # windows of those that begin too early have gone around the ring
    for row in np.flatnonzero(begins < WARM_UP).tolist():
        own = model.zero_hidden(1)
        if begins[row]:
            tokens = torch.from_numpy(stream.windows(np.array([0]), int(begins[row]))).to(device)
            own = model.advance(tokens.to(torch.int64), own)
        for name, state in own.items():
            hidden[name][row] = state[0]
    return hidden
