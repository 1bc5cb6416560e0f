"""Builds at scale: the same bytes for any workers, any engine and any number of kills; nothing lost silently."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, environment, make_text
from hypothesis import given
from hypothesis import strategies as st

from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig
from rnnlm.data.build.build import Build
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.hashing import fraction_of, permuted

UNIT_BYTES = 3000
OPTIONS = {"unit_bytes": UNIT_BYTES, "shard_tokens": 700, "valid_fraction": 0.2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 documents, every 40th a repetition, in more than 20 units."""
    texts = make_text(1200, seed=3)
    texts[::40] = [texts[7]] * len(texts[::40])
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    assert path.stat().st_size > 20 * UNIT_BYTES
    return path


def options(text: Path, directory: Path, **changed: Any) -> list[str]:
    """As given to the door."""
    keys = {"unit_bytes": "corpus", "shard_tokens": "stream", "valid_fraction": "stream", "workers": "build"}
    every = {**OPTIONS, "workers": 1, **changed}
    given = [f"--{keys.get(key, 'corpus')}.{key}={value}" for key, value in every.items()]
    return [f"--corpus.train={text}", f"--stream.directory={directory}", *given]


def build(
    text: Path | str | list[str],
    directory: Path,
    tokenizer: Tokenizer,
    make: Callable[[], Executor] | None = None,
    **corpus: Any,
) -> Path:
    """Build in this process, or on an executor."""
    made = corpus.pop("build", BuildConfig(workers=3 if make else 1))
    valid_fraction = corpus.pop("valid_fraction", 0.2)
    stream = StreamConfig(directory=str(directory), shard_tokens=700, valid_fraction=valid_fraction)
    paths = text if isinstance(text, list) else str(text)
    corpus = {"unit_bytes": UNIT_BYTES, **corpus}
    config = Config(corpus=CorpusConfig(train=paths, **corpus), stream=stream, build=made)
    Build(config, tokenizer).run(lambda size: None, make)
    return directory


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file of every stream."""
    files = [path for path in directory.glob("*/*") if path.parent.name in ("train", "valid")]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(text: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a build by one worker, which is checked against a slow obvious one."""
    directory = build(text, tmp_path_factory.mktemp("whole") / "s", tokenizer)
    for split in ("train", "valid"):
        lines = [line for line in text.read_text(encoding="utf-8").split("\n") if line.strip()]
        mine = [line for line in lines if (fraction_of(line.encode(), 0) < 0.2) == (split == "valid")]
        ids = [[*tokenizer.encode(line), tokenizer.eos_id] for line in mine]
        stream = TokenStream(directory / split)
        assert stream.windows(np.array([0]), len(stream))[0].tolist() == [token for each in ids for token in each]
        sizes = [(len(i), len(line.encode()), len(line.split())) for i, line in zip(ids, mine, strict=True)]
        assert stream.documents.tolist() == np.cumsum(sizes, 0).tolist()
        assert list(stream.verify())
        assert len(stream.manifest.shards) > 5
    return digests(directory)


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


