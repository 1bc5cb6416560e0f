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
from collections.abc import Iterator, Mapping
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
    final, partial, replaced = (root / f"{name}{suffix}" for suffix in ("", ".partial", ".replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        entries = {}
        for file, data in _files(parts, state):
            write_durably(partial / file, data)
            entries[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_durably(partial / "manifest.json", _spell({"format": FORMAT, "version": VERSION, "files": entries}))
        fsync_directory(partial)
        if final.exists():  # of a life of this run that died after it, and went on from an older one
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        fsync_directory(root)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _files(parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of each file but the manifest, one in memory at a time."""
    for part, tensors in parts.items():
        yield f"{part}.safetensors", to_safetensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    yield "trainer.json", json.dumps(dict(state), indent=1).encode()


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
        if _step(path) > _step(good.path):
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def names(root: Path, prefix: str) -> list[Path]:
    """The directories called <prefix>-<step>, oldest first; whole or not."""
    pattern = re.compile(rf"{prefix}-\d{{8,}}")
    found = [path for path in root.iterdir() if pattern.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def prune(written: Path, prefix: str, keep: int) -> None:
    """Delete all but `keep`, the one just written and the newest others, once it has been read back and is whole.

    Raises:
        CheckpointError: the one just written is damaged; nothing was deleted.
    """
    others = [path for path in names(written.parent, prefix) if path != written]
    if surplus := others[: max(0, len(others) - keep + 1)]:
        load(written)
        for path in surplus:
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


def choose(config: Config) -> Path:
    """The checkpoint that run.checkpoint names: the best one, or the last where no best one is whole; reads only.

    Raises:
        CheckpointError: no whole checkpoint in the run.
    """
    root = Path(config.run.directory) / "checkpoints"
    if config.run.checkpoint == "best":
        try:
            if (best := newest(root, "best")[0]) is not None:
                return best.path
        except CheckpointError as error:
            print(f"warning: {error}; reading the last checkpoint instead", file=sys.stderr, flush=True)
    last, _ = newest(root, "step")
    if last is None:
        raise CheckpointError(f"{root}: no checkpoint yet; train first, or wait for run.save_every_steps")
    return last.path


def load_model(config: Config, path: Path, device: torch.device) -> tuple[RecurrentLM, Tokenizer | None, Checkpoint]:
    """The model in a checkpoint of the run, on a device, and its tokenizer if its stream had one.

    Raises:
        UserError: a checkpoint that does not fit the run's configuration or tokenizer.
    """
    found = load(path)
    tokenizer = None
    if found.state.get("tokenizer") != "":
        tokenizer = Tokenizer.load(Path(config.run.directory) / "tokenizer.model")
        if tokenizer.digest != found.state.get("tokenizer"):
            raise CheckpointError(
                f"{config.run.directory}/tokenizer.model: not that of {path.name}; put the right one back"
            )
    vocab_size = tokenizer.vocab_size if tokenizer else int(found.state["vocab_size"])
    model = RecurrentLM(config.model, vocab_size, config.train.seed, config.train.loss_chunk_tokens)
    copy_tensors(dict(model.named_parameters()), found.tensors("model"), path)
    return model.to(device), tokenizer, found


def _spell(body: Mapping[str, Any]) -> bytes:
    """A manifest's only spelling, its digest in it."""
    return json.dumps({**body, "digest": json_digest(body)}, indent=1).encode()


def _manifest(path: Path) -> dict[str, Any]:
    """The files that a checkpoint must have: name -> size, sha256."""
    try:
        if (path / "manifest.json").stat().st_size > JSON_BYTES:
            raise CheckpointError(f"{path}/manifest.json: larger than any manifest")
        data = (path / "manifest.json").read_bytes()
        body = json.loads(data)
        del body["digest"]
        files = {str(name): dict(entry) for name, entry in body["files"].items()}
        known = (body["format"], body["version"]) == (FORMAT, VERSION)
        safe = all(Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/manifest.json: cannot be read ({error})") from error
    if data != _spell(body) or not known or not safe:
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
