"""Taking over a run's directory: who may, with which configuration, from which checkpoint.

What a run is does not change over its lives: model, optimizer, batch and windows, stream and tokenizer are compared
with the record, and the first difference stops everything before anything is written. Two fields may change when the
user says so by name: seq_len at any step, global_batch_size where an epoch begins; the arithmetic of the substreams
then starts anew from a recorded origin, and every token of the epoch is still a target once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rnnlm
from rnnlm.checkpoint import checkpoint
from rnnlm.cli import dump_yaml, load_yaml
from rnnlm.config import TRAINING_SECTIONS, Config, as_list, field_kinds, nearest
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.files import write_whole
from rnnlm.hashing import json_digest
from rnnlm.train.state import check_state


def identity(config: Config) -> dict[str, dict[str, Any]]:
    """The fields that must stay the same over all lives of a run; the stream's digest stands for the stream's."""
    kinds, values = field_kinds(), dataclasses.asdict(config)
    return {
        section: {name: value for name, value in values[section].items() if not kinds[f"{section}.{name}"]}
        for section in ("model", "optim", "train")
    }


def differing(config: Config, recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Fields of a run's identity that differ from its record, as `section.key is 1 there, 2 now`."""
    return [
        f"{section}.{name} is {recorded[section][name]} there, {value} now"
        for section, fields in identity(config).items()
        for name, value in fields.items()
        if recorded.get(section, {}).get(name, value) != value
    ]


def open_streams(config: Config) -> tuple[TokenStream, TokenStream | None]:
    """The training and the validation stream; None where there is none.

    Raises:
        UserError: streams that are missing, damaged, or of different tokenizers.
    """
    for key, value in (("stream.directory", config.stream.directory), ("run.directory", config.run.directory)):
        if not value:
            raise UserError(f"{key} is not set; give it on the command line or in the file of --config")
    train = TokenStream(Path(config.stream.directory) / "train")
    place = Path(config.stream.directory) / config.eval.split
    valid = TokenStream(place) if place.exists() else None
    needed = config.optim.schedule == "plateau" or config.optim.early_stop_patience or config.eval.split != "valid"
    if valid is None and needed:
        raise UserError(
            f"{place}: no stream there, but plateau, early stopping or eval.split={config.eval.split} needs it; "
            "build it with tools/build_stream.py"
        )
    if valid and valid.manifest.tokenizer != train.manifest.tokenizer:
        raise UserError(f"{place}: built with another tokenizer than {train.directory}; build both with the same")
    if valid and valid.manifest.vocab_size != train.manifest.vocab_size:  # of streams adopted without a tokenizer
        raise UserError(
            f"{place}: has a vocabulary of {valid.manifest.vocab_size}, {train.directory} one of "
            f"{train.manifest.vocab_size}; adopt both with the same --vocab-size"
        )
    for stream in (train, valid) if config.stream.verify else ():
        for _ in stream.verify() if stream else ():
            pass
    return train, valid


def share(config: Config, process: int, processes: int) -> tuple[int, int]:
    """The substreams of a process: first, and one past the last.

    Raises:
        UserError: they cannot be shared out evenly; it names the numbers that can.
    """
    train = config.train
    if train.exact_slices % processes:
        fitting = [2**k for k in range(train.exact_slices.bit_length())]
        raise UserError(
            f"train.exact_slices={train.exact_slices} is not divisible by {processes} processes; "
            f"launch {', '.join(map(str, fitting))}"
        )
    size, each = train.global_batch_size, processes * train.accumulation
    if size % each:
        raise UserError(
            f"train.global_batch_size={size} is not divisible by {processes} processes times "
            f"train.accumulation={train.accumulation}; use {nearest(size, each)}"
        )
    return process * size // processes, (process + 1) * size // processes


def open_ring(config: Config, stream: TokenStream) -> Ring:
    """The arithmetic of the configured substreams.

    Raises:
        UserError: the stream is shorter than one window.
    """
    size, length = config.train.global_batch_size, config.train.seq_len
    if stream.tokens < size * length:
        raise UserError(
            f"{stream.directory}: {stream.tokens} tokens, shorter than one window of train.global_batch_size={size} "
            f"substreams times train.seq_len={length}; lower one of them, or give more text"
        )
    return Ring(stream.tokens, size, length, config.train.seed if config.train.rotate else None)


MARKER = "preempted.json"  # in the run, while it waits to be started again


@dataclass(frozen=True)
class Claim:
    """Where a life of a run begins."""

    checkpoint: str | None  # path of the newest whole one
    origin: Origin
    changed: tuple[str, ...] = ()  # fields that this life changes


