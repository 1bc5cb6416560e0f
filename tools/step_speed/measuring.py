"""Time, memory and operations of a piece of work, measured the same way whatever the work is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], Any]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, device: torch.device, times: int = 1) -> float:
    """Mean seconds of `times` calls in a row, after which the device is waited for once."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


def in_turn(works: dict[str, Work], device: torch.device, repeats: int, times: int = 1) -> dict[str, float]:
    """Median seconds of each work; they take turns, so that what disturbs the machine disturbs all alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds_of(work, device, times))
    return {name: median(seconds) for name, seconds in found.items()}


def peak_memory(work: Work, device: torch.device, parameters: Sequence[Tensor] = ()) -> int:
    """The most bytes that were allocated during the work, above those allocated when it began; it is done once before.

    The gradients of the parameters are left out. On a CPU the profiler records every allocation and release by
    PyTorch's allocator: tensors, and buffers inside of its operations; a gradient counts as nothing for as long as it
    exists. On CUDA the caching allocator knows the highest level alone: all gradients are taken from it, as if they
    existed at once. Neither sees what other libraries take for themselves: oneDNN's and MKL's packed matrices and
    scratch pads, cuBLAS's first workspace, Python's and numpy's objects.
    """
    work()
    if device.type == "cuda":
        return _peak_on_cuda(work, device, parameters)
    _trace(work, parameters)  # of what was allocated before the first time, the profiler misses the release
    return highest(*_trace(work, parameters))


def _peak_on_cuda(work: Work, device: torch.device, parameters: Sequence[Tensor]) -> int:
    wait(device)
    present = sum(each.nbytes for each in parameters if each.grad is not None)
    before = torch.cuda.memory_allocated(device) - present
    torch.cuda.reset_peak_memory_stats(device)

    work()
    wait(device)
    gradients = sum(each.nbytes for each in parameters)
    return max(0, torch.cuda.max_memory_allocated(device) - before - gradients)


def _trace(work: Work, parameters: Sequence[Tensor]) -> tuple[list[tuple[int, int]], set[int], set[int]]:
    """What `highest` takes: the allocations of the work, and where gradients were before it, and after it or within."""
    old = {_address(each.grad) for each in parameters if each.grad is not None}
    new = set[int]()
    hooks = [each.register_post_accumulate_grad_hook(lambda each: new.add(_address(each.grad))) for each in parameters]
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    for hook in hooks:
        hook.remove()

    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return _allocations(profiler.profiler.kineto_results.experimental_event_tree()), old, new


def highest(changes: Sequence[tuple[int, int]], old: set[int], new: set[int]) -> int:
    """The highest level that allocations and releases lead to, from zero.

    Args:
        changes: (address, bytes, negative where they are released), in their order.
        old: addresses allocated before, whose release is not counted.
        new: addresses of which the last allocation, and its release, is not counted.
    """
    last = {address: index for index, (address, size) in enumerate(changes) if size > 0 and address in new}
    level = top = 0
    left_out = set(old)
    for index, (address, size) in enumerate(changes):
        if size > 0 and last.get(address) == index:
            left_out.add(address)
        elif size < 0 and address in left_out:
            left_out.remove(address)
        else:
            level += size
            top = max(top, level)
    return top


def _address(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.untyped_storage().data_ptr()


def _allocations(tree: Sequence[Any]) -> list[tuple[int, int]]:
    """(address, bytes) of all allocations and releases on the CPU, in their order."""
    found, ahead = [], list(tree)
    while ahead:
        event = ahead.pop()
        ahead += event.children
        if event.tag == _EventType.Allocation and event.typed[1].device.type == "cpu":
            found.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda each: each[0])]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the profiler's library writes to the standard error at each start and stop."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class CountOperations(TorchDispatchMode):
    """Counts the calls that reach a device: those dispatched below autograd and autocast, views left out.

    A view is what by its schema returns an argument's memory without writing to it (view, t, select, detach), and
    _unsafe_view. Counted are allocations, copies and casts, in-place and out-of-place arithmetic, and one for a fused
    call over many tensors. Not seen: kernels that are launched without the dispatcher, as numba's and Triton's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it, and do it."""
        returned = [each.alias_info for each in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and func is not torch.ops.aten._unsafe_view.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def count_operations(work: Work) -> int:
    """Operations of a piece of work, as CountOperations counts them."""
    with CountOperations() as counter:
        work()
    return len(counter.names)
