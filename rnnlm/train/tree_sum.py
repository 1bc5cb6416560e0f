"""Sums of gradients whose bits do not depend on the number of processes W.

The gradients of K fixed slices of the substreams are added in one binary tree over the slices,

    K = 4     ((g0 + g1) + (g2 + g3))        W = 2: rank 0 forms g0 + g1, rank 1 g2 + g3, then these two are added

for which each rank gets a W-th of every rank's sum, adds, and gives the result to all: the bytes of an all-reduce. The
price: log2(K / W) + 1 gradients more in memory, and no overlap of the sum with the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class TreeSum:
    """The sum of the gradients of consecutive slices, in the order of a binary tree over all of them.

    Holds one partial sum per level: memory for log2(slices) + 1 gradients.
    """

    def __init__(self) -> None:
        self._partial: list[tuple[int, Tensor]] = []  # (level, sum of 2 ** level slices)

    def add(self, gradients: Sequence[Tensor]) -> None:
        """The next slice's; they are copied."""
        total, level = torch.cat([gradient.reshape(-1) for gradient in gradients]), 0
        while self._partial and self._partial[-1][0] == level:
            total = self._partial.pop()[1].add_(total)
            level += 1
        self._partial.append((level, total))

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Write the sum over all processes into these tensors, of the same shapes."""
        ((_, total),) = self._partial
        total = _over_processes(total)
        for gradient, part in zip(gradients, torch.split(total, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _over_processes(own: Tensor) -> Tensor:
    """(n,) the sum of every rank's tensor (n,), pair by pair."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count == 1:
        return own

    size = -(-own.numel() // count)
    padded = torch.nn.functional.pad(own, (0, size * count - own.numel()))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)

    parts = parts.view(count, size)  # what every rank has of our share
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    dist.all_gather(list(padded.chunk(count)), parts[0])
    return padded[: own.numel()]
