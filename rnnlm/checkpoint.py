"""Checkpoints: a directory of safetensors and JSON that is whole or is not there.

    step-00001000/model.safetensors      parameters
                  optimizer.safetensors  moments, named like the parameters
                  hidden.safetensors     layer0.h, layer0.c, ...: (global_batch_size, hidden_size)
                  trainer.json           step, validation memory, digests of stream and tokenizer
                  manifest.json          size and sha256 of each, its own digest; written last

Everything is written under `<name>.partial`, synced, then renamed. What is loaded is first compared with the manifest,
and parsed from the very bytes that were compared; no pickle anywhere. A damaged checkpoint is set aside under
`damaged-<name>` and the one before it is used. The price: files pass through memory whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from rnnlm.config import Config, UserError
from rnnlm.model import RecurrentLM
from rnnlm.stream import fsync_directory, json_digest, write_durably
from rnnlm.tokenizer import Tokenizer

FORMAT = "rnnlm-checkpoint"
VERSION = 1
JSON_BYTES = 2**24  # manifest and trainer.json are a few kilobytes

Tensors = Mapping[str, Tensor]


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole: where it is, and its trainer.json."""

    path: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `model`, `optimizer` or `hidden`, on the CPU.

        Raises:
            CheckpointError: the file changed since it was checked.
        """
        return from_safetensors(_read(self.path, f"{name}.safetensors", _manifest(self.path)))


def save(root: Path, name: str, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint root/name and return its path; one of that name is replaced.

    Args:
        parts: file name without suffix -> tensors, none of which share memory.
        state: what goes into trainer.json.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    final, partial = root / name, root / f"{name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {"trainer.json": json.dumps(dict(state), indent=1).encode()}
        entries = {}
        for part in [*parts, "trainer"]:
            key = "trainer.json" if part == "trainer" else f"{part}.safetensors"
            data = files.get(key) or to_safetensors(
                {tensor: value.detach().cpu().contiguous() for tensor, value in parts[part].items()}
            )
            write_durably(partial / key, data)
            entries[key] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        body = {"format": FORMAT, "version": VERSION, "files": entries}
        write_durably(partial / "manifest.json", json.dumps({**body, "digest": json_digest(body)}, indent=1).encode())
        fsync_directory(partial)
        if final.exists():  # left by a later life of this run that an older checkpoint has overtaken
            shutil.rmtree(final)
        partial.rename(final)
        fsync_directory(root)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint.

    Raises:
        CheckpointError: naming the file that is missing or not what the manifest says.
    """
    manifest = _manifest(path)
    for name in manifest:
        _read(path, name, manifest)
    state = json.loads(_read(path, "trainer.json", manifest))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}/trainer.json: not a JSON object")
    return Checkpoint(path, state)


def newest(root: Path, prefix: str) -> Checkpoint | None:
    """The newest whole checkpoint called <prefix>-<step>; None if there is none at all.

    Damaged ones on the way are set aside, loudly.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: starting anew is the user's decision.
    """
    found = names(root, prefix)
    for path in reversed(found):
        try:
            return load(path)
        except CheckpointError as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"warning: {error}; set aside as {aside.name}, looking for an older one", file=sys.stderr, flush=True)
    if found:
        raise CheckpointError(f"{root}: every checkpoint is damaged; to start anew, choose another run.directory")
    return None


def names(root: Path, prefix: str) -> list[Path]:
    """The directories called <prefix>-<step>, oldest first; whole or not."""
    pattern = re.compile(rf"{prefix}-\d{{8,}}")
    found = [path for path in root.iterdir() if pattern.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def prune(root: Path, prefix: str, keep: int) -> None:
    """Delete all but the newest `keep`, once the newest has been read back and is whole.

    Raises:
        CheckpointError: the newest is damaged; nothing was deleted.
    """
    found = names(root, prefix)
    if len(found) > keep:
        load(found[-1])
        for path in found[:-keep]:
            shutil.rmtree(path)


def copy_tensors(target: Tensors, source: Tensors, where: Path) -> None:
    """Copy values into existing tensors of the same names, shapes and dtypes.

    Raises:
        CheckpointError: naming the first tensor that differs; nothing was copied.
    """
    for name in sorted({*target, *source}):
        expected, found = target.get(name), source.get(name)
        if expected is None or found is None or (expected.shape, expected.dtype) != (found.shape, found.dtype):
            raise CheckpointError(f"{where}: tensor {name} is {_describe(found)}, expected {_describe(expected)}")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _describe(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def load_model(config: Config, device: torch.device) -> tuple[RecurrentLM, Tokenizer, Checkpoint]:
    """The model of a run, as run.checkpoint names it: the best one, or the last where there is no best yet.

    Raises:
        UserError: no checkpoint, or one that does not fit the run's configuration.
    """
    directory = Path(config.run.directory)
    found = newest(directory / "checkpoints", "best") if config.run.checkpoint == "best" else None
    found = found or newest(directory / "checkpoints", "step")
    if found is None:
        raise UserError(f"run.directory={directory}: no checkpoint yet; train first, or wait for run.save_every_steps")
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    if tokenizer.digest != found.state.get("tokenizer"):
        raise UserError(f"{directory}/tokenizer.model: not the tokenizer of {found.path.name}; put the right one back")
    model = RecurrentLM(config.model, tokenizer.vocab_size, config.train.seed, config.train.loss_chunk_tokens)
    copy_tensors(dict(model.named_parameters()), found.tensors("model"), found.path)
    return model.to(device), tokenizer, found


def _manifest(path: Path) -> dict[str, Any]:
    """The files that a checkpoint must have: name -> size, sha256."""
    try:
        if (path / "manifest.json").stat().st_size > JSON_BYTES:
            raise CheckpointError(f"{path}/manifest.json: larger than any manifest")
        body = json.loads((path / "manifest.json").read_bytes())
        digest = body.pop("digest")
        files = {str(name): dict(entry) for name, entry in body["files"].items()}
        known = (body["format"], body["version"]) == (FORMAT, VERSION)
        safe = all(Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/manifest.json: cannot be read ({error})") from error
    if digest != json_digest(body) or not known or not safe:
        raise CheckpointError(f"{path}/manifest.json: damaged, or not a checkpoint of version {VERSION}")
    return files


def _read(path: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a file, which are those that were written."""
    try:
        expected = manifest[name]
        if (path / name).stat().st_size != expected["size"]:
            raise CheckpointError(f"{path / name}: {(path / name).stat().st_size} bytes, not {expected['size']}")
        data = (path / name).read_bytes()
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / name}: cannot be read ({error})") from error
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path / name}: its contents differ from the digest in manifest.json")
    return data
