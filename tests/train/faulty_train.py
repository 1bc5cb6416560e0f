"""launch/train.py with a fault built in, for tests: `faulty_train.py FAULT VALUE options...`; or two: `A+B 1+2`.

kill N: SIGKILL to every process when it has done N steps.   saving N: the same at the Nth operation on disk of a save.
nan N, grad N: the loss, or one gradient, of the last process is not finite at step N, and at the 3 after it if N < 0.
row N: the hidden state of substream 3 is NaN before step N.   spike N: the loss of step N is a hundred times itself.
hang N, error N: the last process stops, or raises an error, at step N.   slow N: a step takes N milliseconds more.
masks: dropout masks keyed by rank, not by substream.   skip N: from step N on the loader reads one window too far.
blind: Accelerate is started without cpu=True.   disk N: each file of a save takes N milliseconds more to write.
clocks N: a step takes N seconds by the clock of process 0 and N thousand by any other's; saves-RANK lists its saves.
stuck N: step N never ends; it says "stuck" on stdout, then "noted" when a signal is, and the next one is no echo.
half: fp16 and the scaling of its losses on a CPU, where Accelerate has neither.
touches: touched-RANK lists what each process did to names and contents in the run's directory, by Python's own audit.
reads: read-RANK lists the files of tensors that a process read.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

import rnnlm.files
import rnnlm.train.distributed
import rnnlm.train.saving
import rnnlm.train.signals
from rnnlm.checkpoint import safetensors_file
from rnnlm.config import Config
from rnnlm.data.substreams import Batch, SubstreamDataset
from rnnlm.train.signals import Interrupts
from rnnlm.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
replace = setattr  # tests that inject a fault into their own process put there what can be undone


# Faults of a process


def kill(value: int) -> None:
    """Die like a process that the machine took away."""
    original = Trainer.take_step

    def take_step(self: Trainer, batch: Batch) -> None:
        if self.step == value:
            self.saving.saver.wait()  # or the checkpoint before this step might be lost too, on a slow disk
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, batch)

    replace(Trainer, "take_step", take_step)


def masks(value: int) -> None:
    """The mistake that the comparison of 1 and 2 processes must show."""
    original = Trainer.__init__

    def init(self: Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        self.train_step.rows = torch.arange(self.run.last - self.run.first)

    replace(Trainer, "__init__", init)


def skip(value: int) -> None:
    """A loader that jumps over a window."""
    original = SubstreamDataset.batch

    def batch(self: SubstreamDataset, step: int) -> Batch:
        found = original(self, step + 1 if step >= value else step)
        return Batch(step, found.tokens, found.lengths, found.positions)

    replace(SubstreamDataset, "batch", batch)


def blind(value: int) -> None:
    """Processes that torchrun started and that each believe to be alone."""
    original = rnnlm.train.distributed.Accelerator
    replace(rnnlm.train.distributed, "Accelerator", lambda cpu, **options: original(**options))


def half(value: int) -> None:
    """Start Accelerate as if this CPU could do what is only done on a GPU."""
    original = rnnlm.train.distributed.start_accelerator

    def start(config: Config) -> Accelerator:
        accelerator = original(config)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        # so large that some steps overflow, and tried again after every 4 that do not
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)
        return accelerator

    replace(rnnlm.train.distributed, "start_accelerator", start)


# Faults of some steps


def at_step(step: int, act: Callable[[Trainer], None], times: int = 1, last_only: bool = True) -> None:
    """Do something before a step, and the ones after it, in the last process or in all."""
    original = Trainer.take_step

    def take_step(self: Trainer, batch: Batch) -> None:
        if step <= self.step < step + times and (not last_only or self.accelerator.is_last_process):
            act(self)
        original(self, batch)

    replace(Trainer, "take_step", take_step)


def multiply_loss(self: Trainer, factor: float) -> None:
    """Change the next loss."""
    model = self.train_step.model
    original = model.forward

    def forward(*arguments: Any) -> Any:
        model.forward = original
        loss, count, hidden = original(*arguments)
        return loss * factor, count, hidden

    model.forward = forward


def nan(value: int) -> None:
    at_step(abs(value), lambda self: multiply_loss(self, float("nan")), 4 if value < 0 else 1)


def spike(value: int) -> None:
    at_step(value, lambda self: multiply_loss(self, 100.0))


def grad(value: int) -> None:
    def act(self: Trainer) -> None:
        weight = next(self.train_step.raw.parameters())
        handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])

    at_step(abs(value), act, 4 if value < 0 else 1)


def row(value: int) -> None:
    def act(self: Trainer) -> None:
        if self.run.first <= 3 < self.run.last:
            self.train_step.hidden["layer0.h"][3 - self.run.first, 0] = float("nan")

    at_step(value, act, last_only=False)


def hang(value: int) -> None:
    at_step(value, lambda self: time.sleep(1000))


def stuck(value: int) -> None:
    noted = threading.Event()

    class Listening(Interrupts):
        """Says when it has noted a signal."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "first_signal" and value:
                noted.set()

    def act(self: Trainer) -> None:
        print("stuck", flush=True)
        noted.wait()
        print("noted", flush=True)
        threading.Event().wait()

    replace(rnnlm.train.signals, "Interrupts", Listening)
    replace(rnnlm.train.signals, "ECHO_SECONDS", 0.0)
    at_step(value, act)


