"""Where the guard's rules begin and end: the first loss that is judged, sums that overflow, counts beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from rnnlm.train.guard import SPIKE_WINDOW, Guard

CPU, META = torch.device("cpu"), torch.device("meta")


def judged(losses: list[float], *sigmas: float) -> list[bool]:
    """Whether each loss is skipped, one after the other."""
    guard = Guard(CPU)
    return [bool(guard.should_skip(tensor(1.0), tensor(loss), *sigmas)) for loss in losses]


@pytest.mark.parametrize(("before", "skipped"), [(31, False), (32, True), (33, True)])
def test_a_loss_is_judged_once_there_are_32_before_it(before: int, skipped: bool) -> None:
    assert judged([2.0] * before + [9.0], 6.0) == [False] * before + [skipped]


def test_a_loss_at_the_limit_is_no_spike() -> None:
    """Of losses 1 and 3 in turn the mean is 2 and the deviation 1, exactly: 4 is two deviations above, and not more."""
    assert not any(judged([1.0, 3.0] * 20 + [4.0], 2.0))
    assert judged([1.0, 3.0] * 20 + [4.001], 2.0)[-1]
    assert judged([2.0] * 40 + [2.5], 0.0)[-1] and not any(judged([2.0] * 41, 0.0))
    assert judged([1.0, 3.0] * 20 + [2.5])[-1], "whatever is above the mean, where nothing else is said"


def test_only_the_last_128_finite_losses_count_and_each_has_its_place() -> None:
    guard = Guard(CPU)
    for number in range(SPIKE_WINDOW + 5):
        guard.should_skip(tensor(1.0), tensor(float(number)), 1e9)
        guard.should_skip(tensor(1.0), tensor(float("nan")), 1e9)
    expected = [float(number if number >= 5 else SPIKE_WINDOW + number) for number in range(SPIKE_WINDOW)]
    assert guard.losses.tolist() == expected
    assert guard.counts.tolist() == [0, 0, SPIKE_WINDOW + 5]


def test_counts_are_whole_numbers_of_64_bits() -> None:
    guard, many = Guard(CPU), 2**53 + 1  # which no float holds
    guard.restore([many, 3, many], [0.1] * SPIKE_WINDOW, many)
    assert guard.to_dict(int(guard.resets)) == {
        "counts": [many, 3, many], "resets": many, "losses": [0.1] * SPIKE_WINDOW
    }  # fmt: skip
    guard.should_skip(tensor(float("inf")))
    hidden = {"h": tensor([[1.0], [float("nan")]])}
    guard.reset_rows(hidden, {"h": torch.zeros(1, 1)})
    assert guard.counts.tolist() == [many + 1, 4, many] and int(guard.resets) == many + 1


def test_states_without_floating_numbers_and_sums_that_overflow_halves_stay() -> None:
    guard = Guard(CPU)
    whole = {"seen": tensor([[3], [4]])}
    assert guard.reset_rows(whole, {"seen": tensor([[0]])})["seen"].tolist() == [[3], [4]]

    halves = {"h": torch.full((2, 4), 60_000.0, dtype=torch.float16), "seen": tensor([7, 8])}
    zero = {"h": torch.zeros(1, 4, dtype=torch.float16), "seen": tensor([3])}
    found = guard.reset_rows(halves, zero)
    assert torch.equal(found["h"], halves["h"]) and found["seen"].tolist() == [7, 8]
    assert int(guard.resets) == 0

    halves["h"][1, 2] = -torch.inf
    found = guard.reset_rows(halves, zero)
    assert found["h"].tolist() == [[60_000.0] * 4, [0.0] * 4]
    assert found["seen"].tolist() == [7, 3], "a row begins anew in all its states"
    assert int(guard.resets) == 1


def test_all_that_it_computes_is_on_the_device() -> None:
    """A device of shapes alone: it takes no part in an operation with the host's numbers."""
    guard, number = Guard(META), torch.zeros((), device=META)
    skip = guard.should_skip(number, number.double(), 6.0)
    found = guard.reset_rows({"h": torch.zeros(2, 3, device=META)}, {"h": torch.zeros(1, 3, device=META)})
    for each in (skip, found["h"], guard.counts, guard.resets, guard.losses):
        assert each.device == META
    assert (guard.counts.shape, guard.resets.shape, guard.losses.shape) == ((3,), (), (SPIKE_WINDOW,))
