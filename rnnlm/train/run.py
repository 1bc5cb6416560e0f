"""Opening a run's directory: who may, with which configuration, from which checkpoint.

What a run is does not change over its attempts: model, optimizer, batch and windows, stream and tokenizer are compared
with the record, and the first difference stops everything before anything is written. Two fields may change when the
user says so by name: seq_len at any step, global_batch_size where an epoch begins; the arithmetic of the substreams
then restarts from a recorded origin, and every token of the epoch is still a target once. The price: a run that is
to differ in anything else needs another directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rnnlm.checkpoint import checkpoint
from rnnlm.checkpoint.checkpoint import Checkpoint
from rnnlm.cli import dump_yaml, load_yaml
from rnnlm.config import TRAINING_SECTIONS, Config, as_list
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.files import locked, write_file
from rnnlm.train.distributed import Accelerator, all_gather_object, errors_are_shared, errors_may_be_local, run_on_main
from rnnlm.train.identity import check_alike, differing, fingerprint, identity, versions
from rnnlm.train.inputs import Streams, open_ring, substreams_of
from rnnlm.train.state import TrainerState, check_state

MARKER = "preempted.json"  # in the run, while it waits to be started again
LOCK_PATIENCE_SECONDS = 5.0  # an attempt that was killed a moment ago may not have ended yet


@dataclass(frozen=True)
class Run:
    """A run whose directory this attempt holds.

    Args:
        tokenizer: of its streams; None: they have none, so there is no text.
        ring: how the training stream is read, from the origin of this attempt on.
        first, last: substreams first ... last - 1 are this process's.
        checkpoint: the newest whole one, and its state; None: the run begins.
        same_substreams: whether the hidden states in the checkpoint are those of this attempt's substreams.
        damaged: what is wrong with each newer checkpoint.
    """

    directory: Path
    tokenizer: Tokenizer | None
    ring: Ring
    first: int
    last: int
    checkpoint: Checkpoint | None
    state: TrainerState | None
    same_substreams: bool
    damaged: tuple[str, ...]


@contextmanager
def open_run(config: Config, accelerator: Accelerator, streams: Streams) -> Iterator[Run]:
    """Hold the run's directory in the main process, and find where this attempt begins; nothing is written yet.

    Raises:
        UserError: processes that differ; substreams that cannot be shared out; a run of another configuration, stream
            or tokenizer; a change that is not possible there.
        RunError: another process holds the directory.
        CheckpointError: there are checkpoints, but none is whole.
    """
    fingerprints = all_gather_object(fingerprint(config, streams))
    with errors_are_shared():
        open_ring(config, streams.train)  # refused before the directory is made, if it cannot be
        check_alike(fingerprints)
        first, last = substreams_of(config, accelerator.process_index, accelerator.num_processes)
    directory = Path(config.run.directory)
    tokenizer = streams.train.tokenizer() if streams.train.manifest.tokenizer else None

    with ExitStack() as stack:

        def hold() -> _Start:
            lock = locked(directory / "lock", "run", patience_seconds=LOCK_PATIENCE_SECONDS)
            stack.enter_context(lock)
            return _examine(config, streams.train)

        start = run_on_main(accelerator, hold)
        found, state = None, None
        if start.checkpoint is not None:
            with errors_may_be_local():
                found = checkpoint.load(Path(start.checkpoint), every_byte=False)  # tensors: as they are read
                state = check_state(found.state, found.path)
        ring = open_ring(config, streams.train, start.origin)
        same_substreams = "train.global_batch_size" not in start.changed
        yield Run(directory, tokenizer, ring, first, last, found, state, same_substreams, start.damaged)


@dataclass(frozen=True)
class _Start:
    """What the main process found out for all."""

    checkpoint: str | None  # path of the newest whole one
    origin: Origin
    changed: tuple[str, ...]  # fields that this attempt changes
    damaged: tuple[str, ...]  # what is wrong with each newer checkpoint


def _examine(config: Config, stream: TokenStream) -> _Start:
    """Check that the directory is this run's, and find the newest whole checkpoint; reads only."""
    directory = Path(config.run.directory)
    found, damaged = checkpoint.find_newest(directory / "checkpoints", "step")
    state = check_state(found.state, found.path) if found else None

    changed = _changed_fields(config, directory, state)
    origin = Origin()
    if state:
        _check_data(directory, state, stream)
        origin = _origin(config, state, stream, changed)
    return _Start(str(found.path) if found else None, origin, changed, tuple(map(str, damaged)))


