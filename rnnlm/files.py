"""Durable files: nothing half-written has a final name; one writer in a directory.

Bytes go through `write`, changes of names through `rename` and `unlink`, and `sync` makes names outlive a power loss.
Whoever needs these calls them as `files.write`, so that a test can put a fault into each in one place. The price: every
`write` and every `sync` waits for the disk. Arrays whose length is known only at their end have writers of their own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from rnnlm.errors import RunError

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
TEMPORARY = re.compile(r"\.([0-9a-f]{12})-(\d+)-[0-9a-f]{16}$")  # how the names of temporary_path end
DELETED = ".deleted"  # the suffix of what is being deleted; no reader takes it


def write(path: Path, fill: Callable[..., object], *contents: Any) -> None:
    """Have fill(path, *contents) write a file, and wait until it is on disk; its name is after `sync` of its directory.

    All contents of a checkpoint go through here, those that a library writes too: tests inject faults in one place.
    """
    fill(path, *contents)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Wait until the names in a directory are on disk: made, renamed and removed ones are only after this."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(path: Path, target: Path) -> None:
    """Give another name in the same directory, in place of what has it; it is on disk after `sync` of the directory."""
    path.rename(target)


def link(path: Path, target: Path) -> bool:
    """Give a file a second name, which is on disk after `sync` of its directory; False where it cannot be had."""
    try:
        os.link(path, target)
    except OSError:  # a file system without such links, or too many of them
        return False
    return True


def unlink(path: Path) -> None:
    """Remove a file or a link."""
    path.unlink()


def write_file(path: Path, data: bytes, alone: bool = False) -> None:
    """Write a file under a temporary name, and rename it when its bytes are on disk.

    Its directory is not synced: after a power loss the file of before may be there again, but never half of this one.

    Args:
        alone: nobody else writes there; the temporary name is always the same, so that a kill leaves one at most.
    """
    partial = path.with_name(f"{path.name}.partial") if alone else temporary_path(path)
    write(partial, Path.write_bytes, data)
    rename(partial, path)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that no other process on any machine takes, and that tells whose it is."""
    return path.with_name(f".{path.name}.{_this_machine()}-{os.getpid()}-{uuid.uuid4().hex[:16]}")


def clear_temporaries(directory: Path) -> None:
    """Remove what is left under temporary names by this process, or by processes of this machine that are dead.

    Those of other machines stay: nobody here can tell whether they are still being written.
    """
    for path in directory.glob(".*"):
        found = TEMPORARY.search(path.name)
        if found and found[1] == _this_machine() and (int(found[2]) == os.getpid() or not _is_alive(int(found[2]))):
            path.unlink(missing_ok=True)


def _this_machine() -> str:
    """The same for all processes that see each other's ids: containers on one machine, and of one name, may not."""
    try:
        processes = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # no Linux
        processes = 0
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:12]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def open_regular(path: Path) -> tuple[BufferedReader, int]:
    """A file opened for reading, and its size in bytes.

    Raises:
        OSError: it is not there, a symbolic link, or not a regular file (opening a pipe would wait for its writer).
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise OSError(f"{path}: not a regular file")
    return os.fdopen(handle, "rb"), status.st_size


def make_directory(path: Path) -> None:
    """Make a directory and the missing ones above it, these durably; its own name is so after `sync` of its parent."""
    if not path.parent.is_dir():
        make_directory(path.parent)
        sync(path.parent.parent)
    path.mkdir(exist_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it, one name after the other; nothing happens where there is none."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return

    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            unlink(entry)
    path.rmdir()


def delete(path: Path) -> None:
    """Delete a directory such that no crash leaves only some of its files under its name."""
    doomed = path.with_name(path.name + DELETED)
    remove_tree(doomed)
    rename(path, doomed)
    sync(path.parent)  # else a power loss could keep the name and lose some of the files
    remove_tree(doomed)


@contextmanager
def locked(path: Path, what: str, shared: bool = False, patience_seconds: float = 0) -> Iterator[None]:
    """Hold the directory of a lock file, both made if they are not there, against all processes on all nodes.

    The lock is on a regular file that stays for ever, opened for writing: on NFS and Lustre one on a directory excludes
    nobody on another node, and one on a file that others remove excludes nobody either.

    Args:
        path: the lock file; while one alone holds it, it says who.
        what: "build" or "run", for the error.
        shared: together with others who ask for it in the same way.
        patience_seconds: how long to wait for it: who was killed a moment ago may not be gone yet.

    Raises:
        RunError: someone else holds it, with what the file says.
    """
    make_directory(path.parent)
    sync(path.parent.parent)  # else what is written under it could be lost with its name
    until = time.monotonic() + patience_seconds
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while (is_mine := lock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)) is False:
            if time.monotonic() > until:
                found = os.pread(handle, 4096, 0).decode(errors="replace") or "together with others"
                raise RunError(f"{path.parent}: another {what} is working there ({found}); wait for it")
            time.sleep(0.1)
        if is_mine is None:
            print(f"warning: {path.parent}: a file system without locks; do not start a second {what}", file=sys.stderr)
        if not shared:
            os.truncate(handle, 0)
            os.pwrite(handle, f"{this_process()}, {time.ctime()}".encode(), 0)

        try:
            yield
        finally:
            if not shared:
                os.truncate(handle, 0)
    finally:
        os.close(handle)  # which gives the lock back, as the end of the process does


def lock(handle: int, operation: int) -> bool | None:
    """Lock an open file without waiting: whether it is locked now; None: there are no locks on this file system."""
    try:
        fcntl.flock(handle, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return None
    return True


def this_process() -> str:
    """What a lock file says of its holder."""
    return f"{socket.gethostname()}, process {os.getpid()}"
