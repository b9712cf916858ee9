"""Exact nearest neighbours by cosine (paper III-C), in memory that the block bounds and not the number of images.

The answer is the same for any block, any split of the rows over workers, and on CPU and GPU: rows are rounded to
multiples of 2^-26, so that in float64 every product and every partial sum of unit rows is exact (a multiple of 2^-52,
below 2), and no order of summation can matter. Images with equal embeddings are therefore exactly equally similar.
Rounded so, float32 rows still are float32: those of at least 1/4 are such multiples anyway.

Of many rows on the CPU only those are compared exactly that a bound does not rule out (neighbor_bounds.py), or, where
products in bfloat16 are cheap, candidates (neighbor_candidates.py); the answer is the same.

Shapes: N rows, D embedding width, k neighbours, b rows of a query block, t rows of a bank tile.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.neighbor_axes import MOST_NEIGHBORS, choose_axes, may_have_axes, sample_of
from spice_ray.core.neighbor_bounds import (
    KEPT_BYTES,
    QUERIES,
    BoundBank,
    Compare,
    Flags,
    Ints,
    fetch,
    space_for_rows,
)
from spice_ray.core.neighbor_candidates import CHEAP_PRODUCT, CandidateBank, has_matrix_tiles
from spice_ray.core.neighbor_keys import keys_of, merge_pairs, merge_tile, no_keys, row_numbers_of, similarities_of


class ChosenRows(Protocol):
    """Rows that are fetched when they are asked for."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> NDArray[Any]:
        """The chosen rows, float, (n, D)."""
        ...


class Bank(Protocol):
    """All rows, made ready for comparing few of them exactly."""

    def best(self, queries: Tensor, own: Ints, compare: Compare) -> tuple[Tensor, Flags]:
        """The k greatest keys of rows, falling, int64, (b, k), and which of them are known to be these, (b,)."""
        ...


Rows = Tensor | NDArray[Any] | ChosenRows

_ROUNDER = 1.5 * (1 << 26)
"""What is added to it in float64 is rounded to a multiple of 2^-26."""
_MANY_ROWS = 1 << 11
"""From so many on comparing few of them exactly is the faster way."""


