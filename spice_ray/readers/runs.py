"""An external sort of images: chunks of a source become sorted runs on disk, and the runs are merged into parts.

Rows are ordered by (key, source), where the key is a hash of the seed and the content, so the order does not depend on
the chunks. Every file gets its name when it is complete, and a chunk's or part's record is written last: what is there
after a kill is taken over as it is.
"""

import bisect
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spice_ray import mirror
from spice_ray.readers.parts import PartFormat, write_part
from spice_ray.readers.records import Chunk
from spice_ray.readers.rows import KEY_BYTES, Rejected, Row, read_rows
from spice_ray.storage import read_json, write_json

NUM_BINS = 1 << 16
"""Keys are counted by their first two bytes."""
_BATCH_BYTES = 1 << 20
"""What is read of a run at once, at the most: a part takes a few of its batches."""
_REQUESTS_AT_A_TIME = 16
_FIRST_BINS = b"first_bins"
"""In the schema of a run: the bin of the first row of each batch."""
_LABEL_ROWS = pa.schema([("sample_id", pa.int64()), ("name", pa.string())])


class Task(NamedTuple):
    """What both passes need to know."""

    folder: Path
    """Of the runs and of the parts; every process sees it."""
    format: PartFormat
    seed: int
    run_bytes: int
    """Most bytes of content that a run holds, and a process with it."""
    shards: Path | None = None
    """Where the parts go at once; None: they are moved there when all are done."""

    @property
    def parts(self) -> Path:
        """Where the parts are written."""
        return self.folder if self.shards is None else self.shards


class Part(NamedTuple):
    """Which rows of all runs a part holds."""

    number: int
    first_id: int
    """Rank of its first row among all rows, and its sample id."""
    rows: int
    first_bin: int
    stop_bin: int
    """All its rows have keys in these bins."""
    skip: int
    """Rows of the first bin that belong to the part before."""


def write_runs(chunk: Chunk, index: int, task: Task) -> dict[str, Any]:
    """Read, decode and sort a chunk.

    Args:
        chunk: What to read.
        index: Its number in the source.
        task: Where to and how.

    Returns:
        The chunk's record, which is on disk then: ``runs`` (names of files), ``rows``, ``bins`` (how many of the rows
        have keys in each bin, of bins that have some), ``rejects`` (pairs of source and reason) and ``digest``, the sum
        of a hash of each row or reject.
    """
    file = task.folder / f"chunk-{index:06d}.json"
    if mirror.exists(file):
        known: dict[str, Any] = read_json(file)
        return known
    mirror.make_here(task.folder)
    record: dict[str, Any] = {"runs": [], "rows": 0, "rejects": [], "digest": 0}
    bins = Counter[int]()
    rows = read_rows(chunk, task.format, task.seed)
    for run in _bounded(rows, record, task.run_bytes):
        name = f"chunk-{index:06d}-{len(record['runs']):04d}.arrow"
        run.sort(key=lambda row: (row.key, row.source.encode()))
        write_run(task.folder / name, run, task.format)
        record["runs"].append(name)
        record["rows"] += len(run)
        bins.update(_bin_of(row.key) for row in run)
    record["bins"] = sorted(bins.items())
    write_json(file, record)
    return record


def _bin_of(key: bytes) -> int:
    return key[0] << 8 | key[1]


def _bounded(rows: Iterator[Row | Rejected], record: dict[str, Any], run_bytes: int) -> Iterator[list[Row]]:
    """The rows in groups of bounded size; notes rejects and the digest in ``record``."""
    run, held = list[Row](), 0
    for row in rows:
        if isinstance(row, Rejected):
            record["rejects"].append(list(row))
            record["digest"] = _added(record["digest"], b"reject " + row.source.encode())
            continue
        record["digest"] = _added(record["digest"], row.key + row.source.encode())
        run.append(row)
        held += len(row.content)
        if held >= run_bytes:
            yield run
            run, held = [], 0
    if run:
        yield run


def _added(digest: int, content: bytes) -> int:
    # A sum does not depend on the order in which chunks are read.
    return (digest + digest_of(content)) % (1 << 128)


