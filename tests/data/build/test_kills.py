"""A build that is killed, loses workers or fills the disk: the same bytes after it, and nothing half done is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from build_helpers import (
    UNIT_BYTES,
    build,
    build_whole,
    digests,
    encoded,
    faulty,
    first_unit,
    options,
    prepare,
    start,
    write_text,
)
from conftest import make_text

from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_whole(text, tmp_path_factory.mktemp("whole") / "s", tokenizer)


def test_a_stream_removed_while_the_build_is_unfinished_is_made_again(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    assert faulty("commit:2", log, *options(text, directory))[0] == -signal.SIGKILL
    assert (directory / "valid").exists() and not (directory / "train").exists(), "what training opens first comes last"
    shutil.rmtree(directory / "valid")
    assert faulty("none", log, *options(text, directory))[0] == 0
    assert digests(directory) == whole


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        ("unit:7", 1),
        ("unit:3", 2),
        ("shard-end:4", 1),
        ("commit:2", 1),
        *(
            pytest.param(fault, 1, marks=pytest.mark.slow)
            for fault in ("unit-end:9", "shard:4", "commit:1", "commit-end:1", "commit-end:2")
        ),
    ],
)
def test_fault_25_killed_anywhere_the_same_command_continues(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, fault: str, workers: int
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    given = options(text, directory, workers=workers)
    assert faulty(fault, log, *given)[0] == -signal.SIGKILL
    before = encoded(log)

    code, stderr = faulty("none", log, *given)
    assert code == 0, stderr
    assert digests(directory) == whole
    assert sorted(path.name for path in directory.iterdir()) == ["build", "tokenizer.model", "train", "valid"]
    twice = [name for name in set(encoded(log)) if encoded(log).count(name) > 1]
    assert len(twice) <= workers, "a unit that was renamed but not logged, one for each worker at most"
    assert fault.startswith("unit") or encoded(log) == before, "the commit encodes nothing again"


PLACES = (
    "unit", "spill_hashes", "spill_hashes-end", "find_repeats", "find_repeats-end", "drop_repeats", "drop_repeats-end",
    "count_units", "make_part", "make_part-end", "join_parts", "join_parts-end",
    "spill_shuffled", "spill_shuffled-end", "gather_shuffled", "gather_shuffled-end", "shard", "commit",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f"{place}:2" for place in PLACES])
def test_fault_25_killed_while_deduplicating_or_shuffling(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, fault: str
) -> None:
    given = {"deduplicate": "true", "shuffle_seed": 3}
    whole = digests(build(text, tmp_path / "whole", tokenizer, deduplicate=True, shuffle_seed=3))
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    assert faulty(fault, log, *options(text, directory, **given))[0] == -signal.SIGKILL
    assert faulty("none", log, *options(text, directory, **given))[0] == 0
    assert digests(directory) == whole


def progress_of(directory: Path) -> str:
    """How far an unfinished build has come: the phase that began last."""
    phases = sorted(directory.glob("build/work-*/phases/*.json"), key=lambda path: path.stat().st_mtime_ns)
    return phases[-1].stem if phases else "nothing"


def named_sources(directory: Path) -> str:
    """Three sources with shares, of which the second repeats documents of the first, as corpus.train takes them."""
    sources = {}
    for number, (name, share) in enumerate({"books": 2.5, "news": 0.5, "web": 1.0}.items()):
        for part in range(3):
            lines = make_text(500, seed=number % 2 + part)
            (directory / f"{name}-{part}.txt").write_text("\n".join(lines), encoding="utf-8")
        sources[name] = {"paths": str(directory / f"{name}-*.txt"), "share": share}
    return json.dumps(sources)


KILLS = int(os.environ.get("KILLS", "60"))  # of `KILLS=200 pytest -m slow -s -k killed_at_any_moment`
DRAW = random.Random(int(os.environ.get("SEED", "0")))


@pytest.mark.slow
def test_fault_25_killed_at_any_moment(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Kills uniform over the measured time of a build, of all its processes; prints where each fell.

    In turn one process with two workers on one text, and arrays of two and three processes, of which one is killed and
    the others end the build, or all are, on sources with shares that are deduplicated and shuffled.
    """
    many = tmp_path / "many.txt"
    many.write_text("\n".join(make_text(5000, seed=5)), encoding="utf-8")
    mixed = {"deduplicate": "true", "shuffle_seed": 3, "valid_max_tokens": 7000}
    variants: list[tuple[Any, dict[str, Any], int, bool]] = [  # text, options, processes, whether all are killed
        (many, {"workers": 2}, 1, True),
        (named_sources(tmp_path), mixed, 2, False),
        (named_sources(tmp_path), mixed, 3, True),
    ]

    def begin(name: str, text: Any, changed: dict[str, Any], processes: int) -> tuple[Path, list[Popen[str]], float]:
        directory = prepare(tmp_path / name, tokenizer)
        begun = [
            start("none", tmp_path / f"{name}.log", *options(text, directory, **changed), f"--build.task={task}/2")
            for task in range(processes)
        ]
        return directory, begun, first_unit(tmp_path / f"{name}.log", begun[0])

    expected, durations = [], []
    for number, (text, changed, processes, _) in enumerate(variants):
        directory, begun, since = begin(f"whole{number}", text, changed, processes)
        assert [process.communicate(timeout=300)[0] or process.returncode for process in begun] == [0] * processes
        durations.append(time.monotonic() - since)
        expected.append(digests(directory))
    assert expected[1] == expected[2]

    fell = Counter[str]()
    for kill in range(KILLS):
        text, changed, processes, are_all = variants[kill % 3]
        directory, begun, _ = begin(f"s{kill}", text, changed, processes)
        time.sleep(durations[kill % 3] * DRAW.random())
        running = [process for process in begun if process.poll() is None][: processes if are_all else 1]
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
        done = progress_of(directory) if running else "finished"
        fell[done] += 1
        for process in begun:
            stderr = process.communicate(timeout=300)[1]
            assert process in running or process.returncode == 0, stderr

        code, stderr = faulty("none", tmp_path / f"s{kill}.log", *options(text, directory, **changed))
        assert code == 0, stderr
        assert digests(directory) == expected[kill % 3], f"kill {kill} at {done}"
        shutil.rmtree(directory)

    print(f"builds of {', '.join(f'{each:.2f} s' for each in durations)}; kills fell: {dict(fell)}")
    assert sum(fell.values()) - fell["finished"] >= KILLS / 2


