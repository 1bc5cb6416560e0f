"""Durable files: a file that is written as a whole is the old one or the new one, and never half of either."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rnnlm import files
from rnnlm.errors import RunError


def fail(*arguments: Any) -> None:
    raise OSError(errno.EIO, "as a disk says it")


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["write", "rename"])
def test_a_fault_in_one_place_reaches_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, alone: bool
) -> None:
    path = tmp_path / "state.json"
    files.write_file(path, b"old", alone)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="as a disk says it"):
        patch.setattr(files, name, fail)
        files.write_file(path, b"new", alone)
    assert path.read_bytes() == b"old"

    files.write_file(path, b"new", alone)
    assert path.read_bytes() == b"new"
    if alone:
        assert sorted(tmp_path.iterdir()) == [path], "what a killed writer left is replaced by the next"


def test_a_directory_is_deleted_with_all_in_it_but_no_link_is_followed(tmp_path: Path) -> None:
    kept, doomed = tmp_path / "kept", tmp_path / "doomed"
    files.make_directory(kept)
    files.make_directory(doomed / "a/b")
    (kept / "file").write_bytes(b"1")
    (doomed / "a/b/file").write_bytes(b"2")
    (doomed / "link").symlink_to(kept)

    files.delete(doomed)
    assert sorted(tmp_path.iterdir()) == [kept]
    assert (kept / "file").read_bytes() == b"1"


def test_a_lock_is_on_a_regular_file_opened_for_writing_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a lock is one of the server only there: a directory's is local to the node, a read-only file's fails."""
    honest = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        assert stat.S_ISREG(os.fstat(handle).st_mode)
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise OSError(errno.EBADF, "as NFS says it")
        honest(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "new/run/lock"
    with files.locked(path, "run"):
        inode = path.stat().st_ino
        assert path.read_text().startswith(f"{socket.gethostname()}, process {os.getpid()}, ")
        with (
            pytest.raises(RunError, match=rf"new/run: another run is working there \(.*process {os.getpid()}, .*\); w"),
            files.locked(path, "run"),
        ):
            pass
        assert path.read_text(), "who was refused leaves the holder's name"
    assert path.stat().st_ino == inode and not path.read_text()

    path.write_text("elsewhere, process 1")  # was killed: its lock ended with it
    with files.locked(path, "run"):
        assert path.stat().st_ino == inode


def test_without_locks_on_a_file_system_work_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path / "lock", "run"), files.locked(tmp_path / "lock", "run"):
        pass
    assert "a file system without locks; do not start a second run" in capsys.readouterr().err


def test_temporaries_of_the_dead_are_cleared_and_those_of_the_living_and_of_other_machines_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = files.temporary_path(tmp_path / "unit")
    name = mine.name.replace(f"-{os.getpid()}-", "-{}-")
    dead, alive = (tmp_path / name.format(process) for process in (ended.pid, os.getppid()))
    elsewhere = tmp_path / mine.name.replace(mine.name[6:18], "0123456789ab")
    others = [tmp_path / ".hidden", tmp_path / "unit"]
    for path in (mine, dead, alive, elsewhere, *others):
        path.touch()
    files.clear_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere, *others])
