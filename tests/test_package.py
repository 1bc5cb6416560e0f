"""What walks the package sees its folders: the wheel that users install, and the digest of the code of a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import rnnlm
from rnnlm.config import Config
from rnnlm.data.stream import TokenStream
from rnnlm.train.identity import fingerprint
from rnnlm.train.inputs import Streams


def test_the_wheel_holds_all_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, for setuptools builds beside what it packs
    shutil.copytree(ROOT / "rnnlm", source / "rnnlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = [path for path in (ROOT / "rnnlm").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert held == {path.relative_to(ROOT).as_posix() for path in package}
    assert {"rnnlm/py.typed", "rnnlm/data/build/units.py"} <= held


@pytest.mark.parametrize("name", ["config.py", "model/layers.py", "data/build/units.py"])
def test_the_digest_of_the_code_changes_with_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_stream: TokenStream, name: str
) -> None:
    shutil.copytree(ROOT / "rnnlm", tmp_path / "rnnlm")
    monkeypatch.setattr(rnnlm, "__file__", str(tmp_path / "rnnlm/__init__.py"))
    before = fingerprint(Config(), Streams(train_stream, None))
    assert before == fingerprint(Config(), Streams(train_stream, None))

    with (tmp_path / "rnnlm" / name).open("a") as file:
        file.write("# newer\n")
    after = fingerprint(Config(), Streams(train_stream, None))
    assert {key for key in before if before[key] != after[key]} == {"code"}
