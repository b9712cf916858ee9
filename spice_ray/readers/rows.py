"""From a chunk of records to Arrow rows of decoded images: the work of one ingest task."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from spice_ray.readers.decode import Reject, decode
from spice_ray.readers.records import Chunk, Record, Unreadable, read_chunk

_BLOCK_BYTES = 16 << 20
_MAX_ROWS = 512


def row_schema(image_size: int) -> pa.Schema:
    """Columns of decoded rows: either ``reason`` is set, or all but ``label`` and ``reason`` are.

    ``key`` orders the rows (16 bytes, ``order_key``), ``image`` is uint8 RGB, channels first, 3 * S * S bytes.
    """
    return pa.schema(
        [
            ("key", pa.binary()),
            ("source", pa.string()),
            ("split", pa.string()),
            ("image", pa.binary(3 * image_size**2)),
            ("label", pa.string()),
            ("reason", pa.string()),
        ]
    )


def rows_per_block(image_size: int) -> int:
    """How many decoded images make a block of bounded size."""
    return max(1, min(_MAX_ROWS, _BLOCK_BYTES // (3 * image_size**2)))


def decode_chunk(chunk: Chunk, *, image_size: int, seed: int) -> Iterator[pa.Table]:
    """Read and decode a chunk, in blocks of at most ``rows_per_block`` rows of ``row_schema``."""
    # Lazy: of the encoded images only one is held at a time.
    rows = (_row(record, image_size, seed) for record in read_chunk(chunk))
    while block := list(itertools.islice(rows, rows_per_block(image_size))):
        yield pa.Table.from_pylist(block, row_schema(image_size))


def order_key(content: bytes, seed: int) -> bytes:
    """16 bytes that depend on the seed and an image's undecoded bytes alone; shards are sorted by them."""
    content_hash = hashlib.blake2b(content, digest_size=16).digest()
    return hashlib.blake2b(seed.to_bytes(8, "little") + content_hash, digest_size=16).digest()


def _row(record: Record, image_size: int, seed: int) -> dict[str, Any]:
    if isinstance(record.data, Unreadable):
        return {"source": record.source, "reason": record.data.reason}
    try:
        pixels = decode(record.data, image_size)
    except Reject as reject:
        # The run goes on without this image; rejects.parquet lists it.
        return {"source": record.source, "reason": reject.reason}
    return {
        "key": order_key(record.data if isinstance(record.data, bytes) else record.data.tobytes(), seed),
        "source": record.source,
        "split": record.split,
        "image": pixels.tobytes(),
        "label": None if record.label is None else str(record.label),
    }
