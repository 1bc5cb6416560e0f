"""Opening a run's directory: who may, with which configuration, from which checkpoint.

What a run is does not change over its attempts: model, optimizer, batch and windows, stream and tokenizer are compared
with the record, and the first difference stops everything before anything is written. Two fields may change when the
user says so by name: seq_len at any step, global_batch_size where an epoch begins; the arithmetic of the substreams
then restarts from a recorded origin, and every token of the epoch is still a target once. The price: a run that is
to differ in anything else needs another directory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rnnlm.checkpoint import checkpoint
from rnnlm.checkpoint.checkpoint import Checkpoint
from rnnlm.config import BY_SIZE, TRAINING_SECTIONS, Config, as_list
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.files import locked, sync, write_file
from rnnlm.train.distributed import Accelerator, all_gather_object, errors_are_shared, errors_may_be_local, run_on_main
from rnnlm.train.ending import MARKER
from rnnlm.train.identity import check_alike, differing, fingerprint, identity, versions
from rnnlm.train.inputs import Streams, open_ring, substreams_of
from rnnlm.train.sizes import disproportions, follow_text
from rnnlm.train.state import TrainerState, check_state
from rnnlm.yaml_file import dump_yaml, load_yaml

LOCK_PATIENCE_SECONDS = 5.0  # an attempt that was killed a moment ago may not have ended yet
# what a start that was killed leaves before there is a configuration, and what schedulers write into a new directory
EARLY = re.compile(r"\..*|holder|lock|.*\.(lock|partial|log|out|err)")


@dataclass(frozen=True)
class Run:
    """A run whose directory this attempt holds.

    Args:
        config: with all that follows the size of the text.
        tokenizer: of its streams; None: they have none, so there is no text.
        ring: how the training stream is read, from the origin of this attempt on.
        first, last: substreams first ... last - 1 are this process's.
        checkpoint: the newest whole one, and its state; None: the run begins.
        same_substreams: whether the hidden states in the checkpoint are those of this attempt's substreams.
        notes: what the person at the console should know of how it begins.
        damaged: what is wrong with each newer checkpoint.
    """

    config: Config
    directory: Path
    tokenizer: Tokenizer | None
    ring: Ring
    first: int
    last: int
    checkpoint: Checkpoint | None
    state: TrainerState | None
    same_substreams: bool
    notes: tuple[str, ...]
    damaged: tuple[str, ...]


@contextmanager
def open_run(config: Config, accelerator: Accelerator, streams: Streams) -> Iterator[Run]:
    """Hold the run's directory in the main process, and find where this attempt begins; nothing is written yet.

    Raises:
        UserError: processes that differ; substreams that cannot be shared out; a directory of something else; a run of
            another configuration, stream or tokenizer; a change that is not possible there.
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
            check_place(directory)
            lock = locked(directory / "lock", "run", patience_seconds=LOCK_PATIENCE_SECONDS)
            stack.enter_context(lock)
            return _examine(config, streams)

        start = run_on_main(accelerator, hold)
        found, state = None, None
        if start.checkpoint is not None:
            with errors_may_be_local():
                found = checkpoint.load(Path(start.checkpoint), every_byte=False)  # tensors: as they are read
                state = check_state(found.state, found.path)
        ring = open_ring(config, streams.train, start.origin)
        same_substreams = "train.global_batch_size" not in start.changed
        read = (ring, first, last, found, state, same_substreams)
        yield Run(start.config, directory, tokenizer, *read, start.notes, start.damaged)


def check_place(directory: Path) -> None:
    """Check that a directory holds a run, or nothing that a run would write over.

    Raises:
        UserError: a file, or a directory of something else, as of a stream.
    """
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"run.directory={directory}: {path} is a file; choose another name")
    if not directory.is_dir() or (directory / "checkpoints").is_dir():
        return

    has_stream = any((directory / name).exists() for name in ("stream.json", "train/stream.json", "valid/stream.json"))
    if not has_stream and _is_configuration(directory / "config.yaml"):  # killed before its first checkpoint
        return
    if others := sorted(path.name for path in directory.iterdir() if not EARLY.fullmatch(path.name)):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise UserError(
            f"run.directory={directory}: holds no run, but {shown}; choose a directory that is empty or not there yet"
        )


