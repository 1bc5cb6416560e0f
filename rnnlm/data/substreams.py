"""Batches of substreams: read at the places that the ring says, ahead of their use, and checked before it.

A batch is a pure function of its step. So reading ahead, by any number of threads, changes neither batches nor their
order, there is no loader's state to save, and the first batch takes as long at step 10^9 as at step 0. And so whatever
hands out other batches (a loader that shards them a second time, or skips those already skipped) can be found out:
`ContinuityCheck` compares where each batch begins with where its rows ended. The price: a comparison of one token and
one position a row and step. Tokens travel to the device as on disk, in two bytes mostly, and are widened there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
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

READ_TOGETHER = 4  # batches that a thread reads in one go: handing each over alone takes as long as reading it
READ_AHEAD = 2  # such groups of each thread


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
        place = torch.arange(targets.shape[1], device=device)  # (T,)
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


class ContinuityCheck:
    """Checks that each batch begins where its rows ended, as the hidden states of rows first..last-1 are of this text.

    A loader that shards batches a second time, or skips what was already skipped, gives plausible losses.
    """

    def __init__(self, stream: TokenStream, ring: Ring, first: int, last: int, step: int):
        self.stream, self.ring, self.first, self.last = stream, ring, first, last
        self.ended, _ = ring.place(step, first, last)  # (rows,) ring positions
        self._follows: Tokens | None = None  # (rows,) each row's next token; None: ask the stream

    def resume_at(self, ended: Positions, step: int, where: Path) -> None:
        """Take over where the rows ended before a step, (rows,) ring positions, as a checkpoint at `where` says.

        Raises:
            UserError: the step begins elsewhere.
        """
        expected, _ = self.ring.place(step, self.first, self.last)
        if not self.ring.is_epoch_start(step) and not np.array_equal(ended, expected):
            raise UserError(
                f"{where}: its rows ended at {ended.tolist()}, but step {step} begins at {expected.tolist()}; "
                "hidden states would be of other text; resume with the code that wrote it, or from another checkpoint"
            )
        self.ended = ended

    def check(self, batch: Batch, step: int) -> None:
        """Check the batch of a step, and take note of where it ends.

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


def loader(dataset: SubstreamDataset, threads: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """Batches in the order of the steps, read ahead in small groups by `threads`; 0: read when asked for.

    Threads, not processes: numpy and the kernel read without Python's lock, and forking beside a process group's
    threads can hang the child for ever (CPython 3.11). Never hand batches to Accelerate's `prepare`, which would share
    them out to the ranks a second time.
    """

    def read(step: int) -> Batch:
        batch = dataset.batch(step)
        return batch.pin_memory() if pin_memory else batch

    def read_group(steps: range) -> list[Batch]:
        return [read(step) for step in steps]

    steps = range(dataset.first_step, dataset.last_step)
    if not threads:
        yield from map(read, steps)
        return

    groups = (steps[start : start + READ_TOGETHER] for start in range(0, len(steps), READ_TOGETHER))
    with ThreadPoolExecutor(threads, "prefetch") as pool:
        waiting = deque(pool.submit(read_group, group) for group in islice(groups, READ_AHEAD * threads))
        while waiting:
            group = waiting.popleft().result()
            waiting.extend(pool.submit(read_group, each) for each in islice(groups, 1))
            yield from group
