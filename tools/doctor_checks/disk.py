"""The end of a run: how long its last save takes, and how long whoever ends it waits."""

from __future__ import annotations

import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import disk_usage

import torch

from doctor_checks.experiment import Experiment, read_experiment
from doctor_checks.verdict import Verdict, right, wrong
from rnnlm.checkpoint.checkpoint import save
from rnnlm.config import RunConfig
from rnnlm.train.signals import short_shutdown

TRIAL_BYTES = 2**27  # of the checkpoint that is written: more than the caches of disks hold


def check(options: Namespace) -> Iterator[Verdict]:
    """Two lines: saving against run.grace_seconds, and the launcher against the same."""
    found = read_experiment(options)
    run = found.config.run if found.config else RunConfig()
    directory = nearest_directory(Path(run.directory or "."))
    subject = f"checkpoints in {directory}"
    try:
        bytes_per_second = save_rate(directory)
    except OSError as error:
        yield wrong(subject, f"cannot be written ({error}); choose another run.directory")
    else:
        yield time_to_save(subject, found, run, bytes_per_second, disk_usage(directory).free)
    yield launcher(run.grace_seconds, torch.__version__, os.environ)


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the nearest above it that is there."""
    path = path.resolve()
    return next(each for each in (path, *path.parents) if each.is_dir())


def save_rate(directory: Path, size: int = TRIAL_BYTES) -> float:
    """Bytes a second of a checkpoint as a run saves it: written, synced, read back."""
    numbers = torch.randn(size // 4, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=directory) as place:
        started = time.monotonic()
        save(Path(place), "step-00000000", {"model": {"numbers": numbers}}, {})
        return size / (time.monotonic() - started)


def time_to_save(subject: str, found: Experiment, run: RunConfig, rate: float, free: int) -> Verdict:
    """A save must end within run.grace_seconds, and run.keep_last + 1 checkpoints and the best one have room.

    Without an experiment: how large a checkpoint may be.

    Args:
        rate: bytes a second.
        free: bytes on the disk.
    """
    speed, grace = f"{rate / 1e6:,.0f} MB/s", run.grace_seconds
    if not found.checkpoint_bytes:
        return right(subject, f"{speed}: {rate * grace / 1e9:.1f} GB within run.grace_seconds={grace:g}, the default")

    size, kept = found.checkpoint_bytes, run.keep_last + 2
    if size / rate > grace:
        return wrong(
            subject,
            f"one of {size / 1e9:.2f} GB at {speed} takes {size / rate:.0f} s, run.grace_seconds={grace:g}; put "
            "run.directory on a faster disk, or have the scheduler wait longer and raise run.grace_seconds",
        )
    if kept * size > free:
        return wrong(
            subject,
            f"{kept} of {size / 1e9:.2f} GB, {free / 1e9:.2f} GB free; make room, or choose another run.directory",
        )
    return right(subject, f"one of {size / 1e9:.2f} GB at {speed} takes {size / rate:.1f} s of {grace:g}")


def launcher(grace_seconds: float, torch_version: str, environment: Mapping[str, str]) -> Verdict:
    """Whether torchrun, or accelerate launch by it, would kill a run from this shell before its grace is over."""
    warning = short_shutdown(grace_seconds, torch_version, {**environment, "TORCHELASTIC_RUN_ID": "doctor"}, [])
    subject = "the launcher's patience"
    if warning:
        return wrong(subject, warning.removeprefix("warning: "))
    return right(subject, f"run.grace_seconds={grace_seconds:g} or more after SIGTERM")
