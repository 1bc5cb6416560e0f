"""Fault 34: saving does not block training, one save is in flight at most, and what fails is reported."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import environment

from rnnlm import files
from rnnlm.checkpoint import checkpoint
from rnnlm.checkpoint.checkpoint import NonFiniteError, find_newest, load
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.checkpoint.saver import Saver, host_copy


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {group: {"w": torch.full((4, 3), value), "t": torch.arange(6.0).reshape(2, 3).T}
            for group in ("model", "optimizer", "hidden")}  # fmt: skip


class SlowDisk:
    """Writes wait until they are let go; counts how many are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go, self.active, self.most, self.honest = threading.Event(), 0, 0, checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self.save)

    def save(self, *arguments: object) -> Path:
        self.active += 1
        self.most = max(self.most, self.active)
        assert self.go.wait(60)
        path = self.honest(*arguments)  # type: ignore[arg-type]
        self.active -= 1
        return path


def test_fault_34_training_continues_and_what_is_written_is_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, saver, tensors = SlowDisk(monkeypatch), Saver(tmp_path), groups(1.0)
    assert saver.submit(["step-00000010"], tensors, {"step": 10}) == []
    assert saver.poll() == [], "nothing is finished"
    tensors["model"]["w"].fill_(2.0)  # training continues while the disk stands still
    slow.go.set()

    (saved,) = saver.wait()
    assert (saved.name, saved.path, saved.error) == ("step-00000010", tmp_path / "step-00000010", None)
    assert saved.path
    assert saved.bytes == sum(file.stat().st_size for file in saved.path.iterdir())
    assert saved.seconds > 0
    assert saved.blocked_seconds >= 0
    assert (load(saved.path).tensors("model")["w"] == 1.0).all()
    assert saver.wait() == saver.poll() == [], "returned once"


