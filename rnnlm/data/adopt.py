"""Streams of other programs' tokens, which stay where they are: nanoGPT's `.bin`, llm.c's, `.npy`, Megatron-LM's.

An adopted stream is a manifest, documents.npy, and a link to the file, which is read once for its ids, documents and
digest; no token is written. The price: who changes or moves that file breaks the stream (its size is checked whenever
the stream is opened, every byte by verify), and nothing is known of the text: its bytes and words are recorded as 0.
Signed ids are mapped as unsigned ones of the same width: none is negative, so they are the same bytes.

llm.c's file has a header of 256 int32: a magic number, a version, and the number of tokens, which are uint16 under
GPT-2's magic number and uint32 under LLaMA-3's (dev/data/data_common.py there). Megatron-LM's index, little-endian,
without padding (megatron/core/datasets/indexed_dataset.py there):

    9 bytes   MMIDIDX and two zeros          8 bytes   version: 1
    1 byte    the dtype's code               8 bytes   sequences
    8 bytes   marks, one more than documents
    int32     tokens of each sequence
    int64     the byte of the .bin at which each sequence begins
    int64     marks: the sequence with which each document begins; the last one: how many sequences there are
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rnnlm import files
from rnnlm.data.filetypes import COMPRESSED, JSON_LINES, REFUSED, TABLES, UNCLEAR, suffix_of
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import commit, write_array
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError

BLOCK = 2**20  # tokens, sequences or documents in memory at once
OTHERS = {*COMPRESSED, *TABLES, *JSON_LINES, *REFUSED, *UNCLEAR, ".txt", ".md"} - {".bin", ".npy"}
RAW_DTYPES = ("uint16", "uint32")  # what nanoGPT's scripts write; the file itself does not tell
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats
NPY_MAGIC = b"\x93NUMPY"
LLMC_HEADER = struct.Struct("<3i1012x")
LLMC_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # by magic number and version
Positions = npt.NDArray[np.int64]


class _Layout(NamedTuple):
    """How the tokens lie in a file."""

    program: str  # raw, npy, llm.c or megatron: recorded as source.adopted
    dtype: str
    header_bytes: int = 0


class MegatronIndex:
    """A Megatron-LM `.idx`, mapped: the sequences of a `.bin`, and which of them make a document."""

    def __init__(self, path: Path):
        """Map an index.

        Raises:
            UserError: missing, not an index, of floats, or of another size than its counts say.
        """
        self.path = path
        size = _size_of(path)
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if header.startswith(MAGIC) and len(header) < HEADER.size:
            raise UserError(f"{path}: has {size} bytes, and its header alone has {HEADER.size}; copy it again")
        if not header.startswith(MAGIC):
            raise UserError(f"{path}: begins with {header[:9]!r}, expected {MAGIC!r}; give the .idx of Megatron-LM")

        _, version, code, sequences, marks = HEADER.unpack(header)
        if version != 1 or code not in CODES or not marks:
            raise UserError(
                f"{path}: version {version}, dtype code {code}, {marks} marks of documents; expected version 1, one of "
                f"{CODES} and at least one mark; write the dataset again with Megatron-LM's tools/preprocess_data.py"
            )

        expected = HEADER.size + 12 * sequences + 8 * marks
        if size != expected:
            raise UserError(
                f"{path}: has {size} bytes, expected {expected} for {sequences} sequences and {marks} marks of "
                "documents; copy it again (a multimodal index, which is longer, cannot be adopted)"
            )

        self.dtype = CODES[code]
        data = np.memmap(path, np.uint8, "r")
        self.lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)  # (sequences,) tokens
        self.begins = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)  # (sequences,) bytes
        self.marks = np.frombuffer(data, "<i8", marks, HEADER.size + 12 * sequences)  # (documents + 1,) sequences

    def tokens(self) -> int:
        """Tokens of all sequences.

        Raises:
            UserError: sequences that do not lie one behind the other.
        """
        total, width = 0, np.dtype(self.dtype).itemsize
        for first in range(0, len(self.lengths), BLOCK):
            lengths = self.lengths[first : first + BLOCK].astype(np.int64)
            ends = total + np.cumsum(lengths)

            expected = (ends - lengths) * width
            found = self.begins[first : first + BLOCK]
            wrong = np.flatnonzero((found != expected) | (lengths < 0))
            if len(wrong):
                at = wrong[0]
                raise UserError(
                    f"{self.path}: sequence {first + at} has {lengths[at]} tokens from byte {found[at]} of the .bin, "
                    f"expected them from byte {expected[at]}, where the one before it ends; only datasets without gaps "
                    "can be adopted: write it again with Megatron-LM's tools/merge_datasets.py or preprocess_data.py"
                )

            total = int(ends[-1])
        return total

    def document_ends(self, tokens: int) -> Iterator[Positions]:
        """Where each document ends, in tokens of the `.bin`, in blocks; `tokens` are those of all sequences.

        Raises:
            UserError: documents that are not the sequences, once each, in order.
        """
        sequences, width = len(self.lengths), np.dtype(self.dtype).itemsize
        for first in range(0, len(self.marks), BLOCK):
            marks = self.marks[max(0, first - 1) : first + BLOCK]  # with the last one of the block before
            starts_late = first == 0 and marks[0] != 0
            ends_early = len(self.marks) <= first + BLOCK and marks[-1] != sequences
            if starts_late or ends_early or (np.diff(marks) < 0).any() or marks[-1] > sequences:
                raise UserError(
                    f"{self.path}: its documents are not its {sequences} sequences in order (marks {marks[0]} ... "
                    f"{marks[-1]}); write the dataset again with Megatron-LM's tools/preprocess_data.py"
                )

            # a document ends where the next one's first sequence begins; behind the last sequence there is none
            begins = self.begins[np.minimum(marks[1:], sequences - 1)] // width
            yield np.where(marks[1:] < sequences, begins, tokens)


class _Scan:
    """One reading of a `.bin`: every id is checked, digest and EOS tokens are added up; nothing is kept."""

    def __init__(self, path: Path, layout: _Layout, vocab_size: int, eos_id: int):
        self.path, self.layout, self.vocab_size, self.eos_id = path, layout, vocab_size, eos_id
        self.eos_tokens, self._sha256 = 0, hashlib.sha256()
        width, size = np.dtype(layout.dtype).itemsize, _size_of(path) - layout.header_bytes
        if not size or size % width:
            raise UserError(
                f"{path}: has {size} bytes, expected a multiple of {width} above 0 for tokens of {layout.dtype}"
            )
        self.tokens = size // width

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def document_ends(self) -> Iterator[Positions]:
        """Positions behind the EOS tokens, a block at a time, and the end of the file where no EOS is there.

        Raises:
            UserError: an id outside the vocabulary.
        """
        dtype = np.dtype(self.layout.dtype).newbyteorder("<")
        mapped = np.asarray(np.memmap(self.path, dtype, "r", self.layout.header_bytes))
        last = 0  # the end of the last document
        for first in range(0, self.tokens, BLOCK):
            block = mapped[first : first + BLOCK]
            if not 0 <= int(block.min()) <= int(block.max()) < self.vocab_size:
                at = np.flatnonzero((block < 0) | (block >= self.vocab_size))[0]
                raise UserError(
                    f"{self.path}: token {first + at} has the id {block[at]}, outside the vocabulary of "
                    f"{self.vocab_size}; give the --vocab-size and the --dtype with which it was written"
                )

            self._sha256.update(block.view(np.uint8).data)
            ends = np.flatnonzero(block == self.eos_id) + (first + 1)
            self.eos_tokens += len(ends)
            last = int(ends[-1]) if len(ends) else last
            yield ends

        if last < self.tokens:
            yield np.array([self.tokens])


def adopt(
    source: Path, directory: Path, vocab_size: int, eos_id: int, dtype: str = "", tokenizer: Tokenizer | None = None
) -> Manifest:
    """Make a stream of another program's tokens, which are read and not written.

    Args:
        source: a Megatron-LM `.idx`, with its `.bin` beside it; a `.npy` of one dimension; a `.bin` of llm.c; what is
            none of these: raw tokens, as nanoGPT's `.bin`.
        directory: the stream to make; it appears under its name when it is whole.
        vocab_size: ids are below it.
        eos_id: the id at the end of each document; -1: there is none, and raw tokens are one document.
        dtype: of raw tokens, one of RAW_DTYPES; the other files tell their own.
        tokenizer: goes into the stream; without it runs have no samples.

    Raises:
        UserError: naming the file, what was found and expected; then nothing is left behind.
    """
    index = MegatronIndex(source) if source.suffix == ".idx" else None
    path = source.with_suffix(".bin") if index else source
    layout = _Layout("megatron", index.dtype) if index else _layout_of(path, dtype)
    _check_dtype(source, layout, dtype, vocab_size)
    _check_vocabulary(vocab_size, eos_id, tokenizer)
    if directory.exists():
        raise UserError(f"{directory}: is already there; remove it, or choose another directory")

    scan = _Scan(path, layout, vocab_size, eos_id)
    if index and (tokens := index.tokens()) != scan.tokens:
        raise UserError(f"{path}: has {scan.tokens} tokens, but {source} tells of {tokens}; copy both again")

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an adoption that was killed
    partial.mkdir(parents=True)
    try:
        documents, digest = _write_documents(partial / "documents.npy", index, scan)
        (partial / "shard-00000.bin").symlink_to(path.resolve())
        if tokenizer:
            files.write(partial / tokenizer.file_name, Path.write_bytes, tokenizer.model)
        manifest = _manifest(scan, documents, digest, tokenizer)
        return commit(partial, directory, manifest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _manifest(scan: _Scan, documents: int, documents_sha256: str, tokenizer: Tokenizer | None) -> Manifest:
    """What the stream says of itself, after the reading."""
    unsigned = scan.layout.dtype.removeprefix("u").replace("int", "uint")  # of the same width

    return Manifest(
        dtype=np.dtype(unsigned).newbyteorder("<").str,
        vocab_size=scan.vocab_size,
        eos_id=scan.eos_id,
        tokenizer=tokenizer.digest if tokenizer else "",
        tokens=scan.tokens,
        documents=documents,
        text_bytes=0,
        words=0,
        unknown_tokens=0,
        records={"read": documents, "kept": documents},
        mended=0,
        # no path: the same tokens are the same stream, wherever they lie
        source={
            "adopted": scan.layout.program,
            "dtype": scan.layout.dtype,
            "header_bytes": scan.layout.header_bytes,
            "eos_tokens": scan.eos_tokens,
        },
        shards=[{"name": "shard-00000.bin", "tokens": scan.tokens, "sha256": scan.sha256}],
        documents_sha256=documents_sha256,
        rejected_sha256="",
    )


def _write_documents(path: Path, index: MegatronIndex | None, scan: _Scan) -> tuple[int, str]:
    """Write documents.npy, and read all tokens on the way; how many documents there are, and the file's sha256."""
    if not index:
        return write_array(path, map(_totals, scan.document_ends()), "<i8", (3,))

    written = write_array(path, map(_totals, index.document_ends(scan.tokens)), "<i8", (3,))
    for _ in scan.document_ends():  # the index knows the documents; ids, EOS tokens and digest are still wanted
        pass
    return written


