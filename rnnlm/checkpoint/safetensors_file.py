"""A safetensors file, written and read without a copy: what reading takes is checked before any memory is taken.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}, offsets from the header's end
    data      the tensors, one behind the other, without gaps

The header is checked against the file's size and, where the caller knows them, against the names, shapes and dtypes
that must come; then every tensor is read into its own memory while the file's digest is formed. The library would hold
file and tensors at once, and stop all threads while it copies: training beside it stood still for seconds. The price:
the format stands here a second time; the tests compare with the library.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnlm.errors import UserError

HEADER_BYTES = 2**24  # a name, shape and offsets take about 100 bytes: room for 100,000 tensors
JSON_DEPTH = 32
DTYPES = {  # in the order in which they lie in a file, those of the widest alignment first
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
Tensors = Mapping[str, Tensor]


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


def spell(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The file's contents, block by block: the very bytes that safetensors.torch.save gives."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    order = {dtype: place for place, dtype in enumerate(codes)}
    ordered = sorted(tensors.items(), key=lambda item: (order[item[1].dtype], item[0]))
    entries, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in ordered:
        yield _bytes_of(tensor.detach().cpu().contiguous())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def read(file: BufferedReader, size: int, where: Path, expected: Tensors | None) -> tuple[dict[str, Tensor], str]:
    """The tensors of an opened file, on the CPU, and the sha256 of all its bytes.

    Args:
        size: bytes of the file.
        where: what errors call it.
        expected: names, shapes and dtypes that it must have (the values do not matter: `meta` tensors will do).

    Raises:
        CheckpointError: no safetensors file, or one of other tensors; nothing of the data was read.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(HEADER_BYTES, size - 8):
        raise CheckpointError(f"{where}: a header of {length} bytes in a file of {size}")
    header = file.read(length)
    layout = _layout(header, size - 8 - length, where)
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in layout}
    if expected is not None:
        compare(expected, tensors, where)
    sha256 = hashlib.sha256(start + header)
    try:
        for name, shape, dtype in layout:
            tensors[name] = torch.empty(shape, dtype=dtype)
            data = _bytes_of(tensors[name])
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{where}: shorter than it was when it was opened")
            sha256.update(data)
    except (MemoryError, RuntimeError) as error:  # the latter is how torch says so
        raise CheckpointError(f"{where}: {size} bytes do not fit into memory") from error
    return tensors, sha256.hexdigest()


def _layout(header: bytes, data_bytes: int, where: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of the tensors as they lie in the file, which they fill to its last byte."""
    entries = parse_object(header, where)
    entries.pop("__metadata__", None)
    found, end = [], 0
    try:
        ordered = sorted(entries.items(), key=lambda item: tuple(map(int, item[1]["data_offsets"])))
        for name, entry in ordered:
            dtype, shape, (begin, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
                raise ValueError(f"{name}: numbers that are no sizes")
            if len(shape) > 8 or math.prod(max(1, size) for size in shape) > 2**48:  # with 0 among them as well
                raise ValueError(f"{name}: a shape beyond all use")
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: its bytes are not those of its shape, behind the tensor before it")
            found.append((name, shape, dtype))
            end = stop
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{where}: its header is no list of tensors ({_short(error)})") from error
    if end != data_bytes:
        raise CheckpointError(f"{where}: {data_bytes} bytes of data, not {end}")
    return found


def parse_object(data: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in `data`, nested at most JSON_DEPTH deep.

    Raises:
        CheckpointError: no JSON, not an object, or nested deeper.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read ({_short(error)})") from error
    if not isinstance(value, dict) or _deeper(value, JSON_DEPTH):
        raise CheckpointError(f"{where}: not a JSON object, or nested more than {JSON_DEPTH} deep")
    return value


def _deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(each, levels - 1) for each in inner)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def compare(expected: Tensors, found: Tensors, where: Path) -> None:
    """Check that names, shapes and dtypes are the same.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    for name in sorted({*expected, *found}):
        mine, other = expected.get(name), found.get(name)
        if mine is None or other is None or (mine.shape, mine.dtype) != (other.shape, other.dtype):
            raise CheckpointError(f"{where}: tensor {name[:200]} is {_describe(other)}, expected {_describe(mine)}")


def _describe(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
