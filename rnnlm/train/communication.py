"""What processes send each other of a step's gradients, where that is less than DDP would send.

Gradients may travel in bf16 (`train.gradient_compression`), and those of the token vectors as rows:

    W processes, n tokens of one of them in a step, V vocabulary, E width of the token vectors, w bytes of a number

Summed as DDP does it, the gradient of the token vectors takes 2 (W - 1) / W * V E w bytes each way of every process,
though all rows are zero but those of the n tokens at most. Here each process gets the tokens and their rows from all
others instead, (W - 1) n (E w + 8) bytes, and adds them in the order of the processes: no row is named twice in what
one of them sends, so the bits do not depend on the order in which a GPU adds. The price: DDP does not sum it while the
backward pass goes on, but it is the last gradient of that to be ready. It is done where it sends less, which its sizes
alone decide: not for tied vectors, whose gradient by the softmax has no row of zeros; nor with train.exact_slices.
"""

# no annotations from __future__: DDP compares those of its hook as types
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rnnlm.config import TrainConfig
from rnnlm.model.language_model import RecurrentLM

NAME = "embedding.weight"
ID_BYTES = 8


def sends_rows(model: RecurrentLM, train: TrainConfig, processes: int) -> bool:
    """Whether the rows of the tokens are fewer bytes than the whole gradient of the token vectors, and all of it."""
    vocab_size, width = model.embedding.weight.shape
    tied = any(each is model.embedding.weight for each in (*model.head.parameters(), *model.layers.parameters()))
    if processes == 1 or train.exact_slices or tied:
        return False
    row = width * number_bytes(train)
    return train.global_batch_size * train.seq_len * (row + ID_BYTES) < 2 * vocab_size * row


def number_bytes(train: TrainConfig) -> int:
    """Bytes of a number of a gradient on its way."""
    return 2 if train.gradient_compression == "bf16" else 4


def sum_in_bf16(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean over all processes of what DDP sums at once, rounded to bf16 before and between additions.

    As PyTorch's bf16_compress_hook, which takes NCCL alone; the backward pass goes on meanwhile. Each of the W numbers
    is off by 2^-9 of itself at most, each of the W - 1 sums by as much of itself; nothing is kept from step to step.
    """
    whole = bucket.buffer()
    sent = (whole / dist.get_world_size()).to(torch.bfloat16)

    def widen(future: Any) -> Any:
        return whole.copy_(future.value()[0])

    found: torch.futures.Future[Tensor] = dist.all_reduce(sent, async_op=True).get_future().then(widen)
    return found


class TokenVectorSum:
    """The sum of the gradients of the token vectors over all processes, which DDP, wrapped around later, leaves out.

    Args:
        model: on its device; process 0's vectors are taken over by all, as DDP does with what it sums.
    """

    def __init__(self, model: RecurrentLM, train: TrainConfig, processes: int):
        self._vectors, self._processes = model.embedding.weight, processes
        self._dtype = torch.bfloat16 if train.gradient_compression == "bf16" else self._vectors.dtype
        names = [NAME]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
        dist.broadcast(self._vectors.detach(), 0)

    def finish(self, tokens: Tensor) -> None:
        """Replace this process's gradient by the mean over all, as DDP does.

        Args:
            tokens: all that this process has looked up in the step, int64, as many as every other.
        """
        gradient: Any = self._vectors.grad
        ids, rows = distinct_rows(gradient, tokens.flatten(), self._processes, self._dtype)
        all_ids, all_rows = ([torch.empty_like(own) for _ in range(self._processes)] for own in (ids, rows))
        dist.all_gather(all_ids, ids)
        dist.all_gather(all_rows, rows)
        add_rows(gradient, all_ids, all_rows)


def distinct_rows(gradient: Tensor, tokens: Tensor, divisor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a process sends: (n,) the tokens, sorted, and (n, E) their rows, zero where a token is there once more.

    Shapes follow from those of the arguments, so that nothing waits for a GPU.

    Args:
        gradient: (V, E)
        tokens: (n,) int64
        divisor: of the rows.
    """
    ids = tokens.sort().values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[1:] = ids[1:] == ids[:-1]
    rows = gradient.index_select(0, ids).div_(divisor).masked_fill_(again[:, None], 0.0)
    return ids, rows.to(dtype)


def add_rows(gradient: Tensor, ids: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Make the gradient (V, E) the sum of what each process has sent, (n,) tokens and (n, E) rows, in their order."""
    gradient.zero_()
    for each, values in zip(ids, rows, strict=True):
        gradient.index_add_(0, each, values.to(gradient.dtype))
