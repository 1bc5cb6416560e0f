"""A process that hangs ends, and leaves the stacks of its threads in a file.

A thread of ours notices, says so on stderr, and has faulthandler write the stacks. Where an extension hangs and holds
Python's lock, no thread of ours gets a turn: a timer of faulthandler, which needs no lock, then writes them and ends
the process, a few seconds later and without a word on stderr. The file is opened before anything can hang, and while a
thread of ours gets a turn, no end depends on its disk, which may be what hangs. The price: a timer is a thread, 0.1 ms
each time it is set, so it is set once a second at most.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

EXIT_SECONDS = 10.0  # for stderr and the disk to take the words and the stacks; then a process ends without them
TIMER_SECONDS = 5.0  # that the timer gives our thread, which can say more


class Watchdog:
    """Ends this process, with the stacks of all its threads, when its last `beat` is too long ago.

    Args:
        timeout_seconds: after which it ends; 0: never.
        path: of the stacks, a file that stays only where there are some.
    """

    def __init__(self, timeout_seconds: float, path: Path):
        self.timeout_seconds, self.path = timeout_seconds, path
        self._file: IO[bytes] | None = None
        self._pause = min(1.0, timeout_seconds / 10)
        self._beat_at, self._timer_at, self._closed = time.monotonic(), -float("inf"), threading.Event()

    def start(self) -> None:
        """Watch from now on."""
        if self.timeout_seconds:
            self._file = self._open()
            self.beat()
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        """Note that this process is alive."""
        self._beat_at = time.monotonic()
        if self._file and self._beat_at - self._timer_at >= self._pause:
            self._timer_at = self._beat_at
            late = self.timeout_seconds + 2 * self._pause + TIMER_SECONDS  # after `_watch`, which may be a pause late
            faulthandler.dump_traceback_later(late, exit=True, file=self._file)

    def close(self) -> None:
        """Stop watching, when the file is gone: its disk may hang."""
        if self._file:
            with suppress(OSError):
                if not os.fstat(self._file.fileno()).st_size:
                    self.path.unlink(missing_ok=True)
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None
        self._closed.set()

    def abort(self, why: str) -> NoReturn:
        """End this process at once, threads that hang as well; say why, and where their stacks are."""
        # a full pipe that nobody reads takes no words, and a disk that hangs takes no stacks
        late = threading.Timer(EXIT_SECONDS, os._exit, (1,))
        late.daemon = True
        late.start()

        stderr = 2  # whatever sys.stderr is now
        message = f"error: rank {os.environ.get('RANK', '0')} {why}"
        try:
            with suppress(OSError):  # nobody reads it
                os.write(stderr, f"{message}; its stacks: {self.path}\n".encode())
            self._dump_stacks(f"{time.ctime()}: {message}\n")
            late.join()
        finally:
            os._exit(1)

    def _dump_stacks(self, heading: str) -> None:
        """Write the stacks of all threads, then end this process.

        By the timer, at once, since to wait for a disk in faulthandler itself would hold Python's lock.
        """
        file = self._file or self._open()
        try:
            file.write(heading.encode())
        except OSError:  # its disk is full
            file = os.fdopen(os.dup(2), "wb", buffering=0)
        faulthandler.dump_traceback_later(0.001, exit=True, file=file)

    def _open(self) -> IO[bytes]:
        """The file of the stacks, behind what earlier attempts have left there; stderr where there can be none."""
        try:
            return self.path.open("ab", buffering=0)
        except OSError:
            return os.fdopen(os.dup(2), "wb", buffering=0)

    def _watch(self) -> None:
        """Wait for a beat that does not come."""
        while (silent := time.monotonic() - self._beat_at) <= self.timeout_seconds:
            if self._closed.wait(self._pause):
                return
        self.abort(
            f"has done nothing for {silent:.0f} seconds (run.timeout_minutes): it hangs, or waits for a rank that does"
        )
