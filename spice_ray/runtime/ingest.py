"""From a source to image shards: decoded once by Ray Data, then put into an order that only content decides.

Rows come back from the cluster in any order. The driver spreads them over bucket files by the top bits of their order
key, a hash of (seed, content), then sorts one bucket at a time, so its memory holds a bucket and never the data set.
"""

import hashlib
import math
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from spice_ray.contracts import LABELS, SHARDS
from spice_ray.errors import DataError
from spice_ray.readers.records import Chunk, Source
from spice_ray.readers.rows import decode_chunk, row_schema, rows_per_block
from spice_ray.storage import Artifact, fingerprint, publish, reporting_disk_errors

_BLOCK_BYTES = 32 << 20
_BUCKET_BYTES = 64 << 20
# 512 open files stay below the usual limit of 1024 per process.
_MAX_BUCKET_BITS = 9
_PART_BYTES = 16 << 20
# The number of parts is a multiple of this, so that 16, 8, 4, 2 lanes or 1 own equally many files.
_PARTS_MULTIPLE = 16
_LABEL_FILE = "labels.arrow"
_LABEL_ROWS = pa.schema([("sample_id", pa.int64()), ("name", pa.string())])

Report = Callable[[int, int | None], None]


class _Spread(NamedTuple):
    """What the first pass leaves: bucket files in key order, how many rows they hold, and what was rejected."""

    buckets: list[Path]
    num_images: int
    rejects: list[tuple[str, str]]


class _Parts(NamedTuple):
    """What the second pass leaves in its folder."""

    files: list[dict[str, Any]]
    digest: str


def ingest(
    source: Source, root: Path, *, image_size: int, seed: int, progress: Report | None = None
) -> tuple[Artifact, Artifact | None]:
    """Decode every image of ``source`` and publish image shards, and labels where the source has some.

    The order of the rows and the bytes of image and split depend on the seed and on content alone, not on the
    container, the listing order, the cluster or the labels; equal contents are ordered by source.

    Args:
        source: What ``open_source`` found.
        root: The folder of artifacts; on a cluster every node must see the source, only the driver writes here.
        image_size: S, pixels.
        seed: Orders the rows.
        progress: Told (images read so far, images in all).

    Returns:
        The shards, and the labels or None.

    Raises:
        DataError: Not one image could be read.
        StorageError: The disk refused.
    """
    assert ray.is_initialized()
    # What fails on a worker can be an OSError too, and is not this disk's.
    with reporting_disk_errors(root, passing=(ray.exceptions.RayError,)):
        root.mkdir(parents=True, exist_ok=True)
        # The name is one that storage.clear_staging removes after a kill.
        with tempfile.TemporaryDirectory(prefix=".ingest-", dir=root) as name:
            folder = Path(name)
            spread = _spread(source, folder, image_size, seed, progress)
            parts = _write_parts(spread, folder, image_size)
            shards = _publish_shards(root, folder, spread, parts, image_size, seed)
            return shards, _publish_labels(root, shards.fingerprint, folder / _LABEL_FILE)


def _decoded_blocks(chunks: list[Chunk], image_size: int, seed: int) -> Iterator[pa.Table]:
    """Read and decode the chunks on the cluster; blocks of rows in any order."""
    # Pickled by us: Ray would turn objects into columns of its own kind, and file names need not be valid text.
    dataset = ray.data.from_items([{"chunk": pickle.dumps(chunk)} for chunk in chunks])
    dataset.context.target_max_block_size = _BLOCK_BYTES
    work = partial(_decode_payloads, image_size=image_size, seed=seed)
    decoded = dataset.map_batches(work, batch_size=1, batch_format="pyarrow")
    yield from decoded.iter_batches(batch_size=None, batch_format="pyarrow")


def _decode_payloads(batch: pa.Table, *, image_size: int, seed: int) -> Iterator[pa.Table]:
    for payload in batch["chunk"].to_pylist():
        yield from decode_chunk(pickle.loads(payload), image_size=image_size, seed=seed)


def _spread(source: Source, folder: Path, image_size: int, seed: int, progress: Report | None) -> _Spread:
    """First pass: decode everything and spread the rows over buckets by the top bits of their keys."""
    chunks = source.chunks(rows_per_block(image_size))
    total = sum(chunk.num_rows for chunk in chunks)
    bits = min(_MAX_BUCKET_BITS, (total * 3 * image_size**2 // _BUCKET_BYTES).bit_length())
    buckets = [folder / f"bucket-{index:03d}.arrow" for index in range(1 << bits)]
    schema = row_schema(image_size)
    schema = schema.remove(schema.get_field_index("reason"))
    num_images, rejects = 0, list[tuple[str, str]]()
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(bucket), schema)) for bucket in buckets]
        for block in _decoded_blocks(chunks, image_size, seed):
            bad = block.filter(pc.is_valid(block["reason"]))
            rejects += zip(bad["source"].to_pylist(), bad["reason"].to_pylist(), strict=True)
            num_images += len(block) - len(bad)
            _write_to_buckets(block.filter(pc.is_null(block["reason"])).select(schema.names), writers, bits)
            if progress is not None:
                progress(num_images + len(rejects), total)
    rejects.sort()
    if num_images == 0:
        raise DataError(_nothing_read(rejects))
    return _Spread(buckets, num_images, rejects)


