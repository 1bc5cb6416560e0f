"""The ring: which tokens every row of every step reads, as arithmetic on the step number.

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
seq_len or S the arithmetic starts again from an `Origin`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Origin:
    """From this step on the arithmetic starts again, after a planned change of `seq_len` or `substreams`.

    Args:
        step: the first step that is read in the new way.
        epoch: the epoch that it is in.
        position: tokens of each substream consumed in that epoch before it; the number of substreams can change only
            at 0, where rows start elsewhere and hidden states from zero.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Ring:
    """How N `tokens` are read by S `substreams` in windows of `seq_len`; pure arithmetic, no data.

    Args:
        rotate_seed: epochs after the first start at an offset drawn from (rotate_seed, epoch); None: all at 0.
        origin: where this way of reading begins. A ring knows nothing of the steps before: to ask is a mistake.
    """

    tokens: int
    substreams: int
    seq_len: int
    rotate_seed: int | None = None
    origin: Origin = Origin()

    @property
    def longest(self) -> int:
        """Tokens of the longest substream; others are at most one shorter."""
        return -(-self.tokens // self.substreams)

    @property
    def windows_per_epoch(self) -> int:
        """Steps in an epoch; in the origin's there may be other steps, by what was before it."""
        return -(-self.longest // self.seq_len)

    @property
    def _steps_left(self) -> int:
        """Steps in the rest of the origin's epoch; 0 where its position is the end of that."""
        return max(0, -(-(self.longest - self.origin.position) // self.seq_len))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, tokens of each substream consumed in it before this step); hidden states start from zero at 0."""
        done = step - self.origin.step  # steps in this way of reading
        assert done >= 0, f"step {step} is before the origin, {self.origin}"
        if done < self._steps_left:
            return self.origin.epoch, self.origin.position + done * self.seq_len

        epochs, window = divmod(done - self._steps_left, self.windows_per_epoch)
        return self.origin.epoch + 1 + epochs, window * self.seq_len

    def is_epoch_start(self, step: int) -> bool:
        """Whether a step is the first one of its epoch."""
        return self.locate(step)[1] == 0

    def steps_before(self, epoch: int) -> int:
        """Steps done when an epoch begins, and so its first step; the origin's step for epochs that began earlier."""
        later = epoch - self.origin.epoch - 1
        return self.origin.step if later < 0 else self.origin.step + self._steps_left + later * self.windows_per_epoch

    def origin_at(self, step: int) -> Origin:
        """Where a ring that reads in another way from this step on begins."""
        return Origin(step, *self.locate(step))

    def offset(self, epoch: int) -> int:
        """Ring position at which substream 0 starts in this epoch."""
        if epoch == 0 or self.rotate_seed is None:
            return 0
        digest = hashlib.blake2b(f"{self.rotate_seed}:{epoch}".encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little") % self.tokens

    def edges(self, first: int, last: int) -> Positions:
        """Stream positions of the beginnings of substreams first..last, the end of the last one included."""
        # r * N // S in two parts: r * N exceeds 64 bits for 10^12 tokens and 10^7 substreams, r * (N % S) < S * S not
        short, longer = divmod(self.tokens, self.substreams)
        rows = np.arange(first, last + 1, dtype=np.int64)
        return rows * short + rows * longer // self.substreams

    def targets_before(self, step: int) -> int:
        """Targets of all steps before this one: the tokens trained on so far, before the origin as well."""
        epoch, done = self.locate(step)
        # lengths differ by one token at most, so no substream ends before the epoch's last window
        return epoch * self.tokens + self.substreams * done

    def place(self, step: int, first: int, last: int) -> tuple[Positions, Positions]:
        """Where rows first..last-1 read at a step: (ring positions, number of targets), each (last - first,)."""
        epoch, done = self.locate(step)
        edges = self.edges(first, last)
        lengths = np.minimum(np.diff(edges) - done, self.seq_len)  # never below 0: see targets_before
        return (edges[:-1] + (done + self.offset(epoch))) % self.tokens, lengths
