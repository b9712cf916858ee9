"""Exact nearest neighbours by cosine (paper III-C), in memory that the block bounds and not the number of images.

The answer is the same for any block, any split of the rows over workers, and on CPU and GPU: rows are rounded to
multiples of 2^-26, so that in float64 every product and every partial sum of unit rows is exact (a multiple of 2^-52,
below 2), and no order of summation can matter. Images with equal embeddings are therefore exactly equally similar.
Rounded so, float32 rows still are float32: those of at least 1/4 are such multiples anyway.

Of many rows on the CPU only candidates are compared exactly (neighbor_candidates.py); the answer is the same.

Shapes: N rows, D embedding width, k neighbours, b rows of a query block, t rows of a bank tile.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.neighbor_candidates import MOST_NEIGHBORS, QUERIES, CandidateBank, Candidates, Pairs, cheap_dtype
from spice_ray.core.neighbor_keys import (
    LOWEST_KEY,
    keys_of,
    merge_pairs,
    merge_tile,
    row_numbers_of,
    similarities_of,
)


class ChosenRows(Protocol):
    """Rows that are fetched when they are asked for."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> NDArray[Any]:
        """The chosen rows, float, (n, D)."""
        ...


Rows = Tensor | NDArray[Any] | ChosenRows

_ROUNDER = 1.5 * (1 << 26)
"""What is added to it in float64 is rounded to a multiple of 2^-26."""
_MANY_ROWS = 1 << 11
"""From so many on candidates are the faster way."""
_KEPT_BYTES = 512 << 20
"""Rows on the grid that are kept; those of more are rounded whenever they are looked at."""


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
                many rows on the CPU it is at most about 1 GB instead, and the block is a fixed one.
            device: Where to compute; none: where the embeddings are. Rows come to it tile by tile, so put a tensor
                there beforehand if it fits.

        Raises:
            ValueError: ``k`` is not in 1..N-1, ``block`` is below 1, or a value is not finite.
        """
        _check_request(len(embeddings), k, block)
        _check_finite(embeddings, block)
        self._embeddings, self._k, self._block, self._device = embeddings, k, block, device
        self._grid: Tensor | None = None
        self._bank: CandidateBank | None = None
        if self._may_use_candidates():
            self._grid = self._kept_grid()
            self._bank = CandidateBank(self._rows, len(embeddings), cheap_dtype())

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
        step = self._block if self._bank is None else QUERIES
        for first in range(start, stop, step):
            keys = self._best_keys(first, min(first + step, stop))
            found = slice(first - start, first - start + len(keys))
            indices[found], similarities[found] = row_numbers_of(keys), similarities_of(keys)
        return indices, similarities

    def _best_keys(self, first: int, last: int) -> Tensor:
        """The k greatest keys of each row from ``first`` to ``last``, falling, (b, k)."""
        queries = self._rows(slice(first, last))
        if self._bank is not None:
            found = self._bank.candidates(queries, first, self._k)
            if found is not None:
                return self._best_of(found, self._bank, queries)
        starts = range(0, len(queries), self._block)
        return torch.cat([self._best_of_all(queries[start : start + self._block], first + start) for start in starts])

    def _may_use_candidates(self) -> bool:
        at_home = isinstance(self._embeddings, Tensor) and self._embeddings.device.type != "cpu"
        on_cpu = not at_home if self._device is None else self._device.type == "cpu"
        return on_cpu and len(self._embeddings) >= max(_MANY_ROWS, 64 * self._k) and self._k <= MOST_NEIGHBORS

    def _best_of(self, found: Candidates, bank: CandidateBank, queries: Tensor) -> Tensor:
        """The greatest keys of candidates."""
        pairs, exact = found.pairs, queries.double()
        none = torch.full((len(queries), self._k), LOWEST_KEY)
        is_sure = pairs.cheap >= found.floor[pairs.queries, 0]
        best = self._merge(none, pairs.where(is_sure), exact)
        needed = bank.rounded(similarities_of(best[:, -1:]) - found.error)
        return self._merge(best, pairs.where(~is_sure & (pairs.cheap >= needed[pairs.queries, 0])), exact)

    def _merge(self, best: Tensor, pairs: Pairs, queries: Tensor) -> Tensor:
        """With pairs that are compared exactly: few of each query, so that one query at a time is the fastest."""
        counts = pairs.queries.bincount(minlength=len(queries)).tolist()
        exact = [self._exact(rows) @ query for query, rows in zip(queries, pairs.rows.split(counts), strict=True)]
        # Adding zero gives -0.0 the bits of 0.0.
        return merge_pairs(best, pairs.queries, keys_of(torch.cat(exact).float().add_(0.0), pairs.rows))

    def _best_of_all(self, queries: Tensor, first: int) -> Tensor:
        own = torch.arange(first, first + len(queries), device=queries.device)
        return best_of_all(queries.double(), own, self._exact, len(self._embeddings), self._k, self._block)

    def _rows(self, chosen: slice | Tensor) -> Tensor:
        """Rows on the grid, float32, (n, D)."""
        return self._exact(chosen).float() if self._grid is None else self._grid[chosen]

    def _exact(self, chosen: slice | Tensor) -> Tensor:
        """The same in float64."""
        if self._grid is not None:
            # index_select copies whole rows, which an index by a tensor does not.
            rows = self._grid[chosen] if isinstance(chosen, slice) else self._grid.index_select(0, chosen)
            return rows.double()
        return on_grid(take_rows(self._embeddings, chosen).to(device=self._device))

    def _kept_grid(self) -> Tensor | None:
        """All rows on the grid, where they are not too many."""
        num_rows, width = self._embeddings.shape
        if num_rows * width * 4 > _KEPT_BYTES:
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
    best = torch.full((len(queries), k), LOWEST_KEY, device=queries.device)
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