def _nothing_read(rejects: list[tuple[str, str]]) -> str:
    if not rejects:
        return "the source holds no image any more; give a source with at least one image"
    name, reason = rejects[0]
    return (
        f"none of the {len(rejects)} images could be read, the first is {name}: {reason}; "
        "give a source with at least one readable image"
    )


def _write_to_buckets(rows: pa.Table, writers: list[pa.RecordBatchStreamWriter], bits: int) -> None:
    bucket = np.array([int.from_bytes(key[:2], "big") >> (16 - bits) for key in rows["key"].to_pylist()], np.int64)
    rows = rows.take(np.argsort(bucket, kind="stable"))
    ends = np.cumsum(np.bincount(bucket, minlength=len(writers)))
    for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            writer.write_table(rows.slice(start, end - start))


def _sorted_buckets(buckets: list[Path]) -> Iterator[pa.Table]:
    for bucket in buckets:
        with pa.ipc.open_stream(str(bucket)) as stream:
            yield stream.read_all().sort_by([("key", "ascending"), ("source", "ascending")])
        # Freed at once, so that buckets and parts together need hardly more room than the parts.
        bucket.unlink()


def _in_pieces(tables: Iterator[pa.Table], sizes: list[int]) -> Iterator[pa.Table]:
    """The concatenation of ``tables``, cut into pieces of ``sizes`` rows."""
    rest = next(tables)
    for size in sizes:
        while len(rest) < size:
            rest = pa.concat_tables([rest, next(tables)])
        yield rest.slice(0, size).combine_chunks()
        rest = rest.slice(size)


def _write_parts(spread: _Spread, folder: Path, image_size: int) -> _Parts:
    """Second pass: number the sorted rows, write the parts, and hash what they are made of."""
    num_images = spread.num_images
    num_parts = _PARTS_MULTIPLE * math.ceil(num_images * 3 * image_size**2 / (_PARTS_MULTIPLE * _PART_BYTES))
    share, more = divmod(num_images, num_parts)
    sizes = [share + (index < more) for index in range(num_parts)]
    digest, files, first_id = hashlib.blake2b(digest_size=16), list[dict[str, Any]](), 0
    with pa.ipc.new_stream(str(folder / _LABEL_FILE), _LABEL_ROWS) as labels:
        for index, rows in enumerate(_in_pieces(_sorted_buckets(spread.buckets), sizes)):
            ids = pa.array(np.arange(first_id, first_id + len(rows)), pa.int64())
            first_id += len(rows)
            name = f"part-{index:05d}.parquet"
            _write_part(folder / name, rows, ids)
            files.append({"name": name, "rows": len(rows), "splits": _count(rows["split"])})
            labels.write_table(pa.table([ids, rows["label"]], _LABEL_ROWS).filter(pc.is_valid(rows["label"])))
            for key, source in zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True):
                digest.update(key + source.encode() + b"\0")
    for source, _ in spread.rejects:
        digest.update(b"reject " + source.encode() + b"\0")
    return _Parts(files, digest.hexdigest())


def _write_part(file: Path, rows: pa.Table, ids: pa.Array) -> None:
    table = rows.select(["source", "split", "image"]).add_column(0, "sample_id", ids)
    # Minimum and maximum of an image are two whole images in the footer, of use to nobody.
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=["sample_id"])


def _count(splits: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted(Counter(splits.to_pylist()).items()))


def _publish_shards(root: Path, folder: Path, spread: _Spread, parts: _Parts, image_size: int, seed: int) -> Artifact:
    splits: Counter[str] = sum((Counter(file["splits"]) for file in parts.files), Counter())

    def write(staging: Path) -> dict[str, Any]:
        for file in parts.files:
            os.replace(folder / file["name"], staging / file["name"])
        sources, reasons = zip(*spread.rejects, strict=True) if spread.rejects else ((), ())
        rejects = pa.table({"source": pa.array(sources, pa.string()), "reason": pa.array(reasons, pa.string())})
        pq.write_table(rejects, staging / "rejects.parquet")
        return {
            "num_images": spread.num_images,
            "image_size": image_size,
            "splits": dict(splits),
            "files": parts.files,
            "num_rejects": len(spread.rejects),
            "digest": parts.digest,
        }

    return publish(root, SHARDS, fingerprint(SHARDS, {"image_size": image_size, "seed": seed}, [parts.digest]), write)


def _publish_labels(root: Path, shards: str, file: Path) -> Artifact | None:
    """Labels of the rows that have one, in sample_id order; None where no row has."""
    with pa.ipc.open_stream(str(file)) as stream:
        rows = stream.read_all()
    if len(rows) == 0:
        return None
    names = rows["name"].to_pylist()
    codes = _codes(set(names))
    table = pa.table(
        {
            "sample_id": rows["sample_id"],
            "label": pa.array([codes[name] for name in names], pa.int64()),
            "name": rows["name"],
        }
    )
    digest = hashlib.blake2b(repr(table.to_pydict()).encode(), digest_size=16).hexdigest()

    def write(staging: Path) -> dict[str, Any]:
        pq.write_table(table.combine_chunks(), staging / "labels.parquet")
        return {"shards": shards, "num_labels": len(table)}

    return publish(root, LABELS, fingerprint(LABELS, {"digest": digest}, [shards]), write)


def _codes(names: set[str]) -> dict[str, int]:
    """A number for each label: its own where all are plain numbers, else its place in the alphabet."""
    if all(name.isdecimal() and str(int(name)) == name and int(name) < 2**63 for name in names):
        return {name: int(name) for name in names}
    return {name: code for code, name in enumerate(sorted(names))}
