"""Token files of other programs, as the tests of adopted streams write them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rnnlm.data.stream import TokenStream

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
SEQUENCES = [[5, 9, 1], [7], [8, 1], [], [9, 9, 9, 9], [3, 1], [4, 6]]  # EOS is 1
TOKENS = [token for sequence in SEQUENCES for token in sequence]
MARKS = [0, 1, 3, 5, 6, 7]  # five documents: two of two sequences, two that end without EOS
ENDS = [3, 6, 10, 12, 14]


def write_raw(path: Path, tokens: list[int] | npt.NDArray[Any], dtype: str = "uint16") -> Path:
    """A file of raw little-endian tokens."""
    path.write_bytes(np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    return path


def write_llmc(path: Path, tokens: list[int], dtype: str = "uint16", count: int | None = None) -> Path:
    """A .bin of llm.c, as `write_datafile` of its dev/data/data_common.py does; `count` is what its header tells."""
    header = np.zeros(256, "<i4")
    magic, version = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + write_raw(path, tokens, dtype).read_bytes())
    return path


def write_npy(path: Path, array: Any, dtype: str = "uint16") -> Path:
    """An array as numpy saves it."""
    np.save(path, np.asarray(array).astype(dtype))
    return path


def write_megatron(
    path: Path, sequences: list[list[int]], marks: list[int], dtype: str = "int32", gap: int = 0
) -> Path:
    """A .bin and its .idx, as Megatron-LM writes them; `gap` bytes before the second sequence."""
    width = np.dtype(dtype).itemsize
    lengths = [len(sequence) for sequence in sequences]
    begins = [width * sum(lengths[:index]) + (gap if index else 0) for index in range(len(sequences))]
    write_raw(path.with_suffix(".bin"), [token for sequence in sequences for token in sequence], dtype)
    path.write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
        + struct.pack("<QQ", len(sequences), len(marks))
        + struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(begins)}q", *begins)
        + struct.pack(f"<{len(marks)}q", *marks)
    )  # fmt: skip
    return path


def plain(stream: TokenStream) -> npt.NDArray[Any]:
    """(tokens,) all of a stream."""
    return stream.windows(np.array([0]), len(stream))[0]
