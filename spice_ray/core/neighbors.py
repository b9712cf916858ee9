"""Exact nearest neighbours by cosine (paper III-C), in memory that the block bounds and not the number of images.

The answer is the same for any block, any split of the rows over workers, and on CPU and GPU, as similarities are exact
(neighbor_rows.py). Images with equal embeddings are therefore exactly equally similar.

Of many rows only those are compared exactly that a bound does not rule out (neighbor_bounds.py), or, on a GPU and where
products in bfloat16 are cheap, candidates (neighbor_candidates.py); the answer is the same.

Shapes: N rows, D embedding width, k neighbours, b rows of a query block, t rows of a bank tile.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spice_ray.core.neighbor_axes import MOST_NEIGHBORS, choose_axes, may_have_axes, sample_of
from spice_ray.core.neighbor_bounds import QUERIES, BoundBank
from spice_ray.core.neighbor_candidates import CHEAP_PRODUCT, CandidateBank, cheap_of
from spice_ray.core.neighbor_keys import merge_tile, no_keys, row_numbers_of, similarities_of
from spice_ray.core.neighbor_rows import MOST_KEPT, Compare, GridRows, Rows, take_rows

_MANY_ROWS = 1 << 11
"""From so many on comparing few of them exactly is the faster way."""


class Bank(Protocol):
    """All rows, made ready for comparing few of them exactly."""

    def best(self, queries: Tensor, own: Tensor, compare: Compare) -> tuple[Tensor, Tensor]:
        """The k greatest keys of rows, falling, int64, (b, k), and which of them are known to be these, bool, (b,)."""
        ...


def exact_neighbors(
    embeddings: Rows, k: int, *, block: int = 1024, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of every row: ``NeighborSearch`` asked for all of them."""
    return NeighborSearch(embeddings, k, block=block, device=device).find(0, len(embeddings))


