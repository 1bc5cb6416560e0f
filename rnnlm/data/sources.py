"""The files behind paths, globs and URLs, in a fixed order, on any file system that fsspec knows.

A source's name is its path within the corpus, without the directory that all files share: a build is the same wherever
the corpus lies. The price: a file that is renamed counts as another one. A file is read once: the same one twice, under
whatever names, would double its documents, or put them on both sides of a split, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rnnlm.config import CorpusConfig, as_list
from rnnlm.data.filetypes import check_name, document_of, document_of_all, is_table
from rnnlm.errors import UserError
from rnnlm.texts import SPLITS, Texts, named_sources

EDGE_BYTES, BLOCK_BYTES, BLOCKS = 2**16, 2**12, 14  # of a file's content that its digest reads
STAMPS = (  # what file systems call a thing that changes with a file
    "mtime", "ETag", "etag", "LastModified", "Last-Modified", "Content-MD5", "Digest", "last_modified", "updated",
    "modified", "CRC", "created",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One input file."""

    name: str  # within the corpus
    path: str  # on its file system, as shown to the user
    size: int  # bytes on disk
    stamp: str  # changes with the file; where its file system tells nothing of the kind, samples of its content
    group: str  # the named source that it belongs to; "": none
    file_system: Any  # fsspec's, one for all files there: travels to workers

    def open(self) -> Any:
        """The file, opened for reading bytes; each call a handle of its own."""
        return self.file_system.open(self.path, "rb")


class _File(NamedTuple):
    """A file that was found, before all of them are known and it gets its name."""

    file_system: Any
    path: str
    archive: str  # what stands behind it in a chained URL, as ::a.zip
    group: str
    size: int
    stamp: str
    identity: tuple[Any, ...]  # equal for all names of one file

    @property
    def is_local(self) -> bool:
        """Whether it needs no URL to be told from others."""
        return "file" in as_list(self.file_system.protocol)


def corpus_sources(corpus: CorpusConfig) -> dict[str, list[Source]]:
    """The files of each split for which there are texts, no file twice.

    Raises:
        UserError: as `sources`, or a file that belongs to two splits.
    """
    found = {
        f"corpus.{split}": _files(getattr(corpus, split), f"corpus.{split}", corpus.document)
        for split in SPLITS
        if getattr(corpus, split)
    }
    _refuse_repeats(found)
    return {key.removeprefix("corpus."): _named(files) for key, files in found.items()}


def sources(texts: Texts, key: str, document: str = "auto") -> list[Source]:
    """The files behind `texts`, in the order given, each glob's matches sorted.

    Args:
        key: the option to name in errors.
        document: corpus.document; with auto, files of one source must all be lines, or all JSON lines, or tables.

    Raises:
        UserError: nothing matches, a directory, the same file twice, one that cannot be read or has no size, or is of
            no kind that can be read.
    """
    found = _files(texts, key, document)
    _refuse_repeats({key: found})
    return _named(found)


def unchanged(source: Source) -> bool:
    """Whether a file is still there with the size and the stamp that it had when it was found."""
    source.file_system.invalidate_cache(source.path)
    try:
        _, size, stamp, _ = _status(source.file_system, source.path)
    except OSError:
        return False
    return (size, stamp) == (source.size, source.stamp)


def content_digest(source: Source) -> str:
    """sha256 over a file's size, its beginning, its end and some blocks between; of a short file, over all of it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return _digest_of(source.file_system, source.path, source.size)
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror or error})") from error


def _digest_of(file_system: Any, path: str, size: int) -> str:
    """As content_digest, with the errors of the file system."""
    ranges = [(0, size)]
    if size > 2 * EDGE_BYTES + BLOCKS * BLOCK_BYTES:
        between = size - 2 * EDGE_BYTES - BLOCK_BYTES
        begins = [EDGE_BYTES + between * block // (BLOCKS - 1) for block in range(BLOCKS)]
        ranges = [(0, EDGE_BYTES), *((at, at + BLOCK_BYTES) for at in begins), (size - EDGE_BYTES, size)]

    digest = hashlib.sha256(size.to_bytes(8, "little"))
    for begin, end in ranges:
        digest.update(file_system.cat_file(path, begin, end))
    return digest.hexdigest()


def _files(texts: Texts, key: str, document: str) -> list[_File]:
    """All files behind all paths of all sources."""
    found: list[_File] = []
    for group, source in named_sources(texts).items():
        name, first = f"{key}.{group}" if group else key, len(found)
        for pattern in as_list(source.paths):
            found += _matches(pattern, f"{name}={pattern}", group)

        for file in found[first:]:
            check_name(file.path, document, name)
        _check_alike([file.path for file in found[first:]], document, name)
    return found


def _check_alike(paths: list[str], document: str, what: str) -> None:
    """Refuse JSON lines among other texts in one source: one of the two was not meant."""
    if document_of_all(paths, document) == "auto":
        texts = (path for path in paths if not is_table(path))
        first = {document_of(path, document): path for path in texts}
        raise UserError(
            f"{what}: {first['jsonl']} holds JSON lines, {first['line']} does not; name them as two sources, as in "
            "{a: {paths: ...}, b: {paths: ...}}, or set corpus.document for all"
        )


def _matches(pattern: str, what: str, group: str) -> Iterator[_File]:
    """The files behind one path, glob or URL; `what` begins every error."""
    from fsspec.core import url_to_fs  # 0.1 s, and only readers of text need it

    try:
        file_system, path = url_to_fs(pattern)
        archive = "".join(pattern.partition("::")[1:])
        is_glob = "*" in path
        paths = _glob(file_system, path, what) if is_glob else _of_dataset(file_system, path, what) or [path]
    except UserError:
        raise
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{what}: cannot be opened ({error})") from error

    count = 0
    for each in paths:
        try:
            kind, size, stamp, identity = _status(file_system, each)
        except OSError as error:
            raise UserError(f"{what}: cannot be read ({error.strerror or error})") from error
        if kind == "directory" and is_glob:
            continue

        count += 1
        _check_kind(kind, size, each, what, pattern)
        yield _File(file_system, each, archive, group, size, stamp, identity)
    if not count:
        raise UserError(f"{what}: no file matches; give a path, a glob or a URL of text files")


def _glob(file_system: Any, path: str, what: str) -> list[str]:
    """What matches, sorted; says which local directories could not be looked into."""

    def warn(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = f"{error.filename}: cannot be listed ({error.strerror}); no file in it is taken"
            print(f"warning: {what}: {reason}", file=sys.stderr)

    return sorted(_local_glob(path, warn) if "file" in as_list(file_system.protocol) else file_system.glob(path))


def _local_glob(path: str, warn: Callable[[OSError], None]) -> Iterator[str]:
    """As fsspec's, which passes over directories that are links, or that cannot be listed, without a word."""
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(path)).match
    root = re.split(r"[*?[]", path)[0].rpartition("/")[0]
    depth = sys.maxsize if "**" in path else path[len(root) :].count("/")
    for directory, names, others in os.walk(root or "/", onerror=warn, followlinks=True):
        here = directory.rstrip("/")
        yield from (found for name in (*names, *others) if matches(found := f"{here}/{name}"))

        # no deeper than the pattern, and not in circles
        if here[len(root) :].count("/") + 1 >= depth:
            names.clear()
        names[:] = [name for name in names if not _leads_up(f"{here}/{name}")]