def _totals(ends: Positions) -> Positions:
    """(documents, 3) running totals of the documents with these ends, (documents,); bytes and words are unknown."""
    totals = np.zeros((len(ends), 3), np.int64)
    totals[:, 0] = ends
    return totals


def _check_vocabulary(vocab_size: int, eos_id: int, tokenizer: Tokenizer | None) -> None:
    if not -1 <= eos_id < vocab_size:
        raise UserError(f"--eos-id={eos_id}: outside the vocabulary of {vocab_size}; give -1 if it has no EOS")
    if tokenizer and (tokenizer.vocab_size, tokenizer.eos_id) != (vocab_size, eos_id):
        raise UserError(
            f"--vocab-size={vocab_size} and --eos-id={eos_id}: the tokenizer's are {tokenizer.vocab_size} and "
            f"{tokenizer.eos_id}; give these, or no tokenizer"
        )


def _layout_of(path: Path, dtype: str) -> _Layout:
    """How a file of tokens without an index begins."""
    size = _size_of(path)
    with path.open("rb") as file:
        header = file.read(LLMC_HEADER.size)
    if header.startswith(NPY_MAGIC) or path.suffix == ".npy":
        return _npy_layout(path, size)

    if len(header) == LLMC_HEADER.size:
        magic, version, tokens = LLMC_HEADER.unpack(header)
        found = LLMC_DTYPES.get((magic, version), "")
        if found and size == LLMC_HEADER.size + tokens * np.dtype(found).itemsize:
            return _Layout("llm.c", found, LLMC_HEADER.size)
        if found:
            raise UserError(f"{path}: its header is llm.c's and tells of {tokens} tokens of {found}, but it has {size} "
                            "bytes; copy it again")  # fmt: skip

    # told by the name: first bytes alone may be those of tokens
    if (suffix := suffix_of(str(path))) in OTHERS:
        raise UserError(f"{path}: a {suffix} file holds no raw tokens; give a .bin or .npy, or name it .bin if it does")
    if dtype not in RAW_DTYPES:
        hint = f", or {path.with_suffix('.idx')}" if path.with_suffix(".idx").exists() else ""
        raise UserError(f"{path}: raw tokens do not tell their dtype; give --dtype={' or '.join(RAW_DTYPES)}{hint}")
    return _Layout("raw", dtype)


