"""Parquet files with a column of embeddings.

A column of lists of float16, float32 or float64, of fixed size or all equally long, named embedding, embeddings,
feature or features, or the only one of its type. Columns that may lie beside it: ``source``, ``path`` or ``id``,
integers or strings, names the row; ``label`` and ``split`` are those of images.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.columns import (
    LABEL_COLUMN,
    Beside,
    columns_beside,
    name_column,
    names_beside,
    rows_beside,
)
from spice_ray.readers.files import open_input
from spice_ray.readers.parquet import read_metadata, why_unread
from spice_ray.readers.places import Place
from spice_ray.readers.records import Chunk, Record, Unreadable, split_of_container
from spice_ray.readers.vectors import checked_vector

VECTOR_COLUMNS = ("embedding", "embeddings", "feature", "features")
_ROWS_PER_READ = 256
_READ_BUFFER_BYTES = 1 << 20
# A request to a server costs as much time as some megabytes.
_REMOTE_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class VectorTable:
    """One Parquet file whose footer was read."""

    place: Place
    name: str
    """Rows without a name of their own are called by it and their number."""
    dim: int
    columns: tuple[str, ...]
    """The column of embeddings, then ``label`` and ``split`` where there are such."""
    name_column: str | None
    group_rows: tuple[int, ...]
    """The number of rows in each row group."""

    @property
    def labels_known(self) -> bool:
        """Whether rows may carry a label."""
        return LABEL_COLUMN in self.columns

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """One chunk for each row group, whatever ``rows_per_chunk`` is.

        A range inside a group reads and drops the rows before it, which costs more than all that is done with a row.
        """
        first_rows = itertools.accumulate(self.group_rows, initial=0)
        return [
            VectorChunk(self, group, first_row, rows)
            for group, (first_row, rows) in enumerate(zip(first_rows, self.group_rows, strict=False))
            if rows
        ]


@dataclass(frozen=True)
class VectorChunk:
    """One row group, read some rows at a time."""

    table: VectorTable
    row_group: int
    first_row: int
    """Number of the group's first row in the file."""
    num_rows: int

    def read(self) -> Iterator[Record]:
        """The vector of each row as float32, (D,); when the file fails, each row not yet read carries the reason."""
        cells = self._cells()
        for row in range(self.num_rows):
            try:
                name, data, beside = next(cells)
            except Exception as error:
                # The file is gone, shorter than it was or damaged, or its server fails in whatever way: its other
                # chunks may still be read, these rows are listed with the reason.
                reason = Unreadable(f"the Parquet file cannot be read: {why_unread(error)}")
                yield from (self._record(lost, None, reason, Beside(None, None)) for lost in range(row, self.num_rows))
                return
            yield self._record(row, name, data, beside)

    def _record(self, row: int, name: str | None, data: NDArray[np.float32] | Unreadable, beside: Beside) -> Record:
        file = self.table.name
        source = f"{file}#{self.first_row + row}" if name is None else name
        if isinstance(beside.split, Unreadable):
            return Record(source, split_of_container(file), beside.label, beside.split)
        return Record(source, beside.split or split_of_container(file), beside.label, data)

    def _cells(self) -> Iterator[tuple[str | None, NDArray[np.float32] | Unreadable, Beside]]:
        table = self.table
        columns = [*table.columns, *([table.name_column] if table.name_column else [])]
        with _opened(table.place) as file:
            for rows in file.iter_batches(_ROWS_PER_READ, row_groups=[self.row_group], columns=columns):
                yield from zip(
                    names_beside(rows, table.name_column), _vectors(rows, table), rows_beside(rows), strict=True
                )
        raise pa.ArrowInvalid("the row group has become shorter")


def open_vector_table(place: Place, name: str) -> VectorTable:
    """Read the footer of a Parquet file of embeddings, and one row where its type does not tell the width.

    Raises:
        DataError: It is not Parquet, has no such column or several, or a column beside it has a wrong type.
    """
    metadata, schema = read_metadata(place)
    vectors = _vector_column(place, schema)
    return VectorTable(
        place,
        name,
        _width(place, schema, vectors),
        (vectors, *columns_beside(schema, place)),
        name_column(schema),
        tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)),
    )


def vector_columns(schema: pa.Schema) -> list[str]:
    """The columns that can be embeddings: the first by name alone, else all of their type."""
    columns = [field.name for field in schema if _holds_vectors(field.type)]
    named = [name for name in VECTOR_COLUMNS if name in columns]
    return named[:1] or columns


def _vector_column(place: Place, schema: pa.Schema) -> str:
    columns = vector_columns(schema)
    if len(columns) == 1:
        return columns[0]
    found = f"{len(columns)} columns of float lists ({', '.join(columns)})" if columns else "no column of float lists"
    raise DataError(f"{place} has {found}; name the one of the embeddings {' or '.join(VECTOR_COLUMNS)}")


def _holds_vectors(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(is_kind(type_) for is_kind in kinds) and pa.types.is_floating(type_.value_type)


def _width(place: Place, schema: pa.Schema, vectors: str) -> int:
    type_ = schema.field(vectors).type
    width = type_.list_size if pa.types.is_fixed_size_list(type_) else _first_length(place, vectors)
    if not width:
        raise DataError(f"{place} has no embedding in its column {vectors}; give a file with at least one")
    return int(width)


def _first_length(place: Place, vectors: str) -> int | None:
    """The length of the first list of a column; None where all cells are empty."""
    try:
        with _opened(place) as file:
            for batch in file.iter_batches(_ROWS_PER_READ, columns=[vectors]):
                lengths = [len(cell) for cell in batch.column(0) if cell.is_valid]
                if lengths:
                    return lengths[0]
    except Exception as error:
        # Storage libraries have errors of their own; all of them end here, with the reason.
        raise DataError(
            f"{place} is not a readable Parquet file ({why_unread(error)}); give a Parquet or .npy file of embeddings"
        ) from None
    return None


@contextmanager
def _opened(place: Place) -> Iterator[pq.ParquetFile]:
    buffer = _REMOTE_BUFFER_BYTES if place.server else _READ_BUFFER_BYTES
    # Without pre_buffer=False all columns of a row group are read before its first row comes.
    with open_input(place) as input_, pq.ParquetFile(input_, buffer_size=buffer, pre_buffer=False) as file:
        yield file


def _vectors(batch: pa.RecordBatch, table: VectorTable) -> Iterator[NDArray[np.float32] | Unreadable]:
    column = batch.column(table.columns[0])
    # Empty cells have no length and no numbers; a number that is missing comes as NaN, and is refused like one.
    lengths = pc.list_value_length(column).to_pylist()
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    start = 0
    for length in lengths:
        if length is None:
            yield Unreadable("the row holds no embedding")
        else:
            yield checked_vector(numbers[start : start + length], table.dim)
            start += length
