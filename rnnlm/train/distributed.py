"""The processes of a run: started, joined and asked through Accelerate, whose only user this is.

Accelerate launches, places, wraps in DDP, mixes precisions and reduces. It never sees the loader (it would deal
consecutive windows to different ranks), nor the schedule (it would step it once per rank), nor the hidden state.
Sums whose bits must not depend on the number of processes W are formed here: gradients of K fixed slices of the
substreams are added in one binary tree over the slices,

    K = 4     ((g0 + g1) + (g2 + g3))        W = 2: rank 0 forms g0 + g1, rank 1 g2 + g3, then these two are added

for which each rank gets a W-th of every rank's sum, adds, and gives the result to all: the bytes of an all-reduce.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor

from rnnlm.config import Config
from rnnlm.errors import RunError, UserError

__all__ = ["Accelerator", "Meeting", "TreeSum", "Wishes", "end", "everyones", "from_main", "start_accelerator"]
T = TypeVar("T")
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's


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
    """(n,) the sum of every rank's tensor, pair by pair."""
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
    dist.all_gather_into_tensor(padded, parts[0])
    return padded[: own.numel()]


class Wishes:
    """What one process wants, all do, at the same step, without waiting for the device.

    On GPUs the answer is that of the step before: it has most often arrived.
    """

    def __init__(self, device: torch.device):
        self._device, self._alone = device, not dist.is_initialized() or dist.get_world_size() == 1
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def agree(self, *wishes: bool) -> list[bool]:
        """For each wish, whether any process has it."""
        if self._alone:
            return list(wishes)
        mine = torch.tensor(wishes, dtype=torch.int32)
        if self._device.type != "cuda":
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            return [bool(wish) for wish in mine.tolist()]
        sent = mine.pin_memory().to(self._device, non_blocking=True)
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        arrived = torch.empty(len(wishes), dtype=torch.int32, pin_memory=True)
        arrived.copy_(sent, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before, self._before = self._before, (arrived, event)
        if before is None:
            return [False] * len(wishes)
        before[1].synchronize()
        return [bool(wish) for wish in before[0].tolist()]


class Meeting:
    """Called equally often by all processes, some of which may have nothing to do: they meet now and then, so that
    none waits for long, and each tells its watchdog so."""

    def __init__(self, accelerator: Accelerator, beat: Callable[[], None], every: int = 64):
        self._accelerator, self._beat, self._every = accelerator, beat, every
        self._calls = 0

    def __call__(self) -> None:
        """Go on; every 64th time, meet."""
        self._calls += 1
        if self._calls % self._every == 0:
            self._accelerator.reduce(torch.zeros(1, device=self._accelerator.device), "sum").item()  # on GPUs it waits
        self._beat()


def everyones(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    found: list[Any] = gather_object([value])
    return found


def from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What the main process makes of `function`, in every process; its mistake is everyone's."""
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = (RunError if isinstance(error, RunError) else UserError, str(error))
    broadcast_object_list(box)
    if box[1] is not None:
        end(accelerator)
        raise box[1][0](box[1][1])
    result: T = box[0]
    return result


def end(accelerator: Accelerator) -> None:
    """Leave together, once, with nothing that still holds the process group: its threads would abort Python's end."""
    if accelerator.num_processes > 1 and not dist.is_initialized():
        return
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def start_accelerator(config: Config) -> Accelerator:
    """Accelerate for this configuration, after checks that it is what was launched.

    Raises:
        UserError: a device or precision that is not to be had, or processes that do not see each other.
    """
    train = config.train
    cuda = torch.cuda.is_available() and train.device != "cpu"
    if train.device == "cuda" and not cuda:
        raise UserError("train.device=cuda: PyTorch sees no GPU here; use train.device=cpu or auto")
    if train.precision == "fp16" and not cuda:
        raise UserError("train.precision=fp16: needs a GPU, on a CPU nothing would run in fp16; use bf16 or fp32")
    environment = os.environ
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate launch was asked for several processes but started one; "
            "use --config_file launch/cpu.yaml --num_processes 2, which starts them on a CPU"
        )
    set_arithmetic(config, cuda)
    accelerator = Accelerator(
        cpu=not cuda,
        mixed_precision=PRECISIONS[train.precision],
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # the watchdog tells more, and sooner
            InitProcessGroupKwargs(timeout=timedelta(minutes=2 * config.run.timeout_minutes or 24 * 60)),
        ],
    )
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says: a step scales its own loss
    launched = int(environment.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}; "
            "launch with a file of launch/, as in accelerate launch --config_file launch/cpu.yaml"
        )
    return accelerator


def set_arithmetic(config: Config, cuda: bool) -> None:
    """Threads, TF32 and determinism, before anything is computed."""
    if cuda:
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shares = config.train.exact_slices or local  # how a product is cut over threads shows in its bits
        torch.set_num_threads(config.train.cpu_threads or max(1, cores // shares))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # cuBLAS and cuDNN's recurrent layers ask for it
        torch.use_deterministic_algorithms(True)
