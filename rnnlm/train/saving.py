"""When a run waits for its disk, and what it reports of its checkpoints.

The writing itself is the saver's, beside the training. All processes wait together where it is slow, so that none takes
the wait for a hang; a failing disk costs no more than the checkpoint at hand, which is tried again at the next one's
time. The price: a disk that hangs is noticed only after run.timeout_minutes times DISK_PATIENCE.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rnnlm.checkpoint.safetensors_file import Tensors
from rnnlm.checkpoint.saver import Saved, Saver
from rnnlm.config import RunConfig
from rnnlm.errors import RunError
from rnnlm.train.distributed import Accelerator, run_on_main
from rnnlm.train.metrics import SilentMetrics
from rnnlm.train.watchdog import Watchdog

DISK_PATIENCE = 6  # times run.timeout_minutes, so an hour: a disk may be slow where a process may not


class Saving:
    """The checkpoints of one run.

    As a context: nothing is being written any more when it is left, whatever the reason, so that the next attempt may
    hold the directory.

    Args:
        step: of the newest checkpoint when training starts.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        accelerator: Accelerator,
        metrics: SilentMetrics,
        watchdog: Watchdog,
        step: int,
    ):
        self.directory, self.config, self.accelerator = directory, config, accelerator
        self.metrics, self.watchdog = metrics, watchdog
        self.saver = Saver(directory / "checkpoints", config.keep_last, config.keep_every_steps)
        self.disk_patience = DISK_PATIENCE * watchdog.timeout_seconds  # seconds; 0: for ever
        self.submitted_step = -1  # of the last checkpoint that a run resumes from, on all processes
        self.saved_step, self.saved_at = step, time.monotonic()
        self.error = ""  # of the last save that failed

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.saver.busy(self.disk_patience or None):
            self._abort(f"; it was about to end: {error}" if error else "")

    def is_late(self) -> bool:
        """Whether run.save_every_minutes have passed, by the clock of the main process alone."""
        minutes = self.config.save_every_minutes
        return bool(self.accelerator.is_main_process and minutes and time.monotonic() - self.saved_at > 60 * minutes)

    def submit(
        self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], resumable: bool, best: bool
    ) -> None:
        """Copy the tensors and leave the writing to a thread; called by all processes, after `wait_for_disk`.

        Args:
            resumable: write the checkpoint that a run resumes from.
            best: write it as the best one as well, or alone.
        """
        if resumable:
            self.submitted_step = step
        if not self.accelerator.is_main_process:
            return

        self.metrics.sync()
        if resumable:
            self.saved_at = time.monotonic()
        names = [f"{prefix}-{step:08d}" for prefix, due in (("step", resumable), ("best", best)) if due]
        self._report(self.saver.submit(names, tensors, state))

    def report(self) -> None:
        """Report the saves that have ended since the last time; does not wait."""
        self._report(self.saver.poll())

    def wait_for_disk(self, message: str) -> None:
        """Until nothing is being written: all processes together, so that no watchdog takes the wait for a hang.

        Args:
            message: what is printed if that takes a second or more.
        """
        begin, printed = time.perf_counter(), False
        while run_on_main(self.accelerator, lambda: self.saver.busy(patience_seconds=1.0)):
            self.watchdog.beat()
            if not printed:
                self.metrics.print_line(message)
                printed = True
            waited = time.perf_counter() - begin
            if self.accelerator.is_main_process and self.disk_patience and waited > self.disk_patience:
                self._abort()

    def finish(self) -> None:
        """Wait for the last save, and report it; called by all processes."""
        self.wait_for_disk("waiting until the last checkpoint is written")
        self._report(self.saver.wait())

    def check(self, step: int) -> None:
        """In the main process: that the last checkpoint is of this step.

        Raises:
            RunError: it could not be written.
        """
        if self.accelerator.is_main_process and self.saved_step < step:
            raise RunError(
                f"{self.directory}: the last checkpoint is of step {self.saved_step}, not {step} "
                f"({self.error}); repair that, as by making room on the disk, and type the same command again"
            )

    def _abort(self, also: str = "") -> None:
        """Python itself would wait for a thread that hangs on the disk."""
        self.watchdog.abort(
            f"has waited {self.disk_patience:.0f} seconds for a checkpoint to be written ({DISK_PATIENCE} times "
            f"run.timeout_minutes): the disk hangs, or is too slow{also}"
        )

    def _report(self, finished: list[Saved]) -> None:
        for saved in finished:
            prefix, _, step = saved.name.partition("-")
            if saved.path and prefix == "step":
                self.saved_step = max(self.saved_step, int(step))

            if saved.error and saved.path:
                self.metrics.print_line(f"warning: {saved.name}: older checkpoints are still there ({saved.error})")
            elif saved.error:
                self.error = f"{saved.error}"
                self.metrics.print_line(f"warning: step {int(step)}: no checkpoint ({saved.error}); older ones stay")

            grace = self.config.grace_seconds
            if saved.path and saved.seconds > grace:
                self.metrics.print_line(
                    f"warning: {saved.name} took {saved.seconds:.0f} seconds to write, more than run.grace_seconds="
                    f"{grace:g}: after a signal it may be too late; ask for a longer grace, or save more often"
                )
