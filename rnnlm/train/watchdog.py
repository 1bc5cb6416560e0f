"""A process that hangs ends, and says what it was doing."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from typing import NoReturn

TELLING_SECONDS = 10.0  # for the stacks; then a process ends, told or not


class Watchdog:
    """Ends this process, with the stacks of all its threads, when it has not been told for so long that it is alive."""

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self._heard, self._closed = time.monotonic(), threading.Event()

    def start(self) -> None:
        """Watch from now on."""
        self.beat()
        if self.timeout_seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        """Work goes on."""
        self._heard = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while (silent := time.monotonic() - self._heard) <= self.timeout_seconds:
            if self._closed.wait(min(1.0, self.timeout_seconds / 10)):
                return
        abort(
            f"has done nothing for {silent:.0f} seconds (run.timeout_minutes): it hangs, or waits for a rank that does"
        )


def abort(why: str) -> NoReturn:
    """End this process at once, threads that hang as well; say why, and what each of them was doing."""
    rank = os.environ.get("RANK", "0")
    late = threading.Timer(TELLING_SECONDS, os._exit, (1,))  # a full pipe that nobody reads takes nothing more
    late.daemon = True
    late.start()
    try:
        dump_stacks(f"error: rank {rank} {why}; its stacks:", f"[rank {rank}] ")
    finally:
        os._exit(1)


def dump_stacks(heading: str, prefix: str) -> None:
    """Print the stacks of all threads on stderr, a prefix before each line.

    faulthandler writes word by word, so ranks that tell at the same time would tear each other's lines: it writes to
    memory (no file: a disk that hangs may be the cause), and each line goes out at once.
    """
    stderr = 2  # whatever sys.stderr is now
    os.write(stderr, f"{heading}\n".encode())
    try:
        handle = os.memfd_create("stacks")
    except (AttributeError, OSError):  # not Linux, or no descriptor is left
        faulthandler.dump_traceback(stderr, all_threads=True)
        return
    faulthandler.dump_traceback(handle, all_threads=True)
    lines = os.pread(handle, os.fstat(handle).st_size, 0).decode(errors="replace").splitlines()
    os.close(handle)
    for line in lines:
        os.write(stderr, f"{prefix}{line}\n".encode())
