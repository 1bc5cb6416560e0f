"""Signals that ask a run to stop, and the death of its launcher.

The first signal is only noted: training stops at the next step's boundary, saves, and leaves a marker. The second, if
it comes a second or more after the first (a launcher passes on what the terminal has already sent), ends the process
at once; every file is whole at any moment. A launcher that dies takes its child with it: as if by SIGTERM when it
trains, and by SIGKILL before, as processes that look for each other without their launcher wait for minutes, and have
nothing to save. One that is told to stop kills its children some seconds later, however long their last save takes.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # prctl(2)
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")  # their scripts
LAUNCHER_MODULES = ("accelerate.commands", "torch.distributed.run", "torch.distributed.launch")  # after python -m
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds, in the environment of torchrun; from 2.12 on


class Interrupts:
    """A context in which SIGTERM, SIGINT and SIGUSR1 are requests. `first_signal`: the first one's name, empty before.

    A thread takes them from a pipe that Python's C handler writes them into: handlers in Python wait while the main
    thread is in a collective, perhaps for ever.
    """

    def __init__(self) -> None:
        self.first_signal = ""
        self._before: dict[int, Any] = {}
        self._pipe = (-1, -1)

    def __enter__(self) -> Interrupts:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=self._listen, daemon=True).start()

        # only signals that have a handler are written into the pipe; it need not do anything
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        die_with_launcher(signal.SIGKILL)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # ends the thread

    def _listen(self) -> None:
        """Note the first signal, and end the process at the second; an empty read is the end of the context."""
        first_at = 0.0
        while received := os.read(self._pipe[0], 1):
            number = received[0]
            if number not in SIGNALS:  # another one that has a handler
                continue

            if not self.first_signal:
                self.first_signal, first_at = signal.Signals(number).name, time.monotonic()
            elif time.monotonic() - first_at >= ECHO_SECONDS:
                os._exit(128 + number)  # the exit code that shells give it
        os.close(self._pipe[0])


def die_with_launcher(by: signal.Signals) -> None:
    """Be sent this signal when `accelerate launch` or torchrun dies: nobody else would end this process.

    A run that was started without a launcher stays when its terminal closes, as under nohup.
    """
    parent = os.getppid()
    if is_launcher(command_of(parent)):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by, 0, 0, 0)
        if os.getppid() != parent:  # it died meanwhile
            os.kill(os.getpid(), by)


def has_lost_launcher(environment: Mapping[str, str]) -> bool:
    """Whether the launcher died before this process could ask for its signal: then the first of all is its parent."""
    return "TORCHELASTIC_RUN_ID" in environment and os.getppid() == 1 and not is_launcher(command_of(1))


def command_of(process: int) -> list[str]:
    """The command line of a process; empty where that is not to be had."""
    try:
        return os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
    except OSError:  # it has ended, or this is not Linux
        return [""]


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of `accelerate launch` or torchrun: by its program, not by its arguments."""
    program, *arguments = command
    if not Path(program).name.startswith("python"):
        return Path(program).name in LAUNCHERS

    # python [options] script, python [options] -m module
    while arguments and arguments[0].startswith("-") and not arguments[0].startswith(("-m", "-c")):
        takes_value = arguments[0] in ("-W", "-X", "--check-hash-based-pycs")
        del arguments[: 1 + takes_value]
    if not arguments:
        return False
    if arguments[0].startswith("-m"):
        module = arguments[0].removeprefix("-m") or "".join(arguments[1:2])
        return any(module == known or module.startswith(f"{known}.") for known in LAUNCHER_MODULES)
    return Path(arguments[0]).name in LAUNCHERS


def short_shutdown(
    grace_seconds: float, torch_version: str, environment: Mapping[str, str], launcher: Sequence[str]
) -> str:
    """A warning where torchrun, or `accelerate launch` by it, kills before the grace is over; empty if all is well.

    Args:
        grace_seconds: run.grace_seconds.
        torch_version: before 2.12 it kills after 30 seconds, whatever it is told.
        environment: of this process.
        launcher: the command line of the parent.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:  # it sets that
        return ""

    told = tuple(int(part) for part in torch_version.split(".")[:2]) >= (2, 12)
    option = re.search(r"\s--shutdown[-_]timeout[= ](\d+)\s", f" {' '.join(launcher)} ")
    given = option[1] if option else environment.get("PET_SHUTDOWN_TIMEOUT") or environment.get(SHUTDOWN_TIMEOUT, "")
    seconds = int(given) if told and given.isdecimal() else 30
    if seconds >= grace_seconds:
        return ""

    way_out = f"set {SHUTDOWN_TIMEOUT}={grace_seconds:.0f} in its environment"
    if not told:
        way_out = f"PyTorch {torch_version} does not read {SHUTDOWN_TIMEOUT}, as 2.12 does; lower run.grace_seconds"
    return (
        f"warning: the launcher kills {seconds} seconds after SIGTERM, before run.grace_seconds={grace_seconds:g} are "
        f"over; {way_out}"
    )
