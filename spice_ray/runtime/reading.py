"""What the tasks do that read image shards. Nothing here needs torch, whose import takes each new process seconds."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray.data

from spice_ray.contracts import ShardFile
from spice_ray.readers.parts import PartFormat, is_intact, read_part

CPUS_OF_READER = 0.5
"""What a task that reads asks for: workers may have all CPUs but one, and trials of a sweep a part of that one."""


def prepare_context() -> None:
    """Set Ray Data up in this process: blocks keep their order and their size, and errors stay what they are."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = None
    context.raise_original_map_exception = True


def read_parts(
    folder: Path,
    files: list[ShardFile],
    format_: PartFormat,
    *,
    num_cpus: float = CPUS_OF_READER,
    num_tasks: int | None = None,
) -> ray.data.Dataset:
    """A stream of shard files, one block each, in the order given; images are decoded.

    Args:
        folder: Of the shards.
        files: Which of them.
        format_: What the manifest says of their rows.
        num_cpus: Of each task that reads.
        num_tasks: How many read at once; None: as many as there is room for.
    """
    return _per_file(files).map_batches(
        partial(_read, folder=folder, format_=format_),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        compute=ray.data.TaskPoolStrategy(size=num_tasks),
    )


def find_damaged(folder: Path, files: list[ShardFile]) -> frozenset[str]:
    """The files whose bytes are not those that were written; reads every file once."""
    found = _per_file(files).map_batches(partial(_check, folder=folder), batch_size=None, batch_format="pyarrow")
    return frozenset(row["name"] for row in found.iter_rows() if not row["intact"])


def _per_file(files: list[ShardFile]) -> ray.data.Dataset:
    prepare_context()
    return ray.data.from_items([asdict(file) for file in files], override_num_blocks=len(files))


def _read(batch: pa.Table, folder: Path, format_: PartFormat) -> pa.Table:
    return pa.concat_tables(read_part(folder, ShardFile(**row), format_) for row in batch.to_pylist())


def _check(batch: pa.Table, folder: Path) -> pa.Table:
    files = [ShardFile(**row) for row in batch.to_pylist()]
    return pa.table({"name": [file.name for file in files], "intact": [is_intact(folder, file) for file in files]})