def record_attempt(config: Config, run: Run) -> None:
    """In the main process, once model and optimizer are there: make the directory this configuration's, and clear it.

    Not before: an attempt that fails at its start, out of memory perhaps, leaves no configuration to be held to.
    """
    for error in run.damaged:
        print(f"warning: {error}; moved away, resuming from an older one", file=sys.stderr, flush=True)
    if run.checkpoint:
        checkpoint.rename_damaged(run.directory / "checkpoints", "step", run.checkpoint)

    (run.directory / MARKER).unlink(missing_ok=True)
    for stacks in run.directory.glob("hang-rank-*.txt"):  # of processes that were killed, and did not hang
        if not stacks.stat().st_size:
            stacks.unlink()

    files = {"tokenizer.model": run.tokenizer.model} if run.tokenizer else {}
    files["config.yaml"] = dump_yaml(config, TRAINING_SECTIONS).encode()
    for name, data in files.items():
        write_file(run.directory / name, data, alone=True)


def _changed_fields(config: Config, directory: Path, state: TrainerState | None) -> tuple[str, ...]:
    """The fields of the run's identity that this attempt changes.

    Raises:
        UserError: one that run.allow_change does not name.
    """
    record = directory / "config.yaml"
    recorded = state.configuration if state else load_yaml(record) if record.exists() else {}
    fields = differing(config, recorded)
    changed = tuple(name for name in as_list(config.run.allow_change) if any(f.startswith(f"{name} ") for f in fields))
    if refused := [field for field in fields if field.split(" ")[0] not in changed]:
        raise UserError(
            f"run.directory={directory}: holds a run of another configuration ({'; '.join(refused)}); choose another "
            "run.directory, or give these fields the values they have there (run.allow_change says which may change)"
        )
    return changed


def _check_data(directory: Path, state: TrainerState, stream: TokenStream) -> None:
    """Compare stream and tokenizer with those that the run was trained on."""
    for key, trained, now in (
        ("stream", state.stream, stream.manifest.digest),
        ("tokenizer", state.tokenizer, stream.manifest.tokenizer),
    ):
        if trained != now:
            raise UserError(
                f"run.directory={directory}: trained on another {key} ({trained[:12]}, now {now[:12]}); "
                "give it its own again, or choose another run.directory"
            )


def _origin(config: Config, state: TrainerState, stream: TokenStream, changed: tuple[str, ...]) -> Origin:
    """From where the substreams of this attempt are counted."""
    recorded = Origin(**state.origin.model_dump())
    if not changed:
        return recorded

    before = state.configuration["train"]
    seed = before["seed"] if before["rotate"] else None
    ring = Ring(stream.tokens, before["global_batch_size"], before["seq_len"], seed, recorded)
    now = ring.origin_at(state.step)
    if "train.global_batch_size" in changed and now.position:
        epoch_ends = ring.steps_before(now.epoch + 1)
        raise UserError(
            f"run.allow_change=train.global_batch_size: step {state.step} is within epoch {now.epoch}; "
            f"train to its end first, with train.max_steps={epoch_ends}"
        )
    return now


def record_of(config: Config, stream: TokenStream, ring: Ring, device: torch.device) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    return {
        "stream": stream.manifest.digest,
        "tokenizer": stream.manifest.tokenizer,
        "vocab_size": stream.manifest.vocab_size,
        "origin": asdict(ring.origin),
        "configuration": identity(config),
        "versions": versions(device),
    }


def mark_preempted(directory: Path, signal_name: str, step: int, saved_step: int) -> None:
    """Leave the marker by which scripts know that the run is to be started again."""
    text = json.dumps({"signal": signal_name, "step": step, "saved_step": saved_step})
    write_file(directory / MARKER, text.encode(), alone=True)
