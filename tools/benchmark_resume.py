"""Measure what a restart and a checkpoint cost: a first batch far inside a huge stream, the partition, saves, pauses.

    python tools/benchmark_resume.py
    python tools/benchmark_resume.py hidden --run runs/mine
    python tools/benchmark_resume.py --tokens 1e11 --step 1000 --ranks 64 --parameters-mb 1600 --directory /scratch

The stream is made of holes, so 10^12 tokens (2 TB) take no room where the file system knows sparse files; what is
measured is opening, arithmetic and mapping, not a disk. A save is measured in its two parts: the copy of the tensors
to host memory, for which training stands still, and what a thread does beside it. A pause is the longest time that
another thread gets no turn meanwhile, for the library writing a file, as checkpoints do, and for the library making
bytes of it. With --run, the cost of losing the hidden state: the run resumes from its newest checkpoint with it and
without. Figures are medians of --rounds, pauses the longest of them. Prints tables for the README.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from rnnlm import files
from rnnlm.checkpoint import checkpoint, safetensors_file
from rnnlm.checkpoint.saver import Saver
from rnnlm.cli import run_entry_point
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import HEADER_BYTES, Manifest, npy_header
from rnnlm.data.stream_writer import commit, write_array
from rnnlm.data.substreams import SubstreamDataset, loader
from rnnlm.errors import UserError

TRAIN = Path(__file__).resolve().parent.parent / "launch/train.py"


def sparse_stream(directory: Path, tokens: int, shard_tokens: int) -> Path:
    """A stream of zeros, all holes, without documents; its contents have no digests.

    Raises:
        OSError: the file system has no sparse files of this size.
    """
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    for start in range(0, tokens, shard_tokens):
        name, size = f"shard-{len(shards):05d}.npy", min(shard_tokens, tokens - start)
        with (partial / name).open("wb") as file:
            file.write(npy_header("<u2", (size,)))
            file.truncate(HEADER_BYTES + 2 * size)
        shards.append({"name": name, "tokens": size, "sha256": ""})

    _, documents_sha256 = write_array(partial / "documents.npy", [], "<i8", (3,))
    manifest = Manifest(
        dtype="<u2", vocab_size=2**16, eos_id=1, tokenizer="", tokens=tokens, documents=0, text_bytes=0, words=0,
        unknown_tokens=0, records={"read": 0, "kept": 0}, mended=0, source={}, shards=shards,
        documents_sha256=documents_sha256, rejected_sha256="",
    )  # fmt: skip
    commit(partial, directory, manifest)
    return directory


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """(median seconds, last result) of a piece of work."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def first_batch(options: argparse.Namespace) -> None:
    """Opening the stream, and the first batch of a rank's rows at a step, against step 0."""
    with tempfile.TemporaryDirectory(dir=options.directory) as parent:
        directory = sparse_stream(Path(parent) / "stream", options.tokens, max(1, options.tokens // options.shards))
        seconds, stream = timed(lambda: TokenStream(directory), options.rounds)
        ring = Ring(stream.tokens, options.substreams, options.seq_len, rotate_seed=1)
        rows = options.substreams // options.ranks
        print(f"{stream.tokens:,} tokens in {len(stream.manifest.shards)} shards; {rows} rows of {options.seq_len}")
        print(f"\n| | ms |\n|---|---|\n| open the stream | {1e3 * seconds:.2f} |")

        for step in (0, options.step):
            for workers in (0, 1):

                def read(step: int = step, workers: int = workers) -> int:
                    opened = TokenStream(directory)  # as a new process would: nothing is mapped yet
                    dataset = SubstreamDataset(opened, ring, 0, rows, step, step + 100)
                    return next(iter(loader(dataset, workers, pin_memory=False))).step

                seconds, found = timed(read, options.rounds)
                assert found == step
                print(f"| first batch at step {step:,}, {workers} prefetch workers | {1e3 * seconds:.2f} |")


def partition(options: argparse.Namespace) -> None:
    """That the rows of all ranks join, so that every token has one owner, and how long this arithmetic takes."""
    ring = Ring(options.tokens, options.substreams, options.seq_len)

    def check() -> int:
        end = 0
        for rank in range(options.ranks):
            edges = ring.edges(*(each * ring.substreams // options.ranks for each in (rank, rank + 1)))
            assert edges[0] == end and (edges[1:] >= edges[:-1]).all(), f"rank {rank}"
            end = int(edges[-1])
        return end

    seconds, end = timed(check, options.rounds)
    assert end == options.tokens == ring.targets_before(ring.steps_before(1))
    print(f"\npartition over {options.ranks:,} ranks: every token has one owner; checked in {1e3 * seconds:.1f} ms")


def save(options: argparse.Namespace) -> None:
    """How long a save blocks training, which is the copy to host memory, and how long its thread then works."""
    each = options.parameters_mb * 10**6 // 4 // 8
    model = {f"weight{number}": torch.randn(each) for number in range(8)}
    optimizer = {f"{name}.{moment}": torch.randn(each) for name in model for moment in ("exp_avg", "exp_avg_sq")}
    groups = {"model": model, "optimizer": optimizer, "hidden": {"layer0.h": torch.randn(options.substreams, 1024)}}

    found = []
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        saver = Saver(Path(root))
        for step in range(options.rounds):
            saver.submit([f"step-{step:08d}"], groups, {})
            found += saver.wait()
    assert all(saved.path and not saved.error for saved in found), found

    blocked, seconds = (statistics.median(getattr(s, name) for s in found) for name in ("blocked_seconds", "seconds"))
    size = found[0].bytes / 1e6
    print(f"\nsave of {size:,.0f} MB (parameters {options.parameters_mb:,} MB, two moments of each, hidden states)")
    print(f"\n| | s | MB/s |\n|---|---|---|\n| training stands still | {blocked:.2f} | {size / blocked:,.0f} |")
    print(f"| beside it: digest, write, sync, read back, delete the oldest | {seconds:.2f} | {size / seconds:,.0f} |")


def pause(options: argparse.Namespace) -> None:
    """How long a thread waits for its turn while another one writes tensors, and what memory that takes."""
    each = options.parameters_mb * 10**6 // 4 // 8
    tensors = {f"weight{number}.{moment}": torch.randn(each) for number in range(8) for moment in ("first", "second")}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        path = Path(directory) / "tensors.safetensors"

        def write_file() -> None:
            files.write(path, safetensors_file.write, tensors)
            safetensors_file.checksum(path, tensors)

        def write_bytes() -> None:
            data = to_bytes(tensors)
            hashlib.sha256(data)
            files.write(path, Path.write_bytes, data)

        def read_file() -> None:
            with path.open("rb") as file:
                safetensors_file.read(file, path.stat().st_size, path, None)

        print(f"\na thread beside another one that saves {size:,.0f} MB in {len(tensors)} tensors")
        print("\n| | s | longest pause, ms | memory, MB |\n|---|---|---|---|")
        for name, work in (
            ("write a file, digest it", write_file),
            ("make bytes, digest and write them", write_bytes),
            ("read and digest a file", read_file),
        ):
            rounds = [watched(work) for _ in range(options.rounds)]
            seconds, pauses, memory = zip(*rounds, strict=True)
            print(f"| {name} | {statistics.median(seconds):.2f} | {1e3 * max(pauses):.1f} | {max(memory):,.0f} |")


def watched(work: Callable[[], None]) -> tuple[float, float, float]:
    """(seconds, longest pause of this thread in seconds, peak of memory in MB) while another thread works."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on; see proc(5)
    before = peak_mb()
    thread = threading.Thread(target=work)
    begin = last = time.perf_counter()
    thread.start()

    longest = 0.0
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return last - begin, longest, peak_mb() - before


def peak_mb() -> float:
    """The peak of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def hidden(options: argparse.Namespace) -> None:
    """What resuming without the hidden state costs: a run resumes from its newest checkpoint twice."""
    found, _ = checkpoint.find_newest(Path(options.run) / "checkpoints", "step")
    if found is None:
        raise UserError(f"--run={options.run}: no checkpoint there")
    losses = []
    with tempfile.TemporaryDirectory(dir=options.directory) as parent:
        for kept in (True, False):
            run = Path(parent) / f"hidden-{kept}"
            (run / "checkpoints").mkdir(parents=True)
            groups = {group: found.tensors(group) for group in ("model", "optimizer", "hidden")}
            if not kept:
                groups["hidden"] = {n: t if n == "ended" else torch.zeros_like(t) for n, t in groups["hidden"].items()}
            checkpoint.save(run / "checkpoints", found.path.name, groups, found.state)

            steps = found.state["step"] + options.steps
            command = [sys.executable, str(TRAIN), "--config", f"{options.run}/config.yaml", f"--run.directory={run}"]
            command += [f"--train.max_steps={steps}", "--run.log_every_steps=1", f"--run.save_every_steps={steps}"]
            subprocess.run([*command, f"--eval.every_steps={steps}"], check=True, capture_output=True)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses.append([line["loss"] for line in lines if line["kind"] == "train"])

    print(f"\nresumed at step {found.state['step']:,}: mean loss in nats a token of the steps after it\n")
    print("| steps | with its hidden state | without | difference |\n|---|---|---|---|")
    for count in (1, 2, 5, 20, options.steps):
        mine, theirs = (statistics.mean(each[:count]) for each in losses)
        print(f"| {count} | {mine:.4f} | {theirs:.4f} | {theirs - mine:+.4f} |")


def main() -> None:
    """Run the measures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", help="of first_batch, partition, save, pause, hidden; default: all")
    for name, number in (("tokens", 10**12), ("step", 10**6), ("ranks", 1024), ("shards", 1000), ("seq-len", 64)):
        parser.add_argument(f"--{name}", type=lambda text: int(float(text)), default=number, help=f"{number:,}")
    parser.add_argument("--substreams", type=int, default=2**14, help="of all ranks together")
    parser.add_argument("--parameters-mb", type=int, default=400)
    parser.add_argument("--run", help="a run to resume, with and without its hidden states")
    parser.add_argument("--steps", type=int, default=100, help="that it then makes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where files are written and removed again; default: the system's")
    options = parser.parse_args()

    every = {"first_batch": first_batch, "partition": partition, "save": save, "pause": pause}
    if options.run:
        every["hidden"] = hidden
    if unknown := set(options.measures) - every.keys():
        raise UserError(f"no measure is called {', '.join(sorted(unknown))}; give some of {', '.join(every)}")
    for name in options.measures or every:
        every[name](options)


if __name__ == "__main__":
    run_entry_point(main)
