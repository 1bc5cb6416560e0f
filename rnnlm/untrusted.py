"""What a checkpoint says of itself, read without trust: manifest, sizes, digests, and the types in trainer.json.

The files may come from anywhere, and a digest only tells that they are what their writer meant. So only the expected
names are opened, none of them through a symbolic link, sizes are compared before anything is read, and every fault is a
CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from rnnlm import disk, tensorfile
from rnnlm.health import SPIKE_WINDOW
from rnnlm.optim import ValidationMemory
from rnnlm.stream import json_digest
from rnnlm.tensorfile import CheckpointError, Tensors

FORMAT = "rnnlm-checkpoint"
VERSION = 2
PARTS = ("model", "optimizer", "hidden")
FILES = {*(f"{part}.safetensors" for part in PARTS), "trainer.json"}
JSON_BYTES = 2**20  # of trainer.json, which is a few kilobytes, and of a manifest, which is less
READ_BYTES = 2**22


def spell_manifest(files: Mapping[str, Any]) -> bytes:
    """A manifest's only spelling, its digest in it."""
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
    body = tensorfile.parse_object(data, where)
    files = body.get("files")
    if not isinstance(files, dict) or data != spell_manifest(files):  # of another format or version as well
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
        CheckpointError: nothing.
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
    """The tensors of a file, every byte checked; `expected` as in tensorfile.read.

    Raises:
        CheckpointError: it is not what the manifest says, or not what is expected.
    """
    with _opened(path, name, manifest) as file:
        tensors, sha256 = tensorfile.read(file, manifest[name]["size"], path / name, expected)
    _check_digest(path, name, manifest, sha256)
    return tensors


def read_state(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """trainer.json, every byte checked.

    Raises:
        CheckpointError: it is not what the manifest says, or no JSON object.
    """
    data = _small_file(path / "trainer.json")
    _check_digest(path, "trainer.json", manifest, hashlib.sha256(data).hexdigest())
    return tensorfile.parse_object(data, path / "trainer.json")


@contextmanager
def _opened(path: Path, name: str, manifest: Mapping[str, Any]) -> Iterator[BufferedReader]:
    """A file of the size that the manifest tells; what fails while it is read is a CheckpointError."""
    expected = entry_of(path, name, manifest)["size"]
    try:
        file, size = disk.open_regular(path / name)
        with file:
            if size != expected:
                raise CheckpointError(f"{path / name}: {size} bytes, not {expected}")
            yield file
    except OSError as error:
        raise CheckpointError(f"{path / name}: cannot be read ({error})") from error


def _small_file(path: Path) -> bytes:
    try:
        file, size = disk.open_regular(path)
        with file:
            if size > JSON_BYTES:
                raise CheckpointError(f"{path}: {size} bytes, more than any such file has")
            return file.read(JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _check_digest(path: Path, name: str, manifest: Mapping[str, Any], sha256: str) -> None:
    if sha256 != entry_of(path, name, manifest)["sha256"]:
        raise CheckpointError(f"{path / name}: its contents differ from the digest in manifest.json")


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """Check that trainer.json holds what the trainer writes: keys and types; what they say is the caller's to judge.

    Args:
        path: the checkpoint, for errors.

    Raises:
        CheckpointError: naming the first key that is missing or of another type.
    """
    rules: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("step", "horizon_steps", "vocab_size", "processes"), _is_count),
        **dict.fromkeys(("stream", "tokenizer"), lambda value: isinstance(value, str)),
        "memory": _is_memory,
        "interval": lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_whole, value)),
        "scaler": lambda value: _is_dict(value, _is_number),
        "configuration": lambda value: _is_dict(value, lambda part: isinstance(part, dict)),
        "health": _is_health,
        "versions": lambda value: _is_dict(value, lambda part: isinstance(part, str)),
    }
    rules["origin"] = lambda value: _is_origin(value) and value["step"] <= state["step"]
    for key, holds in rules.items():
        if key not in state or not holds(state[key]):
            shown = repr(state[key])[:100] if key in state else "not there"
            raise CheckpointError(f"{path}/trainer.json: {key} is {shown}, which no trainer writes")


def _is_memory(value: Any) -> bool:
    """Whether these are the fields of a ValidationMemory."""
    fields = ValidationMemory().to_dict()
    if not _is_dict(value, _is_number) or {*value} != {*fields} or value["learning_rate_scale"] is None:
        return False
    return all(_is_count(value[key]) for key, default in fields.items() if type(default) is int)


def _is_origin(value: Any) -> bool:
    """Whether these are the fields of an Origin."""
    return _is_dict(value, _is_count) and value.keys() == {"step", "epoch", "position"}


def _is_health(value: Any) -> bool:
    """Whether these are the fields of Health."""
    lists = {"counts": (3, _is_count), "losses": (SPIKE_WINDOW, lambda loss: type(loss) is float)}
    if not isinstance(value, dict) or value.keys() != {*lists, "resets"} or not _is_count(value["resets"]):
        return False
    found = ((value[key], size, holds) for key, (size, holds) in lists.items())
    return all(isinstance(each, list) and len(each) == size and all(map(holds, each)) for each, size, holds in found)


def _is_whole(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return value is None or type(value) is float or _is_whole(value)


def _is_dict(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))
