"""Bytes that change where no size does: nothing is deleted, used or taken for whole before its digest was compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rnnlm.checkpoint.checkpoint import find_newest, list_checkpoints, load, prune, save
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.checkpoint.saver import Saver

GROUPS = ("model", "optimizer", "hidden")


def write(root: Path, name: str) -> Path:
    groups = {group: {"w": torch.arange(12.0), "v": torch.ones(3)} for group in GROUPS}
    return save(root, name, groups, {"step": int(name[-2:])})


def flip_a_number(path: Path, group: str) -> None:
    """Another number in a file of tensors: header, names, shapes, size and manifest stay."""
    file = path / f"{group}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("group", GROUPS)
def test_a_tensor_that_changed_in_place_is_refused_by_whoever_reads_it(tmp_path: Path, group: str) -> None:
    path = write(tmp_path, "step-00000010")
    flip_a_number(path, group)
    found = load(path, every_byte=False)  # as processes do that leave the first pass to another one
    with pytest.raises(CheckpointError, match=f"{group}.safetensors: its contents differ from the digest"):
        found.tensors(group)
    for other in {*GROUPS} - {group}:
        assert found.tensors(other)["w"].tolist() == list(range(12))


@pytest.mark.parametrize("group", GROUPS)
def test_fault_03_pruning_compares_every_byte_of_the_new_one_before_it_deletes(tmp_path: Path, group: str) -> None:
    for step in (10, 20, 30):
        path = write(tmp_path, f"step-000000{step}")
    flip_a_number(path, group)
    with pytest.raises(CheckpointError, match=f"{group}.safetensors: its contents differ from the digest"):
        prune(path, "step", 1)
    assert len(list_checkpoints(tmp_path, "step")) == 3, "nothing was deleted"

    found, damaged = find_newest(tmp_path, "step")
    assert found and found.state["step"] == 20 and len(damaged) == 1


def test_fault_03_of_a_save_whose_numbers_change_on_the_way_nothing_older_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a disk that returns other bytes than it took, once the file has been written and compared."""
    write(tmp_path, "step-00000010")
    write(tmp_path, "step-00000020")

    def damaged(root: Path, name: str, *rest: object) -> Path:
        path = save(root, name, *rest)  # type: ignore[arg-type]
        flip_a_number(path, "optimizer")
        return path

    monkeypatch.setattr("rnnlm.checkpoint.checkpoint.save", damaged)
    saver = Saver(tmp_path, keep_last=2)
    saver.submit(["step-00000030"], {group: {"w": torch.ones(5)} for group in GROUPS}, {"step": 30})
    (saved,) = saver.wait()
    assert saved.path is None and "optimizer.safetensors: its contents differ" in str(saved.error)
    assert {"step-00000010", "step-00000020"} <= {path.name for path in tmp_path.iterdir()}
