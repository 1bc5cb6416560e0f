"""Streams written: arrays and shards block by block, then a commit.

Files are written under temporary names and renamed when they are on disk, and the manifest comes last, in a directory
that gets its name last: whatever is killed leaves no half stream behind. The price: the header of a file, which holds
its length, is written twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rnnlm import files
from rnnlm.data.stream import Tokens, TokenStream
from rnnlm.data.stream_format import HEADER_BYTES, Manifest, StreamError, npy_header
from rnnlm.data.tokenizer import Tokenizer, token_dtype

REPLACED = ".replaced"  # the suffix of a stream in whose place another one comes; no reader takes it


def write_array(
    path: Path, blocks: Iterable[npt.NDArray[Any]], dtype: str, columns: tuple[int, ...] = ()
) -> tuple[int, str]:
    """Write arrays, (rows, *columns) each, behind one another as one `.npy` file that gets its name when it is on disk.

    Returns:
        All rows, and the sha256 of the bytes behind the header.
    """
    partial, rows, sha256 = files.temporary_path(path), 0, hashlib.sha256()
    try:
        with partial.open("wb") as file:
            file.write(bytes(HEADER_BYTES))  # until the length is known
            for block in blocks:
                data = np.ascontiguousarray(block, dtype=dtype).reshape(-1).view(np.uint8).data
                file.write(data)  # not through a memmap: a full disk is then an error, not a SIGBUS
                sha256.update(data)
                rows += len(block)

            file.seek(0)
            file.write(npy_header(dtype, (rows, *columns)))
            file.flush()
            os.fsync(file.fileno())
        files.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return rows, sha256.hexdigest()


def write_shard(path: Path, blocks: Iterable[Tokens], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write tokens, (any number,) in each block, as a shard: its manifest entry, and how many are `unknown`.

    Raises:
        StreamError: a token outside the vocabulary (it is never wrapped into the dtype).
    """
    unknown = 0

    def checked() -> Iterator[Tokens]:
        nonlocal unknown
        for block in blocks:
            if len(block) and not 0 <= int(block.min()) <= int(block.max()) < tokenizer.vocab_size:
                outside = block[(block < 0) | (block >= tokenizer.vocab_size)][0]
                raise StreamError(f"{path}: token {outside} is outside the vocabulary of {tokenizer.vocab_size}")
            unknown += int(np.count_nonzero(block == tokenizer.unknown_id))
            yield block

    tokens, sha256 = write_array(path, checked(), token_dtype(tokenizer.vocab_size))
    return {"name": path.name, "tokens": tokens, "sha256": sha256, "unknown": unknown}


def commit(partial: Path, directory: Path, manifest: Manifest) -> Manifest:
    """Finish a stream, and give it its name: from then on there is one.

    Raises:
        StreamError: a file is not there, or has another size than the manifest says.
    """
    finish(partial, manifest)
    place(partial, directory)
    return Manifest.read(directory)  # its digest with it


def finish(partial: Path, manifest: Manifest) -> None:
    """Write the manifest beside the files that it names, all of which are on disk then.

    Raises:
        StreamError: a file is not there, or has another size than the manifest says.
    """
    for leftover in partial.glob(".*"):  # of workers that were killed; no file is wanted that is not there
        leftover.unlink()
    files.write_file(partial / "stream.json", manifest.to_json().encode())
    TokenStream(partial)  # checks all sizes
    files.sync(partial)


def place(partial: Path, directory: Path) -> None:
    """Give a finished stream its name; the one that has it is deleted behind that.

    A crash in between leaves the old one, or neither of the two under the name: the next call goes on from there.
    """
    replaced = directory.with_name(directory.name + REPLACED)
    if directory.exists():
        files.remove_tree(replaced)
        files.rename(directory, replaced)
        files.sync(directory.parent)
    files.rename(partial, directory)
    files.sync(directory.parent)
    files.remove_tree(replaced)
