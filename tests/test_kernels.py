"""Compiled code is kept where a directory can be written, is never that of another source, and is compiled once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, environment

from rnnlm import kernels
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.kernels import SOURCES, cache_directory


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that cannot be written to, of a user without a home; its temporary directory is tmp_path/tmp."""
    package = tmp_path / "package"
    for name in SOURCES:
        source = package / f"{name}.py"
        source.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"rnnlm/{name}.py", source)
    (package / "__pycache__").write_text("a file: the tests' user may write to every directory")
    (tmp_path / "home").write_text("another")
    (tmp_path / "tmp").mkdir()

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kernels.settings, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return package


def test_a_read_only_installation_keeps_compiled_code_in_the_users_own_temporary_directory(
    installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Path(cache_directory(installation))
    own = tmp_path / "tmp" / f"rnnlm-{os.getuid()}"
    assert found.parent == own and found.is_dir()
    assert own.stat().st_mode & 0o077 == 0

    own.chmod(0o777)
    assert cache_directory(installation) == "", "others could put code there that is run"
    monkeypatch.setattr(kernels.settings, "CACHE_DIR", str(tmp_path / "given"))
    assert Path(cache_directory(installation)).parent == tmp_path / "given"


def test_an_edited_helper_finds_no_compiled_code(installation: Path) -> None:
    before = cache_directory(installation)
    assert cache_directory(installation) == before
    with (installation / "data/word_keys.py").open("a") as file:
        file.write("# edited\n")
    assert cache_directory(installation) not in (before, "")


def test_every_module_with_compiled_code_is_a_source() -> None:
    with_code = [
        path.relative_to(ROOT / "rnnlm").with_suffix("").as_posix()
        for path in sorted((ROOT / "rnnlm").rglob("*.py"))
        if any(line in ("@kernel", "@unlocked_kernel", "@inlined") for line in path.read_text().splitlines())
    ]
    assert sorted({*with_code, "kernels", "model/random_bits"}) == sorted(SOURCES)


def run_python(directory: Path, code: str, **extra: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=directory, env=environment(**extra), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("temporary", ["tmp", "nowhere"])
def test_a_read_only_installation_encodes(tmp_path: Path, temporary: str, tokenizer: Tokenizer) -> None:
    shutil.copytree(ROOT / "rnnlm", tmp_path / "rnnlm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rnnlm/__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)

    code = (
        "import tempfile\n"
        f"tempfile.tempdir = {str(tmp_path / temporary)!r}\n"
        "from rnnlm.data.encoder import Encoder\n"
        "from rnnlm.data.tokenizer import Tokenizer\n"
        f"tokenizer = Tokenizer.load({str(tmp_path / 'tokenizer.model')!r})\n"
        "assert Encoder(tokenizer).encode([b'anna sees'])[0].tolist() == [*tokenizer.encode('anna sees'), 1]\n"
        "from rnnlm.kernels import CACHE; print(CACHE)\n"
    )

    (tmp_path / "tmp").mkdir()
    found = run_python(tmp_path, code, PYTHONPATH=str(tmp_path), HOME=str(tmp_path / "home"), XDG_CACHE_HOME="")
    assert found.strip().startswith(str(tmp_path / "tmp")) if temporary == "tmp" else found == "\n"


@pytest.mark.slow
def test_workers_compile_nothing_after_a_build_has_prepared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    load = f"from rnnlm.data.tokenizer import Tokenizer\ntokenizer = Tokenizer.load({str(tmp_path)!r})\n"
    prepare = f"{load}from rnnlm.data.encoder import prepare\nprepare(tokenizer)\n"

    encode = (
        f"{load}from rnnlm.data.encoder import Encoder\n"
        "encoder = Encoder(tokenizer, max_words=16)\n"
        "[encoder.encode([b'anna%d sees %d'  % (n, n)]) for n in range(100)]\n"
        "list(encoder.encode_long(iter([b'anna sees ' * 1000])))\n"
        "from rnnlm.data import bpe_kernels, word_table\n"
        "made = [each.stats for module in (bpe_kernels, word_table) for each in vars(module).values()\n"
        "        if hasattr(each, 'stats') and each.stats.cache_path]\n"
        "print(sum(len(each.cache_hits) for each in made), sum(len(each.cache_misses) for each in made))\n"
    )

    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    larger = encode.replace("max_words=16", "max_words=2**18")
    assert run_python(tmp_path, larger, **cache).split()[1] != "0", "else it proves nothing"
    shutil.rmtree(tmp_path / "cache")
    run_python(tmp_path, prepare, **cache)
    hits, misses = map(int, run_python(tmp_path, encode, **cache).split())
    assert hits >= 5 and misses == 0, "five kernels are called, as a first process compiles them"
