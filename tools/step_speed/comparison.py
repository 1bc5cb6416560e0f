"""One preset in one precision: the usual loop, our step and the floor in turn, and what else is measured of them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rnnlm.config import HEADS
from rnnlm.model.precision import DTYPES
from rnnlm.train.distributed import Accelerator, launched
from rnnlm.train.speed import flops_per_token, measured_peak
from step_speed.floor import Floor
from step_speed.measuring import Work, count_operations, in_turn, peak_memory
from step_speed.parts import split_time
from step_speed.presets import Preset, preset, reduced, tiny, without_dropout
from step_speed.sides import Sides

LARGEST = {"cpu": 4096, "cuda": 16384}  # sides of the matrices whose best rate is the peak
PEAK_SECONDS = 3.0  # for measuring it, about
HOST_STEPS = 30
BATCHES = 4


def compare(
    name: str, precision: str, device: str, repeats: int, loss_steps: int, warm_up: int, options: Sequence[str]
) -> dict[str, Any]:
    """All that is measured of a preset in a precision; times in ms, memory in MB.

    Args:
        repeats: steps whose median is taken.
        loss_steps: over which the losses of both sides are compared, on a CPU at a reduced size; 0: not.
        warm_up: steps of both sides before the first that is measured.
        options: of our side.
    """
    size = replace(preset(name, device), options=tuple(options))
    row: dict[str, Any] = {"preset": name, "precision": precision, "device": device, "scaled": size.scaled}
    row |= {"options": list(options), "warm_up": warm_up}
    if size.head not in HEADS:
        return row | {"missing": f"model.head={size.head} is not there"}

    with launched(size.config(precision, device)) as accelerator:
        row |= {"machine": _machine(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
        if loss_steps and size.head == "softmax":
            at = without_dropout(reduced(size) if device == "cpu" else size)
            row["loss_difference"] = Sides(at, precision, accelerator, loss_steps).loss_difference(loss_steps)
        row |= _host_time(tiny(size), precision, accelerator)
        return row | measure(size, precision, accelerator, repeats, warm_up, PEAK_SECONDS)


def measure(
    size: Preset, precision: str, accelerator: Accelerator, repeats: int, warm_up: int, peak_seconds: float
) -> dict[str, Any]:
    """Times, memory, operations and the split of the time at this size."""
    device, dtype = accelerator.device, DTYPES[precision]
    peak = measured_peak(dtype, device, LARGEST[device.type], peak_seconds)
    sides = Sides(size, precision, accelerator, max(BATCHES, warm_up))
    floor = Floor(size, dtype, sides.inputs, sides.parameters()) if size.head == "softmax" else None
    pieces = floor.works if floor else {}

    works: dict[str, Work] = {"loop": sides.run_loop, "step": sides.run_ours, **pieces}
    for work in (sides.run_loop, sides.run_ours) * warm_up:
        work()
    times = 10 if device.type == "cuda" else 1
    seconds = in_turn(works, device, repeats, times)
    bottom = sum(seconds[piece] for piece in pieces)
    return {
        "repeats": repeats,
        **_times(size, seconds, bottom, peak, flops_per_token(sides.ours.raw)),
        "floor_parts_ms": {piece: 1e3 * seconds[piece] for piece in pieces},
        "floor_forms": floor.chosen if floor else {},
        **_memory(sides),
        "operations": count_operations(sides.run_ours),
        "loop_operations": count_operations(sides.run_loop),
        "split_ms": split_time(sides.run_ours, sides.our_places(), device),
        "loop_split_ms": split_time(sides.run_loop, sides.loop_places(), device),
    }


def _times(size: Preset, seconds: dict[str, float], floor: float, peak: float, flops: int | None) -> dict[str, Any]:
    """Medians and what follows from them; what a head of another kind makes meaningless is None."""
    loop, step = seconds["loop"], seconds["step"]
    return {
        "loop_ms": 1e3 * loop,
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * floor if floor else None,
        "tokens_per_second": size.tokens / step,
        "ratio_to_loop": loop / step,
        "ratio_to_floor": step / floor if floor else None,
        "peak_flops": peak,
        "share_of_peak": flops * size.tokens / step / peak if flops else None,
    }


def _memory(sides: Sides) -> dict[str, Any]:
    """Peaks above parameters, gradients and moments."""
    ours = peak_memory(sides.run_ours, sides.device, sides.parameters())
    loops = peak_memory(sides.run_loop, sides.device, list(sides.loop.model.parameters()))
    return {"step_peak_mb": ours / 1e6, "loop_peak_mb": loops / 1e6, "peak_memory_ratio": ours / max(1, loops)}


def _host_time(size: Preset, precision: str, accelerator: Accelerator) -> dict[str, float]:
    """Median time of a step of both sides where there is next to nothing to calculate, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other
    sides = Sides(size, precision, accelerator, BATCHES)
    for work in (sides.run_loop, sides.run_ours) * 5:
        work()
    seconds = in_turn({"loop": sides.run_loop, "step": sides.run_ours}, sides.device, HOST_STEPS)
    torch.set_num_threads(threads)
    return {"host_ms": 1e3 * seconds["step"], "loop_host_ms": 1e3 * seconds["loop"]}


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return file.readlines()
    except OSError:  # not on macOS
        return []
