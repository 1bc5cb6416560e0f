"""What stays of a build in stream.directory, what goes, and what may not be there at all.

Units stay for the next build. Nothing else is deleted but what this build made for itself, and never without a word.
The price: with the units the tokens lie on disk twice; build.keep_units=false does without.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from rnnlm import files
from rnnlm.errors import UserError

BUILD_FILES = ("lock", "units", "inputs.jsonl")  # and work-...: what a build makes beside the streams
RUN_FILES = ("checkpoints", "metrics.jsonl")  # what a run's directory has


def say(text: str) -> None:
    """Tell the user something, above a progress bar."""
    tqdm.write(f"note: {text}", file=sys.stderr)


def check_directory(directory: Path) -> None:
    """Refuse a stream.directory that is something else.

    Raises:
        UserError: naming what it is.
    """
    key = f"stream.directory={directory}"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{key}: is a file; give a directory")
    if (directory / "stream.json").exists():
        raise UserError(f"{key}: is a stream itself; give the directory above, {directory.parent}, or another one")
    for name in RUN_FILES:
        if (directory / name).exists():
            raise UserError(f"{key}: is the directory of a run, with {name} in it; give the streams one of their own")

    build = directory / "build"
    if build.exists() and not (build.is_dir() and all(map(_is_of_a_build, build.iterdir()))):
        raise UserError(f"{build}: is in the way and of no build of streams; move it, or choose another directory")


def _is_of_a_build(path: Path) -> bool:
    return path.name in BUILD_FILES or path.name.startswith(("work-", ".inputs.jsonl."))


def tidy(keys: Mapping[Path, set[str]], keep_units: bool) -> None:
    """Remove units that this build has no use for, or all of them, and say what stays.

    Args:
        keys: by directory of units: what their names begin with, for all files of the build.
    """
    size = count = 0
    for directory, wanted in keys.items():
        if not directory.exists():
            continue
        removed = 0
        for path in sorted(directory.glob("[!.]*")):
            if keep_units and path.name[:KEY_LETTERS] in wanted:
                size, count = size + path.stat().st_size, count + path.name.endswith(".unit")
            else:
                path.unlink()
                removed += path.name.endswith(".unit")

        if removed and keep_units:
            say(f"{directory}: {removed:,} unit(s) removed, of files that the streams are no longer made from")
        if not keep_units:
            files.clear_temporaries(directory)
            if not any(directory.iterdir()):
                directory.rmdir()
    if count:
        where = next(iter(keys)).parent
        say(
            f"{where}: {count:,} unit(s), {size:,} bytes, stay for the next build, which encodes what is new; remove "
            "the directory, or set build.keep_units=false, if there will be none"
        )


KEY_LETTERS = 24  # of a unit's name, before its number
