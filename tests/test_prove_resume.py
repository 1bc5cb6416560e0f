"""The tool that kills runs and builds: it finds what differs, and nothing where nothing does."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, RunScript, Uninterrupted

sys.path.insert(0, str(ROOT / "tools"))
from proof.training import Training

from rnnlm.errors import UserError


@pytest.fixture
def training(uninterrupted: Uninterrupted, tmp_path: Path) -> Training:
    """Two equal runs of 20 steps."""
    options = argparse.Namespace(steps=20, processes=[1], evaluate_every=5)
    found = Training(options, tmp_path, [], random.Random(0))
    found.reference = uninterrupted(1)
    found.begin()
    shutil.copytree(found.reference, found.run)
    return found


def test_equal_runs_are_equal(training: Training) -> None:
    assert training.is_done() and training.differences() == []


@pytest.mark.parametrize("part", ["model", "optimizer", "hidden"])
def test_one_bit_of_a_tensor_is_found(training: Training, part: str) -> None:
    path = training.run / f"checkpoints/step-00000020/{part}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (found,) = training.differences()
    assert found.startswith(f"{part}: ")


@pytest.mark.parametrize("key", ["loss", "gradient_norm", "skipped_steps"])
def test_one_number_of_the_log_is_found(training: Training, key: str) -> None:
    lines = (training.run / "metrics.jsonl").read_text().splitlines()
    number = next(number for number, line in enumerate(lines) if json.loads(line)["kind"] == "train")
    changed = json.loads(lines[number])
    lines[number] = json.dumps({**changed, key: changed[key] + 1e-12})
    (training.run / "metrics.jsonl").write_text("\n".join(lines))
    (found,) = training.differences()
    assert found.startswith("metrics.jsonl: ")


def test_a_missing_line_and_a_counter_are_found(training: Training) -> None:
    path = training.run / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    state = training.run / "checkpoints/step-00000020/trainer.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "interval": [1, 2, 3]}))
    found = training.differences()
    assert "trainer.json: interval" in found and any("expected" in each for each in found)


def test_a_run_that_ends_at_another_step_is_refused_before_anything_is_killed(training: Training) -> None:
    training.check_reference()
    training.options.steps = 30
    with pytest.raises(UserError, match="has ended, but not at step 30; give its last step with --steps"):
        training.check_reference()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--build",)], ids=["training", "build"])
def test_killed_at_random_and_proved(run_script: RunScript, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run_script("tools/prove_resume.py", "--attempts", "6", "--directory", tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("6 attempts") and "ended with the same bits" in verdict
    assert list(tmp_path.iterdir()) == [], "what is proved leaves nothing"
