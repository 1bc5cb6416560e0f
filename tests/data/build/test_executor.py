"""Pools of workers: a death costs the task that died, and nothing else waits for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rnnlm.data.build.executor import WorkerPool, process_pool, stopping

MEETING = 3  # workers that must run at the same time


def meet_or_die(directory: Path, task: str) -> None:
    """The killer dies when it is called first; three others return when all of them run at the same time."""
    (directory / f"{task}-{os.getpid()}").touch()
    if task == "killer":
        if len(list(directory.glob("killer-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return

    group, until = int(task) // MEETING, time.monotonic() + 30  # to fail rather than hang
    (directory / f"met-{group}-{task}").touch()
    while len(list(directory.glob(f"met-{group}-*"))) < MEETING:
        assert time.monotonic() < until, "tasks run one at a time"


def test_after_a_death_the_other_tasks_go_on_at_full_width_and_the_suspect_is_last(tmp_path: Path) -> None:
    tasks = ["killer", *map(str, range(4 * MEETING))]
    done: list[str] = []
    with process_pool(MEETING) as pool:
        assert pool.run(meet_or_die, tmp_path, tasks, done.append) == []
    assert sorted(done) == sorted(tasks)
    assert done[-1] == "killer"
    runs = [path.name.split("-")[0] for path in tmp_path.iterdir() if path.name.split("-")[0] in tasks]
    assert sorted(runs) == sorted([*tasks, "killer"]), "no other task was run twice"


def die(directory: Path, task: int) -> None:
    """Die at every multiple of four."""
    with (directory / "log").open("a") as file:
        file.write(f"{task}\n")
    if task % 4 == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def test_tasks_that_die_twice_have_failed_and_only_they_are_tried_again(tmp_path: Path) -> None:
    with process_pool(2) as pool:
        failed = pool.run(die, tmp_path, range(9))
    assert sorted(failed) == [0, 4, 8]
    tried = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert sorted(tried) == sorted([*range(9), 0, 4, 8])


def test_tasks_that_run_when_another_raises_are_no_part_of_the_next_call() -> None:
    begun, leave = threading.Event(), threading.Event()

    def work(context: None, task: str) -> None:
        if task == "slow":
            begun.set()
            leave.wait(30)
        elif task == "bad":
            begun.wait(30)
            raise ValueError(task)

    done: list[str] = []
    with WorkerPool(lambda: ThreadPoolExecutor(2), 2) as pool:
        with pytest.raises(ValueError, match="bad"):
            pool.run(work, None, ["slow", "bad", "never begun"])
        leave.set()
        assert pool.run(work, None, ["a", "b"], done.append) == []
    assert sorted(done) == ["a", "b"]


def last_until_stopped(directory: Path, task: str) -> None:
    """One raises when the other runs, which lasts until it is told to stop, as a job does at the end of a unit."""
    until = time.monotonic() + 30
    if task == "bad":
        while not (directory / "begun").exists():
            assert time.monotonic() < until
        raise ValueError(task)

    (directory / "begun").touch()
    while not stopping():
        assert time.monotonic() < until, "nobody tells it"
    (directory / "stopped").touch()


def test_a_pool_that_is_left_early_stops_its_workers(tmp_path: Path) -> None:
    """By an error, or by Ctrl-C: nobody waits for the end of a compressed file."""
    with pytest.raises(ValueError, match="bad"), process_pool(2) as pool:
        pool.run(last_until_stopped, tmp_path, ["long", "bad"])
    assert (tmp_path / "stopped").exists()