def test_a_stream_removed_while_the_build_is_unfinished_is_made_again(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    assert faulty("commit:2", log, *options(text, directory))[0] == -signal.SIGKILL
    shutil.rmtree(directory / "valid")
    assert faulty("none", log, *options(text, directory))[0] == 0
    assert digests(directory) == whole


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
        made = BuildConfig(dask=cluster.scheduler_address)
        assert digests(build(text, tmp_path / "s", tokenizer, build=made)) == whole


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_file_or_seven_compressed_or_not(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, suffix: str
) -> None:
    import gzip

    lines = text.read_bytes().split(b"\n")
    for part in range(7):
        data = b"\n".join(lines[part * 1200 // 7 : (part + 1) * 1200 // 7])
        (tmp_path / f"{part}.txt{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    found = digests(build(str(tmp_path / f"*{suffix or '.txt'}"), tmp_path / "s", tokenizer, unit_bytes=900))
    same = [name for name in whole if name.endswith(".npy")]
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}


FAULTY = [sys.executable, str(ROOT / "tests/data/build/faulty_build.py")]


def start(fault: str, log: Path, *given: str) -> subprocess.Popen[str]:
    """The faulty door, begun in a process group of its own."""
    environ = environment(FAULT=fault, LOG=str(log))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*FAULTY, *given], env=environ, start_new_session=True, stdout=subprocess.DEVNULL, stderr=pipe, text=True
    )


def faulty(fault: str, log: Path, *given: str) -> tuple[int, str]:
    """Code and stderr of the faulty door."""
    process = start(fault, log, *given)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr


def prepare(directory: Path, tokenizer: Tokenizer) -> Path:
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    return directory


def first_unit(log: Path) -> float:
    """Wait until a worker begins; the time."""
    while not log.exists():
        time.sleep(0.002)
    return time.monotonic()


def begun_units(log: Path) -> set[str]:
    return {line.split()[1] for line in log.read_text().splitlines() if line.startswith("begin ")}


def encoded(log: Path) -> list[str]:
    """Units whose encoding ended, in order."""
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith("end ")]


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
def test_fault_25_killed_anywhere_the_same_command_goes_on(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path, fault: str, workers: int
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    given = options(text, directory, workers=workers)
    assert faulty(fault, log, *given)[0] == -signal.SIGKILL
    before = encoded(log)
    code, stderr = faulty("none", log, *given)
    assert code == 0, stderr
    assert digests(directory) == whole
    assert sorted(path.name for path in directory.iterdir()) == ["tokenizer.model", "train", "valid"]
    twice = [name for name in set(encoded(log)) if encoded(log).count(name) > 1]
    assert len(twice) <= workers, "a unit that was renamed but not logged, one for each worker at most"
    assert fault.startswith("unit") or encoded(log) == before, "the commit encodes nothing again"


STEPS = (
    "unit", "spill_hashes", "spill_hashes-end", "find_repeats", "find_repeats-end", "drop_repeats", "drop_repeats-end",
    "spill_shuffled", "spill_shuffled-end", "gather_shuffled", "gather_shuffled-end", "shard", "commit",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f"{step}:2" for step in STEPS])
def test_fault_25_killed_while_deduplicating_or_shuffling(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, fault: str
) -> None:
    given = {"deduplicate": "true", "shuffle_seed": 3}
    whole = digests(build(text, tmp_path / "whole", tokenizer, deduplicate=True, shuffle_seed=3))
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    assert faulty(fault, log, *options(text, directory, **given))[0] == -signal.SIGKILL
    assert faulty("none", log, *options(text, directory, **given))[0] == 0
    assert digests(directory) == whole


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
        os.killpg(process.pid, signal.SIGKILL) if running else None
        process.communicate()
        entries = len(list(directory.glob("build.partial/*/train-shard-*.json")))
        units = len(list(directory.glob("build.partial/*/units/*.unit")))
        done = (
            "finished" if not running else "commit" if (directory / "valid").exists() or entries else f"{units} units"
        )
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
    code, stderr = faulty("worker-once:train-000000-000011", log, *options(text, directory, workers=2))
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


