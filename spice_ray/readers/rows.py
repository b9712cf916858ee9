"""From a record to a row of the shards: decoded, keyed by its content, or rejected with a reason."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from spice_ray.readers.decode import Reject, decode
from spice_ray.readers.parts import PartFormat
from spice_ray.readers.records import Chunk, Record, Source, Unreadable, read_chunk

KEY_BYTES = 16
_ROWS_PER_CHUNK = 10_000


class Row(NamedTuple):
    """One image or embedding; the order of the fields but for the label is that of the columns of a run."""

    key: bytes
    """``order_key``; shards are sorted by it."""
    source: str
    split: str
    content: bytes
    """uint8 RGB, channels first, 3 * S * S bytes; or the encoded file; or float32, 4 * D bytes."""
    label: str | None


class Rejected(NamedTuple):
    """An image that could not be used."""

    source: str
    reason: str


def count_rows(source: Source) -> int | None:
    """How many images the source lists; None where that is known only by reading it.

    Raises:
        DataError: A part of the source cannot be used at all.
    """
    counts = [chunk.num_rows for chunk in source.chunks(_ROWS_PER_CHUNK)]
    return None if None in counts else sum(count or 0 for count in counts)


def read_rows(chunk: Chunk, format_: PartFormat, seed: int) -> Iterator[Row | Rejected]:
    """Read and decode a chunk, one image at a time."""
    for record in read_chunk(chunk):
        yield _row(record, format_, seed)


def order_key(content: bytes, seed: int) -> bytes:
    """16 bytes that depend on the seed and an image's undecoded bytes alone."""
    content_hash = hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
    return hashlib.blake2b(seed.to_bytes(8, "little") + content_hash, digest_size=KEY_BYTES).digest()


def _row(record: Record, format_: PartFormat, seed: int) -> Row | Rejected:
    data = record.data
    if isinstance(data, Unreadable):
        return Rejected(record.source, data.reason)
    raw = data if isinstance(data, bytes) else data.tobytes()
    content = raw
    if format_.stored != "vectors":
        try:
            pixels = decode(cast("bytes | NDArray[np.uint8]", data), format_.size)
        except Reject as reject:
            # The run goes on without this image; rejects.parquet lists it.
            return Rejected(record.source, reject.reason)
        content = raw if format_.stored == "encoded" else pixels.tobytes()
    label = None if record.label is None else str(record.label)
    return Row(order_key(raw, seed), record.source, record.split, content, label)
