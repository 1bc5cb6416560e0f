"""Signals that ask a run to stop, its parent's death, and a watchdog for ranks that hang.

The first signal is only noted: training stops at the next step's boundary, saves, and leaves a marker. The second, if
it comes a second or more after the first (a launcher passes on what the terminal has already sent), ends the process
at once; every file is whole at any moment. A launcher that dies takes its child with it, as if by SIGTERM.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupts:
    """A context in which SIGTERM, SIGINT and SIGUSR1 are wishes. `name`: the first that came, empty before."""

    def __init__(self) -> None:
        self.name = ""
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        die_with_launcher()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._came = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._came >= ECHO_SECONDS:
            os._exit(128 + number)  # as the shell spells it


def die_with_launcher() -> None:
    """Be sent SIGTERM when `accelerate launch` or torchrun dies: nobody else would end this process.

    A run that the user started himself outlives its terminal, as he may want (nohup).
    """
    launched = "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Watchdog:
    """Ends this process, with the stacks of all its threads, when it has not been told for so long that it is alive."""

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self._heard, self._closed = time.monotonic(), threading.Event()
        if timeout_seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        """Work goes on."""
        self._heard = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout_seconds / 10)):
            silent = time.monotonic() - self._heard
            if silent > self.timeout_seconds:
                rank = os.environ.get("RANK", "0")
                print(
                    f"error: rank {rank} has done nothing for {silent:.0f} seconds (run.timeout_minutes): it hangs, or "
                    "waits for a rank that does; its stacks:",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(1)
