"""What a checkpoint says of itself, read without trust: manifest, sizes, digests, and trainer.json as an object.

The files may come from anywhere, and a digest only shows that they are what their writer meant. So only the expected
names are opened, none of them through a symbolic link, sizes are compared before anything is read, and every fault is a
CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from rnnlm import files
from rnnlm.checkpoint import safetensors_file
from rnnlm.checkpoint.safetensors_file import CheckpointError, Tensors
from rnnlm.hashing import json_digest

FORMAT = "rnnlm-checkpoint"
VERSION = 2
GROUPS = ("model", "optimizer", "hidden")
FILES = {*(f"{group}.safetensors" for group in GROUPS), "trainer.json"}
JSON_BYTES = 2**20  # of trainer.json, which is a few kilobytes, and of a manifest, which is less
READ_BYTES = 2**22


def serialize_manifest(files: Mapping[str, Any]) -> bytes:
    """The only bytes of a manifest of these files, its digest among them."""
    body = {"format": FORMAT, "version": VERSION, "files": files}
    return json.dumps({**body, "digest": json_digest(body)}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The files that a checkpoint must have: name -> size, sha256.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or lists what no checkpoint has.
    """
    where = path / "manifest.json"
    if path.is_symlink():
        raise CheckpointError(f"{where}: in a directory that is a symbolic link; give the directory itself")

    data = _small_file(where)
    body = safetensors_file.parse_object(data, where)
    files = body.get("files")
    if not isinstance(files, dict) or data != serialize_manifest(files):  # of another format or version as well
        raise CheckpointError(f"{where}: damaged, or not a checkpoint of version {VERSION}")

    if not {"trainer.json"} <= {*files} <= FILES:
        raise CheckpointError(f"{where}: lists other files than {', '.join(sorted(FILES))}")
    for entry in files.values():
        if not isinstance(entry, dict) or not _is_count(entry.get("size")) or not isinstance(entry.get("sha256"), str):
            raise CheckpointError(f"{where}: a file without its size and digest")
    return files


def entry_of(path: Path, name: str, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the manifest says of a file.

    Raises:
        CheckpointError: it does not list it.
    """
    if name not in manifest:
        raise CheckpointError(f"{path}/manifest.json: does not list {name}")
    entry: Mapping[str, Any] = manifest[name]
    return entry


def check_file(path: Path, name: str, manifest: Mapping[str, Any], every_byte: bool) -> None:
    """Check a file's size, and its contents if asked for, a block at a time.

    Raises:
        CheckpointError: it is not what the manifest says.
    """
    with _opened(path, name, manifest) as file:
        sha256 = hashlib.sha256()
        while every_byte and (block := file.read(READ_BYTES)):
            sha256.update(block)
    if every_byte:
        _check_digest(path, name, manifest, sha256.hexdigest())


def read_tensors(path: Path, name: str, manifest: Mapping[str, Any], expected: Tensors | None) -> dict[str, Tensor]:
    """The tensors of a file, every byte checked; `expected` as in safetensors_file.read.

    Raises:
        CheckpointError: it is not what the manifest says, or not what is expected.
    """
    with _opened(path, name, manifest) as file:
        tensors, sha256 = safetensors_file.read(file, manifest[name]["size"], path / name, expected)
    _check_digest(path, name, manifest, sha256)
    return tensors


def read_state(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """trainer.json, every byte checked.

    Raises:
        CheckpointError: it is not what the manifest says, or no JSON object.
    """
    data = _small_file(path / "trainer.json")
    _check_digest(path, "trainer.json", manifest, hashlib.sha256(data).hexdigest())
    return safetensors_file.parse_object(data, path / "trainer.json")


@contextmanager
def _opened(path: Path, name: str, manifest: Mapping[str, Any]) -> Iterator[BufferedReader]:
    """A file, which has the size that the manifest says; what fails while it is read is a CheckpointError."""
    expected = entry_of(path, name, manifest)["size"]
    try:
        file, size = files.open_regular(path / name)
        with file:
            if size != expected:
                raise CheckpointError(f"{path / name}: {size} bytes, not {expected}")
            yield file
    except OSError as error:
        raise CheckpointError(f"{path / name}: cannot be read ({error})") from error


def _small_file(path: Path) -> bytes:
    """The contents of a file of JSON_BYTES at most."""
    try:
        file, size = files.open_regular(path)
        with file:
            if size > JSON_BYTES:
                raise CheckpointError(f"{path}: {size} bytes, more than any such file has")
            return file.read(JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _check_digest(path: Path, name: str, manifest: Mapping[str, Any], sha256: str) -> None:
    if sha256 != entry_of(path, name, manifest)["sha256"]:
        raise CheckpointError(f"{path / name}: its contents differ from the digest in manifest.json")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
