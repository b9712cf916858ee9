"""Parquet files with a column of encoded images, plain or in the Hugging Face struct."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spice_ray.errors import DataError
from spice_ray.readers.columns import LABEL_COLUMN, Beside, columns_beside, name_column, names_beside, rows_beside
from spice_ray.readers.files import Found, ask_each, digest_files, open_input, relative_names, sum_sizes
from spice_ray.readers.places import Place, explain
from spice_ray.readers.records import Chunk, Record, Unreadable, split_of_container

IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "png")
# A range inside a row group reads and drops the rows before it, far cheaper than decoding images; eight ranges let a
# file written as a single group be decoded in parallel while it is read 4.5 times over at most. What comes over a
# network is worth more: a group there is one range.
_MAX_RANGES_PER_GROUP = 8
_ROWS_PER_READ = 64
_READ_BUFFER_BYTES = 1 << 20
# A request to a server costs as much time as some megabytes.
_REMOTE_BUFFER_BYTES = 8 << 20


class Footer(NamedTuple):
    """What is needed of a file to cut it into chunks."""

    columns: tuple[str, ...]
    """The image column, then ``label`` and ``split`` where there are such."""
    name_column: str | None
    group_rows: tuple[int, ...]
    """The number of rows in each row group."""


@dataclass(frozen=True)
class ParquetChunk:
    """Rows ``start`` to ``stop`` - 1 of one row group."""

    place: Place
    name: str
    columns: tuple[str, ...]
    name_column: str | None
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
        row, cells = self.start, self._cells()
        while row < self.stop:
            try:
                called, data, beside = next(cells)
            except Exception as error:
                # The file is gone, shorter than it was or damaged, or its server fails in whatever way: its other
                # chunks may still be read, these rows are listed with the reason.
                reason = Unreadable(f"the Parquet file cannot be read: {why_unread(error)}")
                yield from (self._record(lost, None, Beside(None, None), reason) for lost in range(row, self.stop))
                return
            yield self._record(row, called, beside, data)
            row += 1

    def _record(self, row: int, called: str | None, beside: Beside, data: bytes | Unreadable) -> Record:
        source = f"{self.name}#{self.first_row + row}" if called is None else called
        if isinstance(beside.split, Unreadable):
            return Record(source, split_of_container(self.name), beside.label, beside.split)
        return Record(source, beside.split or split_of_container(self.name), beside.label, data)

    def _cells(self) -> Iterator[tuple[str | None, bytes | Unreadable, Beside]]:
        position, buffer = 0, _REMOTE_BUFFER_BYTES if self.place.server else _READ_BUFFER_BYTES
        # Buffered ahead, a whole row group would be in memory; on a server that is one request instead of hundreds.
        ahead = bool(self.place.server)
        with open_input(self.place) as input_, pq.ParquetFile(input_, buffer_size=buffer, pre_buffer=ahead) as file:
            columns = [*self.columns, *([self.name_column] if self.name_column else [])]
            for batch in file.iter_batches(_ROWS_PER_READ, row_groups=[self.row_group], columns=columns):
                first = min(max(0, self.start - position), len(batch))
                rows = batch.slice(first, self.stop - position - first)
                images = _images(rows.column(self.columns[0]))
                yield from zip(names_beside(rows, self.name_column), images, rows_beside(rows), strict=True)
                position += len(batch)
                if position >= self.stop:
                    return
        raise pa.ArrowInvalid("the row group has become shorter")


@dataclass(frozen=True)
class ParquetSource:
    """One Parquet file or several.

    A row's split is in its ``split`` column; else the file's first-level folder, or test, val or unlabeled in the
    file's name gives it.
    """

    files: tuple[Found, ...]
    labels_known: bool
    kind: str = "parquet"

    @cached_property
    def _footers(self) -> tuple[Footer, ...]:
        """Every file's footer, read once and held against the first one's."""
        places = [file.place for file in self.files]
        footers = ask_each(read_footer, places, on_server=any(place.server for place in places))
        first = footers[0].columns[0]
        for file, footer in zip(self.files, footers, strict=True):
            if footer.columns[0] != first:
                raise DataError(
                    f"{file.place} has its images in the column {footer.columns[0]} and {self.files[0].place} in "
                    f"{first}; give files of one layout"
                )
        return tuple(footers)

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the files."""
        return digest_files(self.kind, self.files)

    def encoded_bytes(self) -> int | None:
        """The sizes of all files together; None where a server does not say."""
        return sum_sizes([file.size for file in self.files])

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The rows in chunks that never cross a row group.

        Raises:
            DataError: A file is not Parquet, has no image column or another than the first file, or a label or a split
                of a type that it cannot have; or there is no row at all.
        """
        chunks: list[Chunk] = []
        for file, name, footer in zip(self.files, relative_names(self.files), self._footers, strict=True):
            chunks += _file_chunks(file.place, name, footer, rows_per_chunk)
        if not chunks:
            raise DataError(f"{self.files[0].place} holds no rows; give a Parquet file with at least one image")
        return chunks


def open_parquet(files: Sequence[Found]) -> ParquetSource:
    """A source of Parquet files; only the first one's footer is read now.

    Raises:
        DataError: It is not Parquet, has no image column, or a label or a split of a type that it cannot have.
    """
    return ParquetSource(tuple(files), LABEL_COLUMN in read_footer(files[0].place).columns)


def find_image_column(schema: pa.Schema) -> str | None:
    """The first column of encoded images, or None."""
    for name in IMAGE_COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0 and _holds_images(schema.field(index).type):
            return name
    return None


def read_metadata(place: Place) -> tuple[pq.FileMetaData, pa.Schema]:
    """A file's metadata and its Arrow schema.

    Raises:
        DataError: It is not Parquet, or cannot be read.
    """
    try:
        with open_input(place) as input_:
            metadata = pq.read_metadata(input_)
        return metadata, metadata.schema.to_arrow_schema()
    except Exception as error:
        # Storage libraries have errors of their own; all of them end here, with the reason.
        raise DataError(
            f"{place} is not a readable Parquet file ({why_unread(error)}); give a Parquet file, a folder of "
            "Parquet files or a folder of images"
        ) from None


def read_footer(place: Place) -> Footer:
    """What is needed of a file with images.

    Raises:
        DataError: It is not Parquet, has no image column, or a label or a split of a type that it cannot have.
    """
    metadata, schema = read_metadata(place)
    image = find_image_column(schema)
    if image is None:
        raise DataError(
            f"{place} has no column of encoded images, only {', '.join(schema.names) or 'no columns'}; name a binary "
            f"column or an image struct one of {', '.join(IMAGE_COLUMNS)}"
        )
    rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return Footer((image, *columns_beside(schema, place)), name_column(schema), rows)


def why_unread(error: Exception) -> str:
    """Why a Parquet file cannot be read, in a few words."""
    return explain(error) if isinstance(error, OSError) else type(error).__name__


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and _holds_images(type_.field(index).type)
    return any(is_kind(type_) for is_kind in (pa.types.is_binary, pa.types.is_large_binary))


def _file_chunks(place: Place, name: str, footer: Footer, rows_per_chunk: int) -> Iterator[Chunk]:
    first_row, max_ranges = 0, 1 if place.server else _MAX_RANGES_PER_GROUP
    for group, rows in enumerate(footer.group_rows):
        share = max(rows_per_chunk, -(-rows // max_ranges))
        for start in range(0, rows, share):
            stop = min(start + share, rows)
            yield ParquetChunk(place, name, footer.columns, footer.name_column, group, first_row, start, stop)
        first_row += rows


def _images(images: pa.Array) -> Iterator[bytes | Unreadable]:
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    for cell in images:
        data = cell.as_py()
        yield Unreadable("the row holds no image") if data is None else data
