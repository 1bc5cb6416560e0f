"""Tables of parquet and Arrow: the values of their text column, by unit; the only user of pyarrow, which is optional.

A table consists of parts that can be read one by one: the row groups of parquet, the record batches of Arrow (its file
format, .feather, or its stream format, which Hugging Face's datasets write). A unit is consecutive parts with at least
corpus.unit_bytes of text. The price: a part is never cut, so a file of one part is one unit, which no two workers
share; and the text column of a record batch is in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from rnnlm.data.decompress import CHUNK_BYTES, DamagedError
from rnnlm.data.filetypes import suffix_of
from rnnlm.data.sources import Source
from rnnlm.errors import UserError

ROWS = 256  # in Python's memory at once; of parquet fewer, if these have about two chunks of bytes
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's stream format
Values = Iterator[bytes | None]


class Part(NamedTuple):
    """What can be read of a table by itself."""

    rows: int
    size: int  # bytes of the text column, as stored in parquet, as text in Arrow
    values: Callable[[], Values]  # None where a row has no value


def table_units(source: Source, field: str, unit_bytes: int) -> Iterator[tuple[int, int, Values]]:
    """(number, its first row, its values) of each unit; which units there are does not depend on who takes them.

    Taking values raises DamagedError where the file is damaged: that is the last unit.

    Raises:
        UserError: pyarrow is missing, or the file has no text column of that name.
    """
    number = row = 0
    parts = _parts(source, field)
    while True:
        try:
            first = next(parts, None)
        except DamagedError as error:
            yield number, row, _raising(error)
            return
        if first is None:
            return

        unit = _Unit(first, parts, unit_bytes)
        yield number, row, unit.values()
        try:
            for _ in unit.parts:  # what was not taken
                pass
        except DamagedError:  # whoever takes this unit meets it as well
            return
        number, row = number + 1, row + unit.rows


class _Unit:
    """Consecutive parts, read as they are wanted."""

    def __init__(self, first: Part, others: Iterator[Part], unit_bytes: int):
        self.rows = 0
        self.parts = self._until_full(first, others, unit_bytes)

    def _until_full(self, first: Part, others: Iterator[Part], unit_bytes: int) -> Iterator[Part]:
        size = 0
        for part in chain([first], others):
            self.rows += part.rows
            size += part.size
            yield part
            if size >= unit_bytes:
                return

    def values(self) -> Values:
        for part in self.parts:
            yield from part.values()


def _raising(error: DamagedError) -> Values:
    yield from ()
    raise error


def _parts(source: Source, field: str) -> Iterator[Part]:
    """All parts of a table, in order."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"{source.path}: reading tables needs pyarrow; pip install 'rnnlm[parquet]'") from error

    with source.open() as raw:
        yield from (_parquet if suffix_of(source.path) == ".parquet" else _arrow)(source, raw, field)