def claim(config: Config, stream: TokenStream, tokenizer: Tokenizer | None) -> Claim:
    """Check that the directory is this run's, record the configuration, find the newest whole checkpoint.

    Raises:
        UserError: a run of another configuration, stream or tokenizer; a change that is not possible there.
        CheckpointError: there are checkpoints, but none is whole.
    """
    directory = Path(config.run.directory)
    record, root = directory / "config.yaml", directory / "checkpoints"
    found, damaged = checkpoint.find_newest(root, "step")
    if found:
        check_state(found.state, found.path)
    recorded = found.state["configuration"] if found else load_yaml(record) if record.exists() else {}
    fields = differing(config, recorded)
    changed = tuple(name for name in as_list(config.run.allow_change) if any(f.startswith(f"{name} ") for f in fields))
    if refused := [field for field in fields if field.split(" ")[0] not in changed]:
        raise UserError(
            f"run.directory={directory}: holds a run of another configuration ({'; '.join(refused)}); choose another "
            "run.directory, or give these fields the values they have there (run.allow_change says which may change)"
        )
    origin = Origin()
    if found:
        _check_data(directory, found.state, stream)
        origin = _origin(config, found.state, stream, changed)
    for error in damaged:
        print(f"warning: {error}; set aside, going on from an older one", file=sys.stderr, flush=True)
    if found:
        checkpoint.rename_damaged(root, "step", found)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).unlink(missing_ok=True)
    files = {"tokenizer.model": tokenizer.model} if tokenizer else {}
    files["config.yaml"] = dump_yaml(config, TRAINING_SECTIONS).encode()
    for name, data in files.items():
        write_whole(directory / name, data, alone=True)
    return Claim(str(found.path) if found else None, origin, changed)


def _check_data(directory: Path, state: Mapping[str, Any], stream: TokenStream) -> None:
    for key, digest in {"stream": stream.manifest.digest, "tokenizer": stream.manifest.tokenizer}.items():
        if state[key] != digest:
            raise UserError(
                f"run.directory={directory}: trained on another {key} ({state[key][:12]}, now {digest[:12]}); "
                "give it its own again, or choose another run.directory"
            )


def _origin(config: Config, state: Mapping[str, Any], stream: TokenStream, changed: tuple[str, ...]) -> Origin:
    """From where the substreams of this life are counted."""
    origin = Origin(**state["origin"])
    if not changed:
        return origin
    before = state["configuration"]["train"]
    seed = before["seed"] if before["rotate"] else None
    ring = Ring(stream.tokens, before["global_batch_size"], before["seq_len"], seed, origin)
    now = ring.origin_at(state["step"])
    if "train.global_batch_size" in changed and now.position:
        epoch_ends = ring.steps_before(now.epoch + 1)
        raise UserError(
            f"run.allow_change=train.global_batch_size: step {state['step']} is within epoch {now.epoch}; "
            f"train to its end first, with train.max_steps={epoch_ends}"
        )
    return now


def mark(directory: Path, signal_name: str, step: int, saved_step: int) -> None:
    """Say in the run that it was pre-empted and is to be started again."""
    text = json.dumps({"signal": signal_name, "step": step, "saved_step": saved_step})
    write_whole(directory / MARKER, text.encode(), alone=True)


def state_of(config: Config, stream: TokenStream, ring: Ring, device: torch.device) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    return {
        "stream": stream.manifest.digest,
        "tokenizer": stream.manifest.tokenizer,
        "vocab_size": stream.manifest.vocab_size,
        "origin": asdict(ring.origin),
        "configuration": identity(config),
        "versions": versions(device),
    }


def versions(device: torch.device) -> dict[str, str]:
    """What the bits of a result may depend on besides the configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    return {"rnnlm": rnnlm.__version__, "torch": torch.__version__, "machine": platform.machine(), "device": name}


def fingerprint(config: Config, train: TokenStream, valid: TokenStream | None) -> dict[str, str]:
    """Digests of what must be the same in all processes of a run."""
    sha256 = hashlib.sha256()
    package = Path(rnnlm.__file__).parent
    for source in sorted(package.rglob("*.py")):  # folders too
        sha256.update(f"{source.relative_to(package)}\n".encode() + source.read_bytes())
    sections = {name: part for name, part in asdict(config).items() if name in TRAINING_SECTIONS}
    return {
        "configuration": json_digest(sections),
        "train stream": train.manifest.digest,
        "valid stream": valid.manifest.digest if valid else "none",
        "code": sha256.hexdigest(),
        "torch": torch.__version__,
    }


def check_alike(prints: list[dict[str, str]]) -> None:
    """Compare the fingerprints of all processes.

    Raises:
        UserError: naming the first process that differs, and in what.
    """
    for index, each in enumerate(prints):
        if different := [key for key, value in each.items() if prints[0][key] != value]:
            name = different[0]
            raise UserError(
                f"process {index} has another {' and another '.join(different)} than process 0 "
                f"({each[name][:12]} and {prints[0][name][:12]}); start all with the same code, options and files"
            )
