"""Measure encoding and building against SentencePiece, Hugging Face tokenizers and tiktoken, on a given text.

    python tools/benchmark_build.py my.txt --model streams/my/tokenizer.model
    python tools/benchmark_build.py my.txt --model gpt2/tokenizer.json
    python tools/benchmark_build.py data.jsonl --document jsonl --model streams/my/tokenizer.model --check

Each measurement runs in a process of its own, in rounds, one after the other, so that all share the machine with the
same neighbours; medians are printed. Libraries and our encoder get documents that are in memory already, the libraries
only a sample, since they keep no memory of what they saw; a build reads the files and writes streams. The first row is
the library of the model itself. Beside SentencePiece's, Hugging Face and tiktoken, where installed, use a byte-level
BPE of the same size, trained on the sample: other tokens, the same work. MB are millions of bytes of text; memory is
anonymous memory of the largest worker, and of the parent. --check encodes every document by the library alone and
compares the sha256 of all tokens with the stream's. Prints a table for the README.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rnnlm.cli import run_entry_point
from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig
from rnnlm.data.documents import Document, read
from rnnlm.data.encoder import Encoder
from rnnlm.data.jobs import jobs
from rnnlm.data.sources import sources
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.machine import cores

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # tiktoken's own for its gpt2
Measured = dict[tuple[str, int], list[dict[str, Any]]]  # of each row, what it found in each round


def config_of(options: argparse.Namespace, directory: str = "") -> Config:
    """The corpus as one stream, in order."""
    corpus = CorpusConfig(train=options.files, document=options.document, field=options.field, max_document_bytes=2**25)
    stream = StreamConfig(directory=directory, valid_fraction=0)
    return Config(corpus=corpus, stream=stream, build=BuildConfig(workers=options.workers))


def texts(options: argparse.Namespace, limit: int = 2**62) -> Iterator[bytes]:
    """The documents; with a limit, evenly from the whole corpus, about that many bytes."""
    corpus = replace(config_of(options).corpus, max_whole_bytes=2**25)  # all in memory, as the libraries want them
    files = sources(corpus.train, "files")
    every = max(1, sum(file.size for file in files) // limit)
    for job in jobs("train", files, corpus, 1):
        for _, items in read(job, corpus):
            documents = (item.data for item in items if isinstance(item, Document))
            yield from (data for number, data in enumerate(documents) if number % every == 0)


def timed(encode: Callable[[list[Any]], Any], documents: list[Any], size: int) -> dict[str, float]:
    """MB/s of one call with all documents, after one with a few."""
    encode(documents[:5])
    started = time.perf_counter()
    encode(documents)
    return {"speed": size / 1e6 / (time.perf_counter() - started)}


def byte_level(documents: list[bytes], vocab_size: int) -> Any:
    """Hugging Face's byte-level BPE, trained on the sample."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((document.decode() for document in documents[::4]), trainer)
    return tokenizer


