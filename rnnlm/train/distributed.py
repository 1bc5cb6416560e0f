"""The processes of a run: started, joined and asked through Accelerate, whose only user this is.

Accelerate launches, places, wraps in DDP, mixes precisions and reduces. It never sees the loader (it would give
consecutive windows to different ranks), nor the schedule (it would step it once per rank), nor the hidden state. The
price: what it would do for those stands in this project.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from rnnlm.config import Config
from rnnlm.errors import RunError, UserError, kind_of, line_of
from rnnlm.machine import cores
from rnnlm.train.signals import die_with_launcher, has_lost_launcher

__all__ = [
    "Accelerator",
    "AnyRank",
    "all_gather_object",
    "errors_are_shared",
    "errors_may_be_local",
    "fill_on_main",
    "launched",
    "run_on_main",
]

T = TypeVar("T")
OTHER_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's


@contextmanager
def launched(config: Config) -> Iterator[Accelerator]:
    """Accelerate for this configuration, joined with the other processes; they leave together at the end.

    After an error that all processes have alike they do so too; after one that this process may have alone, nobody is
    waited for: the launcher ends the others.

    Raises:
        UserError: a device or precision that is not there, or processes that do not see each other.
        RunError: the launcher has ended.
    """
    if has_lost_launcher(os.environ):
        raise RunError("the launcher has ended, without which processes do not find each other; start it again")
    accelerator = start_accelerator(config)
    die_with_launcher(signal.SIGTERM)  # there may be something to save from now on
    try:
        yield accelerator
    except UserError as error:
        if error.is_shared:
            clear_frames(error.__traceback__)  # what still holds the model would hold the process group
            leave(accelerator)
        raise
    leave(accelerator)


@contextmanager
def errors_are_shared() -> Iterator[None]:
    """What is wrong in here is so in every process, and raised by all."""
    try:
        yield
    except UserError as error:
        error.is_shared = True
        raise


@contextmanager
def errors_may_be_local() -> Iterator[None]:
    """What is wrong in here may be so in this process alone, as on a machine that sees another disk: it must say so."""
    try:
        yield
    except UserError as error:
        error.may_be_local = True
        raise


def leave(accelerator: Accelerator) -> None:
    """Leave the other processes in order: the threads of a process group that is still held abort Python's end."""
    accelerator.wait_for_everyone()  # none may destroy the group while another one still uses it
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def start_accelerator(config: Config) -> Accelerator:
    """Accelerate for this configuration, after checks that it is what was launched; errors as `launched`."""
    cuda = _uses_cuda(config)
    _check_launcher()
    set_arithmetic(config, cuda)
    accelerator = Accelerator(
        cpu=not cuda,
        mixed_precision=PRECISIONS[config.train.precision],
        dynamo_backend="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            AutocastKwargs(cache_enabled=not cuda),  # a cached tensor would outlive the CUDA graph that made it
            # twice the watchdog's time, which reports more
            InitProcessGroupKwargs(timeout=timedelta(minutes=2 * config.run.timeout_minutes or 24 * 60)),
        ],
    )
    if cuda:
        # the default one cannot be recorded, as capture.py does
        torch.cuda.set_stream(torch.cuda.Stream(accelerator.device))  # type: ignore[no-untyped-call]
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says: a step scales its own loss

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != processes:
        raise UserError(
            f"{processes} processes were launched, but each sees {accelerator.num_processes}; "
            "launch with a file of launch/, as in accelerate launch --config_file launch/cpu.yaml"
        )
    return accelerator


def _uses_cuda(config: Config) -> bool:
    """Whether the run's device is a GPU."""
    cuda = torch.cuda.is_available() and config.train.device != "cpu"
    if config.train.device == "cuda" and not cuda:
        raise UserError("train.device=cuda: PyTorch sees no GPU here; use train.device=cpu or auto")
    if config.train.precision == "fp16" and not cuda:
        raise UserError("train.precision=fp16: needs a GPU, on a CPU nothing would run in fp16; use bf16 or fp32")
    return cuda


def _check_launcher() -> None:
    """Check what `accelerate launch` says in the environment, which Accelerate would obey.

    Raises:
        UserError: MULTI_CPU, which starts one process where several were asked for, unless there is mpirun; or another
            way of sharing a model out than DDP.
    """
    environment = os.environ
    for name in OTHER_ENGINES:
        if environment.get(name, "false").lower() == "true":
            raise UserError(
                f"{name}=true: accelerate was configured for another engine than DDP, which alone trains here; "
                "launch with a file of launch/, as in accelerate launch --config_file launch/one_node.yaml"
            )

    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no" and environment.get("RANK", "0") == "0":
        print(f"warning: ACCELERATE_DYNAMO_BACKEND={backend} is not used: nothing is compiled here", file=sys.stderr)

    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate launch was asked for several processes but started one; "
            "use --config_file launch/cpu.yaml --num_processes 2, which starts them on a CPU"
        )


def set_arithmetic(config: Config, cuda: bool) -> None:
    """Threads, TF32 and determinism, before anything is computed."""
    if cuda:
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shares = config.train.exact_slices or local  # how a product is cut over threads shows in its bits
        torch.set_num_threads(config.train.cpu_threads or max(1, cores() // shares))

    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # cuBLAS and cuDNN's recurrent layers ask for it
        torch.use_deterministic_algorithms(True)
        # else it would also fill all memory that is about to be written anyway
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def run_on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns in the main process, in every process; its error is raised in all of them.

    Raises:
        UserError: the main process's; an OSError becomes one, a RunError where the disk is full.
    """
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = (kind_of(error), line_of(error))

    broadcast_object_list(box)
    if box[1] is not None:
        kind, text = box[1]
        with errors_are_shared():
            raise kind(text)
    result: T = box[0]
    return result


def fill_on_main(accelerator: Accelerator, tensors: Mapping[str, Tensor], fill: Callable[[], None]) -> None:
    """Fill tensors in the main process, and send what is in them to all others, which have the same names and shapes.

    One process reads a checkpoint from a disk that all share; what it read goes the way of gradients.

    Raises:
        UserError: the main process's, in all of them.
    """
    run_on_main(accelerator, fill)
    if accelerator.num_processes == 1:
        return
    for tensor in tensors.values():
        sent = tensor.detach().to(accelerator.device).contiguous()  # itself, where it is so already
        if sent.numel():
            dist.broadcast(sent.reshape(-1).view(torch.uint8), 0)  # bytes: every dtype, every backend
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)


def all_gather_object(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    found: list[Any] = gather_object([value])
    return found


class AnyRank:
    """Flags that are raised on all ranks, at the same step, where one rank raises them; the device is not waited for.

    On GPUs the answer is that of the step before: it has most often arrived.
    """

    def __init__(self, device: torch.device):
        self._device, self._alone = device, not dist.is_initialized() or dist.get_world_size() == 1
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has raised it."""
        if self._alone:
            return list(flags)

        mine = torch.tensor(flags, dtype=torch.int32)
        if self._device.type != "cuda":
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            return [bool(flag) for flag in mine.tolist()]

        sent = mine.pin_memory().to(self._device, non_blocking=True)
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        arrived = torch.empty(len(flags), dtype=torch.int32, pin_memory=True)
        arrived.copy_(sent, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        before, self._before = self._before, (arrived, event)
        if before is None:
            return [False] * len(flags)
        before[1].synchronize()
        return [bool(flag) for flag in before[0].tolist()]