class NeighborSearch:
    """Looks for the k nearest other rows by cosine; what it needs of the rows is made once."""

    def __init__(
        self,
        embeddings: Rows,
        k: int,
        *,
        block: int = 1024,
        device: torch.device | None = None,
        most_kept: int = MOST_KEPT,
    ) -> None:
        """Look at all rows once.

        Args:
            embeddings: Unit rows, taken as float32, (N, D); may be a memory-mapped array.
            k: Neighbours per row, in 1..N-1.
            block: Rows of a query block and of the tiles that it meets one by one. Working memory is at most about
                ``block`` * (100 * ``block`` + 40 * D + 40 * k) bytes whatever N is, or, for many rows, 1.5 GB where
                that is more; there is never an N x N array.
            device: Where to compute; none: where the embeddings are.
            most_kept: Bytes of rows that may be kept on the device, and again of rows in half precision; of more, each
                block of queries takes them anew.

        Raises:
            ValueError: ``k`` is not in 1..N-1, ``block`` is below 1, or a value is not finite.
        """
        _check_request(len(embeddings), k, block)
        _check_finite(embeddings, block)
        self._k, self._block, self._most_kept = k, block, most_kept
        self._uses_banks = len(embeddings) >= max(_MANY_ROWS, 64 * k) and k <= MOST_NEIGHBORS
        self._rows = GridRows(embeddings, device, most_kept, block)
        self._cheap = cheap_of(self._rows.device, k) if self._uses_banks else None
        self._on_axes = self._bank_on_axes() if self._uses_banks else None
        self._asked = self._left_open = 0
        self.num_compared_with_all = 0
        """Queries so far that left too many rows to any bound: few, or all where rows are few or alike."""

    def find(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The neighbours of the rows from ``start`` to ``stop``, the same to the bit whoever asks for the others.

        Returns:
            Row numbers, int64, and similarities, float32, both (stop - start, k), on the CPU. Each row is ordered by
            falling similarity (as float32) and equal ones by rising row number; the row itself is left out.

        Raises:
            ValueError: ``start`` and ``stop`` are no range within 0..N.
        """
        if not 0 <= start <= stop <= len(self._rows):
            raise ValueError(f"rows {start} to {stop} of {len(self._rows)}; the range must lie within the rows")
        indices = torch.empty((stop - start, self._k), dtype=torch.int64)
        similarities = torch.empty((stop - start, self._k), dtype=torch.float32)
        for first in range(start, stop, self._step):
            keys = self._best_keys(first, min(first + self._step, stop))
            found = slice(first - start, first - start + len(keys))
            indices[found], similarities[found] = row_numbers_of(keys), similarities_of(keys)
        return indices, similarities

    @property
    def _step(self) -> int:
        """Rows of a query block."""
        if not self._uses_banks:
            return self._block
        return QUERIES if self._cheap is None else self._cheap.queries

    def _best_keys(self, first: int, last: int) -> Tensor:
        """The k greatest keys of each row from ``first`` to ``last``, falling, (b, k)."""
        device = self._rows.device
        queries, own = self._rows[first:last], torch.arange(first, last, device=device)
        best, open_ = no_keys(len(own), self._k, device), torch.arange(len(own), device=device)
        for bank in self._banks():
            found, is_known = bank.best(queries[open_], own[open_], self._rows.similarities)
            best[open_[is_known]] = found[is_known]
            open_ = open_[~is_known]
            if bank is self._on_axes:
                self._note_left_open(len(open_), len(own))
            if not len(open_):
                return best
        self.num_compared_with_all += len(open_)
        for some in open_.split(self._block):
            best[some] = self._best_of_all(queries[some], own[some])
        return best

    def _note_left_open(self, left: int, asked: int) -> None:
        """Look no more at axes that tell too little: the sample they were chosen by did not show what rows are like."""
        self._left_open, self._asked = self._left_open + left, self._asked + asked
        if self._asked >= QUERIES and self._left_open > self._asked / 2:
            self._on_axes = None

    def _banks(self) -> Iterator[Bank]:
        """The fastest first, and another for queries of which that leaves too many rows."""
        if self._on_axes is not None:
            yield self._on_axes
        if self._uses_banks:
            yield self._whole_rows

    def _bank_on_axes(self) -> Bank | None:
        num_rows, width = self._rows.shape
        if self._rows.device.type != "cpu" or not may_have_axes(num_rows, width):
            return None
        # Threads share a product, and little else.
        product = (1.0 if self._cheap is None else CHEAP_PRODUCT) / torch.get_num_threads()
        axes = choose_axes(self._rows[sample_of(num_rows)], num_rows, self._k, product)
        return None if axes is None else BoundBank(self._rows.__getitem__, self._rows.shape, self._k, axes)

    @cached_property
    def _whole_rows(self) -> Bank:
        if self._cheap is None:
            return BoundBank(self._rows.__getitem__, self._rows.shape, self._k, None, self._most_kept)
        return CandidateBank(self._rows.__getitem__, self._rows.shape, self._k, self._cheap, self._most_kept)

    def _best_of_all(self, queries: Tensor, own: Tensor) -> Tensor:
        return best_of_all(queries.double(), own, self._rows.exact, len(self._rows), self._k, self._block)


def _check_request(num_rows: int, k: int, block: int) -> None:
    if not 1 <= k < num_rows:
        raise ValueError(f"k={k} neighbours of {num_rows} rows; k must be at least 1 and below the number of rows")
    if block < 1:
        raise ValueError(f"block={block} rows; a block needs at least 1")


def _check_finite(embeddings: Rows, step: int) -> None:
    for first in range(0, len(embeddings), step):
        finite = torch.isfinite(take_rows(embeddings, slice(first, first + step))).all(dim=1)
        if not finite.all():
            row = first + int((~finite).nonzero()[0, 0])
            raise ValueError(f"row {row} of the embeddings is not finite; neighbours need finite unit rows")


def best_of_all(
    queries: Tensor, own: Tensor, exact: Callable[[slice], Tensor], num_rows: int, k: int, block: int
) -> Tensor:
    """The k greatest keys of each query, falling, int64, (b, k): all rows are compared, tile by tile.

    Args:
        queries: Rows on the grid, float64, (b, D).
        own: Their row numbers, which are left out, int64, (b,).
        exact: Gives rows on the grid, float64.
        num_rows: N.
        k: Neighbours per row.
        block: Rows of a tile.
    """
    best = no_keys(len(queries), k, queries.device)
    for first in range(0, num_rows, block):
        tile = exact(slice(first, first + block))
        similarities = (queries @ tile.T).float().add_(0.0)
        rows = torch.arange(first, first + len(tile), device=queries.device)
        similarities[rows == own[:, None]] = -torch.inf
        best = merge_tile(best, similarities, rows)
    return best
