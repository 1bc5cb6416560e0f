"""What a power loss may leave of files, as a model that follows the operations of a program up to any point."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rnnlm import files

Operation = tuple[str, Path, Any]


class File:
    """Bytes as programs see them, and how many of the first are on disk."""

    def __init__(self, data: bytes):
        self.data, self.synced = data, 0

    def after_power_loss(self, share: float) -> bytes:
        """Its bytes, with this share of those that were not synced."""
        return self.data[: self.synced + int((len(self.data) - self.synced) * share)]


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

    The bytes of a file that were not synced since they were written may be there, be missing, or end in the middle.
    Each change of a name (made, renamed, removed) in a directory that was not synced since may be done or not, whatever
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
                node.synced = len(node.data)
            else:
                node.synced, node.pending = dict(node.names), []
            return

        parent = self.node(path.parent)
        if kind == "append":
            parent.names[path.name].data += argument
        elif kind == "write" and path.name in parent.names:
            parent.names[path.name].__init__(argument)
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
                    found[prefix + name] = node.after_power_loss(share())
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
            log.append((kind, shown, Path(arguments[0]) if kind == "rename" else None))
            return result

        patch.setattr(os, name, call)

    honest_write = files.write

    def write(path: Path, fill: Callable[..., object], *contents: Any) -> None:
        """Whoever fills a file, a library as well: it is one write of its contents, and is synced after it."""

        def logged_fill(path: Path) -> None:
            fill(path, *contents)
            log.append(("write", path, path.read_bytes()))

        honest_write(path, logged_fill)

    kinds = {"fsync": "sync", "rename": "rename", "unlink": "remove", "rmdir": "remove", "mkdir": "make"}
    for name, kind in kinds.items():
        logged(name, kind)
    patch.setattr(files, "write", write)


def lay_out(root: Path, state: dict[str, bytes | None]) -> None:
    root.mkdir()
    for name, data in state.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
