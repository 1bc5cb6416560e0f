"""What bits depend on is recorded, and what differs is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TrainHere, Uninterrupted, final_state

from rnnlm.config import Config, TrainConfig
from rnnlm.train.identity import gradient_sums, other_versions


def test_how_gradients_are_summed_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL has an order for every set of machines, version and algorithm; exact slices have one."""
    exact, plain = Config(train=TrainConfig(exact_slices=8)), Config()
    assert gradient_sums(plain) == "one process" and gradient_sums(exact) == "in one order"

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert gradient_sums(plain) == "nccl 2.27.5, 2 machine(s) with 8 process(es) each"
    assert gradient_sums(exact) == "in one order"
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert gradient_sums(plain).startswith("nccl 2.27.5 NCCL_ALGO=Tree, 2 machine(s)")

    rounded = Config(train=TrainConfig(gradient_compression="bf16"))
    assert gradient_sums(rounded).startswith("bf16 by nccl 2.27.5")
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert gradient_sums(plain) == "gloo, 16 processes", "on any machines"
    assert gradient_sums(rounded) == "bf16 by gloo, 16 processes"


def test_what_differs_is_named_and_nothing_else() -> None:
    recorded = {"torch": "2.11.0", "machine": "x86_64", "gone": "1"}
    now = {"torch": "2.12.0", "machine": "x86_64", "gradient_sums": "one process"}
    assert other_versions(recorded, now) == ["torch was 2.11.0, is 2.12.0"]


def test_a_resumed_run_says_what_may_change_its_bits(
    uninterrupted: Uninterrupted, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    assert final_state(tmp_path / "run", 20)[1]["versions"]["gradient_sums"] == "one process"
    done = train_here(f"--config={experiment}", "--train.cpu_threads=2", "--train.max_steps=21", "--train.epochs=3")
    assert done.returncode == 0, done.stderr
    assert "device was cpu, 1 thread(s), is cpu, 2 thread(s): bits may differ" in done.stderr
    assert "torch was" not in done.stderr
