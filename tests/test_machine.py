"""Cores: those that the process is bound to, and no more than its container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rnnlm.machine import cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("process_cpu_count", "cpu_count"):
        monkeypatch.setattr(os, name, lambda: 8, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("cpu.max", "max 100000", 8),
        ("cpu.max", "250000 100000", 2),
        ("cpu.max", "10000 100000", 1),  # a tenth of a core is still one worker
        ("pods/cpu.max", "300000 100000", 3),  # of a group around this process's own
        ("pods/mine/cpu.max", "400000 100000", 4),
        ("cpu.max", "1600000 100000", 8),
    ],
)
def test_a_quota_of_a_cgroup_limits_the_cores(tmp_path: Path, file: str, text: str, expected: int) -> None:
    write(tmp_path / "membership", "0::/pods/mine\n")
    write(tmp_path / "cgroup" / file, text)
    assert cores(tmp_path / "cgroup", tmp_path / "membership") == expected


def test_a_quota_of_cgroups_version_1(tmp_path: Path) -> None:
    write(tmp_path / "membership", "4:memory:/other\n3:cpu,cpuacct:/mine\n")
    for name, value in (("quota", "500000"), ("period", "100000")):
        write(tmp_path / f"cgroup/cpu/mine/cpu.cfs_{name}_us", value)
    assert cores(tmp_path / "cgroup", tmp_path / "membership") == 5


def test_cores_where_neither_cgroups_nor_affinity_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    assert cores(tmp_path / "none", tmp_path / "none") == 8


def test_an_affinity_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6}, raising=False)
    assert cores(tmp_path / "none", tmp_path / "none") == 3
