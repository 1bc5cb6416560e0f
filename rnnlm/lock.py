"""One writer in a directory: the kernel's lock on the directory itself, and a note of who holds it.

The kernel frees the lock of the dead, so nothing is ever left to clear away. It is the directory that is locked: a
file would have to be removed in the end, and that cannot be done safely. The price: a file system without locks
(some network ones) protects nobody, and says nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rnnlm.config import RunError


@contextmanager
def locked(directory: Path, note: Path, what: str, shared: bool = False, patience_seconds: float = 0) -> Iterator[None]:
    """Hold a directory, made if it is not there, against every other process.

    Args:
        note: file that names the holder while there is one alone.
        what: "build" or "run", for the error.
        shared: together with others who say so too.
        patience_seconds: how long to wait for it: who was killed a moment ago may not be gone yet.

    Raises:
        RunError: someone else holds it, with what its note says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        _take(directory, handle, note, what, shared, time.monotonic() + patience_seconds)
        note.parent.mkdir(parents=True, exist_ok=True)
        if not shared:
            note.write_text(f"{socket.gethostname()}, process {os.getpid()}, {time.ctime()}")
        try:
            yield
        finally:
            note.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _take(directory: Path, handle: int, note: Path, what: str, shared: bool, until: float) -> None:
    while True:
        try:
            return fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                found = note.read_text() if note.is_file() else "it shares the directory with others"
                raise RunError(f"{directory}: another {what} is working there ({found}); wait for it") from error
        except OSError:  # a file system without locks
            return None
        time.sleep(0.1)
