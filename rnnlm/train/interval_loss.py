"""The mean loss since the last line of metrics, summed on the device and without waiting for it.

The sums are integers, so that they come out the same in whatever order micro-batches, ranks and attempts of the run
are added: a resumed run logs the bits of an uninterrupted one. The price: a resolution of 1e-6 nats of a micro-batch's
loss.
"""

from __future__ import annotations

import torch

FIXED_POINT = 2**20  # losses are summed as integers of this many to the nat, since integer sums have no order
LARGEST = 2.0**32  # nats of a micro-batch; above it training has diverged and the integers would overflow


class IntervalLoss:
    """The sums of an interval: (3,) int64 of loss * FIXED_POINT, targets, losses that are not finite."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Add the M micro-batches of a step.

        Args:
            losses: (M,) the summed loss of each in nats.
            counts: (M,) int64, its number of targets.

        Returns:
            (3,) int64, what was added.
        """
        fixed = losses.double() * FIXED_POINT
        wrong = ~(fixed.abs() < LARGEST * FIXED_POINT)  # true for NaN
        fixed = fixed.masked_fill_(wrong, 0.0).round_().long()
        added = torch.stack([fixed, counts, wrong]).sum(dim=1)
        self.sums += added
        return added

    def clear(self) -> None:
        """Begin an interval, in the same memory."""
        self.sums.zero_()

    def restore(self, sums: list[int]) -> None:
        """Start from sums that a checkpoint holds."""
        self.sums.copy_(torch.tensor(sums))

    @staticmethod
    def tensor_mean(sums: torch.Tensor) -> torch.Tensor:
        """() fp64: as `mean`, on the device; NaN where a loss was not finite."""
        mean = sums[0].double() / FIXED_POINT / sums[1].clamp(min=1)
        return torch.where(sums[2] > 0, torch.nan, mean)

    @staticmethod
    def mean(sums: list[int]) -> float | None:
        """Nats per token of reduced sums; None where a loss was not finite, or beyond all use."""
        loss, count, not_finite = sums
        return None if not_finite else loss / FIXED_POINT / max(1, count)
