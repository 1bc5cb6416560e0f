"""DDP's buckets are settled before the first step, so that every attempt sums gradients in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import small_config
from torch.nn.parallel import DistributedDataParallel

from rnnlm.train.step import TrainStep


@pytest.fixture
def accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """Accelerate, which wraps models in DDP as it does for several processes, though the group has only this one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def wrap(self: Accelerator, model: torch.nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    monkeypatch.setattr(Accelerator, "prepare", wrap)
    yield Accelerator(cpu=True)
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def is_settled(model: object) -> bool:
    """Whether DDP has seen a backward pass, by which it lays its buckets out anew before the next forward pass."""
    assert isinstance(model, DistributedDataParallel)
    return bool(model.reducer._rebuild_buckets())


def test_fault_01_buckets_are_laid_out_before_the_first_step(accelerator: Accelerator, tmp_path: Path) -> None:
    fresh = DistributedDataParallel(torch.nn.Linear(3, 2))
    assert not is_settled(fresh), "control: before any backward pass"

    step = TrainStep(small_config(tmp_path / "run", tmp_path), 40, accelerator, 0, 4)
    assert is_settled(step.model)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in step.raw.parameters())
