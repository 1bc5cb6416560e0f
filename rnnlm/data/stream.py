"""A token stream opened for reading: memory-mapped, as a ring, and verified.

Shards are mapped, not read: the kernel reads what a window touches and keeps what is used often, processes on a machine
share it, and opening takes the same time for one shard and for ten thousand. Opening checks sizes and the manifest's
own digest; contents are checked by `verify`, as two terabytes cannot be hashed at every start. The price: a bit that
flips in a shard is found only by who asks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rnnlm.data.stream_format import Manifest, StreamError, is_raw, npy_header
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError

READ_BYTES = 2**22  # verified at once
MAPPED_SHARDS = 512  # at once: each holds a file descriptor, of which a process has 1,024
Tokens = npt.NDArray[np.unsignedinteger[Any]]


class TokenStream:
    """A stream opened for reading: sizes and the manifest are checked now, contents by verify()."""

    def __init__(self, directory: str | Path):
        """Open a stream.

        Raises:
            StreamError: missing, or a file that is missing or has another size than the manifest says.
        """
        self.directory = Path(directory)
        self.manifest = Manifest.read(directory)
        self.tokens = self.manifest.tokens
        self._ends = np.cumsum([shard["tokens"] for shard in self.manifest.shards], dtype=np.int64)  # (shards,)
        self._maps: dict[int, Tokens] = {}  # of shards, the least recently used one first
        if sum(shard["tokens"] for shard in self.manifest.shards) != self.tokens:
            raise StreamError(f"{self.directory}: the shards do not add up to tokens={self.tokens}; build it again")

        width = np.dtype(self.manifest.dtype).itemsize
        try:
            with os.scandir(self.directory) as entries:  # in one go: ten thousand shards open in a fifth of a second
                sizes = {entry.name: entry.stat().st_size if entry.is_file() else -1 for entry in entries}
        except OSError as error:  # a link to itself
            raise StreamError(f"{self.directory}: {error}; build the stream again") from error

        self._check_size(sizes, "documents.npy", 24 * self.manifest.documents)
        if self.manifest.origins_sha256:
            self._check_size(sizes, "origins.npy", 16 * self.manifest.documents)
        for shard in self.manifest.shards:
            self._check_size(sizes, shard["name"], width * shard["tokens"])

    def __reduce__(self) -> tuple[type[TokenStream], tuple[Path]]:
        return TokenStream, (self.directory,)  # workers of a loader map the files themselves

    def __len__(self) -> int:
        return int(self.tokens)

    def _check_size(self, sizes: Mapping[str, int], name: str, data_bytes: int) -> None:
        if "/" in name or os.sep in name or name == "..":
            raise StreamError(f"{self.directory}: a shard is called {name!r}, outside the directory; build it again")
        found = sizes.get(name, -1)
        size = self.manifest.header_bytes(name) + data_bytes
        if found != size:
            state = "is missing" if found < 0 else f"has {found} bytes"
            again = "adopt" if is_raw(name) else "build"
            raise StreamError(
                f"{self._named(name)}: {state}, expected {size} bytes; copy it again or {again} the stream again"
            )

    def _named(self, name: str) -> str:
        """A file for error messages: of an adopted stream, the one that its link leads to as well."""
        path = self.directory / name
        with suppress(OSError):  # also of a name that is too long for a file
            return f"{path} -> {path.readlink()}" if path.is_symlink() else str(path)
        return str(path)

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The array of this dtype and shape behind a file's header, mapped."""
        path, offset = self.directory / name, self.manifest.header_bytes(name)
        try:
            with path.open("rb") as file:
                if not is_raw(name) and file.read(offset) != npy_header(dtype, shape):
                    raise StreamError(f"{path}: its header is not that of {dtype} {shape}; copy it again")
        except FileNotFoundError as error:
            raise StreamError(f"{path}: was removed since the stream was opened; put it back, and resume") from error

        if 0 in shape:  # nothing cannot be mapped
            return np.empty(shape, dtype)
        # np.asarray: slicing the memmap class itself is fifty times slower
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))

    def shard(self, index: int) -> Tokens:
        """The tokens of one shard, mapped, not read."""
        tokens = self._maps.pop(index, None)
        if tokens is None:
            shard = self.manifest.shards[index]
            tokens = self._map(shard["name"], self.manifest.dtype, (shard["tokens"],))

        self._maps[index] = tokens
        if len(self._maps) > MAPPED_SHARDS:
            del self._maps[next(iter(self._maps))]
        return tokens

    @property
    def documents(self) -> npt.NDArray[np.int64]:
        """(documents, 3): running totals of tokens, UTF-8 bytes, words."""
        return self._map("documents.npy", "<i8", (self.manifest.documents, 3))

    @property
    def origins(self) -> npt.NDArray[np.int64]:
        """(documents, 2): line of sources.jsonl, and the byte or row where the document starts in that file.

        Raises:
            StreamError: the stream has none, as it was adopted or built by an earlier version.
        """
        if not self.manifest.origins_sha256:
            made = "adopted" if "adopted" in self.manifest.source else "built by an earlier version"
            raise StreamError(f"{self.directory}: was {made}, and does not say where its documents are from")
        return self._map("origins.npy", "<i8", (self.manifest.documents, 2))

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> Tokens:
        """The tokens at `starts[i] ... starts[i] + length - 1` of the ring: (len(starts), length).

        Args:
            starts: (rows,) any integers; positions are taken modulo the number of tokens, the first follows the last.
            length: tokens of each row.

        Returns:
            (rows, length) in the shards' dtype, except that 64 bits become 32: adoption has checked that all ids fit.
        """
        starts = np.asarray(starts, dtype=np.int64) % self.tokens
        dtype = np.dtype(self.manifest.dtype)
        out = np.empty((len(starts), length), dtype=dtype if dtype.itemsize < 8 else "<u4")

        shards = np.searchsorted(self._ends, starts, side="right")
        edges = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(starts)]
        for first, last in pairwise(edges):  # rows that begin in one shard; mostly substreams in their order
            if first == last:  # no rows at all
                continue
            index = int(shards[first])
            tokens = self.shard(index)
            begins = starts[first:last] - (self._ends[index] - len(tokens))  # within this shard
            if int(begins.max()) + length <= len(tokens):  # in one go, not row by row
                out[first:last] = _views(tokens, length)[begins]
                continue

            # a few reach into the next shard, or around the ring's end
            within = begins + length <= len(tokens)
            if within.any():
                out[first:last][within] = _views(tokens, length)[begins[within]]
            for row in np.flatnonzero(~within).tolist():
                self._gather(int(starts[first + row]), out[first + row])
        return out

    def _gather(self, start: int, out: Tokens) -> None:
        """Fill `out`, (length,), from ring position `start` on, across shards and the ring's end."""
        filled = 0
        while filled < len(out):
            position = (start + filled) % self.tokens
            index = int(np.searchsorted(self._ends, position, side="right"))
            tokens = self.shard(index)
            begin = position - int(self._ends[index] - len(tokens))
            found = tokens[begin : begin + len(out) - filled]
            out[filled : filled + len(found)] = found
            filled += len(found)

    def tokenizer(self) -> Tokenizer:
        """The stream's own tokenizer.

        Raises:
            StreamError: it is not the one the stream was built with, or the stream has none.
        """
        if not self.manifest.tokenizer:
            raise StreamError(
                f"{self.directory}: was adopted without a tokenizer; "
                "adopt it again with tools/adopt_stream.py --tokenizer=my.model"
            )
        try:
            return Tokenizer.load(self.directory, self.manifest.tokenizer)
        except UserError as error:
            raise StreamError(f"{error}; or build the stream again") from error

    def verify(self) -> Iterator[tuple[str, int]]:
        """Check every byte; yields (file, bytes) as each one is found right.

        Raises:
            StreamError: naming the first file that is wrong, and what was found.
        """
        own = set[str]()
        if self.manifest.tokenizer:
            tokenizer = self.tokenizer()
            if (tokenizer.vocab_size, tokenizer.eos_id) != (self.manifest.vocab_size, self.manifest.eos_id):
                raise StreamError(
                    f"{self.directory}: vocabulary size or EOS differ from those of {tokenizer.file_name}"
                )
            yield tokenizer.file_name, len(tokenizer.model)
            own = {tokenizer.file_name}
        self._verify_names(own)

        eos_tokens = 0
        for index, shard in enumerate(self.manifest.shards):
            eos_tokens += self._verify_shard(index)
            yield shard["name"], self.shard(index).nbytes

        self._verify_documents(eos_tokens)
        yield "documents.npy", 24 * self.manifest.documents
        if self.manifest.origins_sha256:
            yield "sources.jsonl", self._verify_text("sources.jsonl", self.manifest.source["sources_sha256"])
            self._verify_digest("origins.npy", self.origins, self.manifest.origins_sha256)
            yield "origins.npy", 16 * self.manifest.documents
        if self.manifest.rejected_sha256:
            yield "rejected.jsonl", self._verify_text("rejected.jsonl", self.manifest.rejected_sha256)

    def _verify_names(self, known: set[str]) -> None:
        """Check that no file is there but those: a stream is copied and compared as a directory.

        known: beside those of the manifest, the tokenizer's.
        """
        known |= {"stream.json", "documents.npy", *(shard["name"] for shard in self.manifest.shards)}
        if self.manifest.origins_sha256:
            known |= {"sources.jsonl", "origins.npy"}
        if self.manifest.rejected_sha256:
            known.add("rejected.jsonl")
        if extra := {path.name for path in self.directory.iterdir()} - known:
            raise StreamError(f"{self.directory}: files that are no part of the stream: {', '.join(sorted(extra))}")

    def _verify_shard(self, index: int) -> int:
        """Check a shard's digest and the range of its ids; how many of them are EOS."""
        shard, tokens, eos_tokens = self.manifest.shards[index], self.shard(index), 0
        self._verify_digest(shard["name"], tokens, shard["sha256"])
        for block in np.array_split(tokens, max(1, tokens.nbytes // READ_BYTES)):
            if int(block.max()) >= self.manifest.vocab_size:
                raise StreamError(f"{self._named(shard['name'])}: a token outside the vocabulary")
            eos_tokens += int(np.count_nonzero(block == self.manifest.eos_id))
        return eos_tokens

    def _verify_documents(self, eos_tokens: int) -> None:
        """Check the documents' totals against the manifest and the EOS tokens found in the shards."""
        documents, manifest = self.documents, self.manifest
        self._verify_digest("documents.npy", documents, manifest.documents_sha256)
        totals = documents[-1].tolist() if len(documents) else [0, 0, 0]
        if totals != [manifest.tokens, manifest.text_bytes, manifest.words]:
            raise StreamError(f"{self.directory}/documents.npy: its totals {totals} are not those of stream.json")
        if eos_tokens != manifest.eos_tokens:
            raise StreamError(f"{self.directory}: {eos_tokens} EOS tokens, expected {manifest.eos_tokens}")

        records = dict(manifest.records)
        if records.pop("read") != sum(records.values()):
            raise StreamError(f"{self.directory}/stream.json: records read are not kept + empty + rejected")

    def _verify_text(self, name: str, sha256: str) -> int:
        """Check a file of lines; its bytes."""
        path = self.directory / name
        if not path.is_file():
            raise StreamError(f"{path}: is missing; copy it again or build the stream again")
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self._verify_digest(name, data, sha256)
        return len(data)

    def _verify_digest(self, name: str, array: npt.NDArray[Any], expected: str) -> None:
        """Check the sha256 of an array's bytes, of any shape and dtype."""
        sha256 = hashlib.sha256()
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), READ_BYTES):
            sha256.update(data[start : start + READ_BYTES])
        if sha256.hexdigest() != expected:
            raise StreamError(f"{self._named(name)}: its contents differ from the digest in stream.json")


def _views(tokens: Tokens, length: int) -> Tokens:
    """(len(tokens) - length + 1, length) the windows of tokens, (N,), that begin at each place; no copy.

    As numpy's sliding_window_view, which takes ten times as long to make them.
    """
    (step,) = tokens.strides
    return np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens, strides=(step, step))
