"""Writing a stream."""

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


def write_array(path: Path, parts: Iterable[npt.NDArray[Any]], dtype: str, columns: tuple[int, ...] = ()) -> Any:
    """Write arrays one behind the other as one `.npy` file that gets its name when it is on disk; (rows, sha256)."""
    partial, rows, sha256 = files.temporary_path(path), 0, hashlib.sha256()
    with partial.open("wb") as file:
        file.write(bytes(HEADER_BYTES))  # until the length is known
        for part in parts:
            data = np.ascontiguousarray(part, dtype=dtype).reshape(-1).view(np.uint8).data
            file.write(data)  # not through a memmap: a full disk is then an error, not a SIGBUS
            sha256.update(data)
            rows += len(part)
        file.seek(0)
        file.write(npy_header(dtype, (rows, *columns)))
        file.flush()
        os.fsync(file.fileno())
    files.rename(partial, path)
    return rows, sha256.hexdigest()


def write_shard(path: Path, parts: Iterable[Tokens], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write tokens as a shard: its entry in the manifest, and how many `unknown` tokens are in it.

    Raises:
        StreamError: a token outside the vocabulary (it is never wrapped into the dtype).
    """
    unknown = 0

    def checked() -> Iterator[Tokens]:
        nonlocal unknown
        for part in parts:
            if len(part) and not 0 <= int(part.min()) <= int(part.max()) < tokenizer.vocab_size:
                outside = part[(part < 0) | (part >= tokenizer.vocab_size)][0]
                raise StreamError(f"{path}: token {outside} is outside the vocabulary of {tokenizer.vocab_size}")
            unknown += int(np.count_nonzero(part == tokenizer.unknown_id))
            yield part

    tokens, sha256 = write_array(path, checked(), token_dtype(tokenizer.vocab_size))
    return {"name": path.name, "tokens": tokens, "sha256": sha256, "unknown": unknown}


def commit(partial: Path, directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest beside the files that it names, then rename the directory: from then on there is a stream.

    Raises:
        StreamError: a file is not there, or has another size than the manifest says.
    """
    for leftover in partial.glob(".*"):  # of a worker that was killed
        leftover.unlink()
    files.write(partial / "stream.json", [manifest.to_json().encode()])
    TokenStream(partial)
    files.sync(partial)
    files.rename(partial, directory)
    files.sync(directory.parent)
    return Manifest.read(directory)
