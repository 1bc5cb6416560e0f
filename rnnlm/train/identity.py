"""What makes two attempts one run, and two processes one attempt: configuration, data, code, versions.

A run is its model, optimizer, batch and windows; these may not differ from what is recorded. Code, PyTorch, device and
threads may: their digests and versions are recorded, since the last bits depend on them.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rnnlm
from rnnlm.config import TRAINING_SECTIONS, Config, knobs
from rnnlm.errors import UserError
from rnnlm.hashing import json_digest
from rnnlm.train.inputs import Streams


def identity(config: Config) -> dict[str, dict[str, Any]]:
    """The fields that must stay the same over all attempts of a run; the stream's digest stands for the stream's."""
    fixed, values = {key for key, knob in knobs().items() if not knob.changeable}, asdict(config)
    return {
        section: {name: value for name, value in values[section].items() if f"{section}.{name}" in fixed}
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


def versions(config: Config, device: torch.device) -> dict[str, str]:
    """What the bits of a result may depend on besides the configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    return {
        "rnnlm": rnnlm.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": name,
        "gradient_sums": gradient_sums(config),
    }


def gradient_sums(config: Config) -> str:
    """How gradients are summed over processes: NCCL takes another order on other machines, or by another algorithm.

    With train.exact_slices there is one order, on any of them.
    """
    if config.train.exact_slices:
        return "in one order"
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        return "one process"

    library, compression = str(dist.get_backend()), config.train.gradient_compression
    prefix = "" if compression == "none" else f"{compression} by "
    if library != "nccl":
        return f"{prefix}{library}, {processes} processes"

    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    settings = [f"{name}={os.environ[name]}" for name in ("NCCL_ALGO", "NCCL_PROTO") if name in os.environ]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    named = prefix + " ".join([library, version, *settings])
    return f"{named}, {processes // here} machine(s) with {here} process(es) each"


def other_versions(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs from a record, as `torch was 2.11.0, is 2.12.0`; what an older record does not name does not."""
    return [
        f"{name} was {recorded[name]}, is {now[name]}"
        for name in now
        if name in recorded and recorded[name] != now[name]
    ]


def fingerprint(config: Config, streams: Streams) -> dict[str, str]:
    """Digests of what must be the same in all processes of a run."""
    package, sha256 = Path(rnnlm.__file__).parent, hashlib.sha256()
    for source in sorted(package.rglob("*.py")):  # folders too
        sha256.update(f"{source.relative_to(package)}\n".encode() + source.read_bytes())

    sections = {name: part for name, part in asdict(config).items() if name in TRAINING_SECTIONS}
    return {
        "configuration": json_digest(sections),
        "train stream": streams.train.manifest.digest,
        "valid stream": streams.valid.manifest.digest if streams.valid else "none",
        "code": sha256.hexdigest(),
        "torch": torch.__version__,
    }


def check_alike(fingerprints: list[dict[str, str]]) -> None:
    """Compare the fingerprints of all processes.

    Raises:
        UserError: naming the first process that differs, and in what.
    """
    for index, each in enumerate(fingerprints):
        if different := [key for key, value in each.items() if fingerprints[0][key] != value]:
            name = different[0]
            raise UserError(
                f"process {index} has another {' and another '.join(different)} than process 0 "
                f"({each[name][:12]} and {fingerprints[0][name][:12]}); start all with the same code, options and files"
            )
