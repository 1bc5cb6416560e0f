"""Substreams: which tokens every row of every step reads, as arithmetic on the step number.

The stream is a ring of N tokens, cut into S contiguous substreams; a step consumes one window of `seq_len` tokens of
each, so that hidden states carry over from step to step, and the data position *is* the step number. Here N = 60
tokens 1..60, S = 3, seq_len = 6:

            step 0             step 1             step 2             step 3
    row 0 | 1  2  3  4  5  6 | 7  8  9 10 11 12 | 13 14 15 16 17 18 | 19 20  .  .  .  .
    row 1 | 21 22 23 24 25 26| 27 28 29 30 31 32| 33 34 35 36 37 38 | 39 40  .  .  .  .
    row 2 | 41 42 43 44 45 46| 47 48 49 50 51 52| 53 54 55 56 57 58 | 59 60  .  .  .  .

Targets are one later on the ring: 60 is followed by 1. Dots are masked, so shapes stay the same. Every token is a
target exactly once per epoch, whatever N, S and seq_len; the price is up to S * seq_len - 1 masked places in an
epoch's last window. Later epochs start at a drawn offset, so that windows begin elsewhere. After a planned change of
seq_len or S the arithmetic starts anew from an `Origin`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from rnnlm.data.ring import Positions, Ring
from rnnlm.data.stream import Tokens, TokenStream
from rnnlm.errors import UserError

READ_AHEAD = 4  # batches of each thread


@dataclass(frozen=True)
class Batch:
    """One window of some substreams, on the CPU.

    Args:
        step: the step it belongs to.
        tokens: (B, seq_len + 1), unsigned as on disk; inputs are all but the last column, targets all but the first.
        lengths: (B,) number of targets of each row; later ones are masked.
        positions: (B,) ring position of each row's first input.
    """

    step: int
    tokens: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor

    def pin_memory(self) -> Batch:
        """The loader calls this for GPUs."""
        return Batch(self.step, self.tokens.pin_memory(), self.lengths.pin_memory(), self.positions)

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets), each (B, seq_len) int64 on the device, widened there; masked targets are -1."""
        tokens = self.tokens.to(device, non_blocking=True).to(torch.int64)  # (B, T + 1): a quarter of the bytes travel
        lengths = self.lengths.to(device, non_blocking=True)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        place = torch.arange(targets.shape[1], device=device)
        return inputs, targets.masked_fill(place[None, :] >= lengths[:, None], -1)


class SubstreamDataset(IterableDataset[Batch]):
    """Rows first..last-1 of every step from `first_step` on, up to `last_step`.

    The workers of a DataLoader of your own take turns (worker w of n has the steps first_step + w, + n, ...) and it
    collects them in turn, so the order is that of the steps for any number of workers.
    """

    def __init__(self, stream: TokenStream, ring: Ring, first: int, last: int, first_step: int, last_step: int):
        self.stream, self.ring = stream, ring
        self.first, self.last = first, last
        self.first_step, self.last_step = first_step, last_step

    def batch(self, step: int) -> Batch:
        """The rows at a step: a pure function of the step."""
        starts, lengths = self.ring.place(step, self.first, self.last)
        tokens = self.stream.windows(starts, self.ring.seq_len + 1)
        return Batch(step, torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(starts))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.batch, range(self.first_step + turn, self.last_step, workers))


class Reading:
    """Up to where the hidden states of rows first..last-1 have read: there the next batch must begin.

    A loader that deals, shards or skips what was already dealt out gives plausible losses; this tells it from positions
    and tokens, at the cost of comparing one token a row.
    """

    def __init__(self, stream: TokenStream, ring: Ring, first: int, last: int):
        self.stream, self.ring, self.first, self.last = stream, ring, first, last
        self.ended, _ = ring.place(0, first, last)  # (rows,) ring positions
        self._follows: Tokens | None = None  # (rows,) each row's next token; None: ask the stream

    def go_on(self, ended: Positions, step: int, where: Path) -> None:
        """Take over where the rows ended before a step, (rows,), as a checkpoint says.

        Raises:
            UserError: the step begins elsewhere.
        """
        expected, _ = self.ring.place(step, self.first, self.last)
        if not self.ring.is_epoch_start(step) and not np.array_equal(ended, expected):
            raise UserError(
                f"{where}: its rows ended at {ended.tolist()}, but step {step} begins at {expected.tolist()}; "
                "hidden states would be of other text; go on with the code that wrote it, or from another checkpoint"
            )
        self.ended = ended

    def check(self, batch: Batch, step: int) -> None:
        """Go on to the end of a batch.

        Raises:
            RuntimeError: it is of another step, or does not begin where the rows ended.
        """
        if self.ring.is_epoch_start(step):
            self.ended, self._follows = self.ring.place(step, self.first, self.last)[0], None
        if self._follows is None:
            self._follows = self.stream.windows(self.ended, 1)[:, 0]
        positions, tokens = batch.positions.numpy(), batch.tokens.numpy()
        right = np.array_equal(positions, self.ended) and np.array_equal(tokens[:, 0], self._follows)
        if batch.step != step or not right:
            raise RuntimeError(
                f"step {step}: the loader gave step {batch.step} at positions {positions.tolist()}, "
                f"but the rows ended at {self.ended.tolist()}; hidden states would be of other text"
            )
        self.ended = (self.ended + batch.lengths.numpy()) % self.ring.tokens
        self._follows = tokens[:, -1]  # a row that ends before it ends the epoch


def loader(dataset: SubstreamDataset, threads: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches in the order of the steps, each read ahead by one of `threads`; 0: read when asked for.

    Threads, not processes: numpy and the kernel read without Python's lock, and forking beside a process group's
    threads can hang the child for ever (CPython 3.11). Never hand batches to Accelerate's `prepare`, which would deal
    them to the ranks a second time.
    """

    def read(step: int) -> Batch:
        batch = dataset.batch(step)
        return batch.pin_memory() if pin_memory else batch

    steps = iter(range(dataset.first_step, dataset.last_step))
    if not threads:
        yield from map(read, steps)
        return
    with ThreadPoolExecutor(threads, "prefetch") as pool:
        waiting = deque(pool.submit(read, step) for step in islice(steps, READ_AHEAD * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(read, step) for step in islice(steps, 1))
