"""What Hypothesis draws is the same every time, so that a red run can be repeated; here it is drawn anew."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn() -> list[int]:
    """What one run of a test is given."""
    found: list[int] = []

    @given(st.integers(0, 2**60))
    def test(number: int) -> None:
        found.append(number)

    test()
    return found


def test_the_same_examples_every_time() -> None:
    assert settings().derandomize and settings().deadline is None
    assert drawn() == drawn() and len(set(drawn())) > 50


@pytest.mark.slow
def test_all_properties_hold_for_examples_that_are_drawn_anew() -> None:
    """What fails is printed with what repeats it."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "hypothesis and not slow and not gpu"]
    done = subprocess.run(
        [sys.executable, *command, "--hypothesis-profile=random", "tests"], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:]
