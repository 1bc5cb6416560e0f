"""Checkpoints: a directory of safetensors and JSON that is whole or is not there.

    step-00001000/model.safetensors      parameters
                  optimizer.safetensors  moments, named like the parameters
                  hidden.safetensors     layer0.h, layer0.c, ...: (global_batch_size, ...), and where the rows ended
                  trainer.json           step, validation memory, digests of stream and tokenizer
                  manifest.json          size and sha256 of each, its own digest; written last

Everything is written under `<name>.partial`, synced, then renamed. One of the same name that was there stays as
`<name>.replaced` until the new one has been read back; readers take it only where `<name>` is not whole. What is
loaded is compared with the manifest in the same pass that reads it; no pickle anywhere. A damaged checkpoint is
renamed to `damaged-<name>` and the one before it is used. The files are not trusted: no link is followed, and
sizes and shapes are checked before memory is taken. The price: every byte saved is read back once.

Two checkpoints of one step share the files that both have, as one file with two names where the disk can do that:
nothing is ever written in place, and to delete one of the names leaves the other. What damages the file damages both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
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

    def tensors(self, group: str, expected: Tensors | None = None) -> dict[str, torch.Tensor]:
        """The tensors of `model`, `optimizer` or `hidden`, on the CPU, every byte of them checked.

        Args:
            expected: names, shapes and dtypes that they must have (`meta` tensors will do); where it is given, other
                ones are refused before memory is taken for them.

        Raises:
            CheckpointError: damaged, changed since, or of another model.
        """
        return manifest.read_tensors(self.path, f"{group}.safetensors", manifest.read_manifest(self.path), expected)

    def bytes(self, group: str) -> int:
        """The size of the file of `model`, `optimizer` or `hidden`."""
        name = f"{group}.safetensors"
        return int(manifest.entry_of(self.path, name, manifest.read_manifest(self.path))["size"])


def save(
    root: Path, name: str, groups: Mapping[str, Tensors], state: Mapping[str, Any], same: Path | None = None
) -> Path:
    """Write the checkpoint root/name and return its path; one of that name is replaced.

    Args:
        groups: `model`, `optimizer`, `hidden` -> tensors, none of which share memory.
        state: what goes into trainer.json.
        same: a checkpoint that was just written of the same tensors, or of some groups of them, to share files with.

    Raises:
        NonFiniteError: a tensor is not finite; nothing was written.
        CheckpointError: what arrived in a file is not what was written; nothing of it is left.
        OSError: it could not be written; nothing of it is left, or it is whole but its name may not outlive a crash.
    """
    check_finite(groups)
    final, partial, replaced = (root / f"{name}{suffix}" for suffix in ("", PARTIAL, REPLACED))
    try:
        if not root.is_dir():
            files.make_directory(root)
            files.sync(root.parent)
        files.remove_tree(partial)
        files.make_directory(partial)

        _write_files(partial, groups, state, same)
        files.sync(partial)  # before its name can be found: else a power loss could keep the name and lose files

        if final.exists():  # of an earlier attempt of this run, which died after it and was resumed from an older one
            if replaced.exists():
                files.delete(replaced)
            files.rename(final, replaced)
        files.rename(partial, final)
        files.sync(root)
    except (OSError, CheckpointError):
        # the disk may fail here as well; what is left then is cleared up by the next save
        with suppress(OSError):
            if replaced.exists() and not final.exists():
                files.rename(replaced, final)
        with suppress(OSError):
            files.remove_tree(partial)
        raise
    return final


def check_finite(groups: Mapping[str, Tensors]) -> None:
    """Check that no tensor holds infinity or NaN.

    Raises:
        NonFiniteError: naming the first that does.
    """
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(f"{group}: tensor {name} is not finite, so it is not saved")


def _write_files(
    directory: Path, groups: Mapping[str, Tensors], state: Mapping[str, Any], same: Path | None = None
) -> None:
    """Write the files of a checkpoint, the manifest last; what `same` has as well becomes another name of its files."""
    assert {*groups} <= {*manifest.GROUPS}, "a reader would refuse them"
    written = manifest.read_manifest(same) if same else {}
    entries = {}
    for group, tensors in groups.items():
        path = directory / f"{group}.safetensors"
        if same and path.name in written and files.link(same / path.name, path):
            entries[path.name] = written[path.name]
            continue
        files.write(path, safetensors_file.write, tensors)
        size, sha256 = safetensors_file.checksum(path, tensors)
        entries[path.name] = {"size": size, "sha256": sha256}

    data = json.dumps(dict(state), indent=1).encode()
    files.write(directory / "trainer.json", Path.write_bytes, data)
    entries["trainer.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files.write(directory / "manifest.json", Path.write_bytes, manifest.serialize_manifest(entries))


def load(path: Path, every_byte: bool = True) -> Checkpoint:
    """Check a checkpoint: all of it, or with every_byte=False its manifest, sizes and trainer.json.

    What tensors() reads it checks anyway, so where another process has just checked every byte, False saves a pass.

    Raises:
        CheckpointError: naming the file that is missing or not what the manifest says.
    """
    listed = manifest.read_manifest(path)
    for name in {*listed} - {"trainer.json"}:  # which is small, and read below
        manifest.check_file(path, name, listed, every_byte)
    return Checkpoint(path, manifest.read_state(path, listed))


def find_newest(root: Path, prefix: str) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest whole checkpoint called <prefix>-<step>, and what is wrong with each newer one; reads only.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: to start from the beginning is the user's decision.
    """
    damaged: list[CheckpointError] = []
    for path in reversed(list_checkpoints(root, prefix)):
        try:
            return load(path), damaged
        except CheckpointError as error:
            damaged.append(error)

    if damaged:
        raise CheckpointError(
            f"{root}: every checkpoint is damaged ({damaged[0]}); "
            "to start from the beginning, choose another run.directory"
        )
    return None, []


