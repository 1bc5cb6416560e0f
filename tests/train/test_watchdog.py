"""Fault 15: a process that hangs ends, whatever hangs in it, and its stacks are in a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from rnnlm.train.watchdog import Watchdog

BEGIN = (
    "import ctypes, fcntl, os, sys, time\nfrom pathlib import Path\nfrom rnnlm.train import watchdog\n"
    "watchdog.TIMER_SECONDS = watchdog.EXIT_SECONDS = 1.0\n"
    "dog = watchdog.Watchdog(0.5, Path(sys.argv[1]))\n"
    "def hang(depth=80):\n    time.sleep(1000) if not depth else hang(depth - 1)\n"
)
FULL = (  # a pipe that nobody reads, with room for so many bytes
    "ours, full = os.pipe()\nfcntl.fcntl(full, fcntl.F_SETPIPE_SZ, 2**16)\nos.write(full, bytes(2**16))\n"
    "os.read(ours, {room})\n"
)


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(path)], env=environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_fault_15_a_thread_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "hang-rank-0.txt"
    path.write_text("of an earlier attempt\n")
    done = run("dog.start()\nhang()", path)
    assert done.returncode == 1
    why = r"error: rank 0 has done nothing for \d+ seconds \(run.timeout_minutes\): it hangs, or waits for .*"
    assert re.fullmatch(rf"{why}; its stacks: {re.escape(str(path))}\n", done.stderr), done.stderr

    text = path.read_text()
    assert text.startswith("of an earlier attempt\n")
    assert re.search(rf"^.*: {why}$", text, re.M)
    assert text.count('File "<string>", line 7 in hang\n') > 80


def test_fault_15_an_extension_that_hangs_with_the_lock_of_python(tmp_path: Path) -> None:
    """No thread gets a turn to say anything; what PyDLL calls keeps the lock."""
    path = tmp_path / "hang-rank-0.txt"
    done = run("dog.start()\nctypes.PyDLL(None).sleep(1000)", path)
    assert (done.returncode, done.stderr) == (1, "")
    text = path.read_text()
    assert text.startswith("Timeout ") and text.endswith('\n  File "<string>", line 9 in <module>\n'), text


@pytest.mark.parametrize("where", ["stderr", "the file", "the file, later"])
def test_fault_15_no_end_depends_on_who_takes_the_stacks(tmp_path: Path, where: str) -> None:
    """A launcher that reads no more; a disk that hangs at once, or in the middle of the stacks."""
    script = FULL.format(room=4096 if where == "the file, later" else 1)
    script += "os.dup2(full, 2)\n" if where == "stderr" else "dog._open = lambda: os.fdopen(full, 'wb', buffering=0)\n"
    done = run(f"{script}dog.start()\nhang()", tmp_path / "hang-rank-0.txt")
    assert done.returncode == 1
    assert ("has done nothing for" in done.stderr) == (where != "stderr")


def test_a_file_stays_only_where_there_are_stacks(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("of an earlier attempt")
    for name in "01":
        watchdog = Watchdog(60.0, tmp_path / name)
        watchdog.start()
        assert (tmp_path / name).exists()
        for _ in range(1000):
            watchdog.beat()
        watchdog.close()
        watchdog.close()
    Watchdog(0.0, tmp_path / "2").start()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