def test_fault_34_one_in_flight_and_none_after_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk stands still until somebody waits for it, for five seconds by a clock that only then goes on."""
    slow, saver, now = SlowDisk(monkeypatch), Saver(tmp_path), [0.0]
    monkeypatch.setattr("rnnlm.checkpoint.saver.time", SimpleNamespace(perf_counter=lambda: now[0]))
    saver.submit(["step-00000001"], groups(1.0), {"step": 1})
    first = saver._thread
    assert first is not None
    join = first.join

    def wait_for_disk(*patience: float) -> None:
        now[0] += 5
        slow.go.set()
        join(*patience)

    monkeypatch.setattr(first, "join", wait_for_disk)
    returned = []
    for step in range(2, 7):
        returned += saver.submit([f"step-{step:08d}"], groups(float(step)), {"step": step})
    returned += saver.wait()

    assert slow.most == 1
    assert [saved.name for saved in returned] == [f"step-{step:08d}" for step in range(1, 7)]
    assert [saved.blocked_seconds for saved in returned] == [0, 5, 0, 0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saving")]


def test_fault_34_its_failure_is_returned_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path)
    saver.submit(["step-00000010"], groups(1.0), {"step": 10})

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        assert saver.submit(["step-00000020"], groups(2.0), {"step": 20}) == []
        saver._thread.join()  # type: ignore[union-attr]
    (failed,) = saver.submit(["step-00000030"], groups(float("nan")), {"step": 30})
    assert (failed.name, failed.path) == ("step-00000020", None)
    assert isinstance(failed.error, OSError)
    (failed,) = saver.submit(["step-00000040"], groups(4.0), {"step": 40})
    assert isinstance(failed.error, NonFiniteError)
    (saved,) = saver.wait()
    assert saved.path == tmp_path / "step-00000040"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000040"]


def test_fault_34_damaged_on_the_way_to_the_disk_or_not_deletable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, honest = Saver(tmp_path), files.write
    for step in (10, 20):
        saver.submit([f"step-{step:08d}"], groups(1.0), {"step": step})
    saver.wait()

    def flipped(path: Path, *fill: Any) -> None:
        honest(path, *fill)
        with path.open("r+b") as file:
            file.write(b"x")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", flipped)
        saver.submit(["step-00000030"], groups(1.0), {"step": 30})
        (saved,) = saver.wait()
    assert saved.path is None
    assert isinstance(saved.error, CheckpointError)
    assert {"step-00000010", "step-00000020"} <= {path.name for path in tmp_path.iterdir()}

    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(files, "delete", refused)
        saver.submit(["step-00000040"], groups(1.0), {"step": 40})
        (saved,) = saver.wait()
    assert saved.path == tmp_path / "step-00000040", "it is whole, and counts as saved"
    assert isinstance(saved.error, PermissionError)


def test_fault_34_a_mistake_in_the_program_is_raised(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.submit(["step-00000010"], groups(1.0), {"step": {1, 2}})  # no JSON
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.wait()
    assert saver.wait() == []
    saver.submit(["step-00000020"], groups(1.0), {"step": 20})
    assert saver.wait()[0].path


def test_the_same_bytes_as_written_at_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "beside")
    saver.submit(["step-00000010"], groups(1.5), {"step": 10})
    (saved,) = saver.wait()
    other = checkpoint.save(tmp_path / "at-once", "step-00000010", groups(1.5), {"step": 10})
    assert saved.path
    for file in sorted(other.iterdir()):
        assert (saved.path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("end", ["sys.exit(75)", "raise ValueError"])
def test_fault_34_python_ends_when_the_save_in_flight_is_whole(tmp_path: Path, end: str) -> None:
    script = (
        "import sys, threading, torch\nfrom pathlib import Path\nfrom rnnlm import files\n"
        "from rnnlm.checkpoint.saver import Saver\n"
        "honest, ended = files.write, threading.main_thread().join\n"
        "files.write = lambda *arguments: (ended(60), honest(*arguments))\n"
        "saver = Saver(Path(sys.argv[1]))\n"
        "saver.submit(['step-00000010'], {'model': {'w': torch.ones(3)}}, {'step': 10})\n" + end
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, timeout=120, check=False
    )
    assert done.returncode == (75 if "exit" in end else 1), done.stderr
    found, damaged = find_newest(tmp_path, "step")
    assert found
    assert not damaged


def test_copies_share_no_memory() -> None:
    tensors = groups(1.0)
    copies = host_copy(tensors)
    for group, each in tensors.items():
        for name, tensor in each.items():
            copy = copies[group][name]
            assert torch.equal(copy, tensor)
            assert copy.is_contiguous()
            assert copy.data_ptr() != tensor.data_ptr()


class OnADevice(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_copies_of_a_devices_tensors_are_in_ordinary_memory_of_their_size() -> None:
    """Pinned memory, which PyTorch rounds up and keeps, cannot even be asked for without a GPU."""
    tensor = torch.arange(6.0).reshape(2, 3).as_subclass(OnADevice)
    assert tensor.is_cuda
    copy = host_copy({"model": {"w": tensor.T}})["model"]["w"]
    assert copy.tolist() == tensor.T.tolist() and copy.is_contiguous()
    assert copy.untyped_storage().nbytes() == 6 * 4


def test_copies_are_given_back_when_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[torch.Tensor]] = []
    honest = checkpoint.save

    def save(root: Path, name: str, tensors: Any, *rest: Any) -> Path:
        copies.append(weakref.ref(tensors["model"]["w"]))
        return honest(root, name, tensors, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    saver = Saver(tmp_path)
    saver.submit(["step-00000010"], groups(1.0), {"step": 10})
    assert saver.wait()[0].path
    assert copies[0]() is None


@pytest.mark.gpu
def test_copies_of_device_tensors_are_complete_and_pin_nothing() -> None:
    large = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        large = large @ large / 64  # still being computed when the copy is asked for
    tensors = {"model": {"large": large, "turned": large.T, "scalar": torch.tensor(2.5, device="cuda")},
               "optimizer": {"step": torch.tensor(3.0)}}  # fmt: skip
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    copies = host_copy(tensors)
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == pinned
    expected = {group: {name: tensor.cpu() for name, tensor in each.items()} for group, each in tensors.items()}
    large.zero_()
    for group, each in expected.items():
        for name, tensor in each.items():
            assert torch.equal(copies[group][name], tensor), name
            assert copies[group][name].is_contiguous() and not copies[group][name].is_pinned()


def test_the_best_one_is_the_model_alone_and_one_file_with_the_last(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.submit(["step-00000010", "best-00000010"], groups(1.0), {"step": 10})
    assert all(saved.error is None for saved in saver.wait())
    best, last = tmp_path / "best-00000010", tmp_path / "step-00000010"
    assert {path.name for path in best.iterdir()} == {"model.safetensors", "trainer.json", "manifest.json"}
    assert (best / "model.safetensors").samefile(last / "model.safetensors")

    # each outlives the other
    for step in (20, 30):
        saver.submit([f"step-{step:08d}"], groups(float(step)), {"step": step})
    saver.wait()
    assert not last.exists() and (load(best).tensors("model")["w"] == 1.0).all()
    saver.submit(["best-00000030", "step-00000030"], groups(3.0), {"step": 30})
    saver.submit(["best-00000040"], groups(4.0), {"step": 40})
    saver.wait()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path, "best")] == ["best-00000040"]
    assert (load(tmp_path / "step-00000030").tensors("model")["w"] == 3.0).all()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_where_there_are_no_hard_links_both_have_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    saver = Saver(tmp_path)
    saver.submit(["step-00000010", "best-00000010"], groups(1.0), {"step": 10})
    assert all(saved.error is None for saved in saver.wait())
    files_of_both = [load(tmp_path / name).path / "model.safetensors" for name in ("step-00000010", "best-00000010")]
    assert files_of_both[0].read_bytes() == files_of_both[1].read_bytes()
    assert not files_of_both[0].samefile(files_of_both[1])


def test_what_a_run_resumes_from_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between the two, the best one is written again; the other way round it would be lost for good."""
    order, honest = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda root, name, *rest: (order.append(name), honest(root, name, *rest))[1]
    )
    saver = Saver(tmp_path)
    saver.submit(["step-00000010", "best-00000010"], groups(1.0), {"step": 10})
    assert [saved.name for saved in saver.wait()] == order == ["best-00000010", "step-00000010"]