def _npy_layout(path: Path, size: int) -> _Layout:
    """That of an array of numpy: one dimension of little-endian integers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read as an array of numpy ({error}); save it again with numpy.save"
        ) from error

    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype.newbyteorder("<") != array.dtype:
        raise UserError(
            f"{path}: an array of {array.dtype} and shape {array.shape}, expected integers in one dimension, "
            "little-endian; save it anew, as with numpy.save(path, array.reshape(-1).astype('<u2'))"
        )
    return _Layout("npy", array.dtype.name, size - array.nbytes)


def _check_dtype(source: Path, layout: _Layout, dtype: str, vocab_size: int) -> None:
    """Refuse another dtype than that of the tokens, and one that cannot hold every id of the vocabulary."""
    if dtype not in ("", layout.dtype):
        raise UserError(f"--dtype={dtype}: {source} says {layout.dtype}; leave --dtype away")
    holds = int(np.iinfo(layout.dtype).max) + 1
    if not 1 <= vocab_size <= min(holds, 2**32):
        raise UserError(
            f"--vocab-size={vocab_size}: {source} has tokens of {layout.dtype}, whose ids are below "
            f"{min(holds, 2**32)}; give the --vocab-size and the --dtype with which it was written"
        )


def _size_of(path: Path) -> int:
    """Bytes of a file that must be there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Megatron-LM dataset is a .idx and a .bin of one name, side by side")
    return path.stat().st_size
