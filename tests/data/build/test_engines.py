"""Any engine gives the same bytes: processes, threads, Dask, tasks of an array; one build in a directory at a time."""

from __future__ import annotations

import gzip
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from build_helpers import (
    build,
    build_whole,
    digests,
    digests_of_arrays,
    encoded,
    faulty,
    first_unit,
    options,
    prepare,
    start,
    write_text,
)

from rnnlm.config import BuildConfig
from rnnlm.data.build.build import parse_task
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_whole(text, tmp_path_factory.mktemp("whole") / "s", tokenizer)


@pytest.mark.parametrize(
    "workers", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_any_number_of_processes(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, workers: int
) -> None:
    assert digests(build(text, tmp_path / "s", tokenizer, build=BuildConfig(workers=workers))) == whole


@pytest.mark.parametrize("threads", [3, 8])
def test_any_executor(text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, threads: int) -> None:
    assert digests(build(text, tmp_path / "s", tokenizer, lambda: ThreadPoolExecutor(threads))) == whole


def test_tasks_of_an_array_started_one_after_the_other_and_one_killed(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each begins when the one before has encoded something; all that live go through to the commit together."""
    given = {"deduplicate": "true", "shuffle_seed": 3}
    whole = digests(build(text, tmp_path / "whole", tokenizer, deduplicate=True, shuffle_seed=3))
    directory = prepare(tmp_path / "s", tokenizer)
    running = []
    for task, fault in (("3/4", "unit:6"), ("0/4", "none"), ("9/4", "spill_shuffled:2"), ("", "none")):
        log = tmp_path / f"log{len(running)}"
        running.append(start(fault, log, *options(text, directory, **given), f"--build.task={task}"))
        first_unit(log, running[-1])

    for process in running:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode in (0, -signal.SIGKILL), stderr
    assert running[0].returncode == -signal.SIGKILL, "else it was too late for the fault"
    assert digests(directory) == whole
    written = [name for log in tmp_path.glob("log*") for name in encoded(log)]
    assert len(written) - len(set(written)) <= 1, "the unit of the one that died before it could be said"
    assert not list(directory.glob("build/work-*"))


def test_any_task_of_an_array_alone_makes_the_streams(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    """As of an array with a stride, or of which only one has begun; those that come later have nothing to do."""
    for task in ("14/8", "3/16", "16/16"):
        build(text, tmp_path / "s", tokenizer, build=BuildConfig(workers=1, task=task))
        assert digests(tmp_path / "s") == whole


@pytest.mark.parametrize("task", ["3", "3/0", "-1/4", "a/b", "1/4/2"])
def test_a_task_that_is_none_is_refused(task: str) -> None:
    with pytest.raises(UserError, match=rf"build.task={task}: expected a task and how many there are, as in 3/16"):
        parse_task(task)


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_dask(text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, processes: bool) -> None:
    import distributed

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=processes, dashboard_address=None, host="127.0.0.1",
        scheduler_port=0, protocol="tcp://",
    ) as cluster:  # fmt: skip
        engine = BuildConfig(dask=cluster.scheduler_address)
        assert digests(build(text, tmp_path / "s", tokenizer, build=engine)) == whole


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_file_or_seven_compressed_or_not(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, suffix: str
) -> None:
    lines = text.read_bytes().split(b"\n")
    for file in range(7):
        data = b"\n".join(lines[file * 1200 // 7 : (file + 1) * 1200 // 7])
        (tmp_path / f"{file}.txt{suffix}").write_bytes(gzip.compress(data) if suffix else data)

    found = digests_of_arrays(build(str(tmp_path / f"*{suffix or '.txt'}"), tmp_path / "s", tokenizer, unit_bytes=900))
    assert len(found) > 5
    assert found == {name: whole[name] for name in found}


def test_another_build_in_the_same_directory_is_refused(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **named: Any) -> Any:
            entered.set()
            leave.wait(60)
            return super().submit(*arguments, **named)

    first = threading.Thread(target=build, args=(text, tmp_path / "s", tokenizer, lambda: Slow(1)))
    first.start()
    assert entered.wait(60)
    with pytest.raises(
        UserError, match=rf"s: another build is working there \(.*process {os.getpid()}, .*\); wait for it"
    ):
        build(text, tmp_path / "s", tokenizer, deduplicate=True)

    leave.set()
    first.join(60)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["build", "train", "valid"]


def test_units_of_an_edited_file_are_not_used(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    copy, directory = tmp_path / "text.txt", prepare(tmp_path / "s", tokenizer)
    copy.write_bytes(text.read_bytes().replace(b"anna", b"otto"))
    assert faulty("unit:9", tmp_path / "log", *options(copy, directory))[0] == -signal.SIGKILL
    copy.write_bytes(text.read_bytes())
    os.utime(copy, (1, 1))
    assert digests(build(copy, tmp_path / "s", tokenizer)) == whole
