"""Scripts of this checkout as processes: run to their end, or killed with all that they started."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rnnlm.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = {"SIGKILL to all": 0.3, "SIGKILL to one": 0.3, "SIGKILL to the launcher": 0.2, "SIGTERM": 0.2}


class Processes:
    """A command and all that it started."""

    def __init__(self, command: Sequence[str], log: Path):
        self._log = log.open("ab")
        self.first = psutil.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=_environment()
        )
        self._seen: dict[int, psutil.Process] = {}

    def all(self) -> list[psutil.Process]:
        """The processes that are alive, the launcher first, then by age."""
        with suppress(psutil.NoSuchProcess):
            self._seen.update({each.pid: each for each in self.first.children(recursive=True)})
        return [each for each in (self.first, *self._seen.values()) if _is_alive(each)]

    def signal(self, how: str, draw: random.Random) -> None:
        """Send what `how` names, one of SIGNALS."""
        found = self.all()
        targets = found[:1]
        if how.endswith("to all"):
            targets = found
        elif how.endswith("to one") and found:  # they may have ended just now
            targets = [draw.choice(found[1:] or found)]

        for each in targets:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGTERM if how.startswith("SIGTERM") else signal.SIGKILL)

    def wait(self, seconds: float) -> int:
        """Wait until all have ended; the exit code of the first one.

        Raises:
            RunError: some have not; they are killed then.
        """
        until = time.monotonic() + seconds
        while left := self.all():
            if time.monotonic() > until:
                names = "; ".join(f"{each.pid} {' '.join(each.cmdline()[-3:])}"[:200] for each in left)
                self.signal("SIGKILL to all", random.Random())
                raise RunError(f"still there {seconds:.0f} s after the signal: {names} (log: {self._log.name})")
            self.first.poll()
            time.sleep(0.01)
        self._log.close()
        return int(self.first.wait())


def _environment() -> dict[str, str]:
    """That of this process, with the package of this checkout first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def call(command: Sequence[str], log: Path) -> None:
    """Run a command that nobody disturbs.

    Raises:
        RunError: it failed.
    """
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=_environment(), check=False).returncode
    if code:
        tail = " ".join(log.read_text(errors="replace").split("\n")[-4:])
        raise RunError(f"{' '.join(command)}: ended with {code}, left alone: {tail} ({log})")


def script(name: str) -> list[str]:
    """The command of a script of this checkout."""
    return [sys.executable, str(ROOT / name)]


def choose(weights: dict[str, float], draw: random.Random) -> str:
    """One of the names, by these weights."""
    return draw.choices(list(weights), list(weights.values()))[0]


def make_tokenizer(directory: Path) -> list[str]:
    """A text, and a tokenizer for it; the options of tools/build_stream.py for both."""
    data = [f"--corpus.train={write_text(directory / 'text.txt', 2000)}", f"--stream.directory={directory}"]
    call([*script("tools/train_tokenizer.py"), *data, "--tokenizer.vocab_size=400"], directory / "log.txt")
    return data


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """Lines of words, some of them twice."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij漢é", k=draw.randint(1, 8))) for _ in range(500)]
    lines = [" ".join(draw.choices(words, k=draw.randint(3, 60))) for _ in range(documents)]
    path.write_text("\n".join(lines + lines[::7]) + "\n", encoding="utf-8")
    return path
