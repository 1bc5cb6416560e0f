"""A loader as one might write it with Accelerate: every way of going wrong ends the run before a step is made of it.

In one process all of them look right, so there are two here, over gloo; see faulty_loader.py for what they do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TRAIN, RunHere, RunScript, records, results
from safetensors.torch import load_file

from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream

FAULTY_LOADER = "tests/train/faulty_loader.py"
CAUGHT = re.compile(
    r"\[rank(\d)\]: RuntimeError: step (\d+): the loader gave step (\d+) at positions \[([\d, ]+)\]"
    r", but the rows ended at \[([\d, ]+)\]; hidden states would be of other text"
)


class Catch(NamedTuple):
    """What one process reported when it refused a batch."""

    process: int
    step: int
    positions: list[int]
    expected: list[int]


def catches(stderr: str) -> list[Catch]:
    """Every refusal; a process that lost its peer first may have been stopped before its own."""
    found = []
    for process, step, given, positions, expected in CAUGHT.findall(stderr):
        assert given == step, "the receiver counts steps itself, so only positions can show it"
        rows = [[int(row) for row in text.split(", ")] for text in (positions, expected)]
        found.append(Catch(int(process), int(step), *rows))
    return found


@pytest.fixture
def ring(streams: Path) -> Ring:
    """What the experiment reads: 8 rows of each of two processes."""
    return Ring(len(TokenStream(streams / "train")), 16, 48)


def rows(ring: Ring, step: int, process: int) -> list[int]:
    return ring.place(step, 8 * process, 8 * process + 8)[0].tolist()


@pytest.mark.slow
def test_a_plain_loader_of_the_same_samples_is_right(run_script: RunScript, experiment: Path, tmp_path: Path) -> None:
    """The control: what the faults are built into trains to the same bits as the trainer's own loader."""
    for script, name in (((TRAIN,), "own"), ((FAULTY_LOADER, "none"), "plain")):
        done = run_script(*script, f"--config={experiment}", f"--run.directory={tmp_path}/{name}", processes=2)
        assert done.returncode == 0, done.stderr
        assert [rank["substreams"] for rank in records(tmp_path / name, "start")[0]["ranks"]] == [[0, 8], [8, 16]]

    assert results(tmp_path / "own") == results(tmp_path / "plain")
    for file in ("model.safetensors", "hidden.safetensors"):
        own, plain = (load_file(tmp_path / name / "checkpoints/step-00000020" / file) for name in ("own", "plain"))
        assert own.keys() == plain.keys() and all(torch.equal(own[key], plain[key]) for key in own)


@pytest.mark.parametrize(
    "fault", ["dispatch", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("shard", "reorder"))]
)
def test_a_loader_that_shares_out_windows_is_caught_at_the_first_batch(
    run_script: RunScript, experiment: Path, tmp_path: Path, ring: Ring, fault: str
) -> None:
    """Dispatched, process 1 gets process 0's second window; sharded again, or out of order, its own second window."""
    done = run_script(FAULTY_LOADER, fault, f"--config={experiment}", processes=2)
    assert done.returncode == 1
    found = {each.process: each for each in catches(done.stderr)}
    assert found[1] == Catch(1, 0, rows(ring, 1, 0 if fault == "dispatch" else 1), rows(ring, 0, 1)), done.stderr
    assert found.get(0) in (None, Catch(0, 0, rows(ring, 1, 0), rows(ring, 0, 0)))
    assert records(tmp_path / "run", "train") == []


@pytest.mark.slow
def test_a_batch_that_is_split_over_the_processes_is_caught(
    run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    """Each process gets half of process 0's rows; the shapes alone show it."""
    done = run_script(FAULTY_LOADER, "split", f"--config={experiment}", processes=2)
    assert done.returncode == 1
    shapes = r"could not be broadcast together with shapes \(4,\) \(8,\)"
    assert any(len(each.positions) == 4 for each in catches(done.stderr)) or re.search(shapes, done.stderr)
    assert records(tmp_path / "run", "train") == []


def test_a_loader_that_skips_a_window_is_caught(faulty_here: RunHere, experiment: Path) -> None:
    done = faulty_here("skip", 4, f"--config={experiment}")
    assert done.returncode == 1
    assert "RuntimeError: step 4: the loader gave step 4 at positions" in done.stderr


@pytest.mark.slow
def test_skipping_again_after_a_resume_is_caught(
    run_script: RunScript, experiment: Path, tmp_path: Path, ring: Ring
) -> None:
    """Ten steps that are done are skipped twice: step 10 would read what step 20, five into epoch 1, reads."""
    first = run_script(FAULTY_LOADER, "skip", f"--config={experiment}", "--train.max_steps=10", processes=2)
    assert first.returncode == 0, "nothing is skipped at the beginning: " + first.stderr

    assert ring.windows_per_epoch > 11
    done = run_script(
        FAULTY_LOADER, "skip", f"--config={experiment}", "--train.max_steps=30", "--train.epochs=3", processes=2
    )
    assert done.returncode == 1
    assert "resuming from step 10" in done.stderr
    found = catches(done.stderr)
    assert found and all(each.step == 10 and each.expected == rows(ring, 10, each.process) for each in found)
    assert all(each.positions != each.expected for each in found)
    assert records(tmp_path / "run", "train")[-1]["step"] == 10


def resumed_on_two(run_script: RunScript, experiment: Path, fault: str) -> tuple[int, str]:
    """Ten steps by one process, two more by one, which is right, then by two: code and stderr of the third attempt."""
    for steps, processes in ((10, 0), (12, 0), (14, 2)):
        done = run_script(
            FAULTY_LOADER, fault, f"--config={experiment}", f"--train.max_steps={steps}", processes=processes
        )
        assert processes or done.returncode == 0, done.stderr
    return done.returncode, done.stderr


@pytest.mark.slow
def test_rows_that_move_with_the_number_of_processes_are_caught(
    run_script: RunScript, experiment: Path, tmp_path: Path, ring: Ring
) -> None:
    code, stderr = resumed_on_two(run_script, experiment, "stride")
    assert code == 1 and "resuming from step 12" in stderr

    every, found = ring.place(12, 0, 16)[0].tolist(), catches(stderr)
    assert found
    for process, step, positions, expected in found:
        assert (step, positions, expected) == (12, every[process::2], rows(ring, 12, process))
    assert records(tmp_path / "run", "train")[-1]["step"] == 12


def test_tokens_of_elsewhere_with_the_right_positions_are_caught(run_script: RunScript, experiment: Path) -> None:
    done = run_script(FAULTY_LOADER, "assume", f"--config={experiment}", "--train.max_steps=4", processes=2)
    assert done.returncode == 1
    assert "hidden states would be of other text" in done.stderr


@pytest.mark.slow
def test_a_ring_that_moves_with_the_number_of_processes_is_caught(run_script: RunScript, experiment: Path) -> None:
    """By the checkpoint itself, which records where its rows ended."""
    code, stderr = resumed_on_two(run_script, experiment, "ring")
    assert code == 1
    assert re.search(r"step-00000012: its rows ended at \[[\d, ]+\], but step 12 begins at \[[\d, ]+\]", stderr), stderr
    assert "hidden states would be of other text" in stderr
