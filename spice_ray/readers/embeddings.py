"""Embeddings that were computed elsewhere, in place of images: .npy arrays and Parquet tables of vectors.

N rows, D numbers in each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.local import digest_files, row_prefix
from spice_ray.readers.npy import describe, has_labels, known_label, map_labels, map_npy
from spice_ray.readers.packed import PackedFile, PackedSource, Row
from spice_ray.readers.records import Chunk, split_of_container
from spice_ray.readers.vector_tables import VectorTable, open_vector_table
from spice_ray.readers.vectors import checked_vector

_FLOAT_BYTES = (2, 4, 8)


@dataclass(frozen=True)
class NpyVectors:
    """A .npy file of vectors with, it may be, labels beside it."""

    loads_whole_files = False

    def num_rows(self, path: str) -> int:
        """N.

        Raises:
            DataError: The file holds something else, or the labels beside it do not fit.
        """
        vectors = _map_vectors(path)
        map_labels(Path(path), len(vectors))
        return len(vectors)

    def rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        """The vectors as float32, (D,), with their labels; one that cannot be used is its reason."""
        vectors = _map_vectors(path)
        labels = map_labels(Path(path), len(vectors))
        if len(vectors) < stop:
            raise DataError(f"{path} has become shorter; write it again")
        for row in range(start, stop):
            yield checked_vector(vectors[row], vectors.shape[1]), known_label(labels, row)


@dataclass(frozen=True)
class EmbeddingSource:
    """One file of embeddings or several, all of the same width."""

    files: tuple[Path, ...]
    dim: int
    """D."""
    labels_known: bool
    kind: str = "embeddings"

    @cached_property
    def _opened(self) -> tuple[PackedSource | VectorTable, ...]:
        """Every file, its header read once and held against the first one's."""
        opened = []
        for file in self.files:
            contents, dim = _open(file)
            if dim != self.dim:
                raise DataError(
                    f"{file} holds embeddings of {dim} numbers and {self.files[0]} of {self.dim}; "
                    "give files of one model alone"
                )
            opened.append(contents)
        return tuple(opened)

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the files that hold embeddings."""
        return digest_files(self.kind, [(file.name, str(file)) for file in self.files])

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
            raise DataError(f"{self.files[0]} holds no embedding; give a file with at least one row")
        return chunks


def holds_embeddings(file: Path) -> bool:
    """Whether a .npy file holds floating-point rows.

    False too for a file that cannot be read: whoever opens it as images will say why.
    """
    try:
        array = map_npy(str(file))
    except (OSError, DataError):
        # Not lost: open_array meets the same error.
        return False
    return array.ndim == 2 and array.dtype.kind == "f"


def open_embeddings(files: Sequence[Path]) -> EmbeddingSource:
    """A source of embeddings; only the first file's header is read now.

    Args:
        files: .npy files of float16, float32 or float64, (N, D), with labels (N,) in X.labels.npy beside X.npy where
            there are some; or Parquet files, see ``vector_tables``. At least one.

    Raises:
        DataError: The first file holds something else.
    """
    contents, dim = _open(files[0])
    return EmbeddingSource(tuple(files), dim, contents.labels_known)


def _open(file: Path) -> tuple[PackedSource | VectorTable, int]:
    if file.suffix.lower() == ".npy":
        packed = PackedFile(str(file), split_of_container(file.name), row_prefix(file))
        source = PackedSource("embeddings", NpyVectors(), (packed,), labels_known=has_labels(file)).checked()
        return source, _map_vectors(str(file)).shape[1]
    table = open_vector_table(file)
    return table, table.dim


def _map_vectors(path: str) -> NDArray[Any]:
    array = map_npy(path)
    if array.dtype.kind != "f" or array.dtype.itemsize not in _FLOAT_BYTES or array.ndim != 2 or array.shape[1] == 0:
        raise DataError(
            f"{path} holds {describe(array)}, needed are embeddings in float16, float32 or float64 of shape (N, D) "
            "with D > 0; convert it and save it again"
        )
    return array
