"""Checkpoints: a directory of safetensors and JSON that is whole or is not there.

    step-00001000/model.safetensors      parameters
                  optimizer.safetensors  moments, named like the parameters
                  hidden.safetensors     layer0.h, layer0.c, ...: (global_batch_size, hidden_size)
                  trainer.json           step, validation memory, digests of stream and tokenizer
                  manifest.json          size and sha256 of each, its own digest; written last

Everything is written under `<name>.partial`, synced, then renamed. One of the same name that was there stays as
`<name>.replaced` until the new one has been read back; readers take it only where `<name>` is not whole. What is
loaded is compared with the manifest in the same pass that reads it; no pickle anywhere. A damaged checkpoint is set
aside under `damaged-<name>` and the one before it is used. Whoever wrote the files: none leads out of the directory,
and none takes more memory than the caller expects. The price: every byte saved is read back once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnnlm import files
from rnnlm.checkpoint import manifest, safetensors_file
from rnnlm.checkpoint.safetensors_file import CheckpointError, Tensors

PARTIAL, REPLACED = ".partial", ".replaced"


class NonFiniteError(CheckpointError):
    """A tensor that was to be saved holds infinity or NaN."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole: where it is, and its trainer.json."""

    path: Path
    state: Mapping[str, Any]

    def tensors(self, part: str, expected: Tensors | None = None) -> dict[str, torch.Tensor]:
        """The tensors of `model`, `optimizer` or `hidden`, on the CPU, every byte of them checked.

        Args:
            expected: names, shapes and dtypes that they must have (`meta` tensors will do); where it is given, other
                ones are refused before memory is taken for them.

        Raises:
            CheckpointError: damaged, changed since, or of another model.
        """
        return manifest.read_tensors(self.path, f"{part}.safetensors", manifest.read_manifest(self.path), expected)

    def bytes(self, part: str) -> int:
        """The size of a part's file."""
        name = f"{part}.safetensors"
        return int(manifest.entry_of(self.path, name, manifest.read_manifest(self.path))["size"])


