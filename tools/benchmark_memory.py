"""Measure the memory of a build on inputs that are made to be hard, from a given text.

    python tools/benchmark_memory.py my.txt --model streams/my/tokenizer.model
    python tools/benchmark_memory.py my.txt --model streams/my/tokenizer.model --only parquet zst --quick

Each row is an input that is written, built by tools/build_stream.py with two workers, and removed again with its
stream, before the next one. The peak is that of anonymous memory, polled every 20 ms, of the parent and of the largest
of its descendants; where there is one job only, the parent does it itself. `large` is for memory, not for speed: its
text repeats. Long documents are just shorter than the limits of the corpus section, so that nothing is refused; pages
of parquet, which are read whole, hold a megabyte. A build that fails shows its last lines, the other rows are still
measured, and the exit code is 1. `large` takes about 12 GB of disk; --quick divides sizes and counts by a hundred,
which shows that the rows work, not what they need.
"""

import argparse
import gzip
import json
import lzma
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from rnnlm.cli import run_entry_point

LIMIT_MIB = 256
GROUP_BYTES = 2 * 10**8  # of a row group of parquet
UNIQUE = "corpus.deduplicate=true"


class Row(NamedTuple):
    """An input: its file's suffix, what is in it, of a text and with sizes divided, and the options of its build."""

    suffix: str
    content: Callable[[Path, int], Iterable[bytes]]
    options: tuple[str, ...] = ()


def blocks(text: Path, size: int = 2**62, block_bytes: int = 2**20) -> Iterator[bytes]:
    """At least that many bytes of the text, in blocks of whole lines; it begins again where it ends."""
    while size > 0:
        with text.open("rb") as file:
            while size > 0 and (lines := file.readlines(min(size, block_bytes))):
                block = b"".join(lines)
                yield block
                size -= len(block)


def long_lines(text: Path, size: int, joint: str) -> Iterator[bytes]:
    """Lines just below corpus.max_whole_bytes: the text with `joint` for all white space."""
    for block in blocks(text, size, 10**6):
        yield joint.join(block.decode().split()).encode()[: 2**20 - 2].decode(errors="ignore").encode() + b"\n"


def tiny(count: int) -> Iterator[bytes]:
    """That many lines of a few characters, no two the same."""
    for first in range(0, count, 2**16):
        yield b"".join(b"%x\n" % number for number in range(first, min(first + 2**16, count)))


