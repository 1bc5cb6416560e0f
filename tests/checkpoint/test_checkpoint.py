"""Checkpoints: whole or not there; any flipped byte is found, set aside, and the one before is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrainHere
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from rnnlm import files
from rnnlm.checkpoint.checkpoint import NonFiniteError, copy_tensors, load, names, newest, prune, save, set_aside
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.config import Config, ModelConfig
from rnnlm.hashing import json_digest
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.guard import Guard
from rnnlm.train.load import load_model
from rnnlm.train.state import check_state

FILES = ["model.safetensors", "hidden.safetensors", "trainer.json", "manifest.json"]
STATE = {
    "step": 7, "horizon_steps": 20, "interval": [1, 2, 0], "scaler": {}, "stream": "ab", "tokenizer": "",
    "processes": 1, "vocab_size": 300, "configuration": {"model": {"layers": 2}}, "versions": {"torch": "2"},
    "origin": {"step": 0, "epoch": 0, "position": 0}, "health": Guard(torch.device("cpu")).to_dict(0),
    "memory": {"best_loss": None, "best_step": 0, "evaluations_since_best": 0, "evaluations_since_cut": 0,
               "learning_rate_scale": 1.0},
}  # fmt: skip


def write(root: Path, step: int, prefix: str = "step", value: float | None = None) -> Path:
    filled = float(step) if value is None else value
    parts = {"model": {"w": torch.full((3, 2), filled)}, "hidden": {"layer0.h": torch.full((4, 2), 0.1)}}
    return save(root, f"{prefix}-{step:08d}", parts, {"step": step, "loss": 0.1 + 0.2})


def steps(root: Path, prefix: str = "step") -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in names(root, prefix)]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    found = load(path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert found.state == {"step": 7, "loss": 0.1 + 0.2}
    assert found.tensors("model")["w"].tolist() == [[7.0, 7.0]] * 3
    assert found.tensors("hidden")["layer0.h"].dtype == torch.float32
    assert found.bytes("model") == (path / "model.safetensors").stat().st_size
    assert newest(tmp_path, "step") == (found, [])
    assert newest(tmp_path, "best") == (None, [])


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
    found, damaged = newest(tmp_path, "step")
    assert found and found.tensors("model")["w"][0, 0] == 1.0 and len(damaged) == 1
    set_aside(tmp_path, "step", found)
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


def test_the_one_just_written_stays_even_if_a_former_life_got_further(tmp_path: Path) -> None:
    write(tmp_path, 18)
    prune(write(tmp_path, 12), "step", 1)
    assert steps(tmp_path) == [12]


def fail_at(monkeypatch: pytest.MonkeyPatch, operation: str, at: int, number: int) -> None:
    """Let the at-th call of one of disk's functions fail with an errno; of a write, ten bytes come through."""
    honest, calls = getattr(files, operation), []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) != at:
            honest(*arguments)
            return
        if operation == "write":
            arguments[0].write_bytes(b"".join(arguments[1])[:10])
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
    found, damaged = newest(tmp_path, "step")
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


