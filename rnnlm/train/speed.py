"""How fast a run is, and how fast its device could be.

The share of the peak is that of Chowdhery et al. 2022, appendix B ("model FLOPs utilisation"): the operations that the
model's products need, whatever else is computed, over those that the device does in products that are as large and
square as it likes. The price of asking: PEAK_SECONDS of the main process, once, in runs that last for minutes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.precision import DTYPES

PEAK_SECONDS = 0.2  # for measuring the peak, about
LONG_RUN_SECONDS = 120.0  # a run shorter than this is not measured: what it could save is less than one would look at
LARGEST = {"cpu": 1024, "cuda": 4096}  # sides of the square matrices: 12 MiB and 192 MiB of fp32
PRODUCTS = {"cpu": 1, "cuda": 20}  # timed as one: what a GPU is given arrives late
WAITING_SHARE = 0.01  # of the time, from which on waiting for data is worth a warning
JUDGED_SECONDS = 1.0  # of shorter times a share says little


class Stopwatch:
    """Seconds of training, and of waiting for data, since the last line; pauses (evaluation, saving) left out."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.reset(0)

    def reset(self, tokens: int) -> None:
        """Start an interval, after this many tokens of training."""
        self._start, self.waited, self._paused, self.tokens = time.perf_counter(), 0.0, 0.0, tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens here does not count."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Seconds of the interval so far."""
        return max(1e-9, time.perf_counter() - self._start - self._paused)

    def seconds_for(self, steps: int, done: int) -> float:
        """What so many steps take, at the pace of all that are done in this attempt, pauses included."""
        return steps * (time.perf_counter() - self._began) / max(1, done)


class WaitCheck:
    """Says once that training waits for its data.

    Args:
        threads: train.prefetch_threads.
    """

    def __init__(self, threads: int):
        self._threads, self._first, self._said = threads, True, False
        self._seconds = self._waited = 0.0

    def warning(self, seconds: float, waited: float) -> str:
        """The warning, or nothing, after an interval of so many seconds, of which so many were waited.

        The first interval is not judged: nothing has been read ahead when it begins. Short ones are judged together.
        """
        if self._first or self._said:
            self._first = False
            return ""
        self._seconds += seconds
        self._waited += waited
        if self._seconds < JUDGED_SECONDS:
            return ""

        share, self._seconds, self._waited = self._waited / self._seconds, 0.0, 0.0
        self._said = share > WAITING_SHARE
        return (
            f"warning: training waited for data in {share:.1%} of the time, expected is {WAITING_SHARE:.0%} at most; "
            f"raise train.prefetch_threads, which is {self._threads}, or put the stream on a faster disk"
            if self._said
            else ""
        )


class Peak:
    """The share of the device's peak that training reaches.

    Args:
        precision: train.precision, in which the products of a step run.
        processes: how many share the work, each on a device, or on cores, like this process's.
    """

    def __init__(self, model: RecurrentLM, device: torch.device, precision: str, processes: int):
        self._flops, self._device, self._dtype = flops_per_token(model), device, DTYPES[precision]
        self._processes, self._rate = processes, 0.0  # operations a second of one process; 0: not measured

    def share(self, tokens_per_second: float, run_seconds: float) -> float | None:
        """The share at this many tokens a second of all processes; None in short runs and where it is not known.

        Measures the peak when it is first wanted.

        Args:
            run_seconds: what the attempt takes from its beginning to its end.
        """
        if self._flops is None or run_seconds < LONG_RUN_SECONDS:
            return None
        try:
            self._rate = self._rate or measured_peak(self._dtype, self._device)
        except torch.OutOfMemoryError:  # training needs all that the GPU has
            self._flops = None
            return None
        return tokens_per_second * self._flops / (self._rate * self._processes)


def flops_per_token(model: RecurrentLM) -> int | None:
    """Multiplications and additions of a training step per token: 6 for each number in a matrix of layers and head.

    Two forward, and four backward, for the gradients of the input and of the matrix (Kaplan et al. 2020, section 2.1).
    Left out: the reading of token vectors, biases and gates, softmax, dropout, clipping, the update, and whatever a
    step computes a second time.

    Returns:
        None where the head does not multiply by all of its matrices for each token, but as values ask for.
    """
    if not model.head.static_shapes:
        return None
    parts = [*model.layers.parameters(), *model.head.parameters()]
    return 6 * sum(each.numel() for each in parts if each.dim() > 1)


def measured_peak(dtype: torch.dtype, device: torch.device, largest: int = 0, seconds: float = 0) -> float:
    """Operations a second of products of square matrices, the best of sizes that double while there is time.

    Not timed: the first product of each size, in which libraries choose and load their kernels.

    Args:
        largest: side of the matrices; 0: that of LARGEST.
        seconds: to measure for, about; 0: PEAK_SECONDS.
    """
    ends, best = time.perf_counter() + (seconds or PEAK_SECONDS), 0.0
    generator = torch.Generator(device).manual_seed(0)  # of its own: nothing else draws other numbers for it
    size, largest, times = 256, largest or LARGEST[device.type], PRODUCTS[device.type]
    while True:
        left = torch.randn(size, size, generator=generator, device=device).to(dtype)
        right, out = left.t().contiguous(), torch.empty_like(left)
        torch.mm(left, right, out=out)
        taken = _seconds_of(left, right, out, times)
        best = max(best, 2 * size**3 * times / taken)

        left_over = ends - time.perf_counter()
        if size < largest and left_over > 2 * 8 * taken:  # twice the side, eight times the work, done twice
            size *= 2
        elif left_over < taken:
            return best


def _seconds_of(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, times: int) -> float:
    """Seconds of so many products of (size, size) matrices in a row."""
    _wait(left.device)
    started = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right, out=out)
    _wait(left.device)
    return max(1e-9, time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process ever held: on the GPU where it uses one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
