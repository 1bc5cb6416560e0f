"""Signals that ask a run to stop, and the death of its launcher.

The first signal is only noted: training stops at the next step's boundary, saves, and leaves a marker. The second, if
it comes a second or more after the first (a launcher passes on what the terminal has already sent), ends the process
at once; every file is whole at any moment. A launcher that dies takes its child with it, as if by SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupts:
    """A context in which SIGTERM, SIGINT and SIGUSR1 are requests. `first_signal`: the first one's name, empty before.

    A thread takes them from a pipe that Python's C handler writes them into: handlers in Python wait while the main
    thread is in a collective, perhaps for ever.
    """

    def __init__(self) -> None:
        self.first_signal = ""
        self._before: dict[int, Any] = {}
        self._pipe = (-1, -1)

    def __enter__(self) -> Interrupts:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=self._listen, daemon=True).start()

        # only signals that have a handler are written into the pipe; it need not do anything
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        die_with_launcher()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # ends the thread

    def _listen(self) -> None:
        """Note the first signal, and end the process at the second; an empty read is the end of the context."""
        first_at = 0.0
        while received := os.read(self._pipe[0], 1):
            number = received[0]
            if number not in SIGNALS:  # another one that has a handler
                continue

            if not self.first_signal:
                self.first_signal, first_at = signal.Signals(number).name, time.monotonic()
            elif time.monotonic() - first_at >= ECHO_SECONDS:
                os._exit(128 + number)  # the exit code that shells give it
        os.close(self._pipe[0])


def die_with_launcher() -> None:
    """Be sent SIGTERM when `accelerate launch` or torchrun dies: nobody else would end this process.

    A run that was started without a launcher stays when its terminal closes, as under nohup.
    """
    parent = os.getppid()
    try:
        launcher = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # not Linux
        return

    if b"accelerate" in launcher or b"torch" in launcher:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
