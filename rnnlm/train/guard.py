"""Numbers that are not finite, and losses that jump: found and skipped on the device, without waiting for it.

A step whose loss or gradient is not finite updates nothing, on any rank: a loss that is not finite makes the gradient
NaN before it is summed, so that every rank sees the same norm. A substream whose hidden state is not finite starts
again from zero, alone. Counts stay on the device until a line is logged. The price: they are seen only then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rnnlm.errors import RunError

SPIKE_WINDOW = 128  # losses that a spike is measured against, as in OLMo-core's SkipStepOptimizer
MIN_LOSSES = 32


class Guard:
    """What was skipped and reset so far; saved with every checkpoint."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # steps skipped, of these in a row, losses seen
        self.resets = torch.zeros((), dtype=torch.int64, device=device)  # of substreams of this process
        ring = torch.zeros(SPIKE_WINDOW + 1, dtype=torch.float64, device=device)
        self._ring, self.losses = ring, ring[:SPIKE_WINDOW]  # the last ones; behind them, a place for what is no number

    def reset_rows(self, hidden: Mapping[str, Tensor], zero: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states with their first value in every row in which one of them is not finite.

        Args:
            hidden: each (B, ...)
            zero: each (1, ...), the state before the first token.
        """
        floating = [state.reshape(len(state), -1) for state in hidden.values() if state.is_floating_point()]
        if not floating:
            return dict(hidden)

        # sums over each row: a third of the time of asking every number
        sums = torch.stack([state.sum(dim=1, dtype=torch.float32) for state in floating])  # (states, B)
        finite = sums.abs().amax(dim=0) < torch.inf  # (B,), false for NaN
        self.resets += (~finite).sum()
        return {
            name: torch.where(finite.view(-1, *[1] * (state.dim() - 1)), state, zero[name])
            for name, state in hidden.items()
        }

    def should_skip(self, gradient_norm: Tensor, mean_loss: Tensor | None = None, sigmas: float = 0.0) -> Tensor:
        """() bool: whether this step is to be skipped; it is counted, and its loss remembered.

        Args:
            gradient_norm: () of the gradient summed over all processes.
            mean_loss: () of this step over all processes; a spike if more than `sigmas` standard deviations above the
                mean of the last 128. Every finite loss is remembered, so that a lasting change is soon accepted.
        """
        skip = ~(gradient_norm < torch.inf)  # true for NaN
        if mean_loss is not None:
            finite = torch.isfinite(mean_loss)
            skip |= finite & self._is_spike(mean_loss, sigmas)
            self._remember(mean_loss, finite)

        self.counts[:2] += skip
        self.counts[1] *= skip
        return skip

    def _is_spike(self, mean_loss: Tensor, sigmas: float) -> Tensor:
        """() bool, of a loss () against those remembered; never before there are MIN_LOSSES."""
        seen = self.counts[2]
        known = torch.arange(SPIKE_WINDOW, device=self.losses.device) < seen
        count = known.sum().clamp(min=1)
        mean = (self.losses * known).sum() / count
        deviation = (((self.losses - mean) * known) ** 2).sum().div(count).sqrt()
        return (seen >= MIN_LOSSES) & (mean_loss > mean + sigmas * deviation)

    def _remember(self, mean_loss: Tensor, finite: Tensor) -> None:
        """Put a loss () into the ring; one that is not finite into a place beyond its end, without a branch."""
        place = torch.where(finite, self.counts[2] % SPIKE_WINDOW, SPIKE_WINDOW)
        self._ring.index_copy_(0, place[None], mean_loss.double()[None])
        self.counts[2] += finite

    def check(self, limit: int) -> int:
        """How many steps were skipped so far.

        Raises:
            RunError: `limit` or more in a row.
        """
        skipped, in_a_row, _ = self.counts.tolist()
        if limit and in_a_row >= limit:
            raise RunError(
                f"the last {in_a_row} steps had losses or gradients that are not finite, or far too large, and "
                f"changed nothing (train.stop_after_skipped={limit}); lower optim.learning_rate or "
                "optim.clip_norm, or use bf16 or fp32, and resume from the last checkpoint"
            )
        return int(skipped)

    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes here."""
        return {"health.counts": self.counts, "health.resets": self.resets, "health.losses": self._ring}

    def to_dict(self, resets: int) -> dict[str, Any]:
        """For the checkpoint, with the resets of all processes."""
        return {"counts": self.counts.tolist(), "resets": resets, "losses": self.losses.tolist()}

    def restore(self, counts: list[int], losses: list[float], resets: int) -> None:
        """Take over what a checkpoint holds; the resets of all processes go to one of them, 0 to the others."""
        self.counts.copy_(torch.tensor(counts))
        self.losses.copy_(torch.tensor(losses, dtype=torch.float64))
        self.resets.fill_(resets)