def exact_neighbors(
    embeddings: Rows, k: int, *, block: int = 1024, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of every row: ``NeighborSearch`` asked for all of them."""
    return NeighborSearch(embeddings, k, block=block, device=device).find(0, len(embeddings))


class NeighborSearch:
    """Looks for the k nearest other rows by cosine; what it needs of the rows is made once."""

    def __init__(self, embeddings: Rows, k: int, *, block: int = 1024, device: torch.device | None = None) -> None:
        """Look at all rows once.

        Args:
            embeddings: Unit rows, taken as float32, (N, D); may be a memory-mapped array.
            k: Neighbours per row, in 1..N-1.
            block: Rows of a query block and of the tiles that it meets one by one. Working memory is at most about
                ``block`` * (100 * ``block`` + 40 * D + 40 * k) bytes whatever N is; there is never an N x N array. For
                many rows on the CPU it is at most about 1.5 GB instead, and the block is a fixed one.
            device: Where to compute; none: where the embeddings are. Rows come to it tile by tile, so put a tensor
                there beforehand if it fits.

        Raises:
            ValueError: ``k`` is not in 1..N-1, ``block`` is below 1, or a value is not finite.
        """
        _check_request(len(embeddings), k, block)
        _check_finite(embeddings, block)
        self._embeddings, self._k, self._block, self._device = embeddings, k, block, device
        self._grid: Tensor | None = None
        self._on_axes: Bank | None = None
        self._asked = self._left_open = 0
        self._uses_banks = self._may_use_banks()
        if self._uses_banks:
            self._grid = self._kept_grid()
            self._space, self._space64 = space_for_rows(np.float32), space_for_rows(np.float64)
            self._on_axes = self._bank_on_axes()

    def find(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The neighbours of the rows from ``start`` to ``stop``, the same to the bit whoever asks for the others.

        Returns:
            Row numbers, int64, and similarities, float32, both (stop - start, k), on the CPU. Each row is ordered by
            falling similarity (as float32) and equal ones by rising row number; the row itself is left out.

        Raises:
            ValueError: ``start`` and ``stop`` are no range within 0..N.
        """
        if not 0 <= start <= stop <= len(self._embeddings):
            raise ValueError(f"rows {start} to {stop} of {len(self._embeddings)}; the range must lie within the rows")
        indices = torch.empty((stop - start, self._k), dtype=torch.int64)
        similarities = torch.empty((stop - start, self._k), dtype=torch.float32)
        step = QUERIES if self._uses_banks else self._block
        for first in range(start, stop, step):
            keys = self._best_keys(first, min(first + step, stop))
            found = slice(first - start, first - start + len(keys))
            indices[found], similarities[found] = row_numbers_of(keys), similarities_of(keys)
        return indices, similarities

    def _best_keys(self, first: int, last: int) -> Tensor:
        """The k greatest keys of each row from ``first`` to ``last``, falling, (b, k)."""
        queries, own = self._rows(slice(first, last)), np.arange(first, last)
        best, open_ = no_keys(len(own), self._k), np.arange(len(own))
        for bank in self._banks():
            found, is_known = bank.best(queries[open_], own[open_], self._compare)
            best[open_[is_known]] = found[is_known]
            open_ = open_[~is_known]
            if bank is self._on_axes:
                self._note_left_open(len(open_), len(own))
            if not len(open_):
                return best
        for some in torch.from_numpy(open_).split(self._block):
            best[some] = self._best_of_all(queries[some], torch.from_numpy(own)[some]).to(best.device)
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
        num_rows, width = self._embeddings.shape
        if not may_have_axes(num_rows, width):
            return None
        # Threads share a product, and little else.
        product = (CHEAP_PRODUCT if has_matrix_tiles() else 1.0) / torch.get_num_threads()
        axes = choose_axes(self._rows(sample_of(num_rows)), num_rows, self._k, product)
        return None if axes is None else BoundBank(self._rows, (num_rows, width), self._k, axes)

    @cached_property
    def _whole_rows(self) -> Bank:
        num_rows, width = self._embeddings.shape
        if has_matrix_tiles():
            return CandidateBank(self._rows, num_rows, self._k)
        return BoundBank(self._rows, (num_rows, width), self._k, axes=None)

    def _may_use_banks(self) -> bool:
        at_home = isinstance(self._embeddings, Tensor) and self._embeddings.device.type != "cpu"
        on_cpu = not at_home if self._device is None else self._device.type == "cpu"
        return on_cpu and len(self._embeddings) >= max(_MANY_ROWS, 64 * self._k) and self._k <= MOST_NEIGHBORS

    def _compare(self, best: Tensor, queries: Tensor, rows: Sequence[Ints]) -> Tensor:
        """Merge rows with the greatest keys so far: few of each query, so that one query at a time is the fastest."""
        exact = [self._products(some, query) for query, some in zip(queries.double().numpy(), rows, strict=True)]
        of_query = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(some) for some in rows]))
        # Adding zero gives -0.0 the bits of 0.0.
        similarities = torch.from_numpy(np.concatenate(exact)).float().add_(0.0)
        return merge_pairs(best, of_query, keys_of(similarities, torch.from_numpy(np.concatenate(rows))))

    def _products(self, rows: Ints, query: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of a query with rows, some at a time, (n,)."""
        most = max(1, self._space.size // len(query))
        parts = [self._fetched(rows[start : start + most]) @ query for start in range(0, len(rows), most)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _fetched(self, rows: Ints) -> NDArray[np.float64]:
        """Rows on the grid, float64, (n, D)."""
        if self._grid is None:
            return self._exact(torch.from_numpy(rows)).numpy()
        found = fetch(self._grid.numpy(), rows, self._space)
        # Into memory that is there already, as they were fetched.
        exact = self._space64[: found.size].reshape(found.shape)
        np.copyto(exact, found)
        return exact

    def _best_of_all(self, queries: Tensor, own: Tensor) -> Tensor:
        own = own.to(queries.device)
        return best_of_all(queries.double(), own, self._exact, len(self._embeddings), self._k, self._block)

    def _rows(self, chosen: slice | Tensor) -> Tensor:
        """Rows on the grid, float32, (n, D)."""
        return self._exact(chosen).float() if self._grid is None else self._grid[chosen]

    def _exact(self, chosen: slice | Tensor) -> Tensor:
        """The same in float64."""
        if self._grid is not None:
            return self._grid[chosen].double()
        return on_grid(take_rows(self._embeddings, chosen).to(device=self._device))

    def _kept_grid(self) -> Tensor | None:
        """All rows on the grid, where they are not too many."""
        num_rows, width = self._embeddings.shape
        if num_rows * width * 4 > KEPT_BYTES:
            return None
        grid = torch.empty(num_rows, width)
        for first in range(0, num_rows, self._block):
            grid[first : first + self._block] = self._exact(slice(first, first + self._block))
        return grid


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


def on_grid(rows: Tensor) -> Tensor:
    """Rows rounded to multiples of 2^-26, float64."""
    return rows.float().double().add_(_ROUNDER).sub_(_ROUNDER)


def take_rows(embeddings: Rows, chosen: slice | Tensor) -> Tensor:
    """The chosen rows as a tensor, (n, D)."""
    if isinstance(embeddings, Tensor):
        return embeddings.detach()[chosen]
    # The copy is for memory maps that cannot be written, which torch does not take.
    return torch.from_numpy(np.array(embeddings[chosen if isinstance(chosen, slice) else chosen.numpy()]))
