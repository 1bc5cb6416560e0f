"""Tasks that any number of processes share, on any number of nodes, knowing only the directory that all of them see.

A task writes one file under a temporary name and renames it: a file that is there is done. Who writes one holds a lock
on another, beside it, which ends with its process, however that ends:

    path there?  --no-->  lock of path free?  --yes-->  path there now?  --no-->  write it
                                |                                                  (a death here frees the lock)
                                no: someone alive is at it; other tasks first, then wait for this one

So processes may start at any time, in any order and number, and those that are left do the work of those that die. Two
that write the same file write the same bytes; where a file system has no locks, that happens more often, and nothing
else changes. The price: a file more for each task while it runs, and up to PAUSE_SECONDS between a task's end and
another process's notice of it (on NFS as long as its client keeps names in its cache, up to a minute).
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rnnlm import files
from rnnlm.data.build.executor import WorkerPool, killed_twice
from rnnlm.data.build.unit_file import DamagedUnitError
from rnnlm.errors import RunError

AnyTask = TypeVar("AnyTask", bound="Task")
LOCKS, PHASES = "locks", "phases"  # directories in that of the build
PAUSE_SECONDS = 1.0  # at most, between two looks at what others are doing


class Listing:
    """Which paths exist; each directory is read once, which also renews what an NFS client remembers of it."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}

    def __contains__(self, path: Path) -> bool:
        if path.parent not in self._names:
            try:
                with os.scandir(path.parent) as entries:
                    self._names[path.parent] = {entry.name for entry in entries}
            except FileNotFoundError:
                self._names[path.parent] = set()
        return path.name in self._names[path.parent]


@contextmanager
def taken(locks: Path, path: Path, is_done: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Whether the task of a file is this process's to do; others stay away from it until the end of the block.

    False: it is done, or someone alive is at it.

    Args:
        is_done: whether it is done; None: when its file is there.
    """
    is_done = is_done or path.exists
    if is_done():
        yield False
        return

    lock = locks / path.name
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        is_mine = files.lock(handle, fcntl.LOCK_EX) is not False
        is_mine = is_mine and not is_done()  # whoever had the lock before may have done it
        if is_mine:
            os.truncate(handle, 0)
            os.pwrite(handle, files.this_process().encode(), 0)

        yield is_mine
        if is_done():  # else the task may have failed, and whoever comes next finds the lock free
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)  # which frees the lock


@dataclass(frozen=True)
class FileTask:
    """A call that writes one file."""

    path: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def is_done(self, exists: Callable[[Path], bool]) -> bool:
        """Whether its file is there."""
        return exists(self.path)


def run_file_task(locks: Path, task: FileTask) -> None:
    """Write the file of a task, unless it is there or someone is at it."""
    with taken(locks, task.path) as is_mine:
        if not is_mine:
            return
        try:
            task.function(*task.arguments)
        except (FileNotFoundError, DamagedUnitError):
            if not task.path.exists():  # else someone has done it unseen, and has removed what it is made of
                raise


class Task(Protocol):
    """What processes share."""

    @property
    def path(self) -> Path:
        """Names it in --status."""

    def is_done(self, exists: Callable[[Path], bool]) -> bool:
        """Whether nothing of it is left."""


@dataclass(frozen=True)
class SharedPool:
    """A pool of workers, for those tasks that no other process does."""

    pool: WorkerPool
    work: Path  # the directory of this build, the same for all who share it
    task: tuple[int, int] = (0, 1)  # (i, n): begin with every n-th task from the i-th on, so that processes seldom meet

    def run(
        self,
        phase: str,
        tasks: Sequence[AnyTask],
        function: Callable[[Any, AnyTask], None],
        context: Any,
        on_done: Callable[[AnyTask], None] = lambda task: None,
    ) -> list[AnyTask]:
        """Return when all tasks are done, by whomever; those that killed their worker twice here.

        Args:
            phase: its name in --status.
            function: called in workers as function(context, task); returns at once if someone else is at the task.
            on_done: called for each task, also those that others did.
        """
        announce(self.work, phase, tasks)
        own, count = self.task
        left = [task for first in range(own, own + count) for task in tasks[first % count :: count]]
        failed, over, pause = list[AnyTask](), set[int](), 0.0

        def look(looked_at: Sequence[AnyTask], exists: Callable[[Path], bool]) -> None:
            for task in looked_at:
                if id(task) not in over and task.is_done(exists):
                    over.add(id(task))
                    on_done(task)

        while True:
            look(left, Listing().__contains__)
            if not (left := [task for task in left if id(task) not in over]):
                return failed

            time.sleep(pause)  # after the first pass only those are left that others are at
            pause = min(2 * pause + 0.01, PAUSE_SECONDS)
            failed += self.pool.run(function, context, left, lambda task: look([task], Path.exists))
            over.update(map(id, failed))

    def write(self, phase: str, tasks: Sequence[FileTask]) -> None:
        """Have the files of all tasks there.

        Raises:
            UserError: a task that kills its workers.
        """
        if failed := self.run(phase, tasks, run_file_task, self.work / LOCKS):
            raise killed_twice(task.path for task in failed)


def announce(work: Path, phase: str, tasks: Sequence[Task]) -> None:
    """Write down which files a phase writes, for --status: not durably, nothing else reads it."""
    path = work / PHASES / f"{phase}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        (work / LOCKS).mkdir(exist_ok=True)
        partial = files.temporary_path(path)
        partial.write_text(json.dumps([str(task.path.relative_to(work.parent)) for task in tasks]))
        files.rename(partial, path)


@contextmanager
def joined(lock: Path, digest: str, what: str) -> Iterator[Callable[[], bool]]:
    """Work on a build, beside any others who work on the same; yields a function that leaves it.

    That function tells whether nobody else is there, and then keeps everyone out until the end of the block. The lock
    is a file that stays for ever, since a lock on a directory excludes nobody on another node of NFS or Lustre.

    Args:
        digest: of the build: all who are there have the same.
        what: the directory, for the error.

    Raises:
        RunError: another build is there, with who began it.
    """
    files.make_directory(lock.parent)
    files.sync(lock.parent.parent)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if files.lock(handle, fcntl.LOCK_EX):  # the first one says what is built
            os.truncate(handle, 0)
            os.pwrite(handle, f"{digest} {files.this_process()}, {time.ctime()}".encode(), 0)
        while (has_locks := files.lock(handle, fcntl.LOCK_SH)) is False:
            time.sleep(PAUSE_SECONDS)  # who has it alone is beginning, or clearing up

        if has_locks is None:
            print(f"warning: {what} is on a file system without locks; tasks may do some work twice", file=sys.stderr)
        else:
            found, _, who = os.pread(handle, 4096, 0).decode(errors="replace").partition(" ")
            if found != digest:
                raise RunError(f"{what}: another build is working there ({who}); wait for it")

        yield lambda: files.lock(handle, fcntl.LOCK_EX) is not False
    finally:
        os.close(handle)  # which gives the lock back, as the end of the process does
