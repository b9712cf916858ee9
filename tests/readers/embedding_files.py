from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spice_ray.readers.embeddings import EmbeddingSource
from tests.readers.reading import numbers, records


def saved(file: Path, array: Any) -> Path:
    np.save(file, array)
    return file


def table(file: Path, columns: dict[str, pa.Array], rows_per_group: int = 100) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=rows_per_group)
    return file


def lists(rows: list[Any], type_: pa.DataType) -> pa.Array:
    return pa.array(rows, type_)


def counted(rows: int, dim: int = 3) -> list[list[float]]:
    """Row 4 begins with 5, then 0.5, and ends with -4."""
    return [[row + 1.0, *[0.5] * (dim - 2), float(-row)] for row in range(rows)]


FIXED = pa.list_(pa.float32(), 3)


def vectors(source: EmbeddingSource, rows_per_chunk: int = 3) -> np.ndarray[Any, np.dtype[Any]]:
    return np.stack([numbers(record) for record in records(source, rows_per_chunk)])
