"""Every disk operation of a save: here a test logs them or lets them fail, and here stands what a power loss may undo.

A file's bytes are on disk once the file is synced, a name once its directory is. So a file is written and synced, its
directory is synced, the directory gets its final name, and that name is synced. What is deleted first loses its name
for good: a half-deleted directory is never met under it. The price: one sync of a directory more per deletion.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

from rnnlm.stream import fsync_directory

DELETED = ".deleted"  # the suffix of what is being deleted; no reader takes it


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file and wait until its bytes are on disk; its name is after `sync` of its directory."""
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    fsync_directory(directory)


def rename(path: Path, target: Path) -> None:
    """Give another name in the same directory; it is on disk after `sync` of that directory."""
    path.rename(target)


def unlink(path: Path) -> None:
    """Remove a file or a link."""
    path.unlink()


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
        remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else unlink(entry)
    path.rmdir()


def delete(path: Path) -> None:
    """Delete a directory such that no crash leaves a part of it under its name."""
    doomed = path.with_name(path.name + DELETED)
    remove_tree(doomed)
    rename(path, doomed)
    sync(path.parent)  # else a power loss could keep the name and lose some of the files
    remove_tree(doomed)


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
