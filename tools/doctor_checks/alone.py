"""Checks in processes of their own: what crashes or hangs there is one line here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from doctor_checks.verdict import Verdict, wrong

ROOT = Path(__file__).resolve().parents[2]
MARK = "verdicts: "  # in front of what a check prints for us; libraries may print as well


def run_alone(name: str, limit_seconds: float, arguments: Sequence[str]) -> list[Verdict]:
    """The verdicts of the check of this name, in a process with all that it starts.

    Args:
        limit_seconds: after which it counts as hanging, and is killed.
        arguments: of tools/doctor.py, which the check reads too.
    """
    command = [sys.executable, str(ROOT / "tools/doctor.py"), f"--alone={name}", *arguments]
    return verdicts_of(name, command, limit_seconds)


def verdicts_of(name: str, command: Sequence[str], limit_seconds: float) -> list[Verdict]:
    """What a command prints behind MARK; a single verdict if it does not come so far."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    again = f"to see all of it: {' '.join(command)}"
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            return [wrong(name, f"has not ended after {limit_seconds:g} s and was killed; {again}")]
        finally:
            with suppress(ProcessLookupError):  # also what it has left behind
                os.killpg(process.pid, signal.SIGKILL)

    found = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
    if found:
        return [Verdict(**each) for each in json.loads(found[-1])]
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "it said nothing")
    if last.startswith("error: "):  # of the user's, with its way out
        return [wrong(name, last.removeprefix("error: "))]
    how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"code {process.returncode}"
    return [wrong(name, f"its process ended with {how}: {last.strip()}; {again}")]


def print_verdicts(found: Sequence[Verdict]) -> None:
    """What `verdicts_of` reads."""
    print(MARK + json.dumps([asdict(each) for each in found]), flush=True)


def records(found: Sequence[tuple[str, float, Verdict]]) -> list[dict[str, object]]:
    """For --json: of each line its check, the seconds of that check, and what it says."""
    return [{"check": name, "seconds": round(seconds, 3), **asdict(verdict)} for name, seconds, verdict in found]


def timed(name: str, limit_seconds: float, arguments: Sequence[str]) -> list[tuple[str, float, Verdict]]:
    """`run_alone` with its name and its seconds."""
    started = time.monotonic()
    found = run_alone(name, limit_seconds, arguments)
    return [(name, time.monotonic() - started, each) for each in found]


def arguments_of(options: Namespace) -> list[str]:
    """The command line that gives a check the same options."""
    config = [f"--config={path}" for path in options.config]
    behind = ["--", *options.arguments] if options.arguments else []
    return [f"--device={options.device}", f"--gpus={options.gpus}", *config, *behind]


def count_gpus(limit_seconds: float = 120) -> int:
    """GPUs that PyTorch sees, asked in a process of its own; 0 where that process fails, as `machine` will say."""
    command = [
        sys.executable,
        "-c",
        "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        return 0
    last = done.stdout.split()[-1:]
    return int(last[0]) if last and last[0].isdecimal() else 0