def equal(text: Path, line_bytes: int, size: int) -> Iterator[bytes]:
    """One line of about that many bytes, of the text's first words, again and again."""
    line = next(long_lines(text, size, " "))[:line_bytes].decode(errors="ignore").strip() + "\n"
    block = line.encode() * (2**20 // len(line))
    return repeat(block, -(-size // len(block)))


def objects(text: Path, document_bytes: int, size: int) -> Iterator[bytes]:
    """JSON lines; one character of each document needs four bytes in Python, and so do then all others."""
    for block in blocks(text, size, document_bytes):
        yield json.dumps({"text": block.decode() + "\U0001f600"}, ensure_ascii=False).encode() + b"\n"


ROWS = {
    "small": Row(".txt", lambda text, scale: blocks(text, 10**8 // scale)),
    "large": Row(".txt", lambda text, scale: blocks(text, 5 * 10**9 // scale)),
    "one-document": Row(".txt", lambda text, scale: blocks(text, 10**9 // scale), ("corpus.document=file",)),
    "tiny-documents": Row(".txt", lambda text, scale: tiny(30 * 10**6 // scale)),
    "equal-documents": Row(".txt", lambda text, scale: repeat(b"the same\n" * 1000, 8000 // scale), (UNIQUE,)),
    "tiny-shuffled": Row(".txt", lambda text, scale: tiny(8 * 10**6 // scale), ("corpus.shuffle_seed=1", UNIQUE)),
    "no-spaces": Row(".txt", lambda text, scale: long_lines(text, 10**8 // scale, "")),
    "unigram": Row(".txt", lambda text, scale: long_lines(text, 10**8 // scale, " ")),
    "parquet": Row(".parquet", lambda text, scale: blocks(text, 6 * 10**8 // scale, 10**4)),
    "parquet-long": Row(".parquet", lambda text, scale: blocks(text, 6 * 10**8 // scale, 10**6 // scale)),
    "zst": Row(".zst", lambda text, scale: equal(text, 500, 3 * 10**9 // scale)),
    "gz": Row(".gz", lambda text, scale: blocks(text, 5 * 10**8 // scale)),
    "xz": Row(".xz", lambda text, scale: blocks(text, 5 * 10**8 // scale)),
    "long-jsonl": Row(
        ".jsonl", lambda text, scale: objects(text, 7 * 10**6 // scale, 3 * 10**8 // scale), ("corpus.document=jsonl",)
    ),
}


def opened(path: Path) -> Any:
    """The file, open for writing; what is written is compressed in the way of its suffix."""
    if path.suffix == ".zst":
        import zstandard

        return zstandard.open(path, "wb")
    if path.suffix == ".xz":  # fast to write, with the dictionary of `xz -9`, which its reader holds in memory
        return lzma.open(path, "wb", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**26}])
    return gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb")


def write(path: Path, content: Iterable[bytes]) -> int:
    """Write the file; in parquet each block is a row. How many bytes of text it holds."""
    size, items = 0, iter(content)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        first = next(items)
        items = chain([first], items)
        # what is read is a page, whole, and a page has this many rows at least: by default 1,024
        with pyarrow.parquet.ParquetWriter(path, schema, write_batch_size=max(1, 2**20 // len(first))) as writer:
            while rows := list(islice(items, GROUP_BYTES // len(first))):
                writer.write_table(pyarrow.table([pyarrow.array(rows, pyarrow.string())], schema=schema))
                size += sum(map(len, rows))
        return size

    with opened(path) as file:
        for block in items:
            file.write(block)
            size += len(block)
    return size


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from family(int(child))
    except OSError:  # it has ended
        return


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(command: list[str], log: Path) -> tuple[int, int, int]:
    """Run a command: its exit code, the peak of its own anonymous memory, and of its largest descendant, if any."""
    peaks: dict[int, int] = {}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            for pid in family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), anonymous(pid))
            time.sleep(0.02)
    parent = peaks.pop(process.pid, 0)
    return process.returncode, parent, max(peaks.values(), default=0)


def report(name: str, row: Row, options: argparse.Namespace) -> bool:
    """Write a row's input, build it, and print its line of the table; whether it was built."""
    model = options.unigram if name == "unigram" else options.model
    given = ["build.workers=2", "stream.valid_fraction=0", *row.options]
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        path, log = Path(directory) / f"{name}{row.suffix}", Path(directory) / "log"
        size = write(path, row.content(options.text, 100 if options.quick else 1))
        places = [f"corpus.train={path}", f"tokenizer.model={model}", f"stream.directory={directory}/stream"]
        script = str(Path(__file__).with_name("build_stream.py"))

        started = time.perf_counter()
        code, parent, worker = measure([sys.executable, script, *(f"--{each}" for each in places + given)], log)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            print(f"error: {name}: the build failed with code {code}:\n{last}", file=sys.stderr)

    largest = f"{worker / 2**20:.0f}" if worker else "one process"
    within = "yes" if max(worker, parent) <= LIMIT_MIB * 2**20 else "NO"
    found = f"failed | {parent / 2**20:.0f} | NO" if code else f"{largest} | {parent / 2**20:.0f} | {within}"
    print(f"| {name} | {size / 1e6:,.1f} MB | {' '.join(row.options)} | {found} |", flush=True)
    return code == 0


def main() -> int:
    """Measure row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="plain text in UTF-8, a document per line")
    parser.add_argument("--model", required=True, help="a tokenizer.model")
    parser.add_argument("--unigram", help="another one, of a unigram model; without it there is no such row")
    parser.add_argument("--directory", help="where inputs and streams are written and removed; default: the system's")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the sizes")
    options = parser.parse_args()

    if not options.text.is_file() or not options.text.stat().st_size:
        parser.error(f"{options.text}: no text")
    if "unigram" in (options.only or ()) and not options.unigram:
        parser.error("--only unigram: give --unigram, a unigram model")

    names = options.only or [name for name in ROWS if name != "unigram" or options.unigram]
    print(f"| input | size | options | worker MiB | parent MiB | within {LIMIT_MIB} MiB |\n|---|---|---|---|---|---|")
    failed = [name for name in names if not report(name, ROWS[name], options)]
    return int(bool(failed))


if __name__ == "__main__":
    run_entry_point(main)
