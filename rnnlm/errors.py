"""What goes wrong because of the user, the machine or the files, reported in one line.

Everything else is a fault of the program and keeps its traceback. The price: whoever raises one of these must put into
the line all that the user needs: what was found, what was expected, what to do.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave; the script prints its line and exits with code 2."""

    code = 2
    may_be_local = False  # whether one process may have it without the others, so that each must print it
    is_shared = False  # whether all processes have it, so that they can leave together


class RunError(UserError):
    """A run that cannot continue although what was asked of it was right; the script exits with code 1."""

    code = 1
    is_shared = True  # or the other processes are about to end as well
