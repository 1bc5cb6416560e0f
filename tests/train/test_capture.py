"""Steps that are recorded and replayed: the trial changes no bit of a run, and refuses a replay that would.

There is no GPU here: a recording is the function itself, run again at every replay, or one that does something wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import small_config
from torch import Tensor

from rnnlm.config import Config
from rnnlm.data.substreams import Batch
from rnnlm.train.capture import WARM_UP, NotCapturedError, Step, capture
from rnnlm.train.distributed import start_accelerator
from rnnlm.train.step import TrainStep

PIECES = 11
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16, dropout": {"train": {"precision": "bf16"}, "model": {"dropout": 0.5, "cell": "gru"}},
    "micro-batches, spikes": {"train": {"accumulation": 2, "skip_spikes_sigmas": 0.3}},
    "slices, sgd": {"train": {"exact_slices": 4}, "optim": {"name": "sgd", "momentum": 0.9, "learning_rate": 0.1}},
    "adamw, decay": {"optim": {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.0}},
}


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def started(config: Config, scaled: bool = False) -> TrainStep:
    """A step of all substreams; with fp16's scaler, which overflows at first."""
    accelerator: Accelerator = start_accelerator(config)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    step = TrainStep(config, PIECES, accelerator, 0, config.train.global_batch_size)
    step.raw.head.weight.data *= 2.0**9 if scaled else 1.0  # type: ignore[operator]
    step.guard.restore([0, 0, 100], [2.45, 2.3] * 64, 0)  # losses from which some of the next are spikes, if one asks
    return step


def batch_of(number: int, config: Config) -> Batch:
    """Random pieces; in every third batch a row ends early."""
    shape = (config.train.global_batch_size, config.train.seq_len + 1)
    tokens = np.random.default_rng(number).integers(0, PIECES, shape).astype(np.uint16)
    lengths = torch.full(shape[:1], config.train.seq_len - (number % 3 == 0))
    return Batch(number, torch.from_numpy(tokens), lengths, torch.zeros(shape[:1], dtype=torch.int64))


def everything(step: TrainStep) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in step.changing().items()}


def trained(step: TrainStep, steps: range = range(7)) -> dict[str, Tensor]:
    """What is left after these steps, with an epoch's beginning among them and another rate in each."""
    for number in steps:
        step.run(batch_of(number, step.config), number == 5, 0.01 / (number + 1))
    return everything(step)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert torch.equal(torch.nan_to_num(each), torch.nan_to_num(expected[name])), name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_trial_changes_no_bit_of_the_steps_that_count(
    tmp_path: Path, options: dict[str, dict[str, Any]], scaled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path / "run", tmp_path, **options)
    plain = trained(started(config, scaled))
    AcceleratorState._reset_state(reset_partial_state=True)

    step, replays = started(config, scaled), list[int]()

    def record(function: Step) -> Step:
        def replay() -> None:
            replays.append(1)
            function()

        return replay

    step.record = record
    assert_same(trained(step), plain)
    assert len(replays) == 2 + 7, "two of the trial, then every step that counts"
    assert not capsys.readouterr().err
    assert all(key in plain for key in ("interval", "health.counts", "health.resets", "health.losses", "gradient_norm"))
    assert bool(plain["health.counts"][0]) == (scaled or "spikes" in str(options))


def frozen_rate(step: TrainStep) -> Callable[[Step], Step]:
    """A graph holds the numbers that the host had when it was recorded."""

    def record(function: Step) -> Step:
        rate = step.raw_optimizer.param_groups[0]["lr"]

        def replay() -> None:
            for group in step.raw_optimizer.param_groups:
                group["lr"] = rate
            function()

        return replay

    return record


def frozen_step(step: TrainStep) -> Callable[[Step], Step]:
    def record(function: Step) -> Step:
        number = int(step.step)

        def replay() -> None:
            step.step.fill_(number)
            function()

        return replay

    return record


def lost_hidden(step: TrainStep) -> Callable[[Step], Step]:
    """A graph writes to the memory that it was recorded with."""

    def record(function: Step) -> Step:
        def replay() -> None:
            held = {name: state.clone() for name, state in step.hidden.items()}
            function()
            for name, state in step.hidden.items():
                state.copy_(held[name])

        return replay

    return record


def unable(step: TrainStep) -> Callable[[Step], Step]:
    """A step that reads a value cannot be recorded: it ends halfway."""

    def record(function: Step) -> Step:
        step._micro_batch(slice(0, 4), True, None)
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    return record


def failing(step: TrainStep) -> Callable[[Step], Step]:
    def replay() -> None:
        step.interval.sums += 7
        raise MemoryError("no room")

    return lambda function: replay


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (frozen_rate, "its replay gives other bits than the step itself, first in embedding.weight"),
        (frozen_step, "its replay gives other bits than the step itself, first in embedding.weight"),
        (lost_hidden, "its replay gives other bits than the step itself, first in"),
        (unable, "a step cannot be recorded (RuntimeError: operation not permitted when stream is capturing)"),
        (failing, "its replay failed (MemoryError: no room)"),
    ],
)
def test_a_replay_that_is_not_the_step_is_refused_and_the_run_goes_on_as_without(
    tmp_path: Path,
    fault: Callable[[TrainStep], Callable[[Step], Step]],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small_config(tmp_path / "run", tmp_path, model={"dropout": 0.5})
    plain = trained(started(config))
    AcceleratorState._reset_state(reset_partial_state=True)

    step = started(config)
    step.record = fault(step)
    assert_same(trained(step), plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: train.capture: no CUDA graph, {reason}") and "more of it" not in line


def test_a_step_that_differs_from_itself_is_named_as_such() -> None:
    """As with kernels that add in any order."""
    value, calls = torch.zeros(2), list[int]()

    def step() -> None:
        calls.append(1)
        value[1] += len(calls)

    with pytest.raises(NotCapturedError, match="repeated gives other bits by itself, first in sum, .*deterministic"):
        capture(step, [lambda: None, lambda: None], {"sum": value}, lambda function: function)
    assert value.tolist() == [0.0, 0.0], "as before"
    assert len(calls) == WARM_UP + 6


def test_resumed_in_mid_run_a_captured_run_has_the_bits_of_a_plain_one(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", tmp_path, model={"dropout": 0.5})
    plain = trained(started(config))
    AcceleratorState._reset_state(reset_partial_state=True)

    first = started(config)
    first.record = lambda function: function
    saved = trained(first, range(3))
    AcceleratorState._reset_state(reset_partial_state=True)

    second = started(config)
    second.record = lambda function: function
    for name, tensor in second.changing().items():
        tensor.data.copy_(saved[name])
    assert_same(trained(second, range(3, 7)), plain)
