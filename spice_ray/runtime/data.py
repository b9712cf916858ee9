"""Image shards, read by Ray Data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from numpy.typing import NDArray

from spice_ray.contracts import TRAIN_SPLITS, ShardFile
from spice_ray.core.lanes import LaneImages
from spice_ray.errors import ConfigError
from spice_ray.storage import Artifact


@dataclass(frozen=True)
class Shards:
    """Image shards as a stage sees them: their files, and which of their rows count."""

    path: Path
    image_size: int
    files: list[ShardFile]
    splits: tuple[str, ...] | None
    """The splits that count; None: all."""

    @property
    def num_rows(self) -> int:
        """N: rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def num_counted(self) -> int:
        """Rows that count."""
        return sum(file.num_counted for file in self.files)


def open_shards(artifact: Artifact, splits: tuple[str, ...] | None) -> Shards:
    """The shards of an artifact, of which the rows of ``splits`` count."""
    manifest = artifact.manifest
    files = [
        ShardFile(
            name=file["name"],
            rows=file["rows"],
            num_counted=sum(n for split, n in file["splits"].items() if splits is None or split in splits),
        )
        for file in manifest["files"]
    ]
    return Shards(artifact.path, manifest["image_size"], files, splits)


def splits_of(protocol: str, *, unlabeled: bool) -> tuple[str, ...] | None:
    """The splits that a training stage sees; stage 1 alone sees the unlabeled part."""
    if protocol == "whole":
        return None
    return TRAIN_SPLITS if unlabeled else ("train",)


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


def images_of(table: pa.Table, image_size: int) -> NDArray[np.uint8]:
    """The ``image`` column as an array, uint8, (rows, 3, S, S); a view of Arrow's memory, not to be written."""
    column = table["image"].combine_chunks()
    width = 3 * image_size * image_size
    flat = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width : (column.offset + len(column)) * width]
    return flat.reshape(len(column), 3, image_size, image_size)


def read_files(shards: Shards, files: list[ShardFile]) -> ray.data.Dataset:
    """A Ray Data stream of files, one block each, in the order given."""
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    paths = [str(shards.path / file.name) for file in files]
    return ray.data.read_parquet(paths, override_num_blocks=len(paths))


def load_lanes(shards: Shards, lane_ids: list[int], num_lanes: int, device: torch.device) -> LaneImages:
    """Stream the files of the lanes that a worker serves into its memory, once.

    Lane g owns files g, g + G, ...; rows that do not count are left out.
    """
    files = [file for lane in lane_ids for file in shards.files[lane::num_lanes] if file.rows]
    offsets = dict(zip((f.name for f in files), np.cumsum([0, *(f.num_counted for f in files)]), strict=False))
    first_ids = np.cumsum([0, *(file.rows for file in shards.files)])
    total = sum(file.num_counted for file in files)
    images = torch.empty((total, 3, shards.image_size, shards.image_size), dtype=torch.uint8)
    sample_ids = torch.empty(total, dtype=torch.int64)
    for table in _counted_rows(shards, files):
        ids = table["sample_id"].to_numpy()
        if len(ids) == 0:
            continue
        name = shards.files[int(np.searchsorted(first_ids, ids[0], side="right")) - 1].name
        start = offsets[name]
        offsets[name] = stop = start + len(ids)
        images[start:stop] = torch.from_numpy(images_of(table, shards.image_size).copy())
        sample_ids[start:stop] = torch.from_numpy(ids.copy())
    rows_per_file = [[f.num_counted for f in shards.files[lane::num_lanes] if f.rows] for lane in lane_ids]
    return LaneImages(images.to(device), sample_ids.to(device), lane_ids, rows_per_file, num_lanes)


def _counted_rows(shards: Shards, files: list[ShardFile]) -> Iterator[pa.Table]:
    """Blocks of single files, rows in file order, without the rows that do not count."""
    for table in read_files(shards, files).iter_batches(batch_size=None, batch_format="pyarrow"):
        if shards.splits is not None:
            table = table.filter(pc.is_in(table["split"], pa.array(shards.splits)))
        yield table.combine_chunks()
