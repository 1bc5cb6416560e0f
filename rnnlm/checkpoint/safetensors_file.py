"""A safetensors file, written and read by the library; what a file says is checked before the library sees it.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}, offsets from the header's end
    data      the tensors, one behind the other, without gaps

A header is compared with the file's size and, where the caller knows them, with the names, shapes and dtypes that must
come. Only then does the library read one tensor after the other into memory of its own, so that a file and its tensors
are never there at once, and the digest is of the very bytes that are used. It writes without a copy, and without
Python's lock: while 800 MB are saved another thread waits for 8 to 43 ms at the longest, and for 0.4 to 4 s where they
are made into bytes first, which takes twice their memory (tools/benchmark_resume.py pause). The price: the library
holds the lock while it reads a tensor; but nothing trains meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnnlm.errors import UserError

HEADER_BYTES = 2**24  # a name, shape and offsets take about 100 bytes: room for 100,000 tensors
JSON_DEPTH = 32
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
Tensors = Mapping[str, Tensor]
Layout = list[tuple[str, tuple[int, ...], torch.dtype]]  # of the tensors as they lie in a file


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


def write(path: Path, tensors: Tensors) -> None:
    """Write a file, which is on disk once the caller has synced it.

    Raises:
        OSError: it could not be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # the library gives the number of a system's error only in its words
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error

    path.chmod(mode & 0o777)  # the library replaces the file by one that its owner alone may read


def checksum(path: Path, tensors: Tensors) -> tuple[int, str]:
    """The size of a file just written, and the sha256 that it must have: of its header and of the tensors in memory.

    What is damaged on the way to the disk thus differs from it when the file is read back.

    Raises:
        CheckpointError: the header is not that of these tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header, layout = _read_header(file, size, path)
    compare(tensors, _without_values(layout), path)

    sha256 = hashlib.sha256(header)
    for name, _, _ in layout:
        sha256.update(_bytes_of(tensors[name].detach().cpu().contiguous()))
    return size, sha256.hexdigest()


def read(file: BufferedReader, size: int, where: Path, expected: Tensors | None) -> tuple[dict[str, Tensor], str]:
    """The tensors of an opened file, on the CPU, and the sha256 of all its bytes.

    Args:
        size: bytes of the file.
        where: what errors call it.
        expected: names, shapes and dtypes that it must have (the values do not matter: `meta` tensors will do).

    Raises:
        CheckpointError: no safetensors file, or one of other tensors, of which no data was read; or it changed
            meanwhile, or does not fit into memory.
    """
    header, layout = _read_header(file, size, where)
    if expected is not None:
        compare(expected, _without_values(layout), where)

    tensors, sha256 = {}, hashlib.sha256(header)
    opened = f"/dev/fd/{file.fileno()}"  # this file, whatever has its name by now
    try:
        with safe_open(opened, "pt", backend="pread") as library:  # mapped, values could change after they are hashed
            for name, shape, dtype in layout:
                announced = library.get_slice(name)
                if (announced.get_shape(), DTYPES.get(announced.get_dtype())) != ([*shape], dtype):
                    raise CheckpointError(f"{where}: changed while it was read")
                tensors[name] = library.get_tensor(name)
                sha256.update(_bytes_of(tensors[name]))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{where}: cannot be read ({_short(error)})") from error
    except MemoryError as error:
        raise CheckpointError(f"{where}: {size} bytes do not fit into memory") from error
    return tensors, sha256.hexdigest()


def _read_header(file: BufferedReader, size: int, where: Path) -> tuple[bytes, Layout]:
    """All bytes before the data of a file of this size, and the tensors that they announce."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(HEADER_BYTES, size - 8):
        raise CheckpointError(f"{where}: a header of {length} bytes in a file of {size}")

    header = file.read(length)
    return start + header, _layout(header, size - 8 - length, where)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _without_values(layout: Layout) -> dict[str, Tensor]:
    """Tensors of these shapes and dtypes that take no memory."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in layout}


def _layout(header: bytes, data_bytes: int, where: Path) -> Layout:
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
            # a 0 among the sizes would hide the others from the product, and torch would overflow in strides
            if len(shape) > 8 or math.prod(max(1, size) for size in shape) > 2**48:
                raise ValueError(f"{name}: a shape beyond all use")
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: its bytes are not those of its shape, behind the tensor before it")
            found.append((name, shape, dtype))
            end = stop
    # whatever JSON can hold in the place of these dicts, lists and numbers
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
    """Whether JSON is nested more than so many levels deep."""
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
        mine, theirs = expected.get(name), found.get(name)
        if mine is None or theirs is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise CheckpointError(f"{where}: tensor {name[:200]} is {_describe(theirs)}, expected {_describe(mine)}")


def _describe(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
