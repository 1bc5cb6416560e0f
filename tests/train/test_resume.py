"""Resume to the bit: a pairwise covering array of what may meet, killed in real processes and run again.

Every pair of values of two factors meets in one case at least; some cases run by default, the others with -m slow.
"""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunScript, TrainHere, assert_same_bits, final_state, records

from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream

TRAIN, FAULTY = "launch/train.py", "tests/train/faulty_train.py"
FACTORS = {
    "kill": ("window", "saving", "epoch", "first"),
    "processes": (1, 2, 4),
    "cell": ("lstm", "gru", "rnn"),
    "prefetch": (0, 2),
    "accumulation": (1, 3),
    "precision": ("fp32", "bf16"),
    "schedule": ("cosine", "plateau"),
}
Case = tuple[str | int, ...]


def covering(factors: list[tuple[str | int, ...]]) -> list[Case]:
    """Cases in which all pairs of values meet: always the case that meets most of the pairs that are left."""
    pairs = {
        (a, x, b, y)
        for (a, first), (b, second) in combinations(enumerate(factors), 2)
        for x, y in product(first, second)
    }
    cases = []
    while pairs:

        def new(case: Case, left: set[tuple[Any, ...]] = pairs) -> int:
            return sum((a, case[a], b, case[b]) in left for a, b in combinations(range(len(factors)), 2))

        case = max(product(*factors), key=new)
        cases.append(case)
        pairs -= {(a, case[a], b, case[b]) for a, b in combinations(range(len(factors)), 2)}
    return cases


CASES = covering(list(FACTORS.values()))
DEFAULT = (0, 4, 6, 7, 9, 10)


def test_the_cases_cover_all_pairs() -> None:
    for (a, first), (b, second) in combinations(enumerate(FACTORS.values()), 2):
        for x, y in product(first, second):
            assert any(case[a] == x and case[b] == y for case in CASES)
    for index, values in enumerate(FACTORS.values()):
        assert {CASES[number][index] for number in DEFAULT} >= set(values) - {4}, "the default run has every value"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if index in DEFAULT else pytest.mark.slow, id="-".join(map(str, case)))
        for index, case in enumerate(CASES)
    ],
)
def test_fault_01_killed_at_any_place_it_goes_on_bit_for_bit(
    run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path, streams: Path, case: Case
) -> None:
    kill, processes, cell, prefetch, accumulation, precision, schedule = case
    windows = Ring(len(TokenStream(streams / "train")), 24, 32).windows_per_epoch
    assert 10 < windows < 20, "an epoch ends between the last checkpoint but one and the end"
    options = [
        f"--config={experiment}", "--train.global_batch_size=24", "--train.seq_len=32", f"--model.cell={cell}",
        f"--train.prefetch_threads={prefetch}", f"--train.accumulation={accumulation}", "--eval.every_steps=4",
        f"--train.precision={precision}", f"--optim.schedule={schedule}", "--optim.learning_rate=0.1",
    ]  # fmt: skip
    launched = 0 if processes == 1 else int(processes)
    whole, run = tmp_path / "whole", tmp_path / "run"
    uninterrupted = (*options, f"--run.directory={whole}")
    done = run_script(TRAIN, *uninterrupted, processes=launched) if launched else train_here(*uninterrupted)
    assert done.returncode == 0, done.stderr
    faults = {"window": ("kill", 13), "saving": ("saving", 30), "epoch": ("kill", windows), "first": ("kill", 1)}
    killed = run_script(FAULTY, *map(str, faults[str(kill)]), *options, processes=launched)
    assert killed.returncode != 0
    assert (run / "metrics.jsonl").exists() and not (run / "checkpoints/step-00000020").exists()
    resumed = run_script(TRAIN, *options, processes=launched)
    assert resumed.returncode == 0, resumed.stderr
    steps = [start["step"] for start in records(run, "start")]
    assert len(steps) == 2 and (steps[1] == 10 or kill in ("first", "saving")), steps
    assert_same_bits(run, whole)


@pytest.mark.slow
def test_fault_01_the_scaling_of_fp16_losses_goes_on_bit_for_bit(
    run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    """On a CPU, with the layers in real fp16 and PyTorch's own scaler."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = (f"--config={experiment}", "--train.max_steps=30", "--train.epochs=3", "--run.log_every_steps=1")
    done = run_script(FAULTY, "half", "0", *options, f"--run.directory={whole}")
    assert done.returncode == 0, done.stderr
    assert run_script(FAULTY, "half+kill", "0+23", *options).returncode == -9
    done = run_script(FAULTY, "half", "0", *options)
    assert done.returncode == 0, done.stderr
    assert [start["step"] for start in records(run, "start")] == [0, 20]
    assert_same_bits(run, whole, 30)
    last = records(run, "train")[-1]
    assert last["ran_in"] == {"layer0": "float16", "layer1": "float16", "head": "float16"}
    skipped = [line["skipped_steps"] for line in records(run, "train")]
    scaler = final_state(run, 20)[1]["scaler"]
    assert 0 < skipped[19] < skipped[-1], "steps overflowed on both sides of the kill"
    assert 0 < scaler["_growth_tracker"] < 4, "the scaler remembered something"


def test_fault_35_resumed_exactly_at_an_epochs_end(
    train_here: TrainHere, experiment: Path, tmp_path: Path, streams: Path
) -> None:
    windows = Ring(len(TokenStream(streams / "train")), 16, 48).windows_per_epoch
    assert windows < 20
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = (f"--config={experiment}", "--optim.horizon_steps=20")
    assert train_here(*options, f"--run.directory={whole}").returncode == 0
    assert train_here(*options, f"--train.max_steps={windows}").returncode == 0
    done = train_here(*options)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in records(run, "start")] == [0, windows]
    (mine, my_state), (theirs, their_state) = final_state(run, 20), final_state(whole, 20)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert my_state["memory"] == their_state["memory"]
    assert records(run, "train")[-1]["tokens"] == records(whole, "train")[-1]["tokens"]