@pytest.mark.parametrize("part", ["model", "hidden"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fault_16_a_non_finite_checkpoint_is_never_written(tmp_path: Path, part: str, value: float) -> None:
    write(tmp_path, 10)
    for dtype in (torch.float32, torch.bfloat16):
        parts = {name: {"a": torch.zeros(3), "b": torch.zeros(3, 4, dtype=dtype)} for name in ("model", "hidden")}
        parts[part]["b"][2, 3] = value
        with pytest.raises(NonFiniteError, match=f"{part}: tensor b is not finite"):
            save(tmp_path, "step-00000020", parts, {})
    assert steps_and_remains(tmp_path) == ["step-00000010"]


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
    """A sparse file of a terabyte, which the manifest and the header both claim, costs nothing."""
    path, size = write(tmp_path, 10), 2**40
    header = with_header({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    sealed_with(path, "model.safetensors", header)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(len(header) + size)
    resealed(path, lambda body: body["files"]["model.safetensors"].update(size=len(header) + size))
    with pytest.raises(CheckpointError, match=r"tensor w is \(274877906944,\).*, expected \(3, 2\)"):
        load(path, every_byte=False).tensors("model", {"w": torch.empty(3, 2, device="meta")})


def test_fault_30_a_large_or_deep_trainer_json(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    for data in (b" " * (2**20 + 1), b"[" * 10**5, b'{"a":' * 40 + b"1" + b"}" * 40, b"[]", b'{"a": ' + b"9" * 5000):
        sealed_with(path, "trainer.json", data)
        with pytest.raises(CheckpointError, match="trainer.json"):
            load(path)


def test_fault_30_the_types_in_trainer_json(tmp_path: Path) -> None:
    check_state(STATE, tmp_path)
    check_state({**STATE, "more": [1]}, tmp_path)
    wrong = {
        "step": (-1, 1.5, True, 2**63, "7", None), "horizon_steps": ("",),
        "interval": ([1, 2], [1, 2, "3"], {}, 10**30),
        "memory": ({}, None, {**STATE["memory"], "x": 1}, {**STATE["memory"], "best_step": None}), "tokenizer": (None,),
        "scaler": ([], {"a": []}), "stream": (1,), "vocab_size": (10**30,), "processes": ([],), "versions": ({"a": 1},),
        "origin": ({}, {"step": -1, "epoch": 0, "position": 0}),
        "health": ({}, {"counts": [], "resets": 0, "losses": []}),
        "configuration": ([], {"model": 1}),
    }  # fmt: skip
    assert {*wrong} == {*STATE}
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(CheckpointError, match=f"trainer.json: {key} is .*, which no trainer writes"):
                check_state({**STATE, key: value}, tmp_path)
        with pytest.raises(CheckpointError, match=f"{key} is not there"):
            check_state({name: value for name, value in STATE.items() if name != key}, tmp_path)


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


def test_fault_30_a_vocabulary_that_the_model_cannot_have_takes_no_memory(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(embedding_size=2, hidden_size=3, layers=1))
    for size, message in ((300, None), (2**40, "a vocabulary of 1099511627776 in a smaller model"), (301, "expected")):
        model = RecurrentLM(config.model, 300, config.train.seed)
        path = save(tmp_path, "step-00000007", {"model": dict(model.named_parameters())}, {**STATE, "vocab_size": size})
        if message is None:
            assert load_model(config, path, torch.device("cpu"))[0].vocab_size == 300
            continue
        with pytest.raises(CheckpointError, match=message):
            load_model(config, path, torch.device("cpu"))


def test_fault_30_tensors_of_other_shapes_are_refused_before_they_are_used(
    train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    """PyTorch's fused kernels do not look at shapes: a smaller moment would be written beyond its end."""
    options = (f"--config={experiment}", "--train.max_steps=2")
    assert train_here(*options).returncode == 0
    root = tmp_path / "run/checkpoints"
    found = load(root / "step-00000002")
    tensors = {part: found.tensors(part) for part in ("model", "optimizer", "hidden")}
    moment = next(name for name in tensors["optimizer"] if name.endswith("exp_avg"))
    elsewhere = tensors["hidden"]["ended"] + 10**15
    for part, name, other in (
        ("optimizer", moment, torch.zeros(1)),
        ("optimizer", moment, None),
        ("hidden", "layer0.h", torch.zeros(17, 16)),
        ("hidden", "ended", None),
        ("hidden", "ended", elsewhere),
    ):
        changed = {key: value for key, value in tensors[part].items() if key != name}
        changed |= {} if other is None else {name: other}
        save(root, "step-00000002", {**tensors, part: changed}, found.state)
        done = train_here(f"--config={experiment}", "--train.max_steps=3")
        assert done.returncode == 2, done.stderr
        assert name in done.stderr
