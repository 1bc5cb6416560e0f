"""Compiling: the decorators of kernels, and the directory that keeps what was compiled.

numba compiles a kernel when it is first called, seconds each, and keeps the result on disk for all later processes. It
compares the source of the kernel's own module alone; so the directory is named by a digest of all modules of kernels,
and what was compiled with another version of an inlined helper is never found. It lies in the first of these that can
be written: $NUMBA_CACHE_DIR; __pycache__ of this package; the user's cache directory; one of the user's own in the
temporary directory. Where none can, every process compiles for itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

settings: Any = numba.config
compile_with: Any = numba.njit
Function = TypeVar("Function", bound=Callable[..., Any])
SOURCES = (
    "kernels",
    "data/word_keys",
    "data/word_table",
    "data/known_words",
    "data/bpe_kernels",
    "data/byte_level_kernels",
    "model/random_bits",
    "model/dropout_kernels",
    "model/cross_entropy_kernels",
)  # modules with code that is compiled, and with constants that are compiled into it


def inlined(function: Function) -> Function:
    """A helper that is compiled into each kernel that calls it."""
    made: Function = compile_with(inline="always")(function)
    return made


def kernel(function: Function) -> Function:
    """A compiled function, which checks no bounds."""
    return _compiled(function)


def unlocked_kernel(function: Function) -> Function:
    """The same, without Python's lock: threads may run it side by side."""
    return _compiled(function, nogil=True)


def _compiled(function: Function, **options: bool) -> Function:
    before = settings.CACHE_DIR
    try:
        settings.CACHE_DIR = CACHE  # numba reads it here, and never again for this function
        made: Function = compile_with(cache=bool(CACHE), boundscheck=False, error_model="numpy", **options)(function)
    finally:
        settings.CACHE_DIR = before
    return made


def on_threads(run: Callable[[int, int], None], items: int, threads: int) -> None:
    """Call run(begin, end), of an unlocked kernel, for as many stretches of items as there are threads, side by side.

    numba's own threads would be those of torch in some installations, and another set in others.
    """
    threads = max(1, min(threads, items))
    edges = [items * part // threads for part in range(threads + 1)]
    others = [_pool(os.getpid(), threads).submit(run, *edges[part : part + 2]) for part in range(1, threads)]
    run(0, edges[1])
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """So many threads, with the one that asks; anew in a process that was forked, where those of the other are not."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="kernels")


def cache_directory(package: Path) -> str:
    """Where compiled code is kept; empty if no directory can be written."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((package / f"{name}.py").read_bytes())

    for parent in _parents(package):
        directory = parent / f"kernels-{digest.hexdigest()[:16]}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError:
            continue
        return str(directory)
    return ""


def _parents(package: Path) -> Iterator[Path]:
    """Where that directory may lie, the best first."""
    if settings.CACHE_DIR:
        yield Path(settings.CACHE_DIR)
    yield package / "__pycache__"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rnnlm"

    # what is loaded from here is run: nobody else may write there
    try:
        directory = Path(tempfile.gettempdir()) / f"rnnlm-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        yield directory


CACHE = cache_directory(Path(__file__).parent)
