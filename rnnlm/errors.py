"""What goes wrong because of the user, the machine or the files, reported in one line.

Everything else is a fault of the program and keeps its traceback. The price: whoever raises one of these must put into
the line all that the user needs: what was found, what was expected, what to do.
"""

from __future__ import annotations

import errno


class UserError(ValueError):
    """A mistake in what the user gave; the script prints its line and exits with code 2."""

    code = 2
    may_be_local = False  # whether one process may have it without the others, so that each must print it
    is_shared = False  # whether all processes have it, so that they can leave together


class RunError(UserError):
    """A run that cannot continue although what was asked of it was right; the script exits with code 1."""

    code = 1
    is_shared = True  # or the other processes are about to end as well


def is_full(error: BaseException) -> bool:
    """Whether a disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def line_of(error: UserError | OSError) -> str:
    """What the user is told of it."""
    return f"{error}; make room on the disk and type the same command again" if is_full(error) else str(error)


def kind_of(error: UserError | OSError) -> type[UserError]:
    """What it is to the script: a full disk is no mistake in what was asked."""
    return RunError if is_full(error) or isinstance(error, RunError) else UserError
