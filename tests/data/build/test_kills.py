"""A build that is killed, loses workers or fills the disk: the same bytes after it, and nothing half done is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from build_helpers import (
    UNIT_BYTES,
    begun_units,
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
    """How far an unfinished build has come."""
    entries = len(list(directory.glob("build/work-*/train-shard-*.json")))
    units = len(list(directory.glob("build/units/*/*.unit")))
    return "commit" if (directory / "valid").exists() or entries else f"{units} units"


@pytest.mark.slow
def test_fault_25_fifty_kills_at_any_moment(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Uniform over the measured time of a build on two workers, from its first unit on; prints where each fell."""
    many = tmp_path / "many.txt"
    many.write_text("\n".join(make_text(12_000, seed=5)), encoding="utf-8")
    directory, log = prepare(tmp_path / "timed", tokenizer), tmp_path / "timed.log"
    process = start("none", log, *options(many, directory, workers=2))
    begun = first_unit(log)
    process.communicate(timeout=120)
    duration, expected = time.monotonic() - begun, digests(directory)

    fell: list[str] = []
    draw = random.Random(0)
    for kill in range(75):
        directory, log = prepare(tmp_path / f"s{kill}", tokenizer), tmp_path / f"log{kill}"
        given = options(many, directory, workers=2)
        process = start("none", log, *given)
        first_unit(log)
        time.sleep(duration * (kill + draw.random()) / 75)
        running = process.poll() is None
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = progress_of(directory) if running else "finished"
        fell.append(done)

        code, stderr = faulty("none", log, *given)
        assert code == 0, stderr
        assert digests(directory) == expected, f"kill {kill} at {done}"
        repeated = [name for name in begun_units(log) if log.read_text().count(f"begin {name}\n") > 1]
        assert len(repeated) <= 2, f"kill {kill} at {done}: encoded again {repeated}"

    print(f"a build of {len(begun_units(tmp_path / 'timed.log'))} units in {duration:.2f} s; kills fell:", fell)
    assert sum(done != "finished" for done in fell) >= 50 and fell.count("commit") >= 5


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
