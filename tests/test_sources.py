"""The sources themselves: import order, one home per library, no pickle, small doors, no torch in tools."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command, environment

ORDER = ["config", "lock", "corpus", "tokenizer", "words", "encoder", "stream", "foreign", "units",
         "spill", "workers", "assemble", "build", "substreams", "cells", "loss", "model", "optim",
         "health", "evaluate", "generate", "disk", "tensorfile", "untrusted", "checkpoint", "saving",
         "claim", "interrupts", "processes", "score", "metrics", "learner",
         "trainer"]  # fmt: skip
HOMES = {
    "sentencepiece": "tokenizer",
    "safetensors": "tensorfile",
    "accelerate": "processes",
    "wandb": "metrics",
    "numba": "words",
    "pyarrow": "corpus",
    "distributed": "workers",
}
SOURCES = sorted(path for folder in ("rnnlm", "launch", "tools") for path in (ROOT / folder).glob("*.py"))


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_modules_import_only_those_before_them() -> None:
    modules = {path.stem for path in (ROOT / "rnnlm").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    for name in ORDER:
        for imported in imports(ROOT / "rnnlm" / f"{name}.py"):
            if found := re.match(r"rnnlm\.(\w+)", imported):
                inner = found[1] if found[1] in ORDER else None
                assert inner is None or ORDER.index(inner) < ORDER.index(name), f"{name} imports {imported}"


def test_each_library_has_one_home() -> None:
    for path in SOURCES:
        if path.stem.startswith("benchmark_"):  # may use what it measures with
            continue
        for imported in imports(path):
            library = imported.split(".")[0]
            assert HOMES.get(library, path.stem) == path.stem, f"{path.name} imports {imported}"


def test_nothing_is_pickled_and_nothing_is_left_for_later() -> None:
    for path in SOURCES:
        text = path.read_text()
        for banned in (
            r"\bpickle\.",
            r"import pickle",
            r"torch\.(load|save)\(",
            r"\bTODO\b",
            r"\bFIXME\b",
            "NotImplemented",
        ):
            assert not re.search(banned, text), f"{path.name}: {banned}"


def test_every_module_says_what_it_is() -> None:
    for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tools_never_import_torch(script: Path) -> None:
    """--help and everything that main() imports."""
    if script.stem.startswith("benchmark"):
        pytest.skip("benchmarks measure the library, and may")
    watched = (
        f"import runpy, sys\nsys.argv = [{str(script)!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
        "import rnnlm.build, rnnlm.stream, rnnlm.tokenizer\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_doors_explain_themselves(script: Path) -> None:
    done = subprocess.run(
        command(script, "--help"), env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"launch/{script.name}" in done.stdout
