"""Tasks that processes share: each is done once by whoever is alive, and all who share them wait for the last."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rnnlm.data.build.executor import Inline, WorkerPool, process_pool
from rnnlm.data.build.shared_tasks import LOCKS, FileTask, SharedPool, joined, taken
from rnnlm.errors import RunError

TASKS = 40


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work" / LOCKS).mkdir(parents=True)
    return tmp_path / "work"


def write(path: Path) -> None:
    """Note that it was called, and give the file its name at the end, as every task does."""
    with path.with_name("log").open("a") as log:
        log.write(f"{path.name}\n")
    path.with_suffix(".partial").touch()
    path.with_suffix(".partial").rename(path)


def tasks_in(work: Path) -> list[FileTask]:
    return [FileTask(work / f"file-{number}", write, (work / f"file-{number}",)) for number in range(TASKS)]


def share(work: Path, task: tuple[int, int] = (0, 1)) -> None:
    with WorkerPool(Inline, 1) as pool:
        SharedPool(pool, work, task).write("phase", tasks_in(work))
    assert all(task.path.exists() for task in tasks_in(work))


def written(work: Path) -> Counter[str]:
    return Counter((work / "log").read_text().split())


def test_those_who_share_tasks_do_each_once_and_all_return_when_all_are_done(work: Path) -> None:
    threads = [threading.Thread(target=share, args=(work, task)) for task in ((0, 1), (1, 3), (1, 3), (7, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written(work) == {f"file-{number}": 1 for number in range(TASKS)}
    assert not list((work / LOCKS).iterdir()), "locks of what is done are gone"


def test_a_task_that_someone_alive_is_at_is_waited_for(work: Path) -> None:
    thread = threading.Thread(target=share, args=(work,))
    with taken(work / LOCKS, work / "file-7") as is_mine:
        assert is_mine
        thread.start()
        while not (work / "log").exists() or len(written(work)) < TASKS - 1:
            assert thread.is_alive()
        with taken(work / LOCKS, work / "file-7") as again:
            assert not again
        write(work / "file-7")
    thread.join()
    assert written(work)["file-7"] == 1


def die_once(work: Path, task: FileTask) -> None:
    """A worker killed while it has the lock of a task, the first time."""
    with taken(work / LOCKS, task.path) as is_mine:
        assert is_mine
        if not (work / "died").exists():
            (work / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        write(task.path)


def test_the_task_of_one_who_died_is_free(work: Path) -> None:
    with process_pool(2) as pool:
        assert SharedPool(pool, work).run("phase", tasks_in(work)[:3], die_once, work) == []
    assert (work / "died").exists()
    assert sorted(written(work)) == ["file-0", "file-1", "file-2"]


def test_without_locks_everything_is_done_and_said_once(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", missing)
    with joined(work / "lock", "ab", "streams/my") as leave:
        share(work)
        share(work)
        assert leave()
    assert written(work) == {f"file-{number}": 1 for number in range(TASKS)}
    assert capsys.readouterr().err.count("streams/my is on a file system without locks") == 1


def test_a_task_whose_inputs_are_gone_since_another_did_it_is_done(work: Path) -> None:
    """As where an NFS client has not seen yet that the phase is over."""

    def late(path: Path) -> None:
        write(path)
        raise FileNotFoundError(path.with_name("spill"))

    with WorkerPool(Inline, 1) as pool:
        SharedPool(pool, work).write("phase", [FileTask(work / "file", late, (work / "file",))])

        def broken(path: Path) -> None:
            raise FileNotFoundError(path)

        with pytest.raises(FileNotFoundError):
            SharedPool(pool, work).write("other", [FileTask(work / "none", broken, (work / "none",))])


def test_one_build_at_a_time_by_any_number_and_the_last_one_knows(tmp_path: Path) -> None:
    lock = tmp_path / "build/lock"
    with ExitStack() as others:
        leave = [others.enter_context(joined(lock, "ab", "streams/my")) for _ in range(3)]
        message = rf"streams/my: another build is working there \(.*process {os.getpid()}, .*\); wait for it"
        with pytest.raises(RunError, match=message), joined(lock, "cd", "streams/my"):
            pass
        assert not leave[0]()

    def alone() -> Iterator[bool]:
        with joined(lock, "cd", "streams/my") as leave:
            yield leave()

    assert list(alone()) == [True]
    assert lock.is_file()
