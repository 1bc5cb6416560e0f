"""How far a build is, from the files that its tasks have left: nothing is written, no process is asked.

A phase says which files it writes when it begins; those that are there are done, those whose lock is held are in work.
The price: phases that have not begun are not listed, since how much they will do is not known before.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rnnlm.data.build.shared_tasks import LOCKS, PHASES, Listing

SHOWN = 8  # tasks in work that are named


def report(directory: Path) -> Iterator[str]:
    """Lines on all builds of a stream.directory, by phase in the order in which they began."""
    for split in ("train", "valid", "test"):
        if (directory / split / "stream.json").exists():
            yield f"{directory / split}: is there"

    units = [path.stat().st_size for path in directory.glob("build/units/*/*.unit")]
    if units:
        yield f"{directory / 'build/units'}: {len(units):,} unit(s) encoded, {sum(units) / 1e6:,.1f} MB"

    builds = sorted(path for path in directory.glob("build/work-*") if path.is_dir())
    for work in builds:
        yield f"{work}:"
        yield from _report_phases(work)
        held = list(_held(work / LOCKS))
        more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
        yield f"  in work: {', '.join(held[:SHOWN])}{more}" if held else "  in work: nothing; no process is building"
    if not builds:
        yield f"{directory}: no build is under way"


def _report_phases(work: Path) -> Iterator[str]:
    """A line for each phase that has begun."""
    phases = sorted((work / PHASES).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    exists, now = Listing(), time.time()
    for phase in phases:
        paths = [work.parent / name for name in json.loads(phase.read_bytes())]
        size, newest, done = 0, 0.0, 0
        for path in paths:
            with suppress(OSError):  # removed in this moment
                if path in exists:
                    status = path.stat()
                    size, newest, done = size + status.st_size, max(newest, status.st_mtime), done + 1

        # files of an earlier phase may be gone because they were used
        if phase != phases[-1]:
            done = len(paths)
        since = f", the last one {max(0, now - newest):.0f} s ago" if newest else ""
        written = f", {size / 1e6:,.1f} MB" if phase.stem != "encode" else ""  # these only tell of units
        yield f"  {phase.stem}: {done:,} of {len(paths):,} files{written}{since}"


def _held(locks: Path) -> Iterator[str]:
    """What is in work now, and by whom."""
    for lock in sorted(locks.glob("*")):
        with suppress(OSError), lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"{lock.name} ({file.read(200).decode(errors='replace')})"
