"""launch/train.py with a fault built in, for tests: `faulty_train.py FAULT VALUE options...`.

kill N: SIGKILL to every process when it has done N steps.   masks: dropout masks keyed by rank, not by substream.
skip N: from step N on the loader reads one window too far.   blind: Accelerate is not told that it is on a CPU.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))

import accelerate
import torch
import train

from rnnlm.config import run_door
from rnnlm.substreams import Batch, SubstreamDataset
from rnnlm.trainer import Trainer


def kill(value: int) -> None:
    """Die like a process that the machine took away."""
    honest = Trainer.train_step

    def step(self: Trainer, batch: Batch) -> None:
        if self.step == value:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(self, batch)

    Trainer.train_step = step  # type: ignore[method-assign]


def masks(value: int) -> None:
    """The mistake that the comparison of 1 and 2 processes must show."""
    honest = Trainer.__init__

    def init(self: Trainer, config: object) -> None:
        honest(self, config)  # type: ignore[arg-type]
        self.rows = torch.arange(self.last - self.first, device=self.device)

    Trainer.__init__ = init  # type: ignore[assignment,method-assign]


def skip(value: int) -> None:
    """A loader that jumps over a window."""
    honest = SubstreamDataset.batch

    def batch(self: SubstreamDataset, step: int) -> Batch:
        found = honest(self, step + 1 if step >= value else step)
        return Batch(step, found.tokens, found.lengths, found.positions)

    SubstreamDataset.batch = batch  # type: ignore[method-assign]


def blind(value: int) -> None:
    """Processes that torchrun started and that each believe to be alone."""
    honest = accelerate.Accelerator
    accelerate.Accelerator = lambda cpu, **options: honest(**options)  # type: ignore[assignment,misc]


if __name__ == "__main__":
    globals()[sys.argv[1]](int(sys.argv[2]))
    del sys.argv[1:3]
    run_door(train.main)
