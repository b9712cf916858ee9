"""The columns that may lie beside images, embeddings or paths in a Parquet file: names, ``label`` and ``split``."""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from spice_ray.errors import DataError
from spice_ray.readers.places import Place
from spice_ray.readers.records import TEST, TRAIN, UNLABELED, Unreadable

LABEL_COLUMN, SPLIT_COLUMN = "label", "split"
NAME_COLUMNS = ("source", "path", "id")
"""The first of these is what a row is called."""
_SPLITS = {"train": TRAIN, "test": TEST, "val": TEST, "validation": TEST, "unlabeled": UNLABELED}
_TEXT = (pa.types.is_string, pa.types.is_large_string)


class Beside(NamedTuple):
    """What a row says of itself beside its image."""

    label: str | int | None
    split: str | Unreadable | None
    """None where it says nothing; Unreadable where it is none of the splits."""


def columns_beside(schema: pa.Schema, file: Place) -> list[str]:
    """Which of ``label`` and ``split`` the file has.

    Raises:
        DataError: One has a type that it cannot have; the sentence names it.
    """
    present = [name for name in (LABEL_COLUMN, SPLIT_COLUMN) if _has_values(schema, name)]
    for name in present:
        type_, needed = value_type(schema, name), "strings" if name == SPLIT_COLUMN else "integers or strings"
        if not (is_text(type_) or (name == LABEL_COLUMN and pa.types.is_integer(type_))):
            raise DataError(f"{file} has a column {name} of type {type_}, needed are {needed}; convert or rename it")
    return present


def rows_beside(batch: pa.RecordBatch) -> Iterator[Beside]:
    """Label and split of each row."""
    columns = [
        batch.column(name) if name in batch.schema.names else [None] * len(batch)
        for name in (LABEL_COLUMN, SPLIT_COLUMN)
    ]
    for label, split in zip(*columns, strict=True):
        yield Beside(known_label(text_or_number(label)), _known_split(text_or_number(split)))


def name_column(schema: pa.Schema) -> str | None:
    """The column of the rows' names, text or integers; None where there is none."""

    def holds_names(type_: pa.DataType | None) -> bool:
        return is_text(type_) or (type_ is not None and pa.types.is_integer(type_))

    return next((name for name in NAME_COLUMNS if holds_names(value_type(schema, name))), None)


def names_beside(batch: pa.RecordBatch, column: str | None) -> Iterator[str | None]:
    """What each row is called; None where it has no name."""
    for cell in batch.column(column) if column is not None else [None] * len(batch):
        value = text_or_number(cell)
        yield None if value is None else str(value)


def text_or_number(cell: pa.Scalar | None) -> str | int | None:
    """The value of a cell, None where it is empty or its text is not UTF-8, which Parquet does not check."""
    try:
        value: str | int | None = None if cell is None else cell.as_py()
    except UnicodeDecodeError:
        # A label that is none must not cost the image.
        return None
    return value


def known_label(value: object) -> str | int | None:
    """A label that is an integer or text; None for anything else, and for the negative numbers that withhold one."""
    if isinstance(value, str):
        return value
    # Hugging Face data sets mark rows whose label is withheld with -1. A truth value is no class.
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def value_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """The type of a column's values, or None; that of its dictionary where it has one."""
    index = schema.get_field_index(name)
    if index < 0:
        return None
    type_ = schema.field(index).type
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def is_text(type_: pa.DataType | None) -> bool:
    """Whether the values are text."""
    return type_ is not None and any(is_kind(type_) for is_kind in _TEXT)


def _has_values(schema: pa.Schema, name: str) -> bool:
    type_ = value_type(schema, name)
    return type_ is not None and not pa.types.is_null(type_)


def _known_split(value: str | int | None) -> str | Unreadable | None:
    if value is None:
        return None
    split = _SPLITS.get(str(value).lower())
    return split or Unreadable(f"its split is {value!r}, which is none of {', '.join(_SPLITS)}")
