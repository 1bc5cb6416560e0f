"""What goes wrong because of the user, the machine or the files, told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave; doors print its one line and exit with code 2."""

    code = 2
    is_alone = False  # whether one process may have it without the others, so that each must print it
    on_all_ranks = False  # whether all processes have it, so that they can leave together


class RunError(UserError):
    """A run that cannot go on although what was asked of it was right; doors print one line and exit with code 1."""

    code = 1
    on_all_ranks = True
