"""Builds for tests: a text in many units, the build of it in this process, or by a script that has faults."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT, environment, make_text

from rnnlm.config import BuildConfig, Config, CorpusConfig, StreamConfig
from rnnlm.data.build.build import Build
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.hashing import fraction_of

UNIT_BYTES = 3000
OPTIONS = {"unit_bytes": UNIT_BYTES, "shard_tokens": 700, "valid_fraction": 0.2}
FAULTY = [sys.executable, str(ROOT / "tests/data/build/faulty_build.py")]


def write_text(directory: Path) -> Path:
    """1,200 documents, every 40th a repetition, in more than 20 units."""
    texts = make_text(1200, seed=3)
    texts[::40] = [texts[7]] * len(texts[::40])
    path = directory / "text.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    assert path.stat().st_size > 20 * UNIT_BYTES
    return path


def options(text: Path, directory: Path, **changed: Any) -> list[str]:
    """As given to the script."""
    keys = {"unit_bytes": "corpus", "shard_tokens": "stream", "valid_fraction": "stream", "workers": "build"}
    every = {**OPTIONS, "workers": 1, **changed}
    given = [f"--{keys.get(key, 'corpus')}.{key}={value}" for key, value in every.items()]
    return [f"--corpus.train={text}", f"--stream.directory={directory}", *given]


def build(
    text: Path | str | list[str],
    directory: Path,
    tokenizer: Tokenizer,
    make: Callable[[], Executor] | None = None,
    **corpus: Any,
) -> Path:
    """Build in this process, or on an executor."""
    engine = corpus.pop("build", BuildConfig(workers=3 if make else 1))
    valid_fraction = corpus.pop("valid_fraction", 0.2)
    stream = StreamConfig(directory=str(directory), shard_tokens=700, valid_fraction=valid_fraction)

    paths = text if isinstance(text, list) else str(text)
    corpus = {"unit_bytes": UNIT_BYTES, **corpus}
    config = Config(corpus=CorpusConfig(train=paths, **corpus), stream=stream, build=engine)
    Build(config, tokenizer).run(lambda size: None, make)
    return directory


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file of every stream."""
    files = [path for path in directory.glob("*/*") if path.parent.name in ("train", "valid")]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digests_of_arrays(directory: Path) -> dict[str, str]:
    """Of its shards and documents alone: others also tell from which files it was built."""
    return {name: each for name, each in digests(directory).items() if re.search(r"(shard-\d+|documents)\.npy$", name)}


def build_whole(text: Path, directory: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The digests of a build by one worker, which is checked against a slow obvious one."""
    build(text, directory, tokenizer)
    for split in ("train", "valid"):
        lines = [line for line in text.read_text(encoding="utf-8").split("\n") if line.strip()]
        mine = [line for line in lines if (fraction_of(line.encode(), 0) < 0.2) == (split == "valid")]
        ids = [[*tokenizer.encode(line), tokenizer.eos_id] for line in mine]

        stream = TokenStream(directory / split)
        assert stream.windows(np.array([0]), len(stream))[0].tolist() == [token for each in ids for token in each]
        sizes = [(len(i), len(line.encode()), len(line.split())) for i, line in zip(ids, mine, strict=True)]
        assert stream.documents.tolist() == np.cumsum(sizes, 0).tolist()
        assert list(stream.verify())
        assert len(stream.manifest.shards) > 5
    return digests(directory)


def decoded(directory: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents of a stream, as text."""
    stream = TokenStream(directory / split)
    tokens, ends = stream.windows(np.array([0]), len(stream))[0], stream.documents[:, 0]
    return [tokenizer.decode(tokens[a : b - 1]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def prepare(directory: Path, tokenizer: Tokenizer) -> Path:
    """A directory with nothing but a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    return directory


def start(fault: str, log: Path, *given: str) -> subprocess.Popen[str]:
    """The faulty build, started in a process group of its own."""
    environ = environment(FAULT=fault, LOG=str(log))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*FAULTY, *given], env=environ, start_new_session=True, stdout=subprocess.DEVNULL, stderr=pipe, text=True
    )


def faulty(fault: str, log: Path, *given: str) -> tuple[int, str]:
    """Code and stderr of the faulty build."""
    process = start(fault, log, *given)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr


def first_unit(log: Path) -> float:
    """Wait until a worker begins with a unit; the time."""
    while not log.exists():
        time.sleep(0.002)
    return time.monotonic()


def begun_units(log: Path) -> set[str]:
    """Units whose encoding began."""
    return {line.split()[1] for line in log.read_text().splitlines() if line.startswith("begin ")}


def encoded(log: Path) -> list[str]:
    """Units whose encoding ended, in order."""
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith("end ")]
