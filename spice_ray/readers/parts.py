"""Parts of image shards: one Parquet file each, written once, read whole and held against its checksum."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spice_ray import mirror
from spice_ray.contracts import ShardFile
from spice_ray.errors import DamagedError
from spice_ray.readers.decode import decode

_PIECE_BYTES = 1 << 20


class PartFormat(NamedTuple):
    """What the last column of a set of shards holds."""

    size: int
    """S, pixels; of vectors D."""
    stored: str
    """``pixels``, ``encoded`` where files are decoded whenever they are read, or ``vectors`` of float32."""

    @property
    def column(self) -> str:
        """Its name."""
        return "embedding" if self.stored == "vectors" else "image"

    @property
    def row_bytes(self) -> int:
        """What a row takes when it is decoded."""
        return 4 * self.size if self.stored == "vectors" else 3 * self.size**2

    @property
    def type(self) -> pa.DataType:
        """Of the column."""
        return pa.binary() if self.stored == "encoded" else pa.binary(self.row_bytes)


def format_of(manifest: dict[str, Any]) -> PartFormat:
    """The format of the shards that have this manifest."""
    stored = manifest["stored"]
    return PartFormat(manifest["embed_dim" if stored == "vectors" else "image_size"], stored)


def write_part(file: Path, table: pa.Table) -> int:
    """Write a part; gives the checksum of its bytes."""
    # Minimum and maximum of an image are two whole images in the footer, of use to nobody.
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=["sample_id"])
    crc32 = 0
    with file.open("rb") as written:
        while piece := written.read(_PIECE_BYTES):
            crc32 = zlib.crc32(piece, crc32)
    return crc32


def read_part(folder: Path, file: ShardFile, format_: PartFormat, rows: NDArray[np.int64] | None = None) -> pa.Table:
    """Rows of a part, images decoded.

    Args:
        folder: Of the shards.
        file: Which part.
        format_: What the manifest says of its images.
        rows: Positions in the part; none: all.

    Returns:
        ``sample_id``, ``source``, ``split``, and ``image``: uint8 RGB, channels first, 3 * S * S bytes; or
        ``embedding``: float32, 4 * D bytes.

    Raises:
        DamagedError: The part is missing, or its bytes are not those that were written.
    """
    table = pq.read_table(pa.BufferReader(_intact_bytes(folder, file)))
    if rows is not None:
        table = table.take(rows)
    if format_.stored != "encoded":
        return table
    pixels = [decode(data, format_.size).tobytes() for data in table["image"].to_pylist()]
    column = pa.array(pixels, pa.binary(format_.row_bytes))
    return table.set_column(table.schema.get_field_index("image"), "image", column)


def read_column(folder: Path, file: ShardFile, name: str) -> pa.ChunkedArray:
    """One column of a part.

    Raises:
        DamagedError: As :func:`read_part`.
    """
    return pq.read_table(pa.BufferReader(_intact_bytes(folder, file)), columns=[name])[name]


def is_intact(folder: Path, file: ShardFile) -> bool:
    """Whether the part is there and holds the bytes that were written."""
    try:
        _intact_bytes(folder, file)
    except DamagedError:
        return False
    return True


def _intact_bytes(folder: Path, file: ShardFile) -> bytes:
    path = folder / file.name
    remedy = (
        f"delete the folder {folder} and make it anew, or set scale.skip_damaged=true to leave out its {file.rows} rows"
    )
    try:
        data = mirror.read_copy(path)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    found = zlib.crc32(data)
    if found != file.crc32 and mirror.is_mirrored(path):  # it may be this node's copy
        path.unlink(missing_ok=True)
        data = mirror.read_copy(path)
        found = zlib.crc32(data)
    if found != file.crc32:
        raise DamagedError(f"{path} is damaged (its checksum is {found:08x} and was {file.crc32:08x}); {remedy}")
    return data


def images_of(table: pa.Table, image_size: int) -> NDArray[np.uint8]:
    """The ``image`` column as an array, uint8, (rows, 3, S, S); a view of Arrow's memory, not to be written."""
    return _array_of(table["image"]).reshape(-1, 3, image_size, image_size)


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """The ``embedding`` column as an array, float32, (rows, D); a view of Arrow's memory, not to be written."""
    return _array_of(table["embedding"]).view(np.float32)


def _array_of(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """A column of fixed-size binary, uint8, (rows, bytes)."""
    values, width = column.combine_chunks(), column.type.byte_width
    flat = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * width : (values.offset + len(values)) * width]
    return flat.reshape(len(values), width)
