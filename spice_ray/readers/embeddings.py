"""Embeddings that were computed elsewhere, in place of images: .npy arrays and Parquet tables of vectors.

N rows, D numbers in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.files import Found, ask_each, digest_files, relative_names
from spice_ray.readers.npy import NpyFile, NpyRows, find_labels, npy_header, open_rows
from spice_ray.readers.packed import PackedSource
from spice_ray.readers.records import Chunk, Unreadable
from spice_ray.readers.vector_tables import VectorTable, open_vector_table
from spice_ray.readers.vectors import checked_vector

_FLOAT_BYTES = (2, 4, 8)


@dataclass(frozen=True)
class EmbeddingSource:
    """One file of embeddings or several, all of the same width."""

    files: tuple[Found, ...]
    dim: int
    """D."""
    labels_known: bool
    kind: str = "embeddings"

    @cached_property
    def _opened(self) -> tuple[PackedSource | VectorTable, ...]:
        """Every file, its header read once and held against the first one's."""
        named = list(zip(self.files, relative_names(self.files), strict=True))
        on_server = any(file.place.server for file in self.files)
        opened = ask_each(lambda file: _open(*file), named, on_server=on_server)
        for file, (_, dim) in zip(self.files, opened, strict=True):
            if dim != self.dim:
                raise DataError(
                    f"{file.place} holds embeddings of {dim} numbers and {self.files[0].place} of {self.dim}; "
                    "give files of one model alone"
                )
        return tuple(contents for contents, _ in opened)

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the files that hold embeddings."""
        return digest_files(self.kind, self.files)

    def encoded_bytes(self) -> None:
        """None: the rows are plain numbers and no encoded files, which shards could hold as they are."""
        return None

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The rows in chunks that never cross a file.

        Raises:
            DataError: A file cannot be used, differs from the first in its width, or there is no row at all.
        """
        chunks = [chunk for opened in self._opened for chunk in opened.chunks(rows_per_chunk)]
        if not chunks:
            raise DataError(f"{self.files[0].place} holds no embedding; give a file with at least one row")
        return chunks


def holds_embeddings(file: Found) -> bool:
    """Whether a .npy file holds floating-point rows.

    False too for a file that cannot be read: whoever opens it as images will say why.
    """
    try:
        array = npy_header(file.place)
    except DataError:
        # Not lost: open_array meets the same error.
        return False
    return len(array.shape) == 2 and array.dtype.kind == "f"


def open_embeddings(files: Sequence[Found]) -> EmbeddingSource:
    """A source of embeddings; only the first file's header is read now.

    Args:
        files: .npy files of float16, float32 or float64, (N, D), with labels (N,) in X.labels.npy beside X.npy where
            there are some; or Parquet files, see ``vector_tables``. At least one.

    Raises:
        DataError: The first file holds something else.
    """
    contents, dim = _open(files[0], relative_names(files)[0])
    return EmbeddingSource(tuple(files), dim, contents.labels_known)


def _open(file: Found, name: str) -> tuple[PackedSource | VectorTable, int]:
    if file.place.name.lower().endswith(".npy"):
        rows = NpyRows(_check_vectors, _vector, find_labels(file.place))
        return open_rows("embeddings", file, name, rows), npy_header(file.place).shape[1]
    table = open_vector_table(file.place, name)
    return table, table.dim


def _vector(row: NDArray[Any], array: NpyFile) -> NDArray[np.float32] | Unreadable:
    return checked_vector(row, array.shape[1])


def _check_vectors(array: NpyFile) -> None:
    is_float = array.dtype.kind == "f" and array.dtype.itemsize in _FLOAT_BYTES
    if not is_float or len(array.shape) != 2 or array.shape[1] == 0:
        raise DataError(
            f"{array.place} holds {array}, needed are embeddings in float16, float32 or float64 of shape (N, D) "
            "with D > 0; convert it and save it again"
        )
