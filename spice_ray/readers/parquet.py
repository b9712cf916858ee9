"""Parquet files with a column of encoded images, plain or in the Hugging Face struct."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spice_ray.errors import DataError
from spice_ray.readers.folder import file_stamp
from spice_ray.readers.records import TEST, TRAIN, UNLABELED, Chunk, Record, Unreadable

IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "png")
LABEL_COLUMN = "label"
# A range inside a row group reads and drops the rows before it, far cheaper than decoding images; eight ranges let a
# file written as a single group be decoded in parallel while it is read 4.5 times over at most.
_MAX_RANGES_PER_GROUP = 8
_ROWS_PER_READ = 64
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetChunk:
    """Rows ``start`` to ``stop`` - 1 of one row group."""

    path: str
    row_group: int
    first_row: int
    """Number of the row group's first row in the file."""
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many rows the chunk holds."""
        return self.stop - self.start

    def read(self) -> Iterator[Record]:
        """The encoded bytes of each row; when the file fails, every row not yet read carries the reason."""
        path, row = Path(self.path), self.start
        try:
            for data, label in self._cells():
                yield self._record(path, row, label, data)
                row += 1
        except (OSError, pa.ArrowException) as error:
            # The file is gone or damaged: its other chunks may still be read, these rows are listed with the reason.
            reason = Unreadable(f"the Parquet file cannot be read: {type(error).__name__}")
            for lost in range(row, self.stop):
                yield self._record(path, lost, None, reason)

    def _record(self, path: Path, row: int, label: str | int | None, data: bytes | Unreadable) -> Record:
        return Record(f"{path.name}#{self.first_row + row}", _split(path.stem), label, data)

    def _cells(self) -> Iterator[tuple[bytes | Unreadable, str | int | None]]:
        position = 0
        with pq.ParquetFile(self.path, buffer_size=_READ_BUFFER_BYTES) as file:
            image = find_image_column(file.schema_arrow)
            if image is None:
                raise pa.ArrowInvalid("the image column is gone")
            columns = [image, LABEL_COLUMN] if has_labels(file.schema_arrow) else [image]
            for batch in file.iter_batches(_ROWS_PER_READ, row_groups=[self.row_group], columns=columns):
                first = min(max(0, self.start - position), len(batch))
                yield from _batch_cells(batch.slice(first, self.stop - position - first), image)
                position += len(batch)
                if position >= self.stop:
                    return


@dataclass(frozen=True)
class ParquetSource:
    """One Parquet file or several; test or val in a file's name, or unlabeled, gives the split."""

    files: tuple[Path, ...]
    labels_known: bool
    kind: str = "parquet"

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the files."""
        digest = hashlib.blake2b(f"{self.kind} {self.labels_known}".encode(), digest_size=16)
        for file in self.files:
            digest.update(file_stamp(file.parent, file.name))
        return digest.hexdigest()

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The rows in chunks that never cross a row group.

        Raises:
            DataError: A file is not Parquet or has no image column, or there is no row at all.
        """
        chunks = [chunk for file in self.files for chunk in _file_chunks(file, rows_per_chunk)]
        if not chunks:
            raise DataError(f"{self.files[0]} holds no rows; give a Parquet file with at least one image")
        return chunks


def open_parquet(files: list[Path]) -> ParquetSource:
    """A source of Parquet files; only the first one's footer is read now.

    Raises:
        DataError: It is not Parquet or has no image column.
    """
    return ParquetSource(tuple(files), has_labels(_footer(files[0]).schema.to_arrow_schema()))


def find_image_column(schema: pa.Schema) -> str | None:
    """The first column of encoded images, or None."""
    for name in IMAGE_COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0 and _holds_images(schema.field(index).type):
            return name
    return None


def has_labels(schema: pa.Schema) -> bool:
    """Whether there is a ``label`` column of integers or strings."""
    index = schema.get_field_index(LABEL_COLUMN)
    if index < 0:
        return False
    type_ = schema.field(index).type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return any(is_kind(type_) for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string))


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and _holds_images(type_.field(index).type)
    return any(is_kind(type_) for is_kind in (pa.types.is_binary, pa.types.is_large_binary))


def _footer(file: Path) -> pq.FileMetaData:
    try:
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} is not a readable Parquet file ({type(error).__name__}); give a Parquet file, a folder of Parquet "
            "files or a folder of images"
        ) from None
    if find_image_column(schema) is None:
        raise DataError(
            f"{file} has no column of encoded images, only {', '.join(schema.names) or 'no columns'}; name a binary "
            f"column or an image struct one of {', '.join(IMAGE_COLUMNS)}"
        )
    return metadata


def _file_chunks(file: Path, rows_per_chunk: int) -> Iterator[Chunk]:
    metadata, first_row = _footer(file), 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        share = max(rows_per_chunk, -(-rows // _MAX_RANGES_PER_GROUP))
        for start in range(0, rows, share):
            yield ParquetChunk(str(file), group, first_row, start, min(start + share, rows))
        first_row += rows


def _batch_cells(batch: pa.RecordBatch, image: str) -> Iterator[tuple[bytes | Unreadable, str | int | None]]:
    images = batch.column(image)
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    labels = batch.column(LABEL_COLUMN) if LABEL_COLUMN in batch.schema.names else [None] * len(batch)
    for cell, label in zip(images, labels, strict=True):
        data = cell.as_py()
        yield (Unreadable("the row holds no image") if data is None else data), _known(label)


def _known(label: pa.Scalar | None) -> str | int | None:
    try:
        value: str | int | None = None if label is None else label.as_py()
    except UnicodeDecodeError:
        # Parquet does not check its text; a label that is none must not cost the image.
        return None
    # Hugging Face data sets mark rows whose label is withheld with -1.
    return None if isinstance(value, int) and value < 0 else value


def _split(stem: str) -> str:
    lower = stem.lower()
    if "unlabeled" in lower or "unlabelled" in lower:
        return UNLABELED
    return TEST if "test" in lower or "val" in lower else TRAIN
