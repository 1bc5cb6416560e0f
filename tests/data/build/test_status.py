"""How far a build is, as `tools/build_stream.py --status` tells it from the files that tasks leave."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from build_helpers import build, encoded, faulty, options, prepare, write_text
from conftest import RunHere

from rnnlm.data.build.shared_tasks import LOCKS, taken
from rnnlm.data.build.status import report
from rnnlm.data.tokenizer import Tokenizer


def test_status_tells_of_each_phase_what_is_done_and_of_each_task_who_is_at_it(
    tokenizer: Tokenizer, tmp_path: Path, run_here: RunHere
) -> None:
    text, directory, log = write_text(tmp_path), prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    given = options(text, directory, deduplicate="true")
    assert list(report(directory)) == [f"{directory}: no build is under way"]

    assert faulty("find_repeats:3", log, *given)[0] == -signal.SIGKILL
    before = sorted(path for path in directory.rglob("*"))
    done = run_here("tools/build_stream.py", f"--stream.directory={directory}", "--status")
    assert done.returncode == 0, done.stderr
    assert sorted(path for path in directory.rglob("*")) == before, "it writes nothing"

    kept, first, encode, hashes, repeats, last = done.stdout.splitlines()
    (work,) = directory.glob("build/work-*")
    units = len(encoded(log))
    assert first == f"{work}:"
    assert kept == f"{directory}/build/units: {units} unit(s) encoded, 0.2 MB"
    assert encode.startswith(f"  encode: {units} of {units} files, the last one "), "in order of their beginning"
    assert hashes.startswith("  train sort hashes: 12 of 12 files, ")
    assert repeats.startswith("  train find repeats: 2 of 12 files, 0.0 MB, the last one ")
    assert last == "  in work: nothing; no process is building"

    with taken(work / LOCKS, work / "train-repeats-000005"):
        *_, last = report(directory)
    assert last.startswith("  in work: train-repeats-000005 (") and "process" in last

    build(text, directory, tokenizer, deduplicate=True)
    train, valid, kept, last = report(directory)
    assert (train, valid) == (f"{directory}/train: is there", f"{directory}/valid: is there")
    assert f": {units} unit(s) encoded" in kept and last == f"{directory}: no build is under way"


@pytest.mark.parametrize("directory", ["", "nowhere"])
def test_status_of_no_directory_is_a_mistake_of_the_user(run_here: RunHere, directory: str) -> None:
    done = run_here("tools/build_stream.py", f"--stream.directory={directory}", "--status")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: stream.directory={directory}: no such directory; give that of the streams that are built\n"
    )
