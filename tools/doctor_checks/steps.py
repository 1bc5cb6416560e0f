"""A training step: without warnings, without waiting for the GPU, and as a CUDA graph the same bits."""

from __future__ import annotations

import io
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace

import torch
from step_speed.presets import Preset, make_batches

from doctor_checks.verdict import Verdict, right, untried, wrong
from rnnlm.data.substreams import Batch
from rnnlm.train.capture import first_other
from rnnlm.train.distributed import Accelerator, launched
from rnnlm.train.step import TrainStep

SIZE = Preset(vocab_size=500, embedding_size=32, hidden_size=64, layers=2, dropout=0.2, batch=8, window=16)
STEPS = 6


def check(options: Namespace, precision: str) -> Iterator[Verdict]:
    """Three lines for a precision."""
    if precision == "fp16" and options.device != "cuda":
        yield untried("a step in fp16", "on a CPU nothing would run in fp16")
        return

    cuda = options.device == "cuda"
    more = ("--train.capture=off", f"--train.deterministic={str(cuda).lower()}")
    config = replace(SIZE, options=more).config(precision, options.device)
    with launched(config) as accelerator:
        step, batches = TrainStep(config, SIZE.vocab_size, accelerator, 0, SIZE.batch), make_batches(SIZE, STEPS)
        yield without_warnings(step, batches, precision)

        if not cuda:
            yield untried(f"a step in {precision} never waits for the GPU", "no GPU is used here")
            yield untried(f"a step in {precision} as a CUDA graph", "no GPU is used here")
            return
        batches = [batch.pin_memory() for batch in batches]  # as a run's loader does
        yield without_waiting(step, batches, precision)
        yield captured_is_plain(accelerator, batches, precision)


def without_warnings(step: TrainStep, batches: list[Batch], precision: str) -> Verdict:
    """Steps with every warning of Python's an error; the loss must be finite."""
    subject = f"a step in {precision}, warnings as errors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in batches:
                step.run(batch, batch.step == 0, 0.001)
            loss = step.report()["loss"]
    except Warning as warning:
        return wrong(subject, f"{type(warning).__name__}: {_first_line(warning)}; try the versions of constraints.txt")
    if loss is None:
        return wrong(subject, "no loss is finite; try another train.precision, and the versions of constraints.txt")
    return right(subject, f"loss {loss:.2f} after {len(batches)} steps")


def without_waiting(step: TrainStep, batches: list[Batch], precision: str) -> Verdict:
    """Steps in which whatever waits for the GPU raises; after others, whose libraries may begin with a wait."""
    subject = f"a step in {precision} never waits for the GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step.run(batch, batch.step == 0, 0.001)
    except RuntimeError as error:
        return wrong(subject, f"{_first_line(error)}; it trains all the same, but without a graph; report it")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return right(subject)


def captured_is_plain(accelerator: Accelerator, batches: list[Batch], precision: str) -> Verdict:
    """The same steps one kernel at a time and as replays of a graph: all that they change, to the bit."""
    subject = f"a step in {precision} as a CUDA graph"
    ends, said, graph = [], io.StringIO(), True
    for capture in ("off", "auto"):
        more = (f"--train.capture={capture}", "--train.deterministic=true")
        config = replace(SIZE, options=more).config(precision, "cuda")
        step = TrainStep(config, SIZE.vocab_size, accelerator, 0, SIZE.batch)
        with redirect_stderr(said):
            for batch in batches:
                step.run(batch, batch.step == 0, 0.001)
        ends.append({name: each.detach().cpu() for name, each in step.changing().items()})
        graph = step.is_captured

    if not graph:
        return wrong(subject, f"{said.getvalue().strip()}; train.capture=off leaves the trial out; report it")
    if name := first_other(ends[1], ends[0]):
        return wrong(subject, f"other bits, first in {name}; use train.capture=off, and report it")
    return right(subject, f"the bits of the plain step over {len(batches)} steps")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
