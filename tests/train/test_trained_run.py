"""What is done with a run that was trained: it is scored, asked for text, and read although checkpoints are damaged."""

from __future__ import annotations

import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
from conftest import RunHere, RunScript, TrainHere, Uninterrupted, assert_same_bits

EVAL, GENERATE = "launch/eval.py", "launch/generate.py"


@pytest.fixture
def damaged(uninterrupted: Uninterrupted, tmp_path: Path) -> Path:
    """A run whose newest checkpoint has a flipped bit in its hidden states, and whose best one has no model."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(1), run)
    hidden = run / "checkpoints/step-00000020/hidden.safetensors"
    data = bytearray(hidden.read_bytes())
    data[-1] ^= 1
    hidden.write_bytes(data)

    for best in (run / "checkpoints").glob("best-*"):
        (best / "model.safetensors").unlink()
    return run


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_score_a_damaged_run_like_one_to_the_bit(
    damaged: Path, run_here: RunHere, run_script: RunScript, processes: int
) -> None:
    """Three blocks: with two processes the last one is shared by both."""
    options = (f"--run.directory={damaged}", "--eval.batch_size=40", "--eval.split=train", "--train.seq_len=7")
    for found in (one := run_here(EVAL, *options), more := run_script(EVAL, *options, processes=processes)):
        assert found.returncode == 0, found.stderr
        assert "every checkpoint is damaged" in found.stderr, "of the best one there is only this"
    assert json.loads(one.stdout) == json.loads(more.stdout)
    assert (damaged / "checkpoints/step-00000020").is_dir(), "who only reads renames nothing"


def test_a_damaged_checkpoint_costs_one_interval(
    damaged: Path, uninterrupted: Uninterrupted, train_here: TrainHere, experiment: Path
) -> None:
    done = train_here(f"--config={experiment}")
    assert done.returncode == 0, done.stderr
    assert "hidden.safetensors: its contents differ" in done.stderr and "resuming from step 10" in done.stderr
    assert (damaged / "checkpoints/damaged-step-00000020").is_dir()
    assert_same_bits(damaged, uninterrupted(1))


def test_generation_from_the_script(
    uninterrupted: Uninterrupted, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uninterrupted(1)
    options = (f"--run.directory={run}", "--generate.samples=2", "--generate.prompts=[anna, bob sees]")
    done = run_here(GENERATE, *options)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.rstrip("\n").split("\n---\n")
    assert [text.split()[0] for text in texts] == ["anna", "anna", "bob", "bob"]
    assert run_here(GENERATE, *options).stdout == done.stdout

    monkeypatch.setattr(sys, "stdin", StringIO())  # empty: it asks, and ends
    interactive = run_here(GENERATE, f"--run.directory={run}")
    assert interactive.returncode == 0
    assert interactive.stdout.startswith("prompt (empty to end)>")
