"""A step as a CUDA graph: recorded once, replayed by one call of the host, where it has proved to be the same step.

A recurrent step has hundreds of small kernels, and starting them takes the host longer than running them takes the
GPU. What may be recorded is a function of tensors that stay where they are, and that changes nothing else. Whether a
step is one, on the machine it runs on, is not assumed: before the first step counts, everything that it changes is
copied; it warms up and is recorded with other inputs than those of the proof (a number of the host would have become a
constant); the replays must then give the bits of the plain step; and what was copied comes back. Anything else, and the
run goes the plain way and says why. The price: some seconds at the start of every attempt, and copies in the host's
memory for that long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rnnlm.train.distributed import all_gather_object

WARM_UP = 11  # steps: DDP measures some of the first ten, and does the same at every later one

Step = Callable[[], None]


class NotCapturedError(Exception):
    """Why a step cannot be replayed, the same on all processes."""


def record_cuda_graph(step: Step) -> Step:
    """What replays the kernels of a step, which is recorded on the present stream and not run.

    Other threads, as those that pin batches, may go on meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step()
    return graph.replay


def capture(step: Step, inputs: Sequence[Step], tensors: Mapping[str, Tensor], record: Callable[[Step], Step]) -> Step:
    """What replays a step, and is proved to give its bits; called by all processes.

    Args:
        step: changes `tensors`, where they lie, and nothing else.
        inputs: each fills in other values of what a step reads; it may change `tensors` as well.
        tensors: by name; in the end they are as they were.
        record: makes the replay of a step, and runs nothing; what was filled in before it must not matter.

    Raises:
        NotCapturedError: it cannot be recorded, or gives other bits, on any process.
    """
    before = _copies(tensors)
    for number in range(WARM_UP):
        inputs[number % len(inputs)]()
        step()

    try:
        inputs[-1]()
        replay, fault = _recorded(step, record)
        _raise_any(fault)
        _raise_any(_difference(step, replay, inputs, tensors, before))
    finally:
        _restore(tensors, before)
    return replay


def _recorded(step: Step, record: Callable[[Step], Step]) -> tuple[Step, str]:
    """The replay, and what went wrong in recording it: whatever that is, the step itself ran before."""
    try:
        return record(step), ""
    except Exception as error:
        return step, f"a step cannot be recorded ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _difference(
    step: Step, replay: Step, inputs: Sequence[Step], tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> str:
    """What differs after a step of each of the inputs, and after their replays; the arguments as in `capture`."""

    def after(taken: Step) -> dict[str, Tensor]:
        _restore(tensors, before)
        for fill in inputs:
            fill()
            taken()
        return _copies(tensors)

    plain = after(step)
    try:
        name = first_other(after(replay), plain)
    except Exception as error:
        return f"its replay failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"

    if name and (again := first_other(after(step), plain)):
        return (
            f"a step that is repeated gives other bits by itself, first in {again}, so that nothing can be compared; "
            "train.deterministic=true has only kernels that do not"
        )
    return name and f"its replay gives other bits than the step itself, first in {name}"


def _raise_any(fault: str) -> None:
    """Raise what went wrong on any process, on all: a replay and a plain step would wait for each other."""
    for rank, found in enumerate(all_gather_object(fault)):
        if found:
            raise NotCapturedError(f"process {rank}: {found}" if rank else found)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the host's memory: a GPU may have no room for all of it twice."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _restore(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.detach().copy_(before[name])


def first_other(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The name of the first tensor whose bits differ, NaN being like NaN; "" if there is none."""
    return next((name for name, each in found.items() if not torch.equal(_bits(each), _bits(expected[name]))), "")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
