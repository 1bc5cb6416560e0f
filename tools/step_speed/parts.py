"""Which part of the network a step's time goes to, read from PyTorch's profiler.

Methods and functions are run within a range of the profiler that is named after their part, from outside, so that
what is measured elsewhere is the code as it is. The backward pass is told apart by the sequence numbers that the
profiler gives to an operation and to the gradient function that it created. The price: what no range holds, and small
sums of gradients, is counted as rest; and the profiler itself costs some microseconds an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from step_speed.measuring import Work, quiet, wait

PARTS = ("embedding", "recurrence", "dropout", "head", "update")
PREFIX = "part:"
BACKWARD = "autograd::engine::evaluate_function"

Place = tuple[Any, str, str]
"""An object, a module or a class; the name of its method or function; the part that it belongs to."""


@contextmanager
def marked(places: Sequence[Place]) -> Iterator[None]:
    """Meanwhile, what is at these places runs within a range named after its part."""
    with ExitStack() as restore:
        for owner, name, part in places:
            original = getattr(owner, name)
            if name in vars(owner):
                restore.callback(setattr, owner, name, original)
            else:  # it is the class's, of which the instance gets a version of its own for a while
                restore.callback(delattr, owner, name)
            setattr(owner, name, _within(part, original))
        yield


def _within(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return run


def split_time(work: Work, places: Sequence[Place], device: torch.device) -> dict[str, float]:
    """Milliseconds of each part, forward and backward together, of the rest, and of all that is in the backward pass.

    Of the device's kernels on CUDA, else of the CPU. A captured graph has no parts: all of it is rest.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with marked(places), quiet(), profile(activities=activities) as profiler:
        with record_function("step"):
            work()
        wait(device)

    events = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CPU]
    cuda = device.type == "cuda"
    owners = _owners(events)
    found = {**dict.fromkeys((*PARTS, "rest"), 0.0), "backward": 0.0}
    for event in events:
        time = (event.device_time_total if cuda else event.cpu_time_total) / 1e3
        if event.name.startswith(PREFIX):
            found[event.name.removeprefix(PREFIX)] += time
            if outer := _range(event.cpu_parent):
                found[outer] -= time
        elif event.name.startswith(BACKWARD):
            found["backward"] += time
            if part := owners.get(event.sequence_nr):
                found[part] += time

    # on CUDA the backward pass has a thread of its own, outside of the range of the step
    whole = sum(e.self_device_time_total for e in events) if cuda else _first(events, "step").cpu_time_total
    found["rest"] = whole / 1e3 - sum(found[part] for part in PARTS)
    return found


def _owners(events: list[FunctionEvent]) -> dict[int, str]:
    """Sequence number -> the part in which it created a gradient function: the last that was given the number."""
    owners: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and not _in_backward(event):
            owners[event.sequence_nr] = _range(event) or "rest"
    return {number: part for number, part in owners.items() if part != "rest"}


def _range(event: FunctionEvent | None) -> str | None:
    """The part of the innermost range that holds an event, or is it."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


def _in_backward(event: FunctionEvent | None) -> bool:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False


def _first(events: list[FunctionEvent], name: str) -> FunctionEvent:
    return next(event for event in events if event.name == name)
