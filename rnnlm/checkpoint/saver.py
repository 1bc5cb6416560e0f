"""Checkpoints written beside the training: it waits for the copy to host memory, not for the disk.

One save is in flight at most: the next one waits for it, so host memory holds one copy. The result of a save, a full
disk as well, is returned later as a value, for whoever trains to report and continue; only a mistake in the program is
raised. The writer is a thread per save and no daemon: Python waits for it at exit, and a save once begun is whole.

The copy is in ordinary memory. PyTorch keeps pinned memory for the life of a process, and rounds each tensor of it up
to a power of two (CachingHostAllocator), so that a model of 1.1 GB would hold 2 GB of a machine for ever. The price: a
GPU fills ordinary memory at some GB a second, pinned memory that is there already several times as fast.
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

from rnnlm.checkpoint import checkpoint
from rnnlm.checkpoint.safetensors_file import Tensors
from rnnlm.errors import UserError


@dataclass(frozen=True)
class Saved:
    """The result of one save."""

    name: str
    path: Path | None  # None: not written, or a power loss may undo its name
    error: OSError | UserError | None  # beside a path: older ones could not be deleted
    bytes: int  # of all its files
    seconds: float  # of writing, reading back and deleting
    blocked_seconds: float  # that the caller waited, for the save before and for the copy


def host_copy(groups: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
    """Contiguous copies of the tensors in host memory: what happens to theirs from now on does not matter."""
    # not empty_like, which would keep strides that a checkpoint does not
    return {
        group: {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in each.items()
        }
        for group, each in groups.items()
    }


def groups_of(name: str, groups: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """What a checkpoint of this name holds: the best one, which is scored and written with, the model alone."""
    return {group: each for group, each in groups.items() if group == "model" or not name.startswith("best-")}


class Saver:
    """Writes the checkpoints of one directory, one at a time, beside the caller, who alone calls it.

    Args:
        root: the directory of the checkpoints.
        keep_last, keep_every_steps: of those called step-<step>, as in checkpoint.prune; of other prefixes one is kept.
    """

    def __init__(self, root: Path, keep_last: int = 2, keep_every_steps: int = 0):
        self.root, self.keep_last, self.keep_every_steps = root, keep_last, keep_every_steps
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []
        self._mistake: BaseException | None = None

    def submit(self, names: Sequence[str], groups: Mapping[str, Tensors], state: Mapping[str, Any]) -> list[Saved]:
        """Wait for the save before, copy the tensors, and write them under each of the names, then prune its prefix.

        Args:
            names: each <prefix>-<step>.
            groups, state: as in checkpoint.save; `state` must not be changed afterwards.

        Returns:
            The results of earlier saves that were not yet returned.
        """
        begin = time.perf_counter()
        finished = self.wait()
        wanted = {group for name in names for group in groups_of(name, groups)}
        copies = host_copy({group: each for group, each in groups.items() if group in wanted})
        blocked = time.perf_counter() - begin

        def write() -> None:
            same: Path | None = None  # one of these names that is written already
            try:
                # what a run resumes from comes last: after a kill before it, the others are written again
                for name in sorted(names, key=lambda name: name.startswith("step-")):
                    saved = self._save(name, groups_of(name, copies), state, blocked, same)
                    self._finished.append(saved)
                    same = same if saved.error else saved.path
            except BaseException as mistake:  # for the caller's thread to raise
                self._mistake = mistake

        self._thread = threading.Thread(target=write, name="saving", daemon=False)
        self._thread.start()
        return finished

    def busy(self, patience_seconds: float | None = 0.0) -> bool:
        """Whether something is still being written, after so long a wait at most; None: wait for ever."""
        if self._thread:
            self._thread.join(patience_seconds)
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> list[Saved]:
        """The results of finished saves that were not yet returned; does not wait."""
        return [] if self.busy() else self.wait()

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written; returns the results that were not yet returned."""
        if self._thread:
            self._thread.join()
            self._thread = None

        mistake, self._mistake = self._mistake, None
        if mistake:
            raise mistake

        finished, self._finished = self._finished, []
        return finished

    def _save(
        self, name: str, groups: Mapping[str, Tensors], state: Mapping[str, Any], blocked: float, same: Path | None
    ) -> Saved:
        """Write one checkpoint, and prune those of its prefix; the arguments as in `submit` and checkpoint.save."""
        begin, size, prefix = time.perf_counter(), 0, name.rpartition("-")[0]
        kept = (self.keep_last, self.keep_every_steps) if prefix == "step" else (1, 0)

        path: Path | None = None
        error: OSError | UserError | None = None
        try:
            path = checkpoint.save(self.root, name, groups, state, same)
            size = sum(file.stat().st_size for file in path.iterdir())
            checkpoint.prune(path, prefix, *kept)
        except UserError as found:  # not finite, or not what was written when it was read back
            path, error = None, found
        except OSError as found:
            error = found
        return Saved(name, path, error, size, time.perf_counter() - begin, blocked)