def test_fault_26_a_pool_that_breaks_between_tasks_is_made_anew(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    assert digests(build(text, tmp_path / "s", tokenizer, Breaking)) == whole
    assert Breaking.made == 2


def test_fault_26_a_unit_that_kills_its_workers_is_set_aside(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    fault = "worker:train-000000-000011"
    code, stderr = faulty(fault, log, *options(text, directory, workers=2))
    assert code == 2, stderr
    assert f"{text}, unit 11 (bytes 33,000 to 36,000): killed its worker twice" in stderr, stderr
    units = sorted(directory.glob("build.partial/*/units/*.unit"))
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


def test_fault_24_a_full_disk_is_said_and_the_build_goes_on(
    text: Path, tokenizer: Tokenizer, whole: dict[str, str], tmp_path: Path
) -> None:
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    for fault in ("full:1", "full:9", "full:60"):
        code, stderr = faulty(fault, log, *options(text, directory))
        assert code == 1, stderr
        assert stderr.strip().splitlines()[-1].startswith("error: [Errno 28] No space left on device; make room")
        assert not list(directory.glob("build.partial/*/*/.*")), "no half file stays"
    assert len(encoded(log)) == len(set(encoded(log))) > 8
    assert faulty("none", log, *options(text, directory))[0] == 0
    assert digests(directory) == whole


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


def decoded(directory: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    stream = TokenStream(directory / split)
    tokens, ends = stream.windows(np.array([0]), len(stream))[0], stream.documents[:, 0]
    return [tokenizer.decode(tokens[a : b - 1]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_an_empty_input_that_is_deduplicated_is_an_error_of_the_user(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"\n")
    with pytest.raises(UserError, match="corpus.train: no text in it"):
        build(tmp_path / "empty.txt", tmp_path / "s", tokenizer, deduplicate=True)


def test_deduplication_keeps_the_first_of_each(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnnlm.data.build.assemble.RUN_HASHES", 100)
    lines = text.read_text(encoding="utf-8").split("\n")
    build(text, tmp_path / "a", tokenizer)
    build(text, tmp_path / "b", tokenizer, deduplicate=True)
    build(text, tmp_path / "c", tokenizer, lambda: ThreadPoolExecutor(3), deduplicate=True, unit_bytes=1000)
    for split in ("train", "valid"):
        every, once = decoded(tmp_path / "a", split, tokenizer), decoded(tmp_path / "b", split, tokenizer)
        assert once == list(dict.fromkeys(every))
        records = TokenStream(tmp_path / "b" / split).manifest.records
        assert records["duplicate"] == len(every) - len(once) > 0
        assert records["read"] == records["kept"] + records["empty"] + records["duplicate"]
    assert sum(len(decoded(tmp_path / "b", split, tokenizer)) for split in ("train", "valid")) == len(set(lines))
    found = [{k: v for k, v in digests(tmp_path / name).items() if k.endswith(".npy")} for name in "bc"]
    assert found[0] == found[1]


def test_shuffling_permutes_whole_documents(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(text, tmp_path / "a", tokenizer)
    build(text, tmp_path / "b", tokenizer, shuffle_seed=0, deduplicate=True)
    monkeypatch.setattr("rnnlm.data.build.assemble.RUN_TOKENS", 500)
    build(
        text,
        tmp_path / "c",
        tokenizer,
        lambda: ThreadPoolExecutor(3),
        shuffle_seed=0,
        unit_bytes=1000,
        deduplicate=True,
    )
    build(text, tmp_path / "d", tokenizer, shuffle_seed=1, deduplicate=True)
    for split in ("train", "valid"):
        plain = list(dict.fromkeys(decoded(tmp_path / "a", split, tokenizer)))
        b, c, d = (decoded(tmp_path / name, split, tokenizer) for name in "bcd")
        assert b == c != d
        assert plain != b
        assert sorted(b) == sorted(d) == sorted(plain)
        assert list(TokenStream(tmp_path / "c" / split).verify())
        neighbours = set(pairwise(plain)) & set(pairwise(b))
        assert len(neighbours) < 0.05 * len(plain)


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_the_keyed_permutation_is_one(size: int, seed: int) -> None:
    out = permuted(np.arange(size, dtype=np.uint64), size, seed)
    assert sorted(out.tolist()) == list(range(size))


def test_the_keyed_permutation_is_pinned() -> None:
    assert permuted(np.arange(6, dtype=np.uint64), 1000, 0).tolist() == PINNED, "a new version must shuffle as before"


PINNED = [402, 548, 919, 180, 312, 508]


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_fault_27_a_document_too_long_for_memory_is_encoded_in_pieces(
    tmp_path: Path, tokenizer: Tokenizer, document: str
) -> None:
    words = " ".join(make_text(4000, seed=4))
    texts = ["short one", words, "short two", words[: len(words) // 2].replace(" ", "\u00a0 ")]
    join = {"line": "\n", "paragraph": "\n\n", "file": " "}[document]
    (tmp_path / "long.txt").write_text(join.join(texts), encoding="utf-8")
    for name, size in (("a", 2**30), ("b", 1000)):
        limits = {"document": document, "max_whole_bytes": size, "valid_fraction": 0}
        build(tmp_path / "long.txt", tmp_path / name, tokenizer, **limits)
    found = [digests_of_arrays(tmp_path / name) for name in "ab"]
    assert found[0] == found[1]


def digests_of_arrays(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(directory).items() if name.endswith(".npy")}


def test_fault_27_a_long_word_with_a_bad_end_is_one_rejected_record(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "word.txt").write_bytes(b"good one\n" + b"x" * 3_000_000 + b"\xff\nanother good one\n")
    given = {"max_whole_bytes": 2**20, "valid_fraction": 0, "unit_bytes": 2**25}
    build(tmp_path / "word.txt", tmp_path / "s", tokenizer, on_bad_record="skip", **given)
    assert decoded(tmp_path / "s", "train", tokenizer) == ["good one", "another good one"]
    records = TokenStream(tmp_path / "s/train").manifest.records
    assert records == {"read": 3, "kept": 2, "empty": 0, "invalid UTF-8": 1}


def test_fault_27_every_rejected_record_is_counted_and_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = [json.dumps({"text": text}).encode() for text in make_text(300, seed=8)]
    bad = {
        20: (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        50: (b'{"text": ', "invalid JSON or field"),
        77: (b'{"other": 1}', "invalid JSON or field"),
        120: (json.dumps({"text": "x" * 3000}).encode(), "oversized document"),
        200: (b'{"text": "nul \\u0000 inside"}', ""),
        250: (json.dumps({"text": "y " * 9000}).encode(), "oversized document"),
        260: (b'{"text": "  "}', "empty"),
    }
    for place, (record, _) in bad.items():
        good[place] = record
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(good))
    offsets = np.cumsum([0, *(len(line) + 1 for line in good)])
    expected = [
        {"file": "data.jsonl", "at": int(offsets[place]), "reason": reason}
        for place, (_, reason) in bad.items() if reason not in ("", "empty")
    ]  # fmt: skip
    given = {"document": "jsonl", "max_document_bytes": 2000}
    with pytest.raises(UserError, match=r"data.jsonl: record at byte \d+: .*on_bad_record=skip"):
        build(tmp_path / "data.jsonl", tmp_path / "fail", tokenizer, **given)
    for policy in ("skip", "replace"):
        build(tmp_path / "data.jsonl", tmp_path / policy, tokenizer, **given, on_bad_record=policy)
        manifest = TokenStream(tmp_path / policy / "train").manifest
        listed = [json.loads(line) for line in (tmp_path / policy / "train/rejected.jsonl").read_text().splitlines()]
        if policy == "replace":
            assert listed.pop(0) == {**expected[0], "reason": "invalid UTF-8, mended"}
            assert manifest.mended + TokenStream(tmp_path / policy / "valid").manifest.mended == 1
        assert listed == expected[policy == "replace" :]
        records = dict(manifest.records)
        valid = TokenStream(tmp_path / policy / "valid").manifest.records["kept"]
        assert records.pop("read") == sum(records.values()) == 300 - valid
        assert records["empty"] == 1 and records["oversized document"] == 2
    damaged = tmp_path / "skip/train/rejected.jsonl"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"]\n")
    with pytest.raises(ValueError, match="rejected.jsonl"):
        list(TokenStream(tmp_path / "skip/train").verify())


def test_a_tokenizer_that_needs_whole_texts_gives_the_same_streams_and_refuses_long_ones(
    text: Path, tmp_path: Path
) -> None:
    from rnnlm.config import TokenizerConfig
    from rnnlm.data.tokenizer_training import train

    unigram = train(make_text(400), TokenizerConfig(vocab_size=285, kind="unigram"))
    build(text, tmp_path / "s", unigram)
    found = decoded(tmp_path / "s", "train", unigram) + decoded(tmp_path / "s", "valid", unigram)
    assert sorted(found) == sorted(text.read_text(encoding="utf-8").split("\n"))
    with pytest.raises(UserError, match=r"record at byte \d+: oversized document \(\d+ bytes, corpus.max_whole_bytes"):
        build(text, tmp_path / "t", unigram, max_whole_bytes=60)
