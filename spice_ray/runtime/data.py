"""Image shards, read by Ray Data: once into memory, or again and again in the counted order of the lanes."""

import itertools
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from spice_ray.config import Scale
from spice_ray.contracts import ShardFile
from spice_ray.core.lanes import Lanes, ResidentLanes, Rows, ServedLanes, Stream
from spice_ray.core.streaming import Ahead, StreamedLanes
from spice_ray.errors import ConfigError, DamagedError
from spice_ray.readers.parts import PartFormat, format_of, images_of
from spice_ray.runtime.memory import Budget, home_of
from spice_ray.runtime.progress import Reporter
from spice_ray.runtime.reading import find_damaged, read_parts
from spice_ray.storage import Artifact

# Ray Data starts anew for each of these; the tables that are then still in the worker's queue bridge the pause.
_FILES_PER_EXECUTION = 128
_TABLES_AHEAD = 4
# Reading waits for storage and checksums; readers share a processor with the training worker. Each is a process that
# has to be started, and two are enough for one worker.
_READERS = {"num_cpus": 0.25, "num_tasks": 2}


@dataclass(frozen=True)
class Shards:
    """Image shards as a stage sees them: their files, and which of their rows count."""

    path: Path
    format: PartFormat
    files: list[ShardFile]
    splits: tuple[str, ...] | None
    """The splits that count; None: all."""
    damaged: frozenset[str] = frozenset()
    """Files that are not read; none of their rows counts."""

    @property
    def image_size(self) -> int:
        """S, pixels."""
        return self.format.size

    @property
    def num_rows(self) -> int:
        """N: rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def num_counted(self) -> int:
        """Rows that count."""
        return sum(file.num_counted for file in self.files)

    @property
    def readable(self) -> list[ShardFile]:
        """The files that hold rows and are not damaged."""
        return [file for file in self.files if file.rows and file.name not in self.damaged]


def open_shards(artifact: Artifact, splits: tuple[str, ...] | None, damaged: frozenset[str] = frozenset()) -> Shards:
    """The shards of an artifact, of which the rows of ``splits`` count but for those in ``damaged`` files."""
    manifest, files, first_id = artifact.manifest, [], 0
    for file in manifest["files"]:
        counted = sum(n for split, n in file["splits"].items() if splits is None or split in splits)
        counted = 0 if file["name"] in damaged else counted
        files.append(ShardFile(file["name"], first_id, file["rows"], counted, file["crc32"]))
        first_id += file["rows"]
    return Shards(artifact.path, format_of(manifest), files, splits, damaged)


def find_left_out(artifact: Artifact, scale: Scale, reporter: Reporter) -> frozenset[str]:
    """Damaged shard files, where they may be left out: every file is read for it.

    Raises:
        DamagedError: No file is whole.
    """
    if not scale.skip_damaged:
        return frozenset()
    shards = open_shards(artifact, None)
    damaged = find_damaged(shards.path, shards.readable)
    if len(damaged) == len(shards.readable):
        raise DamagedError(f"every shard file of {shards.path} is damaged; delete that folder and make it anew")
    if damaged:
        lost = sum(file.rows for file in shards.files if file.name in damaged)
        reporter.note(
            f"{lost} rows of {shards.num_rows} are left out, their shard files are damaged: "
            f"{', '.join(sorted(damaged))}"
        )
    return damaged


def check_lanes(shards: Shards, num_lanes: int, name: str) -> None:
    """Refuse lanes that would own no image.

    Raises:
        ConfigError: Fewer filled files than lanes, or a lane without a row.
    """
    for lane in range(num_lanes):
        if not any(file.num_counted for file in shards.files[lane::num_lanes]):
            raise ConfigError(
                f"{name}={num_lanes} leaves lane {lane} without an image of {shards.num_counted}; "
                f"lower {name} to a divisor of its value"
            )


@contextmanager
def open_lanes(
    shards: Shards, lanes: ServedLanes, streams: list[Stream], device: torch.device, budget: Budget
) -> Iterator[list[Lanes]]:
    """Feed the streams from memory where the served images fit the budget, and else from the files.

    Both give the same batches; the first costs memory and the second the reading of every file in every pass.
    """
    home = home_of(lanes.num_rows * shards.format.row_bytes, device, budget)
    if home is not None:
        rows = load_rows(shards, lanes, home)
        yield [ResidentLanes(lanes, rows, stream, device) for stream in streams]
        return
    with ExitStack() as stack:
        fed = [StreamedLanes(lanes, stream, partial(stream_rows, shards), device) for stream in streams]
        for lane_feed in fed:
            stack.callback(lane_feed.close)
        yield list(fed)


def load_rows(shards: Shards, lanes: ServedLanes, home: torch.device) -> Rows:
    """Stream the files of the lanes that a worker serves into memory, once; rows that do not count are left out."""
    files = [file for lane in lanes.files for file in lane if file.num_counted]
    shape = (lanes.num_rows, 3, shards.image_size, shards.image_size)
    images = torch.empty(shape, dtype=torch.uint8, device=home)
    sample_ids = torch.empty(lanes.num_rows, dtype=torch.int64, device=home)
    start = 0
    for rows in _counted_rows(shards, files):
        stop = start + len(rows.sample_ids)
        images[start:stop], sample_ids[start:stop] = rows
        start = stop
    assert start == lanes.num_rows
    return Rows(images, sample_ids)


def stream_rows(shards: Shards, files: Iterator[ShardFile]) -> Iterator[Rows]:
    """The rows that count of each of endless ``files``, in the order given, read ahead of their use."""
    ahead = Ahead(_executions(shards, files), _TABLES_AHEAD)
    try:
        while True:
            yield ahead.get()
    finally:
        ahead.close()


def _executions(shards: Shards, files: Iterator[ShardFile]) -> Generator[Rows]:
    while some := list(itertools.islice(files, _FILES_PER_EXECUTION)):
        yield from _counted_rows(shards, some, **_READERS)


def _counted_rows(shards: Shards, files: list[ShardFile], **readers: Any) -> Iterator[Rows]:
    tables = read_parts(shards.path, files, shards.format, **readers).iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    for file, table in zip(files, tables, strict=True):
        if file.num_counted < file.rows:
            table = table.filter(pc.is_in(table["split"], pa.array(shards.splits)))
        images = torch.from_numpy(images_of(table, shards.image_size).copy())
        yield Rows(images, torch.from_numpy(table["sample_id"].to_numpy().copy()))
