"""Lanes: the counted order in which a training loop meets its images, resident or streamed.

A global batch is B / G rows of each of G lanes. A lane reads its own files pass after pass, in an order that follows
from (seed, stream, pass, lane). A ``Stream`` says which rows come at which turn; ``ResidentLanes`` gathers them from
memory and ``StreamedLanes`` (streaming.py) from files as they are read, and both give the same batches.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.contracts import Batch, ShardFile
from spice_ray.core.order import Pick, lane_order, permutation, stream_key

_WINDOW_ROWS = 8192
_WINDOW_BYTES = 128 << 20


class Lanes(Protocol):
    """A stream of batches over the lanes that one worker serves."""

    num_lanes: int
    """L: how many lanes this worker serves."""

    def batch(self, step: int) -> Batch:
        """This worker's rows of global batch ``step``."""
        ...


@dataclass(frozen=True)
class Stream:
    """Which rows come at which turn of a lane; part of the science, so it never depends on how they are fed."""

    key: int
    """Names seed and stream."""
    rows_per_lane: int
    """b = B / G: rows of each lane in a batch."""
    window: int
    """Rows that are shuffled together."""
    pick: Pick = permutation
    """``permutation``: every row once per pass; ``with_replacement``: as many draws."""
    chosen: Tensor | None = None
    """Which samples come at all, bool, by sample id, (N,); None: all that count."""

    def lane_key(self, lane: int) -> int:
        """The key of lane ``lane`` of all G."""
        return stream_key(self.key, "lane", lane)


@dataclass(frozen=True)
class ServedLanes:
    """The lanes that one worker serves, and the files that they own."""

    lane_ids: list[int]
    """Consecutive numbers of 0..G-1."""
    total_lanes: int
    """G."""
    files: list[list[ShardFile]]
    """Of each served lane."""

    @property
    def num_rows(self) -> int:
        """Rows that count."""
        return sum(file.num_counted for files in self.files for file in files)

    def draws(self, turns: NDArray[np.int64]) -> Tensor:
        """Global positions in the stream of each lane's ``turns``, int64, (len(turns), L)."""
        return torch.from_numpy(turns)[:, None] * self.total_lanes + torch.tensor(self.lane_ids)[None, :]


class Rows(NamedTuple):
    """Images in memory: uint8 (n, 3, S, S), and their sample ids, int64 (n,)."""

    images: Tensor
    sample_ids: Tensor


def serve(files: list[ShardFile], lane_ids: list[int], total_lanes: int) -> ServedLanes:
    """Deal the files out: lane g owns files g, g + G, ..."""
    return ServedLanes(lane_ids, total_lanes, [files[lane::total_lanes] for lane in lane_ids])


def shuffle_window(image_size: int) -> int:
    """Rows of S x S pixels that are shuffled together: 8192, and fewer where they would take over 128 MB."""
    return max(1, min(_WINDOW_ROWS, _WINDOW_BYTES // (3 * image_size**2)))


class ResidentLanes:
    """Batches gathered from images that are all in memory; any step can be asked for at any time."""

    def __init__(self, lanes: ServedLanes, rows: Rows, stream: Stream, device: torch.device) -> None:
        """Take hold of the images of all served lanes, lane after lane and file after file, and serve ``device``."""
        self.num_lanes = len(lanes.lane_ids)
        self._lanes = lanes
        self._rows = rows
        self._stream = stream
        self._device = device
        self._keys = [stream.lane_key(lane) for lane in lanes.lane_ids]
        self._candidates, self._rows_per_file = _candidates(lanes, rows, stream.chosen)
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, step: int) -> Batch:
        """This worker's rows of global batch ``step``, (b * L) of them."""
        turns = np.arange(step * self._stream.rows_per_lane, (step + 1) * self._stream.rows_per_lane)
        positions = np.stack([self._positions(lane, turns) for lane in range(self.num_lanes)], axis=1)
        chosen = torch.from_numpy(positions).flatten().to(self._rows.images.device, non_blocking=True)
        found = (self._rows.images[chosen], self._rows.sample_ids[chosen], self._lanes.draws(turns).flatten())
        return Batch(*(self._sent(values) for values in found))

    def _sent(self, values: Tensor) -> Tensor:
        # From memory that is not pinned a GPU would be waited for.
        pinned = values.pin_memory() if self._device.type == "cuda" and not values.is_cuda else values
        return pinned.to(self._device, non_blocking=True)

    def _positions(self, lane: int, turns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions among the resident images of a lane's turns; a turn past the lane's end opens its next pass."""
        size = len(self._candidates[lane])
        passes = turns // size
        positions = np.empty_like(turns)
        for pass_index in range(int(passes[0]), int(passes[-1]) + 1):
            now = passes == pass_index
            positions[now] = self._candidates[lane][self._order(lane, pass_index)[turns[now] % size]]
        return positions

    def _order(self, lane: int, pass_index: int) -> NDArray[np.int64]:
        cached = self._orders.get(lane)
        if cached is None or cached[0] != pass_index:
            stream = self._stream
            order = lane_order(self._keys[lane], pass_index, self._rows_per_file[lane], stream.window, stream.pick)
            cached = (pass_index, order)
            self._orders[lane] = cached
        return cached[1]


def _candidates(
    lanes: ServedLanes, rows: Rows, chosen: Tensor | None
) -> tuple[list[NDArray[np.int64]], list[list[int]]]:
    """For each lane, where its rows stand among the resident ones, and how many of them each of its files has."""
    taken = torch.ones(len(rows.images), dtype=torch.bool) if chosen is None else chosen[rows.sample_ids.cpu()]
    candidates, rows_per_file, start = list[NDArray[np.int64]](), list[list[int]](), 0
    for files in lanes.files:
        ends = start + np.cumsum([0, *(file.num_counted for file in files)])
        rows_per_file.append([int(taken[a:b].sum()) for a, b in itertools.pairwise(ends)])
        candidates.append(start + torch.nonzero(taken[start : ends[-1]]).flatten().numpy())
        start = int(ends[-1])
    return candidates, rows_per_file
