"""Losses, gradients and hidden states that are not finite, and losses that jump."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAULTY, RunHere, RunScript, TrainHere, assert_same_bits, final_state, records
from torch import tensor

from rnnlm.config import OptimConfig
from rnnlm.errors import RunError
from rnnlm.train.guard import MIN_LOSSES, SPIKE_WINDOW, Guard
from rnnlm.train.optim import build_optimizer

CPU = torch.device("cpu")


def test_fault_17_only_rows_that_are_not_finite_restart_from_zero() -> None:
    guard = Guard(CPU)
    hidden = {"layer0.h": torch.randn(5, 3), "layer0.c": torch.randn(5, 3)}
    expected = {name: state.clone() for name, state in hidden.items()}
    hidden["layer0.h"][1, 2], hidden["layer0.c"][4, 0] = float("nan"), float("inf")

    zero = {name: torch.zeros(1, 3) for name in hidden}
    found = guard.reset_rows(hidden, zero)
    for name, state in found.items():
        assert torch.equal(state[[0, 2, 3]], expected[name][[0, 2, 3]])
        assert not state[[1, 4]].any()
    assert int(guard.resets) == 2


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_fused_optimizer_does_nothing_in_a_skipped_step(name: str) -> None:
    model = torch.nn.Linear(3, 2)
    config = OptimConfig(name=name, learning_rate=1e-3, momentum=0.9 * (name == "sgd"), weight_decay=0.1)
    optimizer = build_optimizer(model, config)

    def step(value: float, skip: bool) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf = tensor(float(skip))  # type: ignore[attr-defined]
        optimizer.step()

    def everything() -> list[torch.Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values() if value is not None]
        return [each.detach().clone() for each in [*model.parameters(), *states]]

    step(1.0, False)
    before = everything()
    step(float("nan"), True)
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
    step(1.0, False)
    assert not all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))


def test_fault_18_a_loss_beyond_k_sigma_is_skipped_and_a_lasting_change_is_soon_accepted() -> None:
    torch.manual_seed(0)
    guard, norm = Guard(CPU), tensor(1.0)
    losses = 3 + 0.1 * torch.randn(400, dtype=torch.float64)
    losses[[10, 200]] = 9.0
    losses[300:] += 5

    skipped = [bool(guard.should_skip(norm, loss, 6.0)) for loss in losses]
    for step, loss in enumerate(losses):
        past = losses[max(0, step - SPIKE_WINDOW) : step]
        expected = len(past) >= MIN_LOSSES and loss > past.mean() + 6 * past.std(correction=0)
        assert skipped[step] == expected, step

    assert skipped[200] and not skipped[10] and skipped[300] and not any(skipped[310:])
    assert guard.check(0) == sum(skipped)


def test_fault_18_spikes_are_judged_when_32_losses_are_known() -> None:
    for known, expected in ((31, False), (32, True)):
        guard = Guard(CPU)
        for number in range(known):
            assert not guard.should_skip(tensor(1.0), tensor(3.0 + number % 2, dtype=torch.float64), 6.0)
        assert bool(guard.should_skip(tensor(1.0), tensor(99.0, dtype=torch.float64), 6.0)) == expected


def test_fault_18_one_batch_of_huge_loss_is_skipped_and_another_one_after_a_resume(
    faulty_here: RunHere, experiment: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (
        f"--config={experiment}", "--train.skip_spikes_sigmas=6", "--run.log_every_steps=1", "--eval.every_steps=99",
        "--optim.horizon_steps=40", "--train.seq_len=8", "--model.layers=1", "--train.epochs=9",
    )  # fmt: skip
    for fault, end in ((34, 36), (38, 40)):
        done = faulty_here("spike", fault, *options, f"--train.max_steps={end}")
        assert done.returncode == 0, done.stderr

    assert [start["step"] for start in records(run, "start")] == [0, 36]
    lines = records(run, "train")
    assert [line["skipped_steps"] for line in lines] == [0] * 34 + [1] * 4 + [2] * 2
    assert max(line["loss"] for line in lines[:34]) < 10 < min(lines[34]["loss"], lines[38]["loss"])
    assert final_state(run, 40)[1]["health"]["counts"] == [2, 0, 40]


def test_fault_16_a_loss_that_is_not_finite_is_no_spike_but_is_skipped() -> None:
    guard = Guard(CPU)
    assert not guard.should_skip(tensor(1.0), tensor(2.0), 6.0)
    for count in range(1, 4):
        assert guard.should_skip(tensor(float("nan")), tensor(float("nan")), 6.0)
        assert guard.check(4) == count

    with pytest.raises(RunError, match="the last 3 steps .*train.stop_after_skipped=3"):
        guard.check(3)
    assert not guard.should_skip(tensor(1.0), tensor(2.0), 6.0)
    assert guard.check(1) == 3, "no longer in a row"

    again = Guard(CPU)
    again.restore(**guard.to_dict(7))
    assert again.to_dict(int(again.resets)) == guard.to_dict(7)


@pytest.mark.parametrize("fault", ["grad", "row"])
def test_fault_16_and_17_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    run_script: RunScript, faulty_here: RunHere, experiment: Path, tmp_path: Path, fault: str
) -> None:
    run = tmp_path / "run"
    options = (
        f"--config={experiment}", "--train.max_steps=7", "--run.log_every_steps=1", "--run.save_every_steps=1",
        "--run.keep_every_steps=1",
    )  # fmt: skip
    alone = fault == "grad"
    done = faulty_here(fault, 5, *options) if alone else run_script(FAULTY, fault, "5", *options, processes=2)
    assert done.returncode == 0, done.stderr

    def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}

    before, after, later = (final_state(run, step)[0] for step in (5, 6, 7))
    assert changed(before, after) == {"hidden"}, "the data continues"
    assert changed(after, later) >= {"model", "optimizer"}
    assert all(torch.isfinite(value).all() for value in later.values() if value.is_floating_point())

    assert [line["skipped_steps"] for line in records(run, "train")] == [0] * 5 + [1, 1]
    assert records(run, "train")[-1]["hidden_resets"] == int(fault == "row")
    if fault == "row":
        rows = torch.arange(16) != 3
        assert not after["hidden.layer0.h"][3].any() and after["hidden.layer0.h"][rows].all(dim=1).all()


def test_fault_16_the_run_stops_after_too_many_in_a_row_and_resumes_from_the_last_checkpoint(
    faulty_here: RunHere, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    options = (f"--config={experiment}", "--run.log_every_steps=1", "--train.stop_after_skipped=3")
    done = faulty_here("nan", -12, *options)
    assert done.returncode == 1
    assert done.stderr.count("error: the last 3 steps had losses or gradients that are not finite") == 1

    whole = tmp_path / "whole"
    for directory in (tmp_path / "run", whole):
        assert train_here(*options, f"--run.directory={directory}").returncode == 0
    assert_same_bits(tmp_path / "run", whole)
