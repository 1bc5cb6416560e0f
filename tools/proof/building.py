"""Builds that are killed, compared with builds that were left alone."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from proof.processes import SIGNALS, Processes, call, choose, make_tokenizer, script, write_text
from rnnlm.cli import read_config
from rnnlm.data.tokenizer_choice import tokenizer_path


@dataclass
class Building:
    """A build that is killed until its streams are there, and the build that it is compared with."""

    options: argparse.Namespace
    directory: Path
    variants: dict[str, list[str]]  # options of tools/build_stream.py, by name
    tokenizer: str
    draw: random.Random
    builds: Iterator[int] = field(default_factory=itertools.count)
    build: Path = Path()
    variant: str = ""
    references: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)  # (digests by file, seconds)

    def prepare(self) -> None:
        """Build once with each of the options, left alone."""
        for name in self.variants:
            path, started = self.directory / f"left-alone-{len(self.references)}", time.monotonic()
            call(self._command(path, name), self.directory / "log.txt")
            self.references[name] = digests(path), time.monotonic() - started
            print(f"{name}, left alone: {self.references[name][1]:.1f} s", flush=True)
        self.begin()

    def begin(self) -> None:
        """Start the next build."""
        number = next(self.builds)
        self.build = self.directory / f"killed-{number}"
        self.variant = [*self.variants][number % len(self.variants)]

    def _command(self, path: Path, variant: str, *more: str) -> list[str]:
        options = [*self.variants[variant], f"--tokenizer.model={self.tokenizer}", f"--stream.directory={path}"]
        return [*script("tools/build_stream.py"), *options, *more]

    def is_done(self) -> bool:
        """Whether all streams are there."""
        return all((self.build / name).parent.is_dir() for name in self.references[self.variant][0])

    def finish(self) -> None:
        """Let the build go on to its end."""
        call(self._command(self.build, self.variant), self.directory / "log.txt")

    def attempt(self) -> tuple[str, str]:
        """Start, kill at any moment, wait; (what happened, where it was hit)."""
        how, tasks = choose(SIGNALS, self.draw), self.draw.choice((1, 1, 2, 3))
        more = [[f"--build.task={task}/{tasks}"] if tasks > 1 else [] for task in range(tasks)]
        started = [
            Processes(self._command(self.build, self.variant, *each), self.directory / "log.txt") for each in more
        ]

        moment = self.draw.uniform(0, self.references[self.variant][1])
        until = time.monotonic() + moment
        while time.monotonic() < until and any(each.first.poll() is None for each in started):
            time.sleep(0.002)

        is_running = any(each.first.poll() is None for each in started)
        for each in started:
            each.signal(how, self.draw)
        for each in started:
            each.wait(self.options.patience)
        what = f"{self.variant}, {tasks} task(s)"
        return (f"{what}: {how} after {moment:.2f} s", "a build") if is_running else (f"{what}: done", "not killed")

    def differences(self) -> list[str]:
        """The files that are not as in the build that was left alone."""
        mine, theirs = digests(self.build), self.references[self.variant][0]
        return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))

    def compared(self) -> str:
        """What was compared, in words."""
        return f"{len(self.references[self.variant][0])} files"


def digests(directory: Path) -> dict[str, str]:
    """sha256 of each file of the streams in a directory, by name."""
    paths = sorted(path for split in ("train", "valid", "test") for path in (directory / split).rglob("*"))
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


def building(directory: Path, options: argparse.Namespace, draw: random.Random) -> Building:
    """The builds that are to be killed: of the configuration, or some small ones with all that a build can do."""
    if options.config:
        given = [f"--config={options.config}", *options.arguments]
        tokenizer = tokenizer_path(read_config(("corpus", "tokenizer", "stream", "build"), None, given))
        return Building(options, directory, {options.config: given}, str(Path(tokenizer).resolve()), draw)

    make_tokenizer(directory)
    texts = [str(write_text(directory / f"more-{number}.txt", 3000, number)) for number in range(3)]
    plain = [f"--corpus.train={json.dumps(texts)}", "--corpus.unit_bytes=50000", "--build.workers=2"]
    plain += ["--stream.shard_tokens=100000", *options.arguments]
    unique, shuffled = "--corpus.deduplicate=true", "--corpus.shuffle_seed=5"
    shares = {"a": {"paths": texts[:2], "share": 1.5}, "b": {"paths": texts[2:], "share": 0.5}}
    mixed = [f"--corpus.train={json.dumps(shares)}", *plain[1:], unique, "--stream.valid_max_tokens=7000"]
    variants = {
        "plain": plain,
        "deduplicated": [*plain, unique],
        "deduplicated and shuffled": [*plain, unique, shuffled],
        "sources with shares": [*mixed, shuffled],
    }
    return Building(options, directory, variants, str(directory / "tokenizer.model"), draw)
