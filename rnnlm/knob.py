"""One knob of the configuration: what a field of a dataclass declares beside its type and its default.

Bounds stand where the field does and are checked when all values are known, so that every fault is reported at once.
The price: a dataclass that is made in Python is not checked until somebody asks for `find_faults`.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Knob:
    """What is declared of a field."""

    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: Sequence[str] | None = None
    changeable: bool = False  # whether it may differ when a run is resumed

    def fault(self, key: str, value: Any) -> str | None:
        """What is wrong with a value, as `section.key=value: what is expected`; None if nothing is."""
        if value is None:
            return f"{key}: has no value; give one or leave the line out"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key}={value}: must be a finite number"

        if self.at_least is not None and value < self.at_least:
            return f"{key}={value}: must be at least {self.at_least}"
        if self.below is not None and value >= self.below:
            return f"{key}={value}: must be below {self.below}"
        if self.at_most is not None and value > self.at_most:
            return f"{key}={value}: must be at most {self.at_most}"

        if self.choices is not None and value not in self.choices:
            known = ", ".join(self.choices)
            return f"{key}={value}: not one of {known}; did you mean {closest(value, self.choices)}?"
        return None


def knob(
    default: T,
    *,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
    changeable: bool = False,
) -> T:
    """A field with something to declare; one without has a plain default, and is fixed once a run has begun.

    Args:
        at_least, below, at_most: bounds of a number: inclusive, exclusive, inclusive.
        choices: a registry's names, to which other code may append.
        changeable: it may differ when a run is resumed; the others of model, optim and train are the run's identity.
    """
    metadata = {"knob": Knob(at_least, below, at_most, choices, changeable)}
    if isinstance(default, list):  # each configuration gets a list of its own
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def closest(text: str, known: Iterable[str]) -> str:
    """The known name that looks most like a text, however little it does."""
    return difflib.get_close_matches(text, known, n=1, cutoff=0.0)[0]
