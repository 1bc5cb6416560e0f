"""The benchmark of a step: both sides are the same training, and what is counted is counted rightly."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "tools"))  # as Python does for a script there

from step_speed.comparison import measure
from step_speed.floor import product
from step_speed.measuring import count_operations, highest, peak_memory
from step_speed.parts import PARTS, split_time
from step_speed.presets import PRESETS, Preset, make_batches, preset, reduced, tiny, without_dropout
from step_speed.sides import Sides
from step_speed.table import header, line, split_tables

from rnnlm.errors import UserError
from rnnlm.train.distributed import Accelerator, launched

CPU = torch.device("cpu")
SMALL = Preset(vocab_size=50, embedding_size=6, hidden_size=8, layers=2, dropout=0.3, batch=4, window=5)


@contextmanager
def one_thread(precision: str) -> Iterator[Accelerator]:
    """As a run on a CPU starts."""
    config = SMALL.config(precision, "cpu")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, cpu_threads=1))
    threads = torch.get_num_threads()
    try:
        with launched(config) as accelerator:
            yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("precision", "steps", "tolerance"), [("fp32", 50, 1e-5), ("bf16", 10, 0.005)])
def test_both_sides_have_the_same_losses(precision: str, steps: int, tolerance: float) -> None:
    with one_thread(precision) as accelerator:
        same = Sides(without_dropout(SMALL), precision, accelerator, batches=steps)
        assert same.loss_difference(steps) < tolerance

        other = Sides(without_dropout(SMALL), precision, accelerator, batches=3)
        with torch.no_grad():
            other.loop.model.head.weight[0] += 1
        assert other.loss_difference(3) > tolerance, "else a difference would not be seen"


def test_a_comparison_has_all_that_is_promised_and_becomes_a_table() -> None:
    with one_thread("fp32") as accelerator:
        found = measure(SMALL, "fp32", accelerator, repeats=5, warm_up=1, peak_seconds=0.01)
    row = {"preset": "a", "precision": "fp32", "scaled": "", "host_ms": 1.0, "loop_host_ms": 1.0, **found}
    assert {
        "preset", "precision", "ratio_to_loop", "ratio_to_floor", "peak_memory_ratio", "operations", "host_ms",
    } <= json.loads(json.dumps(row)).keys()  # fmt: skip
    assert row["ratio_to_loop"] == pytest.approx(row["loop_ms"] / row["step_ms"])
    assert row["ratio_to_floor"] == pytest.approx(row["step_ms"] / sum(row["floor_parts_ms"].values()))
    assert row["tokens_per_second"] == pytest.approx(20 / row["step_ms"] * 1e3)

    missing = {"preset": "b", "precision": "fp32", "scaled": "", "missing": "not there"}
    columns = {text.count("|") for text in (*header().splitlines(), line(row), line(missing))}
    assert len(columns) == 1
    assert "| a fp32 | step |" in split_tables([row, missing])


def test_operations_are_calls_below_autograd_that_are_no_views() -> None:
    x, weight, bias = (torch.ones(size, requires_grad=True) for size in ((3, 2), (4, 2), (4,)))

    def forward() -> Tensor:
        return torch.nn.functional.linear(x, weight, bias).t()[:2].sum()  # t, addmm; t, slice; sum

    def forward_and_backward() -> None:
        forward().backward()  # ones_like; expand, slice_backward, t; mm, mm, sum for x, weight, bias

    assert count_operations(forward) == 2
    assert count_operations(forward_and_backward) == 2 + 5
    assert count_operations(lambda: torch.zeros(2).add_(1).view(2, 1)) == 2


def test_peak_memory_is_the_highest_level_of_allocations() -> None:
    kept = []

    def work() -> None:
        first, second = torch.empty(1000), torch.empty(500)  # 6,000 bytes
        del first
        third = torch.empty(900)  # 5,600
        kept[:] = [second, third]

    assert peak_memory(work, CPU) == 6000


def test_peak_memory_leaves_gradients_out_wherever_they_are_released() -> None:
    """One side releases them at the end of its step, the other one at the beginning of the next."""
    weight = torch.ones(1000, requires_grad=True)

    def step(at_end: bool) -> None:
        if not at_end:
            weight.grad = None
        (weight * 2).sum().backward()
        torch.ones(1500)  # while the gradient is there
        if at_end:
            weight.grad = None

    peaks = [peak_memory(lambda end=end: step(end), CPU, [weight]) for end in (True, False)]
    with_gradient = peak_memory(lambda: step(True), CPU)
    assert peaks == [6000, 6000] and with_gradient == 10_000


def test_the_level_counts_an_address_that_a_gradient_takes_over() -> None:
    changes = [(1, 8), (2, 4), (1, -8), (1, 8), (3, 5), (1, -8), (4, -7)]
    assert highest(changes, old=set(), new=set()) == 4 + 8 + 5
    assert highest(changes, old={4}, new={1}) == 8 + 4
    assert highest([(4, -7), (1, 8)], old={4}, new=set()) == 8
    assert highest([(4, -7), (1, 8)], old=set(), new=set()) == 1


def test_the_time_of_every_part_is_found_on_both_sides() -> None:
    with one_thread("fp32") as accelerator:
        sides = Sides(SMALL, "fp32", accelerator, batches=2)
        for work, places in ((sides.run_ours, sides.our_places()), (sides.run_loop, sides.loop_places())):
            before = [getattr(owner, name) for owner, name, _ in places]
            found = split_time(work, places, CPU)
            assert all(found[part] > 0 for part in PARTS), found
            assert sum(found[part] for part in (*PARTS, "rest")) > found["backward"] > 0
            assert [getattr(owner, name) for owner, name, _ in places] == before, "all is as it was"


@pytest.mark.parametrize("chunks", [1, 3])
def test_every_form_of_a_product_is_that_product(chunks: int) -> None:
    m, k, n = 5, 3, 4
    left, right = torch.randn(m, k), torch.randn(k, n)
    for number in range(8):
        layout = (number & 1 > 0, number & 2 > 0, number & 4 > 0)
        flat = [(each.t() if t else each).flatten() for each, t in zip((left, right), layout, strict=False)]
        out = torch.empty(m * n)
        product(*flat, out, (m, k, n), layout, chunks)()
        found = out.view(n, m).t() if layout[2] else out.view(m, n)
        torch.testing.assert_close(found, left @ right)


def test_options_of_our_side_reach_its_configuration_but_change_no_preset() -> None:
    given = dataclasses.replace(SMALL, options=("--train.loss_chunk_tokens=7",))
    assert tiny(given).config("fp32", "cpu").train.loss_chunk_tokens == 7
    assert given.config("bf16", "cpu").model == SMALL.config("bf16", "cpu").model
    with pytest.raises(UserError, match=r"model\.layers is the preset's own"):
        dataclasses.replace(SMALL, options=("--model.layers=3",)).config("fp32", "cpu")


def test_presets_say_where_they_are_scaled_and_batches_follow_each_other() -> None:
    for name, full in PRESETS.items():
        assert bool(preset(name, "cpu").scaled) == (preset(name, "cpu") != full)
        assert preset(name, "cuda") == full and not full.scaled
        assert (tiny(full).layers, tiny(full).dropout) == (full.layers, full.dropout)
        assert reduced(full).layers == full.layers

    first, second = make_batches(SMALL, 2)
    assert torch.equal(first.tokens.int()[:, -1], second.tokens.int()[:, 0])
    assert torch.equal(first.positions + SMALL.window, second.positions)
    assert first.tokens.shape == (SMALL.batch, SMALL.window + 1) and int(first.tokens.int().max()) < SMALL.vocab_size
