"""Fault 30: a checkpoint may come from anywhere: what it says takes no more memory than expected, and leads nowhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnlm.checkpoint import safetensors_file
from rnnlm.checkpoint.checkpoint import load, save
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.hashing import json_digest

FILES = ["model.safetensors", "hidden.safetensors", "trainer.json", "manifest.json"]


def write(root: Path, step: int) -> Path:
    groups = {"model": {"w": torch.full((3, 2), float(step))}, "hidden": {"layer0.h": torch.full((4, 2), 0.1)}}
    return save(root, f"step-{step:08d}", groups, {"step": step})


def resealed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its digest right again."""
    body = json.loads((path / "manifest.json").read_text())
    del body["digest"]
    change(body)
    (path / "manifest.json").write_text(json.dumps({**body, "digest": json_digest(body)}, indent=1))


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../x": {"size": 1, "sha256": ""}}},
        {"files": {"trainer.json": {"size": 1, "sha256": ""}, "other.safetensors": {"size": 1, "sha256": ""}}},
        {"files": {}},
        {"files": []},
        {"files": {"trainer.json": {"size": -1, "sha256": ""}}},
        {"files": {"trainer.json": {"size": True, "sha256": ""}}},
        {"files": {"trainer.json": {"size": 1, "sha256": 1}}},
        {"files": {"trainer.json": None}},
        {"version": 1},
        {"format": "other"},
        {"more": 1},
    ],
)
def test_fault_30_a_manifest_of_other_files_and_other_formats(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path, 10)
    resealed(path, lambda body: body.update(change))
    with pytest.raises(CheckpointError, match="manifest.json"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_fault_30_no_link_is_followed_and_no_pipe_is_opened(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "run", 10)
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        load(path)

    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read .*not a regular file"):
        load(path)

    (path / name).unlink()
    (tmp_path / name).rename(path / name)
    load(path)

    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        load(path)


def sealed_with(path: Path, name: str, data: bytes) -> None:
    """Put other contents into a checkpoint and make every digest right again."""
    (path / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    resealed(path, lambda body: body["files"].update({name: entry}))


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (2**63).to_bytes(8, "little") + b"{}",
        (2**24 + 1).to_bytes(8, "little") + bytes(2**24 + 2),
        with_header(b"not JSON"),
        with_header(b"[" * 100_000),
        with_header([]),
        with_header({"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}),  # no data
        with_header({"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}, bytes(25)),
        with_header({"w": {"dtype": "F32", "shape": [6], "data_offsets": [4, 28]}}, bytes(28)),
        with_header({"w": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}),
        with_header({"w": {"dtype": "F32", "shape": [-1, -6], "data_offsets": [0, 24]}}, bytes(24)),
        with_header({"w": {"dtype": "PICKLE", "shape": [6], "data_offsets": [0, 24]}}, bytes(24)),
        with_header({"w": {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}}, bytes(24)),
        with_header({"w": {"dtype": "F32", "shape": 6, "data_offsets": "ab"}}, bytes(24)),
        with_header({"w": {"dtype": "F32", "shape": [1e400], "data_offsets": [1e400, 1e400]}}),
        with_header({"w": 1}),
    ],
)
def test_fault_30_a_sealed_file_that_is_no_list_of_tensors(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, 10)
    sealed_with(path, "model.safetensors", data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*(header|cannot be read|bytes of data|JSON)"):
        load(path).tensors("model")


def test_fault_30_no_more_memory_than_is_expected(tmp_path: Path) -> None:
    """A sparse file of a terabyte, which the manifest and the header both announce, costs nothing."""
    path, size = write(tmp_path, 10), 2**40
    header = with_header({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})

    sealed_with(path, "model.safetensors", header)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(len(header) + size)
    resealed(path, lambda body: body["files"]["model.safetensors"].update(size=len(header) + size))
    with pytest.raises(CheckpointError, match=r"tensor w is \(274877906944,\).*, expected \(3, 2\)"):
        load(path, every_byte=False).tensors("model", {"w": torch.empty(3, 2, device="meta")})


@pytest.mark.parametrize("how", ["another file of that name", "the same file, written again", "other values"])
def test_fault_30_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Between the look at its header and the library's reading."""
    path = write(tmp_path / "run", 10)
    file = path / "model.safetensors"
    good = file.read_bytes()
    larger = with_header({"w": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}}, bytes(2**22))
    honest = safetensors_file.safe_open

    def change(*arguments: Any, **options: Any) -> Any:
        if how == "another file of that name":
            (tmp_path / "other").write_bytes(larger)
            (tmp_path / "other").rename(file)
        else:
            file.write_bytes(larger if how == "the same file, written again" else good[:-1] + b"x")
        return honest(*arguments, **options)

    monkeypatch.setattr(safetensors_file, "safe_open", change)
    if how == "another file of that name":
        assert load(path).tensors("model")["w"].tolist() == [[10.0, 10.0]] * 3, "the file that was looked at"
        return
    with pytest.raises(CheckpointError, match=r"model.safetensors: (changed while|its contents differ)"):
        load(path).tensors("model")


def test_fault_30_a_large_or_deep_trainer_json(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    for data in (b" " * (2**20 + 1), b"[" * 10**5, b'{"a":' * 40 + b"1" + b"}" * 40, b"[]", b'{"a": ' + b"9" * 5000):
        sealed_with(path, "trainer.json", data)
        with pytest.raises(CheckpointError, match="trainer.json"):
            load(path)
