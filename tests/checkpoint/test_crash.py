"""Fault 1: a power loss or SIGKILL at any point of saving leaves a whole checkpoint, the newest one that may be."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnlm import files
from rnnlm.checkpoint.checkpoint import find_newest, list_checkpoints, load, prune, rename_damaged, save

Operation = tuple[str, Path, Any]


class File:
    """Bytes as programs see them, and whether they are on disk."""

    def __init__(self, data: bytes):
        self.data, self.synced = data, False


class Directory:
    """Names as programs see them, those on disk, and the changes since: each {name: node, or None for none}."""

    def __init__(self) -> None:
        self.names: dict[str, File | Directory] = {}
        self.synced: dict[str, File | Directory] = {}
        self.pending: list[dict[str, File | Directory | None]] = []

    def change(self, **names: File | Directory | None) -> None:
        self.pending.append(names)
        apply(self.names, names)


def apply(names: dict[str, File | Directory], change: dict[str, File | Directory | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class FileSystem:
    """What a power loss may do to files, where nothing more is promised than POSIX does.

    The bytes of a file that was not synced since it was written may be there, be missing, or end in the middle. Each
    change of a name (made, renamed, removed) in a directory that was not synced since may be done or not, whatever
    became of the others. A rename is done as a whole or not at all. What was synced stays.
    """

    def __init__(self, root: Path):
        self.root, self.top = root, Directory()

    def node(self, path: Path) -> Any:
        node: Any = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names[name]
        return node

    def do(self, operation: Operation) -> None:
        """Follow one operation of a program."""
        kind, path, argument = operation

        if kind == "sync":
            node = self.node(path)
            if isinstance(node, File):
                node.synced = True
            else:
                node.synced, node.pending = dict(node.names), []
            return

        parent = self.node(path.parent)
        if kind == "write" and path.name in parent.names:
            parent.names[path.name].__init__(argument)
        elif kind == "link":
            self.node(argument.parent).change(**{argument.name: parent.names[path.name]})
        elif kind == "rename":
            assert argument.parent == path.parent
            parent.change(**{path.name: None, argument.name: parent.names[path.name]})
        else:
            made = {"write": lambda: File(argument), "make": Directory, "remove": lambda: None}[kind]()
            parent.change(**{path.name: made})

    def after_power_loss(self, keeps: Callable[[], bool], share: Callable[[], float]) -> dict[str, bytes | None]:
        """Path -> contents, None for a directory; `keeps` a change of a name, `share` of bytes that were not synced."""
        found: dict[str, bytes | None] = {}

        def visit(directory: Directory, prefix: str) -> None:
            names = dict(directory.synced)
            for change in directory.pending:
                if keeps():
                    apply(names, change)
            for name, node in sorted(names.items()):
                if isinstance(node, File):
                    found[prefix + name] = node.data if node.synced else node.data[: int(len(node.data) * share())]
                else:
                    found[prefix + name] = None
                    visit(node, f"{prefix}{name}/")

        visit(self.top, "")
        return found

    def losses(self, seed: int, mixtures: int) -> Iterator[dict[str, bytes | None]]:
        """What may be there after a power loss now: all, nothing, and some mixtures of what was not synced."""
        draw = random.Random(seed)
        for keeps in (lambda: True, lambda: False):
            for share in (1.0, 0.5, 0.0):
                yield self.after_power_loss(keeps, lambda share=share: share)  # type: ignore[misc]
        for _ in range(mixtures):
            yield self.after_power_loss(lambda: draw.random() < 0.5, lambda: draw.choice((0.0, 0.5, 1.0)))


def watch(patch: pytest.MonkeyPatch, log: list[Operation]) -> None:
    """Log every operation, as the operating system is asked for it."""

    def logged(name: str, kind: str) -> None:
        honest = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            shown = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
            result = honest(path, *arguments, **options)
            log.append((kind, shown, Path(arguments[0]) if kind in ("rename", "link") else None))
            return result

        patch.setattr(os, name, call)

    honest_write = files.write

    def write(path: Path, fill: Callable[..., object], *contents: Any) -> None:
        """Whoever fills a file, a library as well: it is one write of its contents, and is synced after it."""

        def logged_fill(path: Path) -> None:
            fill(path, *contents)
            log.append(("write", path, path.read_bytes()))

        honest_write(path, logged_fill)

    kinds = {
        "fsync": "sync",
        "rename": "rename",
        "link": "link",
        "unlink": "remove",
        "rmdir": "remove",
        "mkdir": "make",
    }
    for name, kind in kinds.items():
        logged(name, kind)
    patch.setattr(files, "write", write)


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


def lay_out(root: Path, state: dict[str, bytes | None]) -> None:
    root.mkdir()
    for name, data in state.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)


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
