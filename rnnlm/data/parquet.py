"""Parquet files: the values of their text column, by row group; the only user of pyarrow, which is optional.

A row group is a work unit, as it is what a file holds that can be read by itself. The price: a file that was written as
one row group is one unit, which no two workers share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rnnlm.data.decompress import CHUNK_BYTES, DamagedError
from rnnlm.data.sources import Source
from rnnlm.errors import UserError

ROWS = 256  # in memory at once, or as few as have about two chunks of bytes
Values = Iterator[bytes | None]


def row_groups(source: Source, field: str) -> Iterator[tuple[int, int, Values]]:
    """(number, its first row, its values) of each row group; values are None where a row has none.

    Raises:
        DamagedError: no parquet file, or a damaged one: at once, or when its values are taken.
        UserError: pyarrow is missing, or the file has no text column of that name.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{source.path}: reading parquet needs pyarrow; pip install 'rnnlm[parquet]'") from error

    with source.open() as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedError(str(error)) from error

        names = file.schema_arrow.names
        if field not in names or not _is_text(file.schema_arrow.field(field).type):
            raise UserError(f"{source.path}: has no text column corpus.field={field}; its columns: {names}")

        row = 0
        for group in range(file.num_row_groups):
            yield group, row, _values(file, group, field)
            row += file.metadata.row_group(group).num_rows


def _values(file: Any, group: int, field: str) -> Values:
    import pyarrow

    found = file.metadata.row_group(group)
    rows = max(1, min(ROWS, found.num_rows * 2 * CHUNK_BYTES // max(1, found.total_byte_size)))
    try:
        for batch in file.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
            yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk, not the file
        raise DamagedError(str(error)) from error


def _is_text(kind: Any) -> bool:
    import pyarrow.types

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_binary(kind))
