"""Checkpoints: whole or not there; any flipped byte is found, set aside, and the one before is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rnnlm import checkpoint
from rnnlm.checkpoint import CheckpointError, copy_tensors, load, names, newest, prune, save, set_aside

FILES = ["model.safetensors", "hidden.safetensors", "trainer.json", "manifest.json"]


def write(root: Path, step: int) -> Path:
    parts = {"model": {"w": torch.full((3, 2), float(step))}, "hidden": {"layer0.h": torch.full((4, 2), 0.1)}}
    return save(root, f"step-{step:08d}", parts, {"step": step, "loss": 0.1 + 0.2})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    found = load(path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert found.state == {"step": 7, "loss": 0.1 + 0.2}
    assert found.tensors("model")["w"].tolist() == [[7.0, 7.0]] * 3
    assert found.tensors("hidden")["layer0.h"].dtype == torch.float32
    assert newest(tmp_path, "step") == (found, [])
    assert newest(tmp_path, "best") == (None, [])


@pytest.mark.parametrize("name", FILES)
def test_fault_04_any_flipped_byte_is_refused_and_the_older_one_used(tmp_path: Path, name: str) -> None:
    write(tmp_path, 10)
    good = {file: (write(tmp_path, 20) / file).read_bytes() for file in FILES}
    size = len(good[name])
    for place in {*range(0, size, max(1, size // 40)), 0, size - 1}:
        path = write(tmp_path, 20)
        data = bytearray(good[name])
        data[place] ^= 1
        (path / name).write_bytes(data)
        found, damaged = newest(tmp_path, "step")
        assert found is not None
        assert found.state["step"] == 10, f"byte {place} of {name}"
        assert [f"step-00000020/{name}" in str(error) for error in damaged] == [True]
        assert path.is_dir(), "who only reads renames nothing"
        set_aside(tmp_path, "step", found)
        assert (tmp_path / "damaged-step-00000020").is_dir(), "set aside, not deleted"
        assert names(tmp_path, "step") == [found.path]


@pytest.mark.parametrize("fault", ["truncated", "empty", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_fault_05_truncated_empty_and_missing_files(tmp_path: Path, name: str, fault: str) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / name
    data = path.read_bytes()
    path.unlink() if fault == "removed" else path.write_bytes(b"" if fault == "empty" else data[:-1])
    found, _ = newest(tmp_path, "step")
    assert found is not None
    assert found.state["step"] == 10


def test_never_anew_by_itself_when_all_are_damaged(tmp_path: Path) -> None:
    (write(tmp_path, 10) / "trainer.json").write_text("{}")
    for _ in range(2):  # the second try must not find an empty directory
        with pytest.raises(CheckpointError, match="every checkpoint is damaged .*; to start anew, choose another"):
            newest(tmp_path, "step")


def test_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    write(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000020.partial")
    assert [path.name for path in names(tmp_path, "step")] == ["step-00000010"]
    write(tmp_path, 20)
    assert not (tmp_path / "step-00000020.partial").exists()


def test_fault_03_nothing_is_deleted_before_the_newest_is_read_back(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    (tmp_path / "step-00000030/trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000030/trainer.json"):
        prune(tmp_path / "step-00000030", "step", 2)
    assert len(names(tmp_path, "step")) == 3
    prune(write(tmp_path, 30), "step", 2)
    assert [path.name for path in names(tmp_path, "step")] == ["step-00000020", "step-00000030"]


def test_the_one_just_written_stays_even_if_a_former_life_got_further(tmp_path: Path) -> None:
    write(tmp_path, 18)
    prune(write(tmp_path, 12), "step", 1)
    assert [path.name for path in names(tmp_path, "step")] == ["step-00000012"]


def test_fault_02_a_failing_disk_leaves_the_old_ones_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)
    written = []

    def full_disk(path: Path, data: bytes) -> None:
        written.append(path.name)
        path.write_bytes(data[:10])
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_names_that_lead_elsewhere_and_other_formats(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    body = json.loads((path / "manifest.json").read_text())
    for change in ({"files": {"../x": {"size": 1, "sha256": ""}}}, {"version": 2}, {"format": "other"}, {"files": []}):
        changed = {**body, **change}
        del changed["digest"]
        changed["digest"] = checkpoint.json_digest(changed)
        (path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="manifest.json"):
            load(path)


def test_tensors_of_another_model_are_named_and_nothing_is_copied(tmp_path: Path) -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for source, message in (
        ({"a": torch.ones(2)}, r"tensor b is not there, expected \(3,\)"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"tensor b is \(4,\) torch.float32, expected \(3,\)"),
        ({"a": torch.ones(2), "b": torch.ones(3).double()}, "tensor b is .*float64"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "tensor c is .*expected not there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            copy_tensors(target, source, tmp_path)
        assert not target["a"].any()