def test_fault_26_a_worker_killed_once_is_replaced(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    code, stderr = faulty("worker-once:000011", log, *options(text, directory, workers=2))
    assert code == 0, stderr
    assert digests(directory) == whole


def test_fault_26_a_worker_killed_in_the_commit_leaves_nothing(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    code, stderr = faulty("shard-once:shard-00003", log, *options(text, directory, workers=2))
    assert code == 0, stderr
    assert "killed in shard-00003" in log.read_text()
    assert digests(directory) == whole


class Breaking(ThreadPoolExecutor):
    """Breaks when a task is submitted, the third one, as a pool does whose worker died in between."""

    made = 0

    def __init__(self) -> None:
        super().__init__(2)
        Breaking.made += 1
        self.submitted = 0

    def submit(self, *arguments: Any, **named: Any) -> Any:
        self.submitted += 1
        if Breaking.made == 1 and self.submitted == 3:
            raise BrokenExecutor("a worker died")
        return super().submit(*arguments, **named)


def test_fault_26_a_pool_that_breaks_between_tasks_is_recreated(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    assert digests(build(text, tmp_path / "s", tokenizer, Breaking)) == whole
    assert Breaking.made == 2


def test_fault_26_a_unit_that_kills_its_workers_fails_alone(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    fault = "worker:000011"
    code, stderr = faulty(fault, log, *options(text, directory, workers=2))
    assert code == 2, stderr
    assert f"{text}, unit 11 (bytes 33,000 to 36,000): killed its worker twice" in stderr, stderr
    units = sorted(directory.glob("build/units/*/*.unit"))
    assert len(units) == -(-text.stat().st_size // UNIT_BYTES) - 1, "all others are done"
    assert not (directory / "train").exists()

    given = options(text, directory, workers=2, on_bad_record="skip")
    code, stderr = faulty(fault, tmp_path / "other.log", *given)
    assert code == 0, stderr
    stream = TokenStream(directory / "train")
    assert stream.manifest.records["its worker was killed"] == 1
    listed = [json.loads(line) for line in (directory / "train/rejected.jsonl").read_text().splitlines()]
    assert listed == [{"file": "text.txt", "at": 33_000, "reason": "its worker was killed"}]
    assert list(stream.verify())


def test_fault_24_a_full_disk_is_reported_and_the_build_continues(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    for fault in ("full:1", "full:9", "full:60"):
        code, stderr = faulty(fault, log, *options(text, directory))
        assert code == 1, stderr
        assert stderr.strip().splitlines()[-1].startswith("error: [Errno 28] No space left on device; make room")
        assert not list(directory.glob("build/*/*/.*")), "no half file stays"

    assert len(encoded(log)) == len(set(encoded(log))) > 8
    assert faulty("none", log, *options(text, directory))[0] == 0
    assert digests(directory) == whole