def save(root: Path, name: str, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint root/name and return its path; one of that name is replaced.

    Args:
        parts: `model`, `optimizer`, `hidden` -> tensors, none of which share memory.
        state: what goes into trainer.json.

    Raises:
        NonFiniteError: a tensor is not finite; nothing was written.
        OSError: it could not be written; nothing of it is left, or it is whole but its name may not outlive a crash.
    """
    check_finite(parts)
    final, partial, replaced = (root / f"{name}{suffix}" for suffix in ("", PARTIAL, REPLACED))
    try:
        if not root.is_dir():
            files.make_directory(root)
            files.sync(root.parent)
        files.remove_tree(partial)
        files.make_directory(partial)
        entries = {}
        for file, blocks in _files(parts, state):
            seal = _Seal()
            files.write(partial / file, seal.on(blocks))
            entries[file] = {"size": seal.size, "sha256": seal.sha256.hexdigest()}
        files.write(partial / "manifest.json", [manifest.spell_manifest(entries)])
        files.sync(partial)
        if final.exists():  # of a life of this run that died after it, and went on from an older one
            if replaced.exists():
                files.delete(replaced)
            files.rename(final, replaced)
        files.rename(partial, final)
        files.sync(root)
    except OSError:
        with suppress(OSError):
            if replaced.exists() and not final.exists():
                files.rename(replaced, final)
        with suppress(OSError):
            files.remove_tree(partial)
        raise
    return final


def check_finite(parts: Mapping[str, Tensors]) -> None:
    """Check that no tensor holds infinity or NaN.

    Raises:
        NonFiniteError: naming the first that does.
    """
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(f"{part}: tensor {name} is not finite, so it is not saved")


def _files(
    parts: Mapping[str, Tensors], state: Mapping[str, Any]
) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
    """(name, contents) of each file but the manifest."""
    assert {*parts} <= {*manifest.PARTS}, "a reader would refuse them"
    for part, tensors in parts.items():
        yield f"{part}.safetensors", safetensors_file.spell(tensors)
    yield "trainer.json", [json.dumps(dict(state), indent=1).encode()]


class _Seal:
    """Size and digest of what passes through."""

    def __init__(self) -> None:
        self.size, self.sha256 = 0, hashlib.sha256()

    def on(self, blocks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for block in blocks:
            self.size += len(block)
            self.sha256.update(block)
            yield block


def load(path: Path, every_byte: bool = True) -> Checkpoint:
    """Check a checkpoint: all of it, or with every_byte=False its manifest, sizes and trainer.json.

    What tensors() reads it checks anyway, so where another process has just checked every byte, False saves a pass.

    Raises:
        CheckpointError: naming the file that is missing or not what the manifest says.
    """
    listed = manifest.read_manifest(path)
    for name in {*listed} - {"trainer.json"}:
        manifest.check_file(path, name, listed, every_byte)
    return Checkpoint(path, manifest.read_state(path, listed))


def newest(root: Path, prefix: str) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest whole checkpoint called <prefix>-<step>, and what is wrong with each newer one; reads only.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: starting anew is the user's decision.
    """
    damaged: list[CheckpointError] = []
    for path in reversed(names(root, prefix)):
        try:
            return load(path), damaged
        except CheckpointError as error:
            damaged.append(error)
    if damaged:
        raise CheckpointError(
            f"{root}: every checkpoint is damaged ({damaged[0]}); to start anew, choose another run.directory"
        )
    return None, []


def set_aside(root: Path, prefix: str, good: Checkpoint) -> None:
    """Rename the checkpoints that are newer than the newest good one to damaged-<name>."""
    for path in names(root, prefix):
        if _order(path) > _order(good.path):
            aside = path.with_name(f"damaged-{path.name}")
            files.remove_tree(aside)
            files.rename(path, aside)
            files.sync(root)


def names(root: Path, prefix: str) -> list[Path]:
    """The directories called <prefix>-<step> or <prefix>-<step>.replaced, oldest first, whole or not."""
    pattern = re.compile(rf"{re.escape(prefix)}-[0-9]{{8,}}({re.escape(REPLACED)})?")
    found = [path for path in root.iterdir() if pattern.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_order)


def _order(path: Path) -> tuple[int, bool]:
    """(step, whether it is the last of that name); the larger, the newer."""
    name = path.name.removesuffix(REPLACED)
    return int(name.rpartition("-")[2]), name == path.name


def prune(written: Path, prefix: str, keep_last: int, keep_every_steps: int = 0) -> None:
    """Read back the checkpoint just written; if it is whole, delete what is no longer kept, and remains of the dead.

    Kept are the `keep_last` newest whole ones, the one just written among them, and those whose step is a multiple of
    keep_every_steps (0: none of these). Damaged ones count for nothing and stay.

    Raises:
        CheckpointError: the one just written is damaged; nothing was deleted.
        OSError: it is whole, but others could not be deleted.
    """
    load(written)
    root = written.parent
    there = [path for path in names(root, prefix) if path != written]
    superseded = [path for path in there if _is_superseded(path)]
    others = [path for path in there if path not in superseded and _seems_whole(path)]
    for path in others[: max(0, len(others) - keep_last + 1)]:
        if not keep_every_steps or _order(path)[0] % keep_every_steps:
            files.delete(path)
    dead = re.compile(rf"{re.escape(prefix)}-[0-9]{{8,}}(\.replaced)?\.(partial|deleted)")
    for path in [path for path in root.iterdir() if dead.fullmatch(path.name)]:
        files.remove_tree(path)
    for path in superseded:
        files.delete(path)


def _is_superseded(path: Path) -> bool:
    """Whether it is what a checkpoint of the same name has replaced."""
    return path.name.endswith(REPLACED) and path.with_name(path.name.removesuffix(REPLACED)).exists()


def _seems_whole(path: Path) -> bool:
    """Whether manifest and sizes are right; every byte was read back when it was written."""
    try:
        load(path, every_byte=False)
    except CheckpointError:
        return False
    return True


def copy_tensors(target: Tensors, source: Tensors, where: Path) -> None:
    """Copy values into existing tensors of the same names, shapes and dtypes.

    Raises:
        CheckpointError: naming the first tensor that differs; nothing was copied.
    """
    safetensors_file.compare(target, source, where)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