def error(value: int) -> None:
    def act(self: Trainer) -> None:
        raise ZeroDivisionError("a fault of the last process")

    at_step(value, act)


def slow(value: int) -> None:
    at_step(0, lambda self: time.sleep(value / 1000), times=10**9, last_only=False)


# Faults of the disk and of the clock


def belongs_to_a_save(path: Path) -> bool:
    """Whether a file belongs to the checkpoints; others are written by the same functions."""
    return "checkpoints" in path.parts


def saving(value: int) -> None:
    """Die in the middle of a checkpoint."""
    operations = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Path, *arguments: Any) -> Any:
            nonlocal operations
            operations += belongs_to_a_save(path)
            if operations == value:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *arguments)

        return operation

    for name in ("write", "sync", "rename", "unlink"):
        replace(rnnlm.files, name, counted(getattr(rnnlm.files, name)))


def disk(value: int) -> None:
    original = rnnlm.files.write

    def write(path: Path, *arguments: Any) -> None:
        if belongs_to_a_save(path):
            time.sleep(value / 1000)
        original(path, *arguments)

    replace(rnnlm.files, "write", write)


def clocks(value: int) -> None:
    now, original, rank = [0.0], Trainer.save, os.environ["RANK"]
    # the clock of saving alone: watchdogs and process groups keep the true one
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    replace(rnnlm.train.saving, "time", clock)

    def tick(self: Trainer) -> None:
        now[0] += value * (1 if rank == "0" else 1000)

    def save(self: Trainer, *arguments: Any, **options: Any) -> None:
        with Path(f"saves-{rank}").open("a") as file:
            file.write(f"{self.step}\n")
        original(self, *arguments, **options)

    at_step(0, tick, times=10**9, last_only=False)
    replace(Trainer, "save", save)


def touches(value: int) -> None:
    log = os.open(f"touched-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    names = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in names or (event == "open" and arguments[2] & changing):
            for path in arguments[:2]:
                if isinstance(path, str | os.PathLike) and "/run" in os.fspath(path):
                    os.write(log, f"{event} {os.fspath(path)}\n".encode())

    sys.addaudithook(hook)


def reads(value: int) -> None:
    original = safetensors_file.read

    def read(file: Any, size: int, where: Path, *arguments: Any) -> Any:
        with Path(f"read-{os.environ['RANK']}").open("a") as log:
            log.write(f"{where}\n")
        return original(file, size, where, *arguments)

    Path(f"read-{os.environ['RANK']}").touch()
    replace(safetensors_file, "read", read)


def inject(faults: str, values: str) -> None:
    """Build in the faults, as `A+B`, with their values, as `1+2`."""
    for fault, value in zip(faults.split("+"), values.split("+"), strict=True):
        globals()[fault](int(value))


if __name__ == "__main__":
    inject(*sys.argv[1:3])
    del sys.argv[1:3]
    runpy.run_path(str(ROOT / "launch/train.py"), run_name="__main__")
