"""What a run trains on: its streams, the arithmetic of its substreams, and this process's share of them.

All of it is checked here, before any file of the run is touched. The price: streams are opened before the processes
have met, so each process reports a fault of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rnnlm.config import Config
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.errors import UserError
from rnnlm.faults import nearest
from rnnlm.model.evaluate import scored_tokens


@dataclass(frozen=True)
class Streams:
    """The training stream, and the validation stream where there is one."""

    train: TokenStream
    valid: TokenStream | None


def stream_directory(config: Config) -> Path:
    """stream.directory, which is there.

    Raises:
        UserError: it is not, as where streams were moved since the run recorded their place.
    """
    directory = Path(config.stream.directory)
    if not directory.is_dir():
        here = "" if directory.is_absolute() else f" (seen from {Path.cwd()})"
        raise UserError(
            f"stream.directory={directory}: is not there{here}; give the place of the streams with --stream.directory, "
            "or build them with tools/build_stream.py"
        )
    return directory


def open_streams(config: Config) -> Streams:
    """The streams of stream.directory.

    Raises:
        UserError: streams that are missing, damaged, or of different tokenizers, or nothing to evaluate.
    """
    for key, value in (("stream.directory", config.stream.directory), ("run.directory", config.run.directory)):
        if not value:
            raise UserError(f"{key} is not set; give it on the command line or in the file of --config")

    directory = stream_directory(config)
    train, place = TokenStream(directory / "train"), directory / config.eval.split
    valid = TokenStream(place) if place.exists() else None
    needed = config.optim.schedule == "plateau" or config.optim.early_stop_patience or config.eval.split != "valid"
    if valid is None and needed:
        raise UserError(
            f"{place}: no stream there, but plateau, early stopping or eval.split={config.eval.split} needs it; "
            "build it with tools/build_stream.py"
        )
    if valid:
        _check_alike(train, valid)
        scored_tokens(valid, config.eval.count_eos)

    for stream in (train, valid) if config.stream.verify else ():
        for _ in stream.verify() if stream else ():
            pass
    return Streams(train, valid)


def _check_alike(train: TokenStream, valid: TokenStream) -> None:
    """Compare the vocabularies of two streams.

    Raises:
        UserError: they differ.
    """
    if valid.manifest.tokenizer != train.manifest.tokenizer:
        raise UserError(
            f"{valid.directory}: built with another tokenizer than {train.directory}; build both with the same"
        )
    if valid.manifest.vocab_size != train.manifest.vocab_size:  # of streams adopted without a tokenizer
        raise UserError(
            f"{valid.directory}: has a vocabulary of {valid.manifest.vocab_size}, {train.directory} one of "
            f"{train.manifest.vocab_size}; adopt both with the same --vocab-size"
        )


def open_ring(config: Config, stream: TokenStream, origin: Origin = Origin()) -> Ring:  # noqa: B008  # is immutable
    """How the configured substreams read the stream.

    Raises:
        UserError: the stream is shorter than one window.
    """
    size, length = config.train.global_batch_size, config.train.seq_len
    if stream.tokens < size * length:
        raise UserError(
            f"{stream.directory}: {stream.tokens} tokens, shorter than one window of train.global_batch_size={size} "
            f"substreams times train.seq_len={length}; lower one of them, or give more text"
        )
    return Ring(stream.tokens, size, length, config.train.seed if config.train.rotate else None, origin)


def substreams_of(config: Config, process: int, processes: int) -> tuple[int, int]:
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
