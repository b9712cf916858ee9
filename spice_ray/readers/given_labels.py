"""Labels that a user knows, from a Parquet file: stage 3 learns from them in the place of pseudo-labels.

They are another thing than the labels of the data, which evaluate alone reads: who gives them wants them used.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray.errors import DataError

_FORM = "give a Parquet file with a column label of whole numbers, and a column sample_id or source"
_ROWS_AT_ONCE = 1 << 16
Ints = NDArray[np.int64]


class GivenLabels(NamedTuple):
    """A label for each of some images."""

    images: pa.ChunkedArray
    """Which images: int64 sample ids, or the strings of their sources; none twice."""
    labels: Ints
    """In 0..K-1."""
    file: str

    @property
    def by_source(self) -> bool:
        """Whether images are named by their sources."""
        return bool(pa.types.is_string(self.images.type))

    def digest(self) -> str:
        """Equal for the same labels of the same images in any order."""
        order = pc.sort_indices(self.images)
        images, found = self.images.take(order), hashlib.blake2b(self.labels[order.to_numpy()].tobytes())
        for start in range(0, len(images), _ROWS_AT_ONCE):
            found.update("\0".join(map(str, images[start : start + _ROWS_AT_ONCE].to_pylist())).encode() + b"\0")
        return found.hexdigest()[:32]


def read_given_labels(path: str, num_clusters: int) -> GivenLabels:
    """Read a file with a column ``label`` and one of ``sample_id`` and ``source``; of both, ``sample_id`` counts.

    Args:
        path: The file.
        num_clusters: K.

    Raises:
        DataError: It is missing or something else, a label is not in 0..K-1, an image occurs twice, or fewer than two
            labels are in use.
    """
    table = _read(Path(path))
    names = next((name for name in ("sample_id", "source") if name in table.column_names), None)
    if names is None or "label" not in table.column_names:
        raise DataError(f"{path} has the columns {', '.join(table.column_names)}; {_FORM}")
    images, labels = _column(table, names, path), _column(table, "label", path)
    held = labels.to_numpy()
    wrong = np.flatnonzero((held < 0) | (held >= num_clusters))
    if len(wrong):
        raise DataError(
            f"{path} holds the label {held[wrong[0]]}, and with num_clusters={num_clusters} labels are 0 to "
            f"{num_clusters - 1}; correct it, or raise num_clusters"
        )
    values, counts = pc.value_counts(images).flatten()
    twice = values.filter(pc.greater(counts, 1))
    if len(twice):
        raise DataError(f"{path} labels {names} {twice[0]} more than once; keep one label for each image")
    if len(np.unique(held)) < 2:
        raise DataError(f"{path} holds {len(np.unique(held))} different labels, and 2 are needed; add others")
    return GivenLabels(images, held.astype(np.int64), path)


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        raise DataError(f"reliable.labels={file} does not exist; {_FORM}") from None
    except (OSError, pa.ArrowException):
        raise DataError(f"reliable.labels={file} cannot be read as Parquet; {_FORM}") from None


def _column(table: pa.Table, name: str, path: str) -> pa.ChunkedArray:
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    wanted = pa.string() if name == "source" else pa.int64()
    is_right = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (is_right if name == "source" else pa.types.is_integer(column.type)) or column.null_count:
        raise DataError(f"the column {name} of {path} is of type {column.type}, or has gaps; {_FORM}")
    try:
        return column.cast(wanted)
    except pa.ArrowException:
        raise DataError(f"the column {name} of {path} holds numbers beyond those of int64; {_FORM}") from None
