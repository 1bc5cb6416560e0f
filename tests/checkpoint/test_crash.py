"""Fault 1: a power loss or SIGKILL at any point of saving leaves a whole checkpoint, the newest one that may be."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crash_model import FileSystem, lay_out, watch

from rnnlm import files
from rnnlm.checkpoint.checkpoint import find_newest, list_checkpoints, load, prune, rename_damaged, save

Save = tuple[str, int, float]  # prefix, step, the value of all its numbers


def write(root: Path, prefix: str, step: int, value: float, same: Path | None = None) -> Path:
    groups = {group: {"w": torch.full((2, 3), value)} for group in ("model", "optimizer", "hidden")}
    return save(root, f"{prefix}-{step:08d}", groups, {"step": step, "value": value}, same)


class Known:
    """What must be there: the last of those `done` (step, value); or what `maybe` came after it."""

    def __init__(self) -> None:
        self.done: dict[str, list[tuple[int, float]]] = {"step": [], "best": []}
        self.maybe: list[Save] = []

    def learn(self, kind: str, what: Save) -> None:
        if kind == "done":
            self.done[what[0]].append(what[1:])
            self.maybe = []
        else:
            if kind == "damaged":
                self.done[what[0]].remove(what[1:])
            self.maybe.append(what)


def saves_of_a_run(root: Path) -> Iterator[tuple[str, Save]]:
    """Saves with pruning, each yielded as ("begun" or "done", what); in between a damaged one is renamed.

    What was just saved under another name shares its files.
    """
    before: tuple[Path, int, float] | None = None
    for prefix, step, value in (
        ("step", 10, 1.0), ("best", 10, 2.0), ("step", 20, 3.0), ("step", 30, 4.0), ("step", 30, 5.0),
        ("best", 30, 5.0), ("step", 40, 7.0), ("step", 50, 8.0), ("rename", 50, 0.0), ("step", 50, 9.0),
        ("best", 30, 10.0), ("step", 60, 11.0),
    ):  # fmt: skip
        yield "begun", (prefix, step, value)

        if prefix == "rename":
            yield "damaged", ("step", step, 8.0)
            files.write(root / f"step-{step:08d}/model.safetensors", Path.write_bytes, b"damaged")
            good, damaged = find_newest(root, "step")
            assert good and damaged
            rename_damaged(root, "step", good)

        else:
            same = before[0] if before and before[1:] == (step, value) else None
            written = write(root, prefix, step, value, same)
            if same:
                assert (written / "model.safetensors").samefile(same / "model.safetensors")
            before = written, step, value
            yield "done", (prefix, step, value)
            prune(written, prefix, 2 if prefix == "step" else 1, keep_every_steps=30 if prefix == "step" else 0)


def check_newest(root: Path, prefix: str, known: Known) -> None:
    """All are whole, but for one damaged on purpose; the newest is the last done, or may have come after it."""
    if not any(kind == "rename" for kind, _, _ in known.maybe):
        for path in list_checkpoints(root, prefix):
            load(path)  # what is half deleted is not there
    allowed = [(step, value) for kind, step, value in known.maybe if kind == prefix] + known.done[prefix][-1:]
    found, _ = find_newest(root, prefix)
    if found is None:
        assert not known.done[prefix], f"{known.done[prefix][-1]} was done, and nothing is there"
        return
    key = (found.state["step"], found.state["value"])
    assert key in allowed, f"{key} is none of {allowed}"
    for group in ("model", "optimizer", "hidden"):
        assert (found.tensors(group)["w"] == key[1]).all()


@pytest.mark.parametrize("mixtures", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_fault_01_every_crash_point_of_saving_and_pruning(tmp_path: Path, mixtures: int) -> None:
    run, log, marks = tmp_path / "run", [], {}
    run.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, log)
        for mark in saves_of_a_run(run / "checkpoints"):
            marks.setdefault(len(log), []).append(mark)

    # what was logged is followed in a model; after each operation the power may fail
    system, known, states = FileSystem(run), Known(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # what follows shall be quick, not durable
        for place in range(len(log) + 1):
            for mark in marks.get(place, []):
                known.learn(*mark)
            for state in system.losses(place, mixtures):
                key = hashlib.sha256(repr((sorted(state.items()), known.done, known.maybe)).encode()).hexdigest()
                if key not in states:
                    states.add(key)
                    survive(tmp_path / f"state{len(states)}", state, known)

            if place < len(log):
                system.do(log[place])
    print(f"{len(log)} operations, {len(states)} distinct states")
    assert len(states) >= 200


def survive(root: Path, state: dict[str, bytes | None], known: Known) -> None:
    """The next attempt after a crash finds what it must, and saves again."""
    lay_out(root, state)
    checkpoints, later = root / "checkpoints", Known()
    for prefix in ("step", "best"):
        check_newest(checkpoints, prefix, known)
        found, _ = find_newest(checkpoints, prefix)
        if found and prefix == "step":
            rename_damaged(checkpoints, prefix, found)
        prune(write(checkpoints, prefix, 90, 99.0), prefix, 2)
        later.learn("done", (prefix, 90, 99.0))
        check_newest(checkpoints, prefix, later)
    for path in checkpoints.iterdir():
        assert path.suffix not in (".partial", ".deleted"), "the next save clears up"
        assert path.suffix != ".replaced" or not path.with_suffix("").exists()
    shutil.rmtree(root)


@pytest.mark.parametrize("kills", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_fault_01_a_process_killed_while_it_saves(tmp_path: Path, kills: int) -> None:
    draw, step = random.Random(7), 0
    write(tmp_path, "step", 0, 0.0)
    for kill in range(kills):
        child = os.fork()
        if not child:
            try:
                for later in range(step + 1, step + 10_000):
                    prune(write(tmp_path, "step", later, float(later)), "step", 2)
                    prune(write(tmp_path, "best", later, float(later)), "best", 1)
            finally:
                os._exit(1)

        time.sleep(draw.uniform(0.002, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL

        for prefix in ("step", "best"):
            found, damaged = find_newest(tmp_path, prefix)
            assert not damaged, f"kill {kill}"
            if found:
                assert (found.tensors("model")["w"] == found.state["step"]).all()
            if prefix == "step":
                assert found
                assert found.state["step"] >= step
                step = found.state["step"]
    print(f"{kills} kills, {step} saves")
