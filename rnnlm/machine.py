"""What this process may use of its machine: cores.

A container sees all cores of its host, but the kernel gives it only the time that its cgroup's quota says; eight
workers on a quota of two cores would take turns. The price: a quota that is changed later is not noticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where they are mounted
MEMBERSHIP = Path("/proc/self/cgroup")  # which of them this process is in


def cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may use, at least one: those it is bound to, and no more than its cgroups' quota."""
    bound = getattr(os, "process_cpu_count", os.cpu_count)() or 1  # Python 3.13
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        bound = min(bound, len(os.sched_getaffinity(0)))
    return max(1, int(min([bound, *_quotas(cgroups, membership)])))


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """The quota, in cores, of every cgroup that this process is in; none outside of Linux."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = cgroups / "cpu" if controllers else cgroups  # version 1 has a tree for each controller

            # the quotas of all that it lies in hold too; inside a container the path is that of the host, or "/"
            inside = root / path.lstrip("/")
            for directory in (inside, *(each for each in inside.parents if root in (each, *each.parents)), root):
                yield from _quota(directory)


def _quota(directory: Path) -> Iterator[float]:
    """The quota of one cgroup, if it has any: microseconds of time in each period."""
    with suppress(OSError, ValueError):  # no such file; "max" is no number
        quota, period = (directory / "cpu.max").read_text().split()
        yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:  # -1: none
            yield int(quota) / int(period)
