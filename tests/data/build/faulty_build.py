"""tools/build_stream.py with faults: FAULT=... LOG=... python faulty_build.py OPTIONS...

Every unit that is written is a line in LOG before and after, also in workers: each imports this file.
FAULT: none; a place and a number, as in `unit:5`: SIGKILL to the whole process group there, the fifth time,
at `unit` (encoding it), `unit-end` (before its rename), the name of a function of a task, such as `find_repeats`, or
`find_repeats-end`, `shard`, `shard-end`, `commit` (before the rename of a stream), `commit-end`; `shard-once:NAME`
kills the worker that writes that shard, once; `worker:NAME` kills the worker alone whenever it encodes that unit,
`worker-once:NAME` the first time; `full:3`: no space is left on the disk at the third fsync of a process.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

import build_stream

from rnnlm.cli import run_entry_point
from rnnlm.data.build import assemble, encode, shared_tasks, stream_tasks

FAULT, LOG = os.environ["FAULT"], Path(os.environ["LOG"])
times: Counter[str] = Counter()
run_file_task, fsync = shared_tasks.run_file_task, os.fsync
write_unit, write_shard, place = encode.write_unit, stream_tasks.write_shard, assemble.place


def log(line: str) -> None:
    with LOG.open("a") as file:
        file.write(line + "\n")


def point(name: str) -> None:
    times[name] += 1
    if f"{name}:{times[name]}" == FAULT:
        log(f"killed at {FAULT}")
        os.killpg(0, signal.SIGKILL)


def faulty_unit(path: Path, *arguments: Any) -> None:
    point("unit")
    number = path.stem.rpartition("-")[2]
    log(f"begin {number}")

    kind, _, name = FAULT.partition(":")
    in_worker = multiprocessing.parent_process() is not None
    is_due = kind == "worker" or (kind == "worker-once" and LOG.read_text().count(f"begin {name}\n") == 1)
    if in_worker and number == name and is_due:
        os.kill(os.getpid(), signal.SIGKILL)

    write_unit(path, *arguments)
    log(f"end {number}")


def faulty_shard(path: Path, blocks: Any, tokenizer: Any) -> Any:
    point("shard")
    if f"shard-once:{path.stem}" == FAULT and f"killed in {path.stem}" not in LOG.read_text():

        def dying() -> Any:
            yield from blocks
            log(f"killed in {path.stem}")
            os.kill(os.getpid(), signal.SIGKILL)

        return write_shard(path, dying(), tokenizer)

    result = write_shard(path, blocks, tokenizer)
    point("shard-end")
    return result


def faulty_task(locks: Any, task: Any) -> None:
    point(task.function.__name__)
    run_file_task(locks, task)
    point(f"{task.function.__name__}-end")


def faulty_place(*arguments: Any) -> None:
    point("commit")
    place(*arguments)
    point("commit-end")


def faulty_fsync(handle: int) -> None:
    point("unit-end")
    times["fsync"] += 1
    if f"full:{times['fsync']}" == FAULT:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(handle)


stream_tasks.write_shard, shared_tasks.run_file_task = faulty_shard, faulty_task
assemble.place, encode.write_unit = faulty_place, faulty_unit
assemble.SPAN_HASHES, assemble.SPAN_TOKENS, assemble.PART_DOCUMENTS = 100, 2000, 150  # many spans of a small text
os.fsync = faulty_fsync

if __name__ == "__main__":
    run_entry_point(build_stream.main)
