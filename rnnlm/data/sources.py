"""The files behind paths, globs and URLs, in a fixed order, on any file system that fsspec knows.

A source's name is its path within the corpus, without the directory that all files share: a build is the same wherever
the corpus lies. The price: a file that is renamed counts as another one.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

from rnnlm.config import as_list
from rnnlm.errors import UserError


@dataclass(frozen=True)
class Source:
    """One input file."""

    name: str  # within the corpus
    size: int  # bytes on disk
    stamp: str  # changes with the file
    file: Any  # fsspec's OpenFile: travels to workers, opens there

    @property
    def path(self) -> str:
        """Its name as shown to the user."""
        path: str = self.file.path
        return path

    def open(self) -> Any:
        """The file, opened for reading bytes; each call a handle of its own."""
        return self.file.fs.open(self.file.path, "rb")


def sources(paths: list[str] | str, key: str) -> list[Source]:
    """The files behind `paths`, in the order given, each glob's matches sorted.

    Raises:
        UserError: nothing matches, a directory, or a file that cannot be read; `key` is the option to name.
    """
    import fsspec  # 0.1 s, and only readers of text need it

    found = []
    for pattern in as_list(paths):
        try:
            matches = fsspec.open_files(pattern, mode="rb")
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"{key}={pattern}: cannot be opened ({error})") from error
        if not matches:
            raise UserError(f"{key}={pattern}: no file matches; give a path, a glob or a URL of text files")

        for file in matches:
            try:
                info = file.fs.info(file.path)
            except OSError as error:
                raise UserError(f"{key}={pattern}: cannot be read ({error.strerror or error})") from error
            if info.get("type") == "directory":
                raise UserError(f"{key}={pattern}: is a directory; name files, as in {pattern.rstrip('/')}/*.txt")

            # a local file's time, or what the object store of a URL has in its place
            stamp = next((str(info[name]) for name in ("mtime", "ETag", "LastModified", "updated") if name in info), "")
            found.append((file, int(info.get("size") or 0), stamp))

    common = posixpath.commonpath([posixpath.dirname(file.path) for file, _, _ in found]) if found else ""
    return [Source(file.path.removeprefix(common).lstrip("/"), size, stamp, file) for file, size, stamp in found]


def is_parquet(source: Source) -> bool:
    """Whether its records are rows of a parquet file."""
    return source.path.endswith(".parquet")
