"""Durable files: a file that is written as a whole is the old one or the new one, and never half of either."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from rnnlm import files


def fail(*arguments: Any) -> None:
    raise OSError(errno.EIO, "as a disk says it")


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["write", "rename"])
def test_a_fault_in_one_place_reaches_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, alone: bool
) -> None:
    path = tmp_path / "state.json"
    files.write_file(path, b"old", alone)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="as a disk says it"):
        patch.setattr(files, name, fail)
        files.write_file(path, b"new", alone)
    assert path.read_bytes() == b"old"

    files.write_file(path, b"new", alone)
    assert path.read_bytes() == b"new"
    if alone:
        assert sorted(tmp_path.iterdir()) == [path], "what a killed writer left is replaced by the next"


def test_a_directory_is_deleted_with_all_in_it_but_no_link_is_followed(tmp_path: Path) -> None:
    kept, doomed = tmp_path / "kept", tmp_path / "doomed"
    files.make_directory(kept)
    files.make_directory(doomed / "a/b")
    (kept / "file").write_bytes(b"1")
    (doomed / "a/b/file").write_bytes(b"2")
    (doomed / "link").symlink_to(kept)

    files.delete(doomed)
    assert sorted(tmp_path.iterdir()) == [kept]
    assert (kept / "file").read_bytes() == b"1"
