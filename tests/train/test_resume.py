"""Resume to the bit: a pairwise covering array of what may meet, killed in real processes and resumed by other ones.

Every pair of values of two factors meets in one case at least; some cases run by default, the others with -m slow.
"""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAULTY, TRAIN, RunScript, TrainHere, Uninterrupted, assert_same_bits, final_state, records

from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream

FACTORS = {
    "kill": ("window", "saving", "epoch", "first"),
    "processes": (1, 2, 4),
    "cell": ("lstm", "gru", "rnn"),
    "prefetch": (0, 2),
    "accumulation": (1, 3),
    "precision": ("fp32", "bf16"),
    "schedule": ("cosine", "plateau"),
    "head": ("softmax", "adaptive"),
}
Case = tuple[str | int, ...]


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    """All pairs of two factors, by their places, with the values that they have in this case."""
    return {(a, case[a], b, case[b]) for a, b in combinations(range(len(case)), 2)}


def covering(factors: list[tuple[str | int, ...]]) -> list[Case]:
    """Cases in which all pairs of values meet: always the case that meets most of the pairs that are left."""
    left = set().union(*(pairs_of(case) for case in product(*factors)))
    cases = []
    while left:
        cases.append(max(product(*factors), key=lambda case: len(pairs_of(case) & left)))
        left -= pairs_of(cases[-1])
    return cases


CASES = covering(list(FACTORS.values()))
DEFAULT = (4, 6, 7, 9, 10)


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
def test_fault_01_killed_anywhere_it_resumes_bit_for_bit(
    run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path, streams: Path, case: Case
) -> None:
    kill, processes, cell, prefetch, accumulation, precision, schedule, head = case
    launched = 0 if processes == 1 else processes
    windows = Ring(len(TokenStream(streams / "train")), 24, 32).windows_per_epoch
    assert 10 < windows < 20, "an epoch ends between the last checkpoint but one and the end"
    options = [
        f"--config={experiment}", "--train.global_batch_size=24", "--train.seq_len=32", f"--model.cell={cell}",
        f"--train.prefetch_threads={prefetch}", f"--train.accumulation={accumulation}", "--eval.every_steps=4",
        f"--train.precision={precision}", f"--optim.schedule={schedule}", "--optim.learning_rate=0.1",
        f"--model.head={head}",
    ]  # fmt: skip

    def train(*more: str) -> None:
        done = run_script(TRAIN, *options, *more, processes=launched) if launched else train_here(*options, *more)
        assert done.returncode == 0, done.stderr

    whole, run = tmp_path / "whole", tmp_path / "run"
    train(f"--run.directory={whole}")

    faults = {"window": ("kill", 13), "saving": ("saving", 30), "epoch": ("kill", windows), "first": ("kill", 1)}
    killed = run_script(FAULTY, *map(str, faults[str(kill)]), *options, processes=launched)
    assert killed.returncode != 0
    assert (run / "metrics.jsonl").exists() and not (run / "checkpoints/step-00000020").exists()

    train()
    steps = [start["step"] for start in records(run, "start")]
    assert len(steps) == 2 and (steps[1] == 10 or kill in ("first", "saving")), steps
    assert_same_bits(run, whole)


@pytest.mark.slow
def test_fault_01_the_scaling_of_fp16_losses_resumes_bit_for_bit(
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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_fault_01_killed_after_step_10_of_20_it_resumes_bit_for_bit(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path, streams: Path, processes: int
) -> None:
    if processes == 3:  # from three on, the order in which DDP sums gradients shows
        experiment.write_text(experiment.read_text().replace('"global_batch_size": 16', '"global_batch_size": 15'))
    expected = uninterrupted(processes)
    windows = Ring(len(TokenStream(streams / "train")), 15 if processes == 3 else 16, 48).windows_per_epoch
    assert 10 < windows < 20, "an epoch ends between the checkpoint and the end"

    launched = 0 if processes == 1 else processes
    killed = run_script(FAULTY, "kill", "13", f"--config={experiment}", processes=launched)
    assert killed.returncode != 0
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000010"]
    assert records(run, "train")[-1]["step"] == 12, "it had gone further than its checkpoint"

    resumed = run_script(TRAIN, f"--config={experiment}", processes=launched)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 10 of 20" in resumed.stderr
    assert_same_bits(run, expected)
    assert [start["step"] for start in records(run, "start")] == [0, 10]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (run / "samples.md").read_text()
    assert samples == (expected / "samples.md").read_text()
    assert samples.count("## step") == 2 and "anna sees" in samples


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--optim.schedule=plateau", "--model.cell=gru", "--train.precision=bf16"])
def test_plateau_early_stopping_cells_and_bf16_resume_to_the_bit(
    run_script: RunScript, experiment: Path, tmp_path: Path, option: str
) -> None:
    """Evaluated every 2 steps with a learning rate that cannot help, so that plateaus happen."""
    options = [
        f"--config={experiment}", option, "--eval.every_steps=2", "--run.keep_last=9", "--optim.clip_norm=0",
        "--optim.name=sgd", "--optim.momentum=0.9", "--optim.learning_rate=40", "--optim.plateau_factor=0.9",
        "--optim.early_stop_patience=7",
    ]  # fmt: skip
    first = run_script(TRAIN, *options, f"--run.directory={tmp_path}/first")
    assert first.returncode == 1 and "the run has diverged" in first.stderr, first.stderr
    killed = run_script(FAULTY, "kill", "11", *options)
    assert killed.returncode == -9
    resumed = run_script(TRAIN, *options)
    assert resumed.returncode == 1 and "the run has diverged" in resumed.stderr, resumed.stderr

    run = tmp_path / "run"
    ended = records(run, "valid")[-1]["step"]
    assert ended < 20
    assert f"stopped early at step {ended} of 20" in resumed.stdout
    assert_same_bits(run, tmp_path / "first", ended)
    best = [line["step"] for line in records(run, "valid") if line["best"]]
    assert best[-1] < ended
    assert [path.name for path in (run / "checkpoints").glob("best-*")] == [f"best-{best[-1]:08d}"]

    last = records(run, "train")[-1]
    if "plateau" in option:
        assert last["learning_rate"] < 40
    expected = "bfloat16" if "bf16" in option else "float32"
    assert last["ran_in"] == {"layer0": expected, "layer1": expected, "head": expected}
