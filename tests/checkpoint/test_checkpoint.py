"""Checkpoints: whole or not there; any flipped byte is found, renamed, and the one before is used."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from rnnlm import files
from rnnlm.checkpoint.checkpoint import (
    NonFiniteError,
    copy_tensors,
    find_newest,
    list_checkpoints,
    load,
    prune,
    rename_damaged,
    save,
)
from rnnlm.checkpoint.safetensors_file import CheckpointError

FILES = ["model.safetensors", "hidden.safetensors", "trainer.json", "manifest.json"]


def write(root: Path, step: int, prefix: str = "step", value: float | None = None) -> Path:
    filled = float(step) if value is None else value
    groups = {"model": {"w": torch.full((3, 2), filled)}, "hidden": {"layer0.h": torch.full((4, 2), 0.1)}}
    return save(root, f"{prefix}-{step:08d}", groups, {"step": step, "loss": 0.1 + 0.2})


def steps(root: Path, prefix: str = "step") -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in list_checkpoints(root, prefix)]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    found = load(path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert found.state == {"step": 7, "loss": 0.1 + 0.2}
    assert found.tensors("model")["w"].tolist() == [[7.0, 7.0]] * 3
    assert found.tensors("hidden")["layer0.h"].dtype == torch.float32
    assert found.bytes("model") == (path / "model.safetensors").stat().st_size
    assert find_newest(tmp_path, "step") == (found, [])
    assert find_newest(tmp_path, "best") == (None, [])


def test_tensors_are_written_and_read_as_the_library_does(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
              torch.int16, torch.int8, torch.uint8)  # fmt: skip
    tensors = {f"{dtype} {shape}": torch.arange(12).to(dtype).reshape(shape)
               for dtype in dtypes for shape in ((12,), (3, 4), (1, 12, 1))}  # fmt: skip
    tensors |= {
        'schön "漢" \n': torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    path = save(tmp_path, "step-00000001", {"model": tensors}, {})

    written = (path / "model.safetensors").read_bytes()
    assert written == to_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    found, library = load(path).tensors("model"), from_safetensors(written)
    assert {*found} == {*library} == {*tensors}
    for name, tensor in tensors.items():
        for other in (found[name], library[name]):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other, tensor)


@pytest.mark.parametrize("name", FILES)
def test_fault_04_any_flipped_byte_is_refused_and_the_older_one_used(tmp_path: Path, name: str) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20)
    good = (path / name).read_bytes()

    for place in {*range(0, len(good), max(1, len(good) // 40)), 0, len(good) - 1}:
        data = bytearray(good)
        data[place] ^= 1
        (path / name).write_bytes(data)
        found, damaged = find_newest(tmp_path, "step")
        assert found is not None
        assert found.state["step"] == 10, f"byte {place} of {name}"
        assert [f"step-00000020/{name}" in str(error) for error in damaged] == [True]
        assert path.is_dir(), "who only reads renames nothing"

    rename_damaged(tmp_path, "step", found)
    assert (tmp_path / "damaged-step-00000020").is_dir(), "renamed, not deleted"
    assert list_checkpoints(tmp_path, "step") == [found.path]


@pytest.mark.parametrize("fault", ["truncated", "empty", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_fault_05_truncated_empty_and_missing_files(tmp_path: Path, name: str, fault: str) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / name
    data = path.read_bytes()
    path.unlink() if fault == "removed" else path.write_bytes(b"" if fault == "empty" else data[:-1])
    found, _ = find_newest(tmp_path, "step")
    assert found is not None
    assert found.state["step"] == 10


def test_nothing_starts_from_the_beginning_by_itself_when_all_are_damaged(tmp_path: Path) -> None:
    (write(tmp_path, 10) / "trainer.json").write_text("{}")
    for _ in range(2):  # the second try must not find an empty directory
        with pytest.raises(
            CheckpointError, match="every checkpoint is damaged .*; to start from the beginning, choose"
        ):
            find_newest(tmp_path, "step")


def test_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    write(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000020.partial")
    assert [path.name for path in list_checkpoints(tmp_path, "step")] == ["step-00000010"]
    write(tmp_path, 20)
    assert not (tmp_path / "step-00000020.partial").exists()


def test_fault_03_nothing_is_deleted_before_the_newest_is_read_back(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    good = (tmp_path / "step-00000030/trainer.json").read_bytes()
    (tmp_path / "step-00000030/trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000030/trainer.json"):
        prune(tmp_path / "step-00000030", "step", 2)
    assert steps(tmp_path) == [10, 20, 30]
    (tmp_path / "step-00000030/trainer.json").write_bytes(good)
    prune(tmp_path / "step-00000030", "step", 2)
    assert steps(tmp_path) == [20, 30]


def test_fault_03_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        path = write(tmp_path, step)
        if step == 20:
            (path / "model.safetensors").write_bytes(b"")
    prune(path, "step", 2)
    assert steps(tmp_path) == [10, 20, 30], "10 is one of two whole ones"


def test_fault_03_what_was_replaced_stays_until_the_new_one_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 20, value=1.0)
    path = write(tmp_path, 20, value=2.0)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        prune(path, "step", 2)

    found, damaged = find_newest(tmp_path, "step")
    assert found and found.tensors("model")["w"][0, 0] == 1.0 and len(damaged) == 1
    rename_damaged(tmp_path, "step", found)
    assert steps_and_remains(tmp_path) == ["damaged-step-00000020", "step-00000020.replaced"]
    prune(write(tmp_path, 20, value=3.0), "step", 2)
    assert steps_and_remains(tmp_path) == ["damaged-step-00000020", "step-00000020"]


def steps_and_remains(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_every_so_many_steps_one_stays_for_ever(tmp_path: Path) -> None:
    for step in range(1, 9):
        prune(write(tmp_path, step), "step", 2, keep_every_steps=3)
    assert steps(tmp_path) == [3, 6, 7, 8]
    write(tmp_path, 5, "best")
    prune(write(tmp_path, 8, "best"), "best", 1)
    assert steps(tmp_path, "best") == [8]
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_the_one_just_written_stays_even_if_a_former_attempt_got_further(tmp_path: Path) -> None:
    write(tmp_path, 18)
    prune(write(tmp_path, 12), "step", 1)
    assert steps(tmp_path) == [12]


def fail_at(monkeypatch: pytest.MonkeyPatch, operation: str, at: int, number: int) -> None:
    """Let the at-th call of a function of rnnlm.files fail with an errno; of a write, ten bytes come through."""
    honest, calls = getattr(files, operation), []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) != at:
            honest(*arguments)
            return
        if operation == "write":
            honest(*arguments)
            os.truncate(arguments[0], 10)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, operation, failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("fault", [("write", k) for k in (1, 2, 3, 4)] + [("make_directory", 1), ("sync", 1)])
def test_fault_02_a_failing_disk_leaves_the_old_ones_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: tuple[str, int], number: int
) -> None:
    write(tmp_path, 10)
    with monkeypatch.context() as patch:
        fail_at(patch, *fault, number)
        with pytest.raises(OSError, match=os.strerror(number)):
            write(tmp_path, 20)
    assert steps_and_remains(tmp_path) == ["step-00000010"]
    prune(write(tmp_path, 20), "step", 2)  # tried again later
    assert steps(tmp_path) == [10, 20]


@pytest.mark.parametrize("fault", [("rename", 1), ("rename", 2), ("sync", 2)])
def test_fault_02_a_disk_that_fails_while_one_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: tuple[str, int]
) -> None:
    write(tmp_path, 10, value=1.0)
    with monkeypatch.context() as patch:
        fail_at(patch, *fault, errno.EIO)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write(tmp_path, 10, value=2.0)

    found, damaged = find_newest(tmp_path, "step")
    assert found and not damaged
    assert found.path.name == "step-00000010"
    assert found.tensors("model")["w"][0, 0] == (2.0 if fault == ("sync", 2) else 1.0)
    prune(write(tmp_path, 10, value=3.0), "step", 2)
    assert steps_and_remains(tmp_path) == ["step-00000010"]


def test_fault_02_a_read_only_directory(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    write(root, 10)
    root.chmod(0o500)
    try:
        if os.access(root, os.W_OK):
            pytest.skip("this user may write everywhere")

        with pytest.raises(PermissionError):
            write(root, 20)
        assert steps_and_remains(root) == ["step-00000010"]
    finally:
        root.chmod(0o700)
    write(root, 20)
    assert steps(root) == [10, 20]


def test_fault_02_a_file_system_that_fails_within_the_library(tmp_path: Path) -> None:
    """The library has an exception of its own for it; here a file may not be larger than 1,000 bytes."""
    write(tmp_path, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=f"{os.strerror(errno.EFBIG)}.*model.safetensors") as caught:
            save(tmp_path, "step-00000020", {"model": {"w": torch.ones(1000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert caught.value.errno == errno.EFBIG
    assert steps_and_remains(tmp_path) == ["step-00000010"]


def test_all_files_have_the_same_permissions(tmp_path: Path) -> None:
    """Those of any new file, though the library makes its own for their owner alone."""
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in [tmp_path / "new", *write(tmp_path / "run", 10).iterdir()]}
    assert len(modes) == 1


@pytest.mark.parametrize("group", ["model", "hidden"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fault_16_a_non_finite_checkpoint_is_never_written(tmp_path: Path, group: str, value: float) -> None:
    write(tmp_path, 10)
    for dtype in (torch.float32, torch.bfloat16):
        groups = {name: {"a": torch.zeros(3), "b": torch.zeros(3, 4, dtype=dtype)} for name in ("model", "hidden")}
        groups[group]["b"][2, 3] = value
        with pytest.raises(NonFiniteError, match=f"{group}: tensor b is not finite"):
            save(tmp_path, "step-00000020", groups, {})
    assert steps_and_remains(tmp_path) == ["step-00000010"]


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
