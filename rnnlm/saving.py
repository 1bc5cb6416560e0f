"""Checkpoints written beside the training: it waits for the copy to host memory, not for the disk.

One save is in flight at most: the next one waits for it, so host memory holds one copy. What became of a save, a full
disk as well, is handed out later as a value, for whoever trains to report and go on; only a mistake in the program is
raised. The writer is a thread per save and no daemon: Python waits for it at exit, and a save once begun is whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnlm import checkpoint
from rnnlm.config import UserError
from rnnlm.tensorfile import Tensors


@dataclass(frozen=True)
class Saved:
    """What became of one save."""

    name: str
    path: Path | None  # None: there is no whole checkpoint of it
    error: OSError | UserError | None  # beside a path: older ones could not be deleted
    bytes: int  # of all its files
    seconds: float  # of writing, reading back and deleting
    blocked_seconds: float  # that the caller waited, for the save before and for the copy


def host_copy(parts: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
    """Copies of the tensors in host memory: what happens to theirs from now on does not matter.

    From CUDA into pinned memory, all at once, then one wait for the device.
    """
    copies = {part: {name: _copy(tensor.detach()) for name, tensor in each.items()} for part, each in parts.items()}
    for device in {tensor.device for each in parts.values() for tensor in each.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone(memory_format=torch.contiguous_format)
    # not empty_like, which would keep strides that a checkpoint does not
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Saver:
    """Writes the checkpoints of one directory, one at a time, beside the caller, who alone calls it.

    Args:
        root: the directory of the checkpoints.
    """

    def __init__(self, root: Path):
        self.root = root
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []
        self._mistake: BaseException | None = None

    def submit(
        self,
        name: str,
        parts: Mapping[str, Tensors],
        state: Mapping[str, Any],
        keep_last: int,
        keep_every_steps: int = 0,
        also: Sequence[str] = (),
    ) -> list[Saved]:
        """Wait for the save before, copy the tensors, and write them as <prefix>-<step>; then prune that prefix.

        Args:
            name, parts, state: as in checkpoint.save; `state` must not be changed afterwards.
            keep_last, keep_every_steps: as in checkpoint.prune.
            also: further names for the same, each the only one of its prefix that is kept.

        Returns:
            What became of earlier saves and was not yet handed out.
        """
        begin = time.perf_counter()
        finished = self.wait()
        copies = host_copy(parts)
        blocked = time.perf_counter() - begin
        # what a run goes on from comes last: after a kill before it, the others are made again
        kept = [*((other, 1, 0) for other in also), (name, keep_last, keep_every_steps)]
        self._thread = threading.Thread(target=self._run, args=(kept, copies, state, blocked), daemon=False)
        self._thread.start()
        return finished

    def poll(self) -> list[Saved]:
        """What became of saves that are finished and was not yet handed out; does not wait."""
        return [] if self._thread and self._thread.is_alive() else self.wait()

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written; returns what became of it and was not yet handed out."""
        if self._thread:
            self._thread.join()
            self._thread = None
        mistake, self._mistake = self._mistake, None
        if mistake:
            raise mistake
        finished, self._finished = self._finished, []
        return finished

    def _run(
        self,
        kept: Sequence[tuple[str, int, int]],
        parts: Mapping[str, Tensors],
        state: Mapping[str, Any],
        blocked: float,
    ) -> None:
        try:
            for name, keep_last, keep_every_steps in kept:
                self._save(name, parts, state, keep_last, keep_every_steps, blocked)
        except BaseException as mistake:
            self._mistake = mistake

    def _save(
        self,
        name: str,
        parts: Mapping[str, Tensors],
        state: Mapping[str, Any],
        keep_last: int,
        keep_every_steps: int,
        blocked: float,
    ) -> None:
        begin = time.perf_counter()
        path: Path | None = None
        error: OSError | UserError | None = None
        size = 0
        try:
            path = checkpoint.save(self.root, name, parts, state)
            size = sum(file.stat().st_size for file in path.iterdir())
            checkpoint.prune(path, name.rpartition("-")[0], keep_last, keep_every_steps)
        except UserError as found:  # not finite, or not what was written when it was read back
            path, error = None, found
        except OSError as found:
            error = found
        self._finished.append(Saved(name, path, error, size, time.perf_counter() - begin, blocked))
