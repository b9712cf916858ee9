"""Lanes: the counted order in which a training loop meets its images.

A global batch is B / G rows of each of G lanes. A lane reads its own files pass after pass, in an order that follows
from (seed, stream, pass, lane). Any step can be asked for at any time, so resuming costs nothing.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.contracts import Batch
from spice_ray.core.order import integers, lane_order, stream_key

SHUFFLE_WINDOW = 65_536
"""Rows shuffled together within a lane; larger than most lanes, and small enough for a reader that streams to hold."""


class Lanes(Protocol):
    """A stream of batches over the lanes that one worker serves."""

    num_lanes: int
    """L: how many lanes this worker serves."""

    def batch(self, step: int) -> Batch:
        """This worker's rows of global batch ``step``."""
        ...


class LaneImages:
    """The images of the lanes that one worker serves, resident on its device."""

    def __init__(
        self, images: Tensor, sample_ids: Tensor, lane_ids: list[int], rows_per_file: list[list[int]], total_lanes: int
    ) -> None:
        """Take hold of resident images.

        Args:
            images: uint8, (n, 3, S, S), lane after lane and file after file.
            sample_ids: int64, (n,).
            lane_ids: The lanes served, consecutive numbers of 0..G-1.
            rows_per_file: For each of them, the rows of each of its files.
            total_lanes: G.
        """
        self.images = images
        self.sample_ids = sample_ids
        self.lane_ids = lane_ids
        self.rows_per_file = rows_per_file
        self.total_lanes = total_lanes
        self.starts = np.concatenate([[0], np.cumsum([sum(rows) for rows in rows_per_file])])


class ShuffledLanes:
    """Every image once per pass, in shuffled order."""

    def __init__(self, images: LaneImages, *, rows_per_lane: int, key: int, window: int = SHUFFLE_WINDOW) -> None:
        """Read ``rows_per_lane`` (B / G) rows of each lane per batch; ``key`` names seed and stream."""
        self.num_lanes = len(images.lane_ids)
        self._images = images
        self._rows_per_lane = rows_per_lane
        self._keys = [stream_key(key, "lane", lane) for lane in images.lane_ids]
        self._window = window
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, step: int) -> Batch:
        """This worker's rows of global batch ``step``, (b * L) of them."""
        turns = np.arange(step * self._rows_per_lane, (step + 1) * self._rows_per_lane)
        rows = np.stack([self._rows(lane, turns) for lane in range(self.num_lanes)], axis=1)
        return _batch(self._images, torch.from_numpy(rows), _draws(self._images, turns))

    def _rows(self, lane: int, turns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions among the resident images of a lane's turns; a turn past the lane's end opens its next pass."""
        size = int(self._images.starts[lane + 1] - self._images.starts[lane])
        passes = turns // size
        rows = np.empty_like(turns)
        for pass_index in range(int(passes[0]), int(passes[-1]) + 1):
            chosen = passes == pass_index
            rows[chosen] = self._order(lane, pass_index)[turns[chosen] % size]
        return rows + int(self._images.starts[lane])

    def _order(self, lane: int, pass_index: int) -> NDArray[np.int64]:
        cached = self._orders.get(lane)
        if cached is None or cached[0] != pass_index:
            rows_per_file = self._images.rows_per_file[lane]
            cached = (pass_index, lane_order(self._keys[lane], pass_index, rows_per_file, self._window))
            self._orders[lane] = cached
        return cached[1]


class DrawnLanes:
    """Chosen images, drawn with replacement."""

    def __init__(self, images: LaneImages, chosen: Tensor, *, rows_per_lane: int, key: int) -> None:
        """Draw from the samples with ``chosen`` (bool, (N,), by sample id); every lane needs at least one."""
        self.num_lanes = len(images.lane_ids)
        self._images = images
        self._rows_per_lane = rows_per_lane
        self._key = stream_key(key, "drawn")
        resident = chosen[images.sample_ids.cpu()]
        self._candidates = [
            torch.nonzero(resident[start:stop]).flatten() + int(start)
            for start, stop in zip(images.starts[:-1], images.starts[1:], strict=True)
        ]

    def batch(self, step: int) -> Batch:
        """This worker's rows of global batch ``step``, (b * L) of them."""
        turns = np.arange(step * self._rows_per_lane, (step + 1) * self._rows_per_lane)
        draws = _draws(self._images, turns)
        rows = [
            candidates[integers(self._key, draws[:, lane], len(candidates))]
            for lane, candidates in enumerate(self._candidates)
        ]
        return _batch(self._images, torch.stack(rows, dim=1), draws)


def _draws(images: LaneImages, turns: NDArray[np.int64]) -> Tensor:
    """Global positions in the stream of each lane's turns, int64, (b, L)."""
    return torch.from_numpy(turns)[:, None] * images.total_lanes + torch.tensor(images.lane_ids)[None, :]


def _batch(images: LaneImages, rows: Tensor, draws: Tensor) -> Batch:
    device = images.images.device
    rows = rows.flatten().to(device, non_blocking=True)
    return Batch(images.images[rows], images.sample_ids[rows], draws.flatten().to(device, non_blocking=True))
