"""The table of faults names tests that are there, and every fault has one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def list_faults(*options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "tools/list_faults.py"), *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_the_table_of_faults_is_that_of_the_tests() -> None:
    done = list_faults("--check")
    assert done.returncode == 0, done.stderr


def test_names_of_tests_give_the_rows_and_a_missing_test_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").write_text(
        "import pytest\n"
        "def test_fault_01_a(): ...\n"
        "def test_fault_02_03_1_process_of_2(): ...\n"
        "def test_fault_04_and_06_c(): ...\n"
        "@pytest.mark.slow\ndef test_fault_08_to_34_d(): ...\n"
        "@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.slow)])\ndef test_fault_35_e(n): ...\n"
        "def test_other(): ...\n"
    )

    done = list_faults(f"--root={tmp_path}")
    assert done.returncode == 1
    assert done.stderr == "error: no test for fault 5\nerror: no test for fault 7\n"
    lines = (tmp_path / "docs/faults.md").read_text().splitlines()
    rows = {int(line.split("|")[1]): line.split("|")[-2].strip() for line in lines if line[2:3].isdigit()}
    assert rows.keys() == set(range(1, 36))
    assert rows[2] == rows[3] == "`test_some.py::test_fault_02_03_1_process_of_2`"
    assert rows[4] == rows[6] == "`test_some.py::test_fault_04_and_06_c`"
    assert rows[8] == rows[20] == rows[34] == "`test_some.py::test_fault_08_to_34_d` (slow)"
    assert (rows[1], rows[5]) == ("`test_some.py::test_fault_01_a`", "none")
    assert rows[35] == "`test_some.py::test_fault_35_e` (more cases slow)"

    stale = list_faults(f"--root={tmp_path}", "--check")
    assert stale.returncode == 1 and "is not what" not in stale.stderr
    (tmp_path / "docs/faults.md").write_text("")
    assert (
        "docs/faults.md is not what the tests say; run python tools/list_faults.py"
        in list_faults(f"--root={tmp_path}", "--check").stderr
    )