def digest_of(content: bytes) -> int:
    """A number of 128 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")


def _run_schema(format_: PartFormat) -> pa.Schema:
    fields = [("source", pa.string()), ("split", pa.string()), ("content", format_.type), ("label", pa.string())]
    return pa.schema([("key", pa.binary(KEY_BYTES)), *fields])


def write_run(file: Path, rows: list[Row], format_: PartFormat, batch_bytes: int = _BATCH_BYTES) -> None:
    """Write sorted rows as batches of some bytes, of which a reader can take those that it needs."""
    size = max(1, batch_bytes * len(rows) // max(1, sum(len(row.content) for row in rows)))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    first_bins = json.dumps([_bin_of(batch[0].key) for batch in batches])
    schema = _run_schema(format_).with_metadata({_FIRST_BINS: first_bins})
    temporary = mirror.temporary_of(file)
    with pa.ipc.new_file(str(temporary), schema) as writer:
        for batch in batches:
            values = [
                pa.array(column, field.type) for column, field in zip(zip(*batch, strict=True), schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(values, schema=schema))
    mirror.deliver(temporary, file, keep=False)


def plan_parts(counts: NDArray[np.int64], num_parts: int) -> list[Part]:
    """Cut all rows, in the order of their keys, into parts of equal size; the first ones hold one row more.

    Args:
        counts: Rows per bin, (NUM_BINS,).
        num_parts: At least 1; parts are empty where there are fewer rows.
    """
    below = np.concatenate([[0], np.cumsum(counts)])  # rows in lower bins
    share, more = divmod(int(below[-1]), num_parts)
    parts, first = list[Part](), 0
    for index in range(num_parts):
        rows = share + (index < more)
        first_bin = max(0, int(np.searchsorted(below, first, side="right")) - 1)
        stop_bin = int(np.searchsorted(below, first + rows, side="left"))
        parts.append(Part(index, first, rows, first_bin, stop_bin, first - int(below[min(first_bin, NUM_BINS)])))
        first += rows
    return parts


def merge_part(part: Part, runs: list[str], task: Task) -> dict[str, Any]:
    """Write one part from the runs.

    Args:
        part: Which rows.
        runs: The files of all runs.
        task: Where they are, and where the part goes.

    Returns:
        The part's record, which is on disk then: what the manifest says of the file (``name``, ``rows``, ``splits``,
        ``copies``, ``crc32``).
    """
    record_file = task.folder / f"part-{part.number:05d}.json"
    name = f"part-{part.number:05d}.parquet"
    # Parts leave the folder when they are published, and a kill may come before that is done.
    if mirror.exists(record_file) and mirror.exists(task.parts / name):
        known: dict[str, Any] = read_json(record_file)
        return known
    for folder in (task.folder, task.parts):
        mirror.make_here(folder)
    rows, copies = _rows_of(part, runs, task)
    ids, column = pa.array(np.arange(part.first_id, part.first_id + part.rows), pa.int64()), task.format.column
    temporary = mirror.temporary_of(task.parts / name)
    table = pa.table([ids, rows["source"], rows["split"], rows["content"]], ["sample_id", "source", "split", column])
    crc32 = write_part(temporary, table)
    mirror.deliver(temporary, task.parts / name, keep=mirror.has_room(task.parts, 0))
    labels = pa.table([ids, rows["label"]], _LABEL_ROWS).filter(rows["label"].is_valid())
    _write_labels(task.folder / f"labels-{part.number:05d}.arrow", labels)
    splits = dict(sorted(Counter(rows["split"].to_pylist()).items()))
    record = {"name": name, "rows": part.rows, "splits": splits, "copies": copies, "crc32": crc32}
    write_json(record_file, record)
    return record


def _write_labels(file: Path, labels: pa.Table) -> None:
    # A name of its own: a node that was given up for lost may still be writing the same file.
    temporary = mirror.temporary_of(file)
    with pa.ipc.new_file(str(temporary), _LABEL_ROWS) as writer:
        writer.write_table(labels)
    mirror.deliver(temporary, file, keep=False)


def read_labels(folder: Path, num_parts: int) -> pa.Table:
    """``sample_id`` and ``name`` of the rows that have a label, in sample_id order."""

    def read(part: int) -> pa.Table:
        with mirror.open_input(folder / f"labels-{part:05d}.arrow") as file:
            return pa.ipc.open_file(file).read_all()

    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
        return pa.concat_tables(pool.map(read, range(num_parts))).combine_chunks()


def _rows_of(part: Part, runs: list[str], task: Task) -> tuple[pa.Table, int]:
    """The rows of a part, and how many of them have the content of the row before."""
    if part.rows == 0:
        return _run_schema(task.format).empty_table(), 0
    # A server is asked for many runs at once; those on a disk are only mapped.
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME if mirror.is_mirrored(task.folder) else 1) as pool:
        slices = pool.map(lambda name: list(read_slices(task.folder / name, part)), runs)
        rows = pa.concat_tables(itertools.chain.from_iterable(slices))
    order = sorted(
        zip(
            rows["key"].to_pylist(),
            (name.encode() for name in rows["source"].to_pylist()),
            range(len(rows)),
            strict=True,
        )
    )
    stop = part.skip + part.rows
    # With the row before the first one, if that is in the same bin, as one with the same content would be.
    near = itertools.pairwise(order[max(0, part.skip - 1) : stop])
    copies = sum(row[0] == before[0] for before, row in near)
    chosen = [position for _, _, position in order[part.skip : stop]]
    taken = rows.take(pa.array(chosen, pa.int64())).combine_chunks()
    # Arrow put all rows together for that, and writing the part needs room too.
    pa.default_memory_pool().release_unused()
    return taken, copies


def read_slices(file: Path, part: Part) -> Iterator[pa.Table]:
    """The rows of a run whose keys are in a part's bins, by batches; those of a local file are not read, but mapped."""
    with mirror.open_input(file) as opened:
        run = pa.ipc.open_file(opened)
        first_bins = json.loads(run.schema.metadata[_FIRST_BINS])
        # The rows of a bin may begin in the batch before the first that begins with it.
        start = max(0, bisect.bisect_left(first_bins, part.first_bin) - 1)
        for number in range(start, bisect.bisect_left(first_bins, part.stop_bin)):
            found = _slice_of(pa.Table.from_batches([run.get_batch(number)]).replace_schema_metadata(), part)
            if len(found):
                yield found


def _slice_of(run: pa.Table, part: Part) -> pa.Table:
    keys = _keys(run)

    def bin_of(row: int) -> int:
        return int(keys[row * KEY_BYTES]) << 8 | int(keys[row * KEY_BYTES + 1])

    start = bisect.bisect_left(range(len(run)), part.first_bin, key=bin_of)
    stop = bisect.bisect_left(range(len(run)), part.stop_bin, key=bin_of)
    return run.slice(start, stop - start)


def _keys(run: pa.Table) -> NDArray[np.uint8]:
    return np.frombuffer(run["key"].chunk(0).buffers()[1], np.uint8)[: len(run) * KEY_BYTES]
