"""The model of a power loss for builds, which write files in many ways and move directories to another place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from crash_model import Directory, FileSystem, Operation


class MovingFileSystem(FileSystem):
    """Also renames from one directory into another: until the other one is synced, the first still has the name.

    A journal would have one of the two; no promise is broken by both, as what was there stays.
    """

    def __init__(self, root: Path):
        super().__init__(root)
        self.moved: list[tuple[Directory, str, Directory]] = []  # from where, and to where

    def do(self, operation: Operation) -> None:
        kind, path, argument = operation
        if kind == "rename" and argument.parent != path.parent:
            source, target = self.node(path.parent), self.node(argument.parent)
            target.change(**{argument.name: source.names.pop(path.name)})
            self.moved.append((source, path.name, target))
            return

        if kind == "sync" and self.node(path) in [target for _, _, target in self.moved]:
            for source, name, target in self.moved:
                if target is self.node(path):
                    source.synced.pop(name, None)
                    source.pending = [change for change in source.pending if name not in change]
        super().do(operation)


def watch_build(patch: pytest.MonkeyPatch, log: list[Operation], root: Path) -> None:
    """Log every operation below a directory; the bytes of a file when it is synced or renamed, however written."""
    seen: dict[int, bytes] = {}  # contents logged last, by inode

    def log_contents(path: Path) -> None:
        if path.is_file() and seen.get(inode := path.stat().st_ino) != (data := path.read_bytes()):
            seen[inode] = data
            log.append(("write", path, data))

    def logged(name: str, kind: str) -> None:
        honest = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            shown = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
            is_watched = root in (shown, *shown.parents) and (shown.exists() or kind == "make")
            if is_watched and kind in ("sync", "rename"):
                log_contents(shown)
            if is_watched and kind == "remove":
                seen.pop(shown.stat().st_ino, None)  # another file may get this inode

            known = kind != "remove" or any(each[1] == shown or each[2] == shown for each in log)
            result = honest(path, *arguments, **options)
            if is_watched and known:  # a file that was never synced or renamed was not there for anybody
                log.append((kind, shown, Path(arguments[0]) if kind == "rename" else None))
            return result

        patch.setattr(os, name, call)

    for name, kind in {
        "fsync": "sync",
        "rename": "rename",
        "unlink": "remove",
        "rmdir": "remove",
        "mkdir": "make",
    }.items():
        logged(name, kind)