def rename_damaged(root: Path, prefix: str, good: Checkpoint) -> None:
    """Rename the checkpoints that are newer than the newest good one to damaged-<name>."""
    for path in list_checkpoints(root, prefix):
        if _sort_key(path) > _sort_key(good.path):
            damaged = path.with_name(f"damaged-{path.name}")
            files.remove_tree(damaged)
            files.rename(path, damaged)
            files.sync(root)


def list_checkpoints(root: Path, prefix: str) -> list[Path]:
    """The directories called <prefix>-<step> or <prefix>-<step>.replaced, oldest first, whole or not."""
    pattern = re.compile(rf"{re.escape(prefix)}-[0-9]{{8,}}({re.escape(REPLACED)})?")
    found = [path for path in root.iterdir() if pattern.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_sort_key)


def _sort_key(path: Path) -> tuple[int, bool]:
    """(step, whether it is the last one written of that name): larger for newer ones."""
    name = path.name.removesuffix(REPLACED)
    return int(name.rpartition("-")[2]), name == path.name


def prune(written: Path, prefix: str, keep_last: int, keep_every_steps: int = 0) -> None:
    """Read back the checkpoint just written; if it is whole, delete what is no longer kept, and what kills have left.

    Kept are the `keep_last` newest whole ones, the one just written among them, and those whose step is a multiple of
    keep_every_steps (0: none of these). Damaged ones count for nothing and stay.

    Raises:
        CheckpointError: the one just written is damaged; nothing was deleted.
        OSError: it is whole, but others could not be deleted.
    """
    load(written)
    root = written.parent
    there = [path for path in list_checkpoints(root, prefix) if path != written]
    replaced = [path for path in there if _is_replaced(path)]

    others = [path for path in there if path not in replaced and _sizes_match(path)]
    for path in others[: max(0, len(others) - keep_last + 1)]:
        if not keep_every_steps or _sort_key(path)[0] % keep_every_steps:
            files.delete(path)

    # of saves and deletions that were killed
    unfinished = re.compile(rf"{re.escape(prefix)}-[0-9]{{8,}}(\.replaced)?\.(partial|deleted)")
    for path in [path for path in root.iterdir() if unfinished.fullmatch(path.name)]:
        files.remove_tree(path)
    for path in replaced:
        files.delete(path)


def _is_replaced(path: Path) -> bool:
    """Whether a checkpoint of the same name has taken its place."""
    return path.name.endswith(REPLACED) and path.with_name(path.name.removesuffix(REPLACED)).exists()


def _sizes_match(path: Path) -> bool:
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
