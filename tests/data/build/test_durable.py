"""Fault 25: a power loss at any point of a build leaves nothing half done under its name, and it ends the same."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from build_crash import MovingFileSystem, watch_build
from build_helpers import build, digests
from conftest import make_text
from crash_model import Operation, lay_out

from rnnlm.config import BuildConfig
from rnnlm.data.build.unit_file import UnitFile
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer

OPTIONS = {"unit_bytes": 400, "on_bad_record": "skip", "build": BuildConfig(workers=1)}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three units, in the second of which a record is bad; and a small file beside."""
    lines = [line.encode() for line in make_text(16, seed=2)]
    lines[8] += b"\xff"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"carol finds a dog\n")
    return tmp_path / "*.txt"


def operations(text: Path, directory: Path, tokenizer: Tokenizer) -> list[Operation]:
    """What a whole build asks of the operating system."""
    log: list[Operation] = []
    with pytest.MonkeyPatch.context() as patch:
        watch_build(patch, log, directory)
        build(text, directory, tokenizer, **OPTIONS)
    return log


def check_names(root: Path) -> None:
    """What has its name is whole."""
    for path in root.glob("build/units/*/*.unit"):
        unit = UnitFile(path)
        assert len(unit.tokens) == unit.footer["tokens"] and len(unit.rows) == unit.footer["rows"]
        assert len(list(unit.rejected())) == unit.footer["records"].get("invalid UTF-8", 0)
    for split in ("train", "valid"):
        if (root / split).exists():
            assert list(TokenStream(root / split).verify())


@pytest.mark.parametrize("places", [1, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fault_25_a_power_loss_at_any_point_of_a_build(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, places: int
) -> None:
    """The next build finds nothing half done, and makes the same."""
    directory = tmp_path / "whole"
    directory.mkdir()
    log = operations(text, directory, tokenizer)
    whole, system, states = digests(directory), MovingFileSystem(directory), set[str]()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # what follows shall be quick, not durable
        for place, operation in enumerate([*log, None]):
            wanted = place % max(1, len(log) // places) == 0
            for state in system.losses(place, mixtures=1) if wanted else ():
                key = hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()
                if key not in states:
                    states.add(key)
                    root = tmp_path / f"state{len(states)}"
                    lay_out(root, state)
                    check_names(root)
                    assert digests(build(text, root, tokenizer, **OPTIONS)) == whole
                    shutil.rmtree(root)
            if operation:
                system.do(operation)
    print(f"{len(log)} operations, {len(states)} distinct states")
    assert len(states) >= places // 100 + 3


def test_nothing_that_a_build_has_done_is_lost_with_the_power(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A unit and its name are on disk before the next one gets its name; so is all of a stream, and its name."""
    directory = tmp_path / "whole"
    directory.mkdir()
    log, system = operations(text, directory, tokenizer), MovingFileSystem(directory)
    units, placed = set[Path](), set[Path]()

    for kind, path, target in [*log, ("end", directory, directory)]:
        if kind == "end" or (kind == "rename" and (target.suffix == ".unit" or target.parent == directory)):
            on_disk = system.after_power_loss(lambda: False, lambda: 0.0)
            done = [*units, *(file for stream in placed for file in stream.iterdir())]
            assert {str(file.relative_to(directory)): file.read_bytes() for file in done}.items() <= on_disk.items()
        if kind == "rename":
            units |= {target} if target.suffix == ".unit" else set()
            placed |= {target} if target.parent == directory else set()
        if kind != "end":
            system.do((kind, path, target))
    assert len(units) > 3 and len(placed) == 2


def test_train_gets_its_name_last(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What training opens first: whoever finds it finds the others."""
    directory = tmp_path / "whole"
    directory.mkdir()
    log = operations(text, directory, tokenizer)
    named = [target.name for kind, _, target in log if kind == "rename" and target.parent == directory]
    assert named == ["valid", "train"]