def library(options: argparse.Namespace, name: str) -> dict[str, float]:
    """One library on the sample."""
    tokenizer = Tokenizer.load(options.model)
    documents = list(texts(options, options.sample_mb * 10**6))
    decoded, size = [document.decode() for document in documents], sum(map(len, documents))

    if name == "library" and is_json(options):  # a call per document finds where each token stands, twice the work
        return timed(tokenizer.encode_each, decoded, size)
    if name == "library":
        return timed(lambda each: [tokenizer.encode(text) for text in each], decoded, size)
    if name == "threads":
        processor = tokenizer._processor
        return timed(lambda each: processor.encode(each, num_threads=options.cores), decoded, size)

    hugging = byte_level(documents, tokenizer.vocab_size)
    if name == "tokenizers":
        return timed(lambda each: hugging.encode_batch(each), decoded, size)

    import tiktoken

    byte_of = {character: byte for byte, character in enumerate(_gpt2_alphabet())}
    ranks = {bytes(byte_of[c] for c in piece): rank for piece, rank in hugging.get_vocab().items()}
    encoding = tiktoken.Encoding("sample", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
    return timed(lambda each: [encoding.encode_ordinary(text) for text in each], decoded, size)


def is_json(options: argparse.Namespace) -> bool:
    """Whether the model is Hugging Face's, and not SentencePiece's."""
    return Tokenizer.load(options.model).file_name == "tokenizer.json"


def _gpt2_alphabet() -> list[str]:
    """The character that byte-level vocabularies write for each byte: a printable one itself, others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def our_encoder(options: argparse.Namespace) -> dict[str, float]:
    """Our encoder over the whole corpus, on one core; the first 10 MB are the cold start, the second half is steady."""
    encoder = Encoder(Tokenizer.load(options.model))
    encoder.encode([b"compile the kernels"])

    times, sizes, waiting, size = [], [], [], 0
    for document in chain(texts(options), [b""]):
        waiting.append(document)
        size += len(document)
        if size >= 10**6 or not document:
            started = time.perf_counter()
            encoder.encode(waiting)
            times.append(time.perf_counter() - started)
            sizes.append(size / 1e6)
            waiting, size = [], 0

    half = len(times) // 2
    spans = {"speed": slice(0, None), "cold": slice(0, 10), "steady": slice(half, None)}
    return {name: sum(sizes[span]) / sum(times[span]) for name, span in spans.items()}


def anonymous(pids: Iterable[int]) -> dict[int, int]:
    """Bytes of anonymous memory of each process that still is."""
    found = {}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("RssAnon"):
                found[pid] = int(line.split()[1]) * 1024
    return found


def build(options: argparse.Namespace) -> dict[str, Any]:
    """A whole build, its speed from the files to the manifest, and the peak of each process's memory."""
    from rnnlm.data.build.build import Build

    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for pid, size in anonymous([os.getpid(), *map(int, children)]).items():
                peaks[pid] = max(peaks.get(pid, 0), size)

    watcher = threading.Thread(target=watch)
    watcher.start()

    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        started = time.perf_counter()
        manifest = Build(config_of(options, directory), Tokenizer.load(options.model)).run(lambda size: None)["train"]
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        stream, sha256 = TokenStream(Path(directory) / "train"), hashlib.sha256()
        for index in range(len(manifest.shards)):
            sha256.update(stream.shard(index).data)

    parent = peaks.pop(os.getpid())
    return {
        "speed": manifest.text_bytes / 1e6 / seconds, "seconds": seconds, "parent": parent / 2**20,
        "worker": max(peaks.values(), default=parent) / 2**20, "sha256": sha256.hexdigest(),
        "bytes": manifest.text_bytes, "tokens": manifest.tokens, "documents": manifest.documents,
    }  # fmt: skip


def check(options: argparse.Namespace) -> dict[str, Any]:
    """sha256 of all tokens, each document encoded by the library alone."""
    tokenizer, sha256 = Tokenizer.load(options.model), hashlib.sha256()
    dtype, batch = Encoder(tokenizer).dtype, list[str]()
    size, seconds = 0, 0.0

    for document in texts(options):
        batch.append(document.decode())
        size += len(document)
        if len(batch) == 1000:
            started = time.perf_counter()
            for ids in tokenizer.encode_each(batch, add_eos=True):
                sha256.update(np.array(ids, dtype).data)
            seconds += time.perf_counter() - started
            batch = []

    for ids in tokenizer.encode_each(batch, add_eos=True):
        sha256.update(np.array(ids, dtype).data)
    return {"speed": size / 1e6 / max(seconds, 1e-9), "sha256": sha256.hexdigest()}


def run_alone(name: str, workers: int) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    arguments = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--workers", str(workers)]
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False, env=environ)
    if done.returncode:
        sys.exit(f"error: {name} failed; its own message is above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="the text; read whole by ours, a sample of it by the others")
    parser.add_argument("--model", required=True, help="a tokenizer.model or tokenizer.json")
    parser.add_argument("--document", default="line", choices=("line", "paragraph", "file", "jsonl"))
    parser.add_argument("--field", default="text")
    parser.add_argument("--sample-mb", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where builds are written and removed again; default: the system's")
    parser.add_argument("--check", action="store_true", help="also compare every token with the library's")

    # how this script runs itself
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cores = cores()
    return options


def list_rows(options: argparse.Namespace) -> dict[tuple[str, int], str]:
    """The title of each measurement that is possible here, by its name and number of workers."""
    rows = {("library", 1): "Hugging Face tokenizers, one thread"}
    if not is_json(options):
        rows = {("library", 1): "SentencePiece, a call per document", ("threads", 1): "SentencePiece, its own threads"}
        for name, title in {"tokenizers": "Hugging Face tokenizers, one thread", "tiktoken": "tiktoken"}.items():
            with suppress(ImportError):
                __import__(name)
                rows[name, 1] = title

    return {
        **rows,
        ("encoder", 1): "rnnlm's encoder, one core",
        ("build", 1): "rnnlm build, 1 worker",
        ("build", 2): "rnnlm build, 2 workers",
    }


def main() -> None:
    """Run all measurements in rounds and print the table, or run the one that is named."""
    options = parse_options()
    ours = {"encoder": our_encoder, "build": build, "check": check}
    if options.one:
        found = ours[options.one](options) if options.one in ours else library(options, options.one)
        print(json.dumps(found))
        return

    rows = list_rows(options)
    measured: Measured = {row: [] for row in rows}
    for _ in range(options.rounds):
        for row in rows:
            measured[row].append(run_alone(*row))
    print_table(rows, measured, options)
    print_comparisons(measured)
    print_digests(measured, options.check)


def median(measured: Measured, row: tuple[str, int], key: str = "speed") -> float:
    """The median over the rounds."""
    return statistics.median(found[key] for found in measured[row])


def ratio(measured: Measured, row: tuple[str, int], other: tuple[str, int], key: str = "speed") -> float:
    """The median of what one is of the other, round by round: neighbours come and go."""
    pairs = zip(measured[row], measured[other], strict=True)
    return statistics.median(mine[key] / theirs["speed"] for mine, theirs in pairs)


def print_table(rows: dict[tuple[str, int], str], measured: Measured, options: argparse.Namespace) -> None:
    """Print the table for the README."""
    built = measured["build", 1][0]
    print(
        f"{built['bytes'] / 1e6:,.0f} MB of text in {built['documents']:,} documents, {built['tokens']:,} tokens; "
        f"{options.cores} cores; medians of {options.rounds} rounds\n"
    )
    print("| | MB/s | times the library | memory of a worker, of the parent |\n|---|---|---|---|")
    for row, title in rows.items():
        memory = ""
        if row[0] == "build":
            memory = f"{median(measured, row, 'worker'):.0f} MiB, {median(measured, row, 'parent'):.0f} MiB"
        times = ratio(measured, row, ("library", 1))
        print(f"| {title} | {median(measured, row):.1f} | {times:.1f} | {memory} |")


def print_comparisons(measured: Measured) -> None:
    """Print how the encoder begins and becomes steady, and what a second worker brings."""
    cold, steady = (median(measured, ("encoder", 1), key) for key in ("cold", "steady"))
    print(f"\nencoder: first 10 MB {cold:.1f} MB/s, second half of the text {steady:.1f} MB/s", end="")
    for row in measured:
        if row[0] in ("library", "tiktoken"):
            print(f", {ratio(measured, ('encoder', 1), row, 'steady'):.1f} times {row[0]}", end="")
    efficiency = ratio(measured, ("build", 2), ("build", 1)) / 2
    print(f"\ntwo workers: {efficiency:.0%} of twice one worker's speed")


def print_digests(measured: Measured, check: bool) -> None:
    """Print the sha256 of all tokens; with `check` also the library's, and exit 1 if they differ."""
    digests = {found["sha256"] for row in (("build", 1), ("build", 2)) for found in measured[row]}
    print(f"sha256 of all tokens, every build: {', '.join(sorted(digests))}")
    if check:
        plain = run_alone("check", 1)
        same = "the same" if {plain["sha256"]} == digests else "NOT THE SAME"
        print(f"by the library alone, every document: {plain['sha256']}: {same}; {plain['speed']:.1f} MB/s")
        sys.exit({plain["sha256"]} != digests)


if __name__ == "__main__":
    run_entry_point(main)
