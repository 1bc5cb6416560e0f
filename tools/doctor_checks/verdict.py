"""What a check says: right, wrong with the way out, or not to be tried here and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["right", "wrong", "untried"]
WORDS: dict[State, str] = {"right": "right", "wrong": "wrong", "untried": "not to be tried here"}


@dataclass(frozen=True)
class Verdict:
    """One line.

    Args:
        subject: what was checked.
        text: what was found; where it is wrong, also the way out; where it was not tried, why.
    """

    subject: str
    state: State
    text: str = ""

    def line(self) -> str:
        """As it is printed."""
        return f"{self.subject}: {WORDS[self.state]}" + (f": {self.text}" if self.text else "")


def right(subject: str, text: str = "") -> Verdict:
    """All is well."""
    return Verdict(subject, "right", text)


def wrong(subject: str, text: str) -> Verdict:
    """Something is not: what, and the way out."""
    return Verdict(subject, "wrong", text)


def untried(subject: str, why: str) -> Verdict:
    """This machine, or this command line, lacks what it takes."""
    return Verdict(subject, "untried", why)
