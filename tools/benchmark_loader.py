"""Measure how fast training gets its batches: tokens a second of the loader, for each core that it uses.

    python tools/benchmark_loader.py
    python tools/benchmark_loader.py --stream streams/imdb/train --shapes 256x32 --threads 1 2
    python tools/benchmark_loader.py --tokens 1e10 --directory /scratch

Batches come as training gets them: rows of a ring, read ahead by threads, each checked to continue where its rows
ended. An epoch is read cold, the pages of its files thrown out of memory before, and then warm, a median of --rounds.

- tokens/s: by the clock.
- tokens/s a core: over the seconds in which this process had a core, all threads and the system's work for it together.
  The clock can be ahead of it: while one thread reads, the other one checks.
- from disk: what the system really read for this process; 0 where the files never left the memory, as on a file system
  that lies there.

Without --stream, the stream is made of random tokens in two bytes. Prints a table for the README.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rnnlm.cli import run_entry_point
from rnnlm.data.adopt import adopt
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.substreams import ContinuityCheck, SubstreamDataset, loader
from rnnlm.errors import UserError

SHAPES = ("256x32", "512x35")  # configs/imdb.yaml, and large-batch of tools/benchmark_step.py
BLOCK = 2**24  # tokens that are made at once


class Measured(NamedTuple):
    """Reading an epoch."""

    seconds: float  # by the clock
    core_seconds: float
    disk_bytes: int


def main() -> None:
    """Measure what is asked for, and print it line by line."""
    options = parse()
    with opened(options) as directory:
        tokens = TokenStream(directory).tokens
        print(f"{directory}: {tokens:,} tokens\n")
        print(
            "| batch | threads | | million tokens/s | a core | MB/s from disk |\n|---|---|---|---|---|---|", flush=True
        )
        for rows, seq_len in options.shapes:
            for threads in options.threads:
                evict(directory)
                found = [read_epoch(directory, rows, seq_len, threads) for _ in range(1 + options.rounds)]
                warm = Measured(*map(statistics.median, zip(*found[1:], strict=True)))
                for state, each in (("cold", found[0]), ("warm", warm)):
                    print(line(f"{rows} x {seq_len}", threads, state, tokens, each), flush=True)


def line(shape: str, threads: int, state: str, tokens: int, measured: Measured) -> str:
    """A line of the table, of an epoch of so many tokens."""
    rates = [tokens / 1e6 / measured.seconds, tokens / 1e6 / measured.core_seconds]
    disk = measured.disk_bytes / 1e6 / measured.seconds
    return f"| {shape} | {threads} | {state} | {rates[0]:,.0f} | {rates[1]:,.0f} | {disk:,.0f} |"


def read_epoch(directory: Path, rows: int, seq_len: int, threads: int) -> Measured:
    """Read and check every batch of an epoch, from opening the stream on."""
    disk, cores, started = disk_bytes(), time.process_time(), time.perf_counter()
    stream = TokenStream(directory)
    ring = Ring(stream.tokens, rows, seq_len, rotate_seed=1)
    check = ContinuityCheck(stream, ring, 0, rows, 0)
    for step, batch in enumerate(
        loader(SubstreamDataset(stream, ring, 0, rows, 0, ring.windows_per_epoch), threads, False)
    ):
        check.check(batch, step)
    return Measured(time.perf_counter() - started, time.process_time() - cores, disk_bytes() - disk)


def disk_bytes() -> int:
    """What the system has read from disks for this process; 0 where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(each.split()[1]) for each in lines if each.startswith("read_bytes:"))


def evict(directory: Path) -> None:
    """Throw the pages of a stream's files out of memory; what another process has mapped stays."""
    if not hasattr(os, "posix_fadvise"):
        raise UserError("this system cannot be asked to forget a file; measure on Linux")
    for path in directory.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that are not on disk yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Path]:
    """The directory of the stream that is read."""
    if options.stream:
        yield options.stream
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as parent:
        yield random_stream(Path(parent), options.tokens)


def random_stream(parent: Path, tokens: int) -> Path:
    """A stream of so many tokens, written in the directory `parent`."""
    draw, file = np.random.default_rng(0), parent / "tokens.bin"
    with file.open("wb") as out:
        for start in range(0, tokens, BLOCK):
            out.write(draw.integers(0, 2**16, min(BLOCK, tokens - start), np.uint16).tobytes())
    adopt(file, parent / "stream", 2**16, 0, "uint16")
    return parent / "stream"


def shape(text: str) -> tuple[int, int]:
    """(rows, tokens of a window) of "256x32".

    Raises:
        ValueError: it is something else.
    """
    rows, seq_len = map(int, text.split("x"))
    if rows < 1 or seq_len < 1:
        raise ValueError
    return rows, seq_len


def parse() -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: no token, or no round.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", type=Path, help="a stream of your own, with its split")
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=10**8, help="of a random one: 1e8")
    parser.add_argument("--directory", help="where the random one is made: the system's place for temporary files")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[*map(shape, SHAPES)], help="256x32 512x35")
    parser.add_argument("--threads", nargs="+", type=int, default=[0, 1], help="train.prefetch_threads: 0 1")
    parser.add_argument("--rounds", type=int, default=5, help="warm epochs: 5")
    options = parser.parse_args()
    if options.tokens < 1 or options.rounds < 1 or min(options.threads) < 0:
        raise UserError("--tokens and --rounds are 1 or more, --threads 0 or more")
    return options


if __name__ == "__main__":
    run_entry_point(main)
