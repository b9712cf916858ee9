"""Lanes over a few images in memory."""

import torch
from torch import Tensor

from spice_ray.contracts import ShardFile
from spice_ray.core.lanes import ResidentLanes, Rows, ServedLanes, Stream, serve


def shard_files(rows_per_file: list[int]) -> list[ShardFile]:
    starts = [sum(rows_per_file[:index]) for index in range(len(rows_per_file))]
    return [
        ShardFile(f"part-{index}", first, rows, rows, 0)
        for index, (first, rows) in enumerate(zip(starts, rows_per_file, strict=True))
    ]


def rows_of(images: Tensor, file: ShardFile) -> Rows:
    ids = torch.arange(file.first_id, file.first_id + file.rows)
    return Rows(images[ids], ids)


def resident_rows(images: Tensor, lanes: ServedLanes) -> Rows:
    parts = [rows_of(images, file) for files in lanes.files for file in files]
    return Rows(torch.cat([part.images for part in parts]), torch.cat([part.sample_ids for part in parts]))


def resident(
    images: Tensor, rows_per_file: list[int], lane_ids: list[int], num_lanes: int, stream: Stream
) -> ResidentLanes:
    """The images are numbered file after file."""
    lanes = serve(shard_files(rows_per_file), lane_ids, num_lanes)
    return ResidentLanes(lanes, resident_rows(images, lanes), stream, torch.device("cpu"))