@contextmanager
def _damage() -> Iterator[None]:
    """Errors of pyarrow as damage of the file; those of the disk stay what they are."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, IndexError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DamagedError(str(error)) from error


def _parquet(source: Source, raw: Any, field: str) -> Iterator[Part]:
    """The row groups of a parquet file."""
    import pyarrow.parquet

    with _damage():
        file = pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES, pre_buffer=False)
        schema, metadata = file.schema_arrow, file.metadata
    names = _column(source, schema, field)

    leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == ".".join(names)]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
        yield Part(group.num_rows, size, lambda number=number: _row_group(file, number, names))  # type: ignore[misc]


def _row_group(file: Any, number: int, names: list[str]) -> Values:
    """The values of a row group, a batch of rows at a time."""
    found = file.metadata.row_group(number)
    rows = max(1, min(ROWS, found.num_rows * 2 * CHUNK_BYTES // max(1, found.total_byte_size)))
    with _damage():
        for batch in file.iter_batches(rows, row_groups=[number], columns=[".".join(names)], use_threads=False):
            yield from _binary(batch.column(names[0]), names[1:]).to_pylist()


def _arrow(source: Source, raw: Any, field: str) -> Iterator[Part]:
    """The record batches of an Arrow file, or of an Arrow stream."""
    import pyarrow
    import pyarrow.compute

    magic = raw.read(6)
    if magic[:4] == b"FEA1":
        raise DamagedError("the first version of Feather", "no text", "write it again with pyarrow.feather")
    is_file = magic == b"ARROW1"
    if not is_file:
        _check_end(raw)

    def opened(**options: Any) -> Any:
        raw.seek(0)
        given = pyarrow.ipc.IpcReadOptions(use_threads=False, **options)
        return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(raw, options=given)

    with _damage():
        schema = opened().schema
    names = _column(source, schema, field)
    with _damage():
        table = opened(included_fields=[schema.names.index(names[0])])  # no byte of the other columns
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else iter(table)

    while True:
        with _damage():
            batch = next(batches, None)
            values = None if batch is None else _binary(batch.column(0), names[1:])
        if values is None:
            return
        size = pyarrow.compute.sum(pyarrow.compute.binary_length(values)).as_py() or 0
        yield Part(len(values), size, lambda values=values: _rows(values))  # type: ignore[misc]


def _rows(values: Any) -> Values:
    for first in range(0, len(values), ROWS):
        yield from values.slice(first, ROWS).to_pylist()


def _check_end(raw: Any) -> None:
    """Refuse an Arrow stream that was cut off between two batches: a reader would take that for its end."""
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, size - len(END_OF_STREAM)))
    if raw.read() != END_OF_STREAM:
        raise DamagedError("an Arrow stream without its end")


def _column(source: Source, schema: Any, field: str) -> list[str]:
    """The names that lead to the text column: its own, or those of the structs around it first."""
    import pyarrow

    names, kind = _find(list(schema), field)
    if names and schema.names.count(names[0]) > 1:
        raise UserError(
            f"{source.path}: has several columns {names[0]}; rename all but one; its columns: {schema.names}"
        )

    stored = kind.value_type if kind is not None and pyarrow.types.is_dictionary(kind) else kind
    if names and any(getattr(pyarrow.types, f"is_{each}")(stored) for each in TEXT_TYPES):
        return names

    found = f"it holds {kind}; make a column of text of it; " if names else ""
    if kind is not None and _is_struct(kind):
        found = f"it holds {', '.join(f'{field}.{each.name}' for each in kind)}; name one of these; "
    raise UserError(f"{source.path}: no text column corpus.field={field}; {found}its columns: {schema.names}")


TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def _find(fields: list[Any], field: str) -> tuple[list[str], Any]:
    """(names, type) of a field by its name, or by its path through structs; ([], None) if there is none."""
    for each in fields:
        if each.name == field:
            return [field], each.type

    for each in fields:
        if _is_struct(each.type) and field.startswith(f"{each.name}."):
            names, kind = _find(list(each.type), field[len(each.name) + 1 :])
            if names:
                return [each.name, *names], kind
    return [], None


def _is_struct(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(kind))


def _binary(column: Any, names: list[str]) -> Any:
    """The text of a column as pyarrow's large_binary; offsets and indices are checked, UTF-8 is not."""
    import pyarrow
    import pyarrow.compute

    values = pyarrow.compute.struct_field(column, names) if names else column
    if pyarrow.types.is_dictionary(values.type):
        return _binary(values.dictionary, []).take(values.indices)  # which checks the indices

    view = pyarrow.types.is_string_view(values.type) or pyarrow.types.is_binary_view(values.type)
    large = pyarrow.types.is_large_string(values.type) or pyarrow.types.is_large_binary(values.type)
    raw = values.cast(pyarrow.binary_view() if view else pyarrow.large_binary() if large else pyarrow.binary())
    raw.validate(full=True)
    return raw.cast(pyarrow.large_binary())
