"""Any engine gives the same bytes: processes, threads, Dask, tasks of an array; one build in a directory at a time."""

from __future__ import annotations

import gzip
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from build_helpers import build, build_whole, digests, digests_of_arrays, options, prepare, start, write_text

from rnnlm.config import BuildConfig
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


def test_tasks_of_an_array_at_the_same_time(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory = prepare(tmp_path / "s", tokenizer)
    running = [
        start("none", tmp_path / f"log{task}", *options(text, directory), f"--build.task={task}/3") for task in range(3)
    ]
    for process in running:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    assert digests(build(text, directory, tokenizer)) == whole


def test_tasks_of_an_array_in_any_order(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    for task in (3, 0, 4, 1, 2):
        build(text, tmp_path / "s", tokenizer, build=BuildConfig(workers=1, task=f"{task}/5"))
        assert not (tmp_path / "s/train").exists()
    units = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("build.partial/*/units/*.unit")}
    assert len(units) > 20
    build(text, tmp_path / "s", tokenizer, build=BuildConfig(workers=1, task="2/5"))  # once more: nothing to do
    assert {path: path.stat().st_mtime_ns for path in units} == units
    assert digests(build(text, tmp_path / "s", tokenizer)) == whole
    assert not (tmp_path / "s/build.partial").exists()


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
        build(text, tmp_path / "s", tokenizer)

    leave.set()
    first.join()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["train", "valid"]


def test_units_of_another_build_or_of_an_edited_file_are_not_used(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "text.txt"
    copy.write_bytes(text.read_bytes().replace(b"anna", b"otto"))
    build(copy, tmp_path / "s", tokenizer, build=BuildConfig(task="0/2"))
    copy.write_bytes(text.read_bytes())
    os.utime(copy, (1, 1))
    with pytest.raises(UserError, match="tasks of another build are there"):
        build(copy, tmp_path / "s", tokenizer, build=BuildConfig(task="1/2"))
    assert digests(build(copy, tmp_path / "s", tokenizer)) == whole
