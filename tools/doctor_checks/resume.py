"""A small run that is killed and resumed, by tools/prove_resume.py: the same bits as one that was left alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from doctor_checks.alone import ROOT
from doctor_checks.verdict import Verdict, right, untried, wrong
from rnnlm.machine import cores

ALONE, MOVED = "killed and resumed, deterministic", "killed and resumed on 1 and 2 processes with exact_slices"


def check_alone(options: Namespace) -> Iterator[Verdict]:
    """One line, of a process; on a CPU `check_moved` shows it as well."""
    if options.device == "cpu" and cores() > 1:
        yield untried(ALONE, "without a GPU the next line shows it as well")
    else:
        yield prove(ALONE, [1], options.device)


def check_moved(options: Namespace) -> Iterator[Verdict]:
    """One line, of a run that moves between one and two GPUs, or one and two processes on a CPU."""
    if options.device == "cuda" and options.gpus < 2:
        yield untried(MOVED, "there is one GPU")
    elif options.device == "cpu" and cores() < 2:
        yield untried(MOVED, "there is one core")
    else:
        yield prove(MOVED, [1, 2], options.device)


def prove(subject: str, processes: Sequence[int], device: str) -> Verdict:
    """Kill a run in the middle and finish it on the last of these numbers of processes."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as directory:
        done = subprocess.run(
            prove_command(processes, device, Path(directory)), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        return verdict_of(subject, done.returncode, done.stdout, done.stderr)


def prove_command(processes: Sequence[int], device: str, directory: Path) -> list[str]:
    """The command line of the proof."""
    launch = "cpu" if device == "cpu" else "one_node"
    return [
        sys.executable, str(ROOT / "tools/prove_resume.py"), "--attempts=1", "--steps=24", f"--directory={directory}",
        "--processes", *map(str, processes), f"--launch-config={ROOT / 'launch' / launch}.yaml", "--",
        f"--train.device={device}", "--train.deterministic=true",
    ]  # fmt: skip


def verdict_of(subject: str, code: int, out: str, errors: str) -> Verdict:
    """What the proof has printed, as a line."""
    lines = [line.strip() for line in f"{errors}\n{out}".splitlines() if line.strip()]
    ends = [line for line in lines if line.startswith("its end: ")]
    if not code and ends:
        return right(subject, ends[-1].removeprefix("its end: "))
    said = (ends or lines or ["it said nothing"])[-1]
    return wrong(subject, f"{said}; to see all of it: python tools/prove_resume.py --attempts=5")
