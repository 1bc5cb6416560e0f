"""Ctrl-C: a build stops between two units, also of a compressed file that a worker reads from its start to its end."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from build_helpers import FAULTY, build, digests, encoded, first_unit, options, prepare, write_text
from conftest import environment

from rnnlm.data.build import encode, executor
from rnnlm.data.tokenizer import Tokenizer

UNIT_BYTES = 5000


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A compressed file of some fifty units."""
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(write_text(tmp_path).read_bytes() * 3))
    return path


def test_a_worker_that_is_to_stop_ends_its_unit_and_leaves_what_is_done(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, written = threading.Event(), list[str]()

    class Ended(BaseException):
        """Of the parent, when the worker has returned."""

    def write_unit(path: Path, *arguments: Any) -> None:
        honest(path, *arguments)
        written.append(path.name)
        if len(written) == 3:
            stop.set()

    def run_task(*arguments: Any) -> None:
        run(*arguments)
        raise Ended

    honest, run = encode.write_unit, encode.run_encode_task
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(executor, "_stop", stop)
        patch.setattr(encode, "write_unit", write_unit)
        patch.setattr("rnnlm.data.build.build.run_encode_task", run_task)
        build(text, tmp_path / "s", tokenizer, unit_bytes=UNIT_BYTES, stream={"shard_tokens": 2**20})
    units = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("s/build/units/*/*.unit")}
    assert sorted(units) == sorted(written) and len(written) == 3
    assert not list(tmp_path.glob("s/build/work-*/jobs/*.json")), "the job is not done"

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    build(text, tmp_path / "s", tokenizer, unit_bytes=UNIT_BYTES, stream={"shard_tokens": 2**20})
    build(text, tmp_path / "whole", tokenizer, unit_bytes=UNIT_BYTES, stream={"shard_tokens": 2**20})
    assert digests(tmp_path / "s") == digests(tmp_path / "whole")
    assert {name: (tmp_path.glob(f"s/build/units/*/{name}").__next__()).stat().st_mtime_ns for name in units} == units


@pytest.mark.slow
def test_ctrl_c_stops_a_build_between_the_units_of_a_compressed_file(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The parent alone gets the signal, as from a scheduler; the worker then has at most one unit to end."""
    text.write_bytes(gzip.compress(gzip.decompress(text.read_bytes()) * 10))  # not done before the signal comes
    directory, log = prepare(tmp_path / "s", tokenizer), tmp_path / "log"
    process = subprocess.Popen(
        [*FAULTY, *options(text, directory, workers=2, unit_bytes=UNIT_BYTES)],
        env=environment(FAULT="none", LOG=str(log)), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    first_unit(log, process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130, stderr
    done = encoded(log)
    assert len(done) < len(gzip.decompress(text.read_bytes())) // UNIT_BYTES // 2, "far from all"
    assert {path.stem.rpartition("-")[2] for path in directory.glob("build/units/*/*.unit")} == set(done)
    assert not (directory / "train").exists()