def _leads_up(path: str) -> bool:
    """Whether a path is a link to a directory that it lies in."""
    return Path(path).is_symlink() and Path(path).parent.resolve().is_relative_to(Path(path).resolve())


def _of_dataset(file_system: Any, path: str, what: str) -> list[str]:
    """The files of a directory that Hugging Face's `save_to_disk` wrote, in their order; none for any other path."""
    state, splits = f"{path}/state.json", f"{path}/dataset_dict.json"
    if file_system.isfile(splits):
        names = json.loads(file_system.cat_file(splits))["splits"]
        raise UserError(f"{what}: a dataset of the splits {', '.join(names)}; name one, as in {path}/{names[0]}")
    if not file_system.isfile(state):
        return []
    return [f"{path}/{each['filename']}" for each in json.loads(file_system.cat_file(state))["_data_files"]]


def _check_kind(kind: str, size: int, path: str, what: str, pattern: str) -> None:
    """Refuse what is no file with a beginning and an end."""
    if kind == "directory":
        raise UserError(f"{what}: is a directory; name files, as in {pattern.rstrip('/')}/*.txt")
    if kind == "other":
        raise UserError(f"{what}: {path} is a pipe or a device; write what it gives to a file, and name that")
    if size < 0:
        raise UserError(
            f"{what}: {path}: its server does not say how many bytes it has, so that a broken connection would look "
            "like its end; download it, and name the copy"
        )


def _status(file_system: Any, path: str) -> tuple[str, int, str, tuple[Any, ...]]:
    """(file, directory or other; bytes, -1 if nobody knows; stamp; identity) of what a path leads to."""
    if "file" in as_list(file_system.protocol):
        found = Path(path).stat()
        kind = "directory" if stat.S_ISDIR(found.st_mode) else "file" if stat.S_ISREG(found.st_mode) else "other"
        # size and time as well: some network file systems give two files one number
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        return kind, found.st_size, str(found.st_mtime_ns), identity

    info = file_system.info(path)
    kind = "directory" if info.get("type") == "directory" else "file"
    size = -1 if info.get("size") is None else int(info["size"])
    stamp = next((str(info[name]) for name in STAMPS if info.get(name)), "")
    if (
        not stamp and kind == "file" and size >= 0
    ):  # else an edited file of the same size would be taken for the old one
        stamp = _digest_of(file_system, path, size)
    return kind, size, stamp, (file_system._fs_token, path)


def _refuse_repeats(found: dict[str, list[_File]]) -> None:
    """Refuse a file that is there under two names, or in two of the options that are the keys."""
    seen: dict[tuple[Any, ...], tuple[str, _File]] = {}
    for key, files in found.items():
        for file in files:
            first_key, first = seen.setdefault(file.identity, (key, file))
            if first is file:
                continue

            names = file.path if file.path == first.path else f"{first.path} and {file.path}, which are one file,"
            one, other = _option(first_key, first), _option(key, file)
            where = f"twice in {one}" if one == other else f"in {one} and in {other}"
            raise UserError(f"{names} is {where}: its documents would count twice; leave it out once")


def _option(key: str, file: _File) -> str:
    return f"{key}.{file.group}" if file.group else key


def _named(found: list[_File]) -> list[Source]:
    """The files with their names: paths without the directory that all share; URLs, where some lie elsewhere."""
    local = [file for file in found if file.is_local]
    mixed = len({id(file.file_system) for file in found}) > 1
    common = posixpath.commonpath({posixpath.dirname(file.path) for file in (local if mixed else found)} or [""])

    named = []
    for file in found:
        if mixed and not file.is_local:
            name = file.file_system.unstrip_protocol(file.path) + file.archive
        else:
            name = file.path.removeprefix(common).lstrip("/")
        named.append(Source(name, file.path, file.size, file.stamp, file.group, file.file_system))
    return named