def _is_configuration(path: Path) -> bool:
    """Whether a file has sections of ours, and no others."""
    try:
        sections = load_yaml(path)
    except UserError:
        return False
    return bool(sections) and {*sections} <= {each.name for each in fields(Config)}


@dataclass(frozen=True)
class _Start:
    """What the main process found out for all."""

    config: Config  # with all that follows the size of the text
    notes: tuple[str, ...]  # of what was chosen, and of what is out of proportion
    checkpoint: str | None  # path of the newest whole one
    origin: Origin
    changed: tuple[str, ...]  # fields that this attempt changes
    damaged: tuple[str, ...]  # what is wrong with each newer checkpoint


def _examine(config: Config, streams: Streams) -> _Start:
    """Check that the directory is this run's, and find the newest whole checkpoint; reads only."""
    directory, stream = Path(config.run.directory), streams.train
    found, damaged = checkpoint.find_newest(directory / "checkpoints", "step")
    state = check_state(found.state, found.path) if found else None
    config, notes = _with_sizes(config, directory, streams)

    changed = _changed_fields(config, directory, state)
    origin = Origin()
    if state:
        _check_data(directory, state, stream)
        origin = _origin(config, state, stream, changed)
    path = str(found.path) if found else None
    return _Start(config, notes, path, origin, changed, tuple(map(str, damaged)))


def _with_sizes(config: Config, directory: Path, streams: Streams) -> tuple[Config, tuple[str, ...]]:
    """The configuration with what the run has recorded, or else what its text asks for, and what to print of that.

    Of the record only config.yaml counts: what a checkpoint says is compared, and takes no memory before.
    """
    record, unset = directory / "config.yaml", any(config.flat()[key] == mark for key, mark in BY_SIZE.items())
    recorded = load_yaml(record) if unset and record.exists() else {}
    config, chosen = follow_text(config, recorded, streams)

    manifest = streams.train.manifest
    doubts = [] if record.exists() else disproportions(config, manifest.tokens, manifest.vocab_size)
    return config, tuple([chosen] if chosen else []) + tuple(f"warning: {doubt}" for doubt in doubts)


def record_attempt(config: Config, run: Run) -> None:
    """In the main process, once model and optimizer are there: make the directory this configuration's, and clear it.

    Not before: an attempt that fails at its start, out of memory perhaps, leaves no configuration to be held to.
    """
    for note in run.notes:
        print(note, file=sys.stderr, flush=True)
    for error in run.damaged:
        print(f"warning: {error}; moved away, resuming from an older one", file=sys.stderr, flush=True)
    if run.checkpoint:
        checkpoint.rename_damaged(run.directory / "checkpoints", "step", run.checkpoint)

    (run.directory / MARKER).unlink(missing_ok=True)
    for stacks in run.directory.glob("hang-rank-*.txt"):  # of processes that were killed, and did not hang
        if not stacks.stat().st_size:
            stacks.unlink()

    # the configuration first, and on disk: by it the next attempt knows the directory for a run's
    write_file(run.directory / "config.yaml", dump_yaml(config, TRAINING_SECTIONS).encode(), alone=True)
    sync(run.directory)
    if run.tokenizer:
        write_file(run.directory / run.tokenizer.file_name, run.tokenizer.model, alone=True)


def _changed_fields(config: Config, directory: Path, state: TrainerState | None) -> tuple[str, ...]:
    """The fields of the run's identity that this attempt changes.

    Raises:
        UserError: one that run.allow_change does not name.
    """
    record = directory / "config.yaml"
    recorded = state.configuration if state else load_yaml(record) if record.exists() else {}
    found = differing(config, recorded)
    changed = tuple(name for name in as_list(config.run.allow_change) if any(f.startswith(f"{name} ") for f in found))
    if refused := [field for field in found if field.split(" ")[0] not in changed]:
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

    # a field that its version did not have yet has the value of now, as in `differing`
    before = {**identity(config)["train"], **state.configuration["train"]}
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
        "versions": versions(config, device),
    }
