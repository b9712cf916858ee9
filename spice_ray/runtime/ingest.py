"""From a source to image shards, by Ray Data: chunks are decoded and sorted in parallel, then merged into parts.

No image passes through the driver or the object store: tasks write sorted runs to a folder beside the artifacts, and
other tasks merge them into parts. What a killed ingest left there is taken over by the next one of the same source.
"""

import hashlib
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from spice_ray import mirror
from spice_ray.contracts import LABELS, SHARDS
from spice_ray.errors import DataError
from spice_ray.readers.embeddings import EmbeddingSource
from spice_ray.readers.parts import PartFormat
from spice_ray.readers.records import Chunk, Source
from spice_ray.readers.rows import count_rows
from spice_ray.readers.runs import NUM_BINS, Task, merge_part, plan_parts, read_labels, write_runs
from spice_ray.runtime.progress import Done, Reporter
from spice_ray.runtime.reading import prepare_context
from spice_ray.storage import Artifact, fingerprint, open_artifact, publish, reporting_disk_errors

_RUN_BYTES = (8 << 20, 128 << 20)
"""A run holds at least so much, so that small sources are not cut to pieces, and at most so much memory is taken."""
_NUM_RUNS = 512
_PART_BYTES = (16 << 20, 64 << 20)
_NUM_PARTS = 4096
_LAYOUT = 2
"""Of the folder that an interrupted ingest leaves."""
# The number of parts is a multiple of this, so that 16, 8, 4, 2 lanes or 1 own equally many files.
_PARTS_MULTIPLE = 16
# Images of this side and more are kept as they came where that takes an eighth of the room or less.
_ENCODED_SIDE = 128
_ENCODED_GAIN = 8


class _Read(NamedTuple):
    """What the first pass leaves."""

    runs: list[str]
    num_images: int
    counts: NDArray[np.int64]
    """How many of the images have keys in each bin, (NUM_BINS,)."""
    rejects: list[tuple[str, str]]
    digest: str
    """Of all (key, source) and all rejects."""


def ingest(
    source: Source, root: Path, *, image_size: int | None, seed: int, reporter: Reporter
) -> tuple[Artifact, Artifact | None]:
    """Decode every image of ``source`` and publish image shards, and labels where the source has some.

    The order of the rows and the bytes of image and split depend on the seed and on content alone, not on the
    container, the listing order, the cluster or the labels; equal contents are ordered by source. An ingest that was
    killed goes on with what it has done.

    Args:
        source: What ``open_source`` found.
        root: The folder of artifacts, which every node must see; while it lasts, it takes twice the room of the shards.
        image_size: S, pixels; None for embeddings, which have none.
        seed: Orders the rows.
        reporter: Shows progress.

    Returns:
        The shards, and the labels or None.

    Raises:
        DataError: Not one image could be read, or a part of the source cannot be used at all.
        StorageError: The disk refused.
    """
    assert ray.is_initialized()
    # What fails on a worker can be an OSError too, and is not this disk's.
    with reporting_disk_errors(root, passing=(ray.exceptions.RayError,)):
        task = _plan(source, root, image_size, seed)
        task.folder.mkdir(parents=True, exist_ok=True)
        with reporter.stage("ingest: reading images", "images") as show:
            read = _read(source, task, lambda done, total: show(Done(done, total, None)))
        if read.num_images == 0:
            mirror.remove(task.folder)
            raise DataError(_nothing_read(read.rejects))
        print_ = fingerprint(SHARDS, {**_size(task.format), "seed": seed}, [read.digest])
        known = open_artifact(root, SHARDS, print_)
        if mirror.is_mirrored(root) and known is None:  # where moving is as much work as writing
            task = task._replace(shards=root / f"{SHARDS}-{print_}")
        with reporter.stage("ingest: writing shards", "files") as show:
            files = _write_parts(read, task, lambda done, total: show(Done(done, total, None)))
        labels = read_labels(task.folder, len(files))
        shards = known or _publish_shards(root, print_, task, read, files)
        found = _publish_labels(root, shards.fingerprint, labels)
        mirror.remove(task.folder)
        return shards, found


