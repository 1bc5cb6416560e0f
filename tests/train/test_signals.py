"""Signals, launchers, and ranks that hang or fail, in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, RunScript, TrainHere, command, environment, records

from rnnlm.train.signals import Interrupts

FAULTY = "tests/train/faulty_train.py"
LAUNCHERS = ("python", "accelerate 1", "accelerate 2", "torchrun 2")


class Run:
    """A run that takes long."""

    def __init__(self, experiment: Path, launcher: str, workers: int, slow_ms: int = 50):
        self.directory, self.output = experiment.parent / "run", experiment.parent / "output"
        name, _, processes = launcher.partition(" ")
        arguments = [
            "slow", str(slow_ms), f"--config={experiment}", "--train.max_steps=2000", "--train.epochs=999",
            "--run.log_every_steps=1", "--run.save_every_steps=2000", "--eval.every_steps=2000",
            f"--train.prefetch_threads={workers}",
        ]  # fmt: skip
        line = command(FAULTY, *arguments, processes=int(processes or 0))
        if name == "torchrun":
            line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
            line += [str(ROOT / FAULTY), *arguments]

        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                line, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True,
                cwd=experiment.parent,
            )  # fmt: skip

        until = time.monotonic() + 120
        while not (self.directory / "metrics.jsonl").exists() or len(records(self.directory, "train")) < 3:
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()
            time.sleep(0.05)

    def alive(self) -> list[int]:
        """Every process that still runs and was started for this run (a launcher's are in sessions of their own)."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = str(self.directory.parent).encode() in (path / "cmdline").read_bytes()  # empty once it has ended
            except OSError:
                continue
            if mine:
                found.append(int(path.name))
        return found

    def wait_until_all_gone(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.process.poll() is None or self.alive():
            assert time.monotonic() < until, (self.alive(), self.output.read_text())
            time.sleep(0.1)

    def saved(self) -> dict[str, object]:
        marker: dict[str, object] = json.loads((self.directory / "preempted.json").read_text())
        assert (self.directory / f"checkpoints/step-{marker['saved_step']:08d}/manifest.json").exists()
        return marker


@pytest.fixture
def started() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        for pid in run.alive():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("launcher", "workers", "number"),
    [
        pytest.param(
            launcher, workers, number, id=f"{launcher}-{workers}-{number.name}",
            marks=[] if (launcher, workers, number) in (
                ("python", 1, signal.SIGTERM), ("accelerate 2", 0, signal.SIGUSR1)
            ) else pytest.mark.slow,
        )
        for launcher in LAUNCHERS for workers in (0, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ],
)  # fmt: skip
def test_fault_08_to_11_a_signal_ends_a_run_at_a_step_and_it_is_saved(
    experiment: Path, started: list[Run], launcher: str, workers: int, number: signal.Signals, train_here: TrainHere
) -> None:
    run = Run(experiment, launcher, workers)
    started.append(run)
    begun = time.monotonic()
    os.kill(run.process.pid, number)
    run.wait_until_all_gone(60)

    assert (run.directory / "preempted.json").exists(), run.output.read_text()
    marker = run.saved()
    print(f"{launcher}, {workers} worker(s), {number.name}: exit code {run.process.returncode}, "
          f"{time.monotonic() - begun:.1f} s, {marker}")  # fmt: skip
    assert marker["step"] == marker["saved_step"] and marker["step"] < 2000  # type: ignore[operator]
    assert run.process.returncode == (75 if launcher == "python" else run.process.returncode) != 0

    if launcher == "python":
        done = train_here(f"--config={experiment}", f"--train.max_steps={marker['step'] + 1}")  # type: ignore[operator]
        assert done.returncode == 0 and f"resuming from step {marker['step']}" in done.stderr
        assert not (run.directory / "preempted.json").exists()


def test_fault_13_a_second_signal_stops_at_once(experiment: Path, tmp_path: Path) -> None:
    """Within a step that never ends."""
    process = subprocess.Popen(
        command(FAULTY, "stuck", "3", f"--config={experiment}"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment(), cwd=tmp_path, text=True,
    )  # fmt: skip
    guard = threading.Timer(120, process.kill)
    guard.start()

    try:
        assert process.stdout and process.stdout.readline() == "stuck\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "noted\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    finally:
        guard.cancel()
        process.kill()
        process.communicate()

    assert (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/preempted.json").exists()


@pytest.mark.parametrize(
    ("times", "ends"), [([10.0, 10.1, 10.9], False), ([10.0, 10.9, 11.0], True), ([10.0, 11.5], True)]
)
def test_fault_13_an_echo_of_the_first_signal_does_not_stop(
    monkeypatch: pytest.MonkeyPatch, times: list[float], ends: bool
) -> None:
    """A launcher passes on what the terminal has already sent: within a second, by a clock that stands in for time."""
    ahead, interrupts = list(times), Interrupts()
    interrupts._pipe = os.pipe()
    os.write(interrupts._pipe[1], bytes([signal.SIGCHLD, signal.SIGTERM, *[signal.SIGINT] * (len(times) - 1)]))
    os.close(interrupts._pipe[1])

    def end(code: int) -> None:
        raise SystemExit(code)

    with monkeypatch.context() as patched:
        patched.setattr("rnnlm.train.signals.time", SimpleNamespace(monotonic=lambda: ahead.pop(0)))
        patched.setattr("rnnlm.train.signals.os", SimpleNamespace(read=os.read, close=os.close, _exit=end))
        with pytest.raises(SystemExit) if ends else nullcontext() as ended:
            interrupts._listen()
    assert interrupts.first_signal == "SIGTERM" and not ahead
    if ended:
        assert ended.value.code == 128 + signal.SIGINT
        os.close(interrupts._pipe[0])


def test_fault_14_a_rank_that_raises_ends_all_and_says_why_once(experiment: Path, run_script: RunScript) -> None:
    done = run_script(FAULTY, "error", "3", f"--config={experiment}", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("ZeroDivisionError: a fault of the last process") == 1


def test_fault_15_a_rank_that_hangs_ends_all_with_stacks(
    experiment: Path, run_script: RunScript, tmp_path: Path
) -> None:
    done = run_script(FAULTY, "hang", "3", f"--config={experiment}", "--run.timeout_minutes=0.1", processes=2)
    assert done.returncode != 0
    why = r"^error: rank 1 has done nothing for \d+ seconds \(run.timeout_minutes\).*; its stacks: (.*)$"
    found = re.search(why, done.stderr, re.M)
    assert found, done.stderr
    assert tmp_path / found[1] == tmp_path / "run/hang-rank-1.txt"
    stacks = (tmp_path / found[1]).read_text()
    assert re.search(r"^ +File .*faulty_train.py\", line \d+ in <lambda>$", stacks, re.M), stacks


@pytest.mark.slow
def test_fault_15_a_slow_disk_is_no_hang(experiment: Path, run_script: RunScript, tmp_path: Path) -> None:
    """All ranks wait for a save that takes longer than run.timeout_minutes, and for the last one at the end."""
    options = (f"--config={experiment}", "--run.timeout_minutes=0.1", "--run.save_every_steps=5")
    done = run_script(FAULTY, "disk", "2000", *options, processes=2)
    assert done.returncode == 0, done.stderr
    waiting = "warning: waiting until the checkpoint before is written; save less often, or on a faster disk"
    assert f"{waiting}\n" in done.stderr, done.stderr
    assert "waiting until the last checkpoint is written\n" in done.stderr, "at the end there is no advice to give"
    assert (tmp_path / "run/checkpoints/step-00000020/manifest.json").exists()
    assert not list((tmp_path / "run").glob("hang-rank-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("also", "value"), [("", ""), ("nan+", "-7+")], ids=["while training", "after another fault"])
def test_fault_15_a_disk_that_hangs_ends_the_run(
    experiment: Path, run_script: RunScript, tmp_path: Path, also: str, value: str
) -> None:
    """The lock is held until then: no other attempt may write beside a thread that still does."""
    options = (f"--config={experiment}", "--run.timeout_minutes=0.02", "--run.save_every_steps=5")
    ended = ("--train.stop_after_skipped=2", "--run.log_every_steps=1") if also else ()
    done = run_script(FAULTY, f"{also}disk", f"{value}60000", *options, *ended)
    assert done.returncode == 1
    assert ("it was about to end: the last 2 steps had losses" in done.stderr) == bool(also)
    assert "has waited 7 seconds for a checkpoint to be written (6 times run.timeout_minutes)" in done.stderr
    stacks = (tmp_path / "run/hang-rank-0.txt").read_text()
    assert re.search(r"^.*files.py.* in write$|^.*faulty_train.py.* in write$", stacks, re.M), stacks