def _plan(source: Source, root: Path, image_size: int | None, seed: int) -> Task:
    """Where the runs go, named by what they are made of, and how large they are."""
    count = count_rows(source)
    format_ = _format(source, image_size, count)
    least, most = _RUN_BYTES
    run_bytes = most if count is None else min(most, max(least, count * format_.row_bytes // _NUM_RUNS))
    made_of = {
        "layout": _LAYOUT,
        "listing": source.listing_digest(),
        "labels": source.labels_known,
        "run_bytes": run_bytes,
    }
    print_ = fingerprint("ingest", {**made_of, **format_._asdict(), "seed": seed}, [])
    return Task(root.resolve() / f".ingest-{print_}", format_, seed, run_bytes)


def _format(source: Source, image_size: int | None, count: int | None) -> PartFormat:
    if isinstance(source, EmbeddingSource):
        return PartFormat(source.dim, "vectors")
    assert image_size is not None
    size, pixels = source.encoded_bytes(), PartFormat(image_size, "pixels")
    gains = size is not None and (count or 0) * pixels.row_bytes >= _ENCODED_GAIN * size
    return pixels._replace(stored="encoded") if gains and image_size >= _ENCODED_SIDE else pixels


def _on_the_cluster(items: list[Any], work: Callable[[Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """``work`` on every item, one task each, as Ray Data finds room; records in any order."""
    if not items:
        return
    prepare_context()
    # Pickled by us: Ray would turn objects into columns of its own kind, and file names need not be valid text.
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = dataset.map_batches(partial(_work_on, work=work), batch_size=None, batch_format="pyarrow")
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
        for record in batch["record"].to_pylist():
            yield pickle.loads(record)


def _work_on(batch: pa.Table, work: Callable[[Any], dict[str, Any]]) -> pa.Table:
    records = [pickle.dumps(work(pickle.loads(item))) for item in batch["item"].to_pylist()]
    # Else each process would keep the most that it ever held.
    pa.default_memory_pool().release_unused()
    return pa.table({"record": pa.array(records, pa.large_binary())})


def _read(source: Source, task: Task, report: Callable[[int, int | None], None]) -> _Read:
    """First pass: every chunk becomes sorted runs."""
    chunks = source.chunks(max(1, task.run_bytes // task.format.row_bytes))
    total = count_rows(source)
    runs, num_images, rejects, digest = list[str](), 0, list[tuple[str, str]](), 0
    counts = np.zeros(NUM_BINS, np.int64)
    work = partial(_write_runs, task=task)
    for record in _on_the_cluster(list(enumerate(chunks)), work):
        runs += record["runs"]
        num_images += record["rows"]
        for bin_, count in record["bins"]:
            counts[bin_] += count
        rejects += [(name, reason) for name, reason in record["rejects"]]
        digest = (digest + record["digest"]) % (1 << 128)
        report(num_images + len(rejects), total)
    return _Read(sorted(runs), num_images, counts, sorted(rejects), f"{digest:032x}")


def _write_runs(item: tuple[int, Chunk], task: Task) -> dict[str, Any]:
    index, chunk = item
    return write_runs(chunk, index, task)


def _write_parts(read: _Read, task: Task, report: Callable[[int, int | None], None]) -> list[dict[str, Any]]:
    """Second pass: the runs are merged into parts; gives their entries of the manifest."""
    total = read.num_images * task.format.row_bytes
    least, most = _PART_BYTES
    part_bytes = min(most, max(least, total // _NUM_PARTS))
    num_parts = _PARTS_MULTIPLE * math.ceil(total / (_PARTS_MULTIPLE * part_bytes))
    parts = plan_parts(read.counts, num_parts)
    files: list[dict[str, Any]] = []
    for record in _on_the_cluster(parts, partial(merge_part, runs=read.runs, task=task)):
        files.append(record)
        report(len(files), num_parts)
    return sorted(files, key=lambda file: str(file["name"]))


def _nothing_read(rejects: list[tuple[str, str]]) -> str:
    if not rejects:
        return "the source holds no image any more; give a source with at least one image"
    name, reason = rejects[0]
    return (
        f"none of the {len(rejects)} images could be read, the first is {name}: {reason}; "
        "give a source with at least one readable image"
    )


def _size(format_: PartFormat) -> dict[str, int]:
    return {"embed_dim" if format_.stored == "vectors" else "image_size": format_.size}


def _publish_shards(root: Path, print_: str, task: Task, read: _Read, files: list[dict[str, Any]]) -> Artifact:
    splits: Counter[str] = sum((Counter(file["splits"]) for file in files), Counter())

    def write(staging: Path) -> dict[str, Any]:
        if task.shards is None:
            for file in files:
                os.replace(task.folder / file["name"], staging / file["name"])
        sources, reasons = zip(*read.rejects, strict=True) if read.rejects else ((), ())
        rejects = pa.table({"source": pa.array(sources, pa.string()), "reason": pa.array(reasons, pa.string())})
        pq.write_table(rejects, staging / "rejects.parquet")
        return {
            "num_images": read.num_images,
            **_size(task.format),
            "stored": task.format.stored,
            "splits": dict(sorted(splits.items())),
            "files": files,
            "num_rejects": len(read.rejects),
            "num_copies": sum(file["copies"] for file in files),
            "digest": read.digest,
        }

    return publish(root, SHARDS, print_, write)


def _publish_labels(root: Path, shards: str, rows: pa.Table) -> Artifact | None:
    """Labels with a number for each name; None where no row has a label."""
    if len(rows) == 0:
        return None
    names = pc.unique(rows["name"])
    codes = _codes(names.to_pylist())
    code_of = pa.array([codes[name] for name in names.to_pylist()], pa.int64())
    table = rows.add_column(1, "label", code_of.take(pc.index_in(rows["name"], names)))
    digest = hashlib.blake2b(digest_size=16)
    for column in (table["sample_id"], table["name"].dictionary_encode().combine_chunks().indices):
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    digest.update(repr(names.to_pylist()).encode())

    def write(staging: Path) -> dict[str, Any]:
        pq.write_table(table, staging / "labels.parquet")
        return {"shards": shards, "num_labels": len(table)}

    return publish(root, LABELS, fingerprint(LABELS, {"digest": digest.hexdigest()}, [shards]), write)


def _codes(names: list[str]) -> dict[str, int]:
    """A number for each label: its own where all are plain numbers, else its place in the alphabet."""
    if all(name.isdecimal() and str(int(name)) == name and int(name) < 2**63 for name in names):
        return {name: int(name) for name in names}
    return {name: code for code, name in enumerate(sorted(names))}
