"""Nearest neighbours among the few rows that a bound on their similarity does not rule out.

A bound is cheaper than a similarity: a product in float32 on the first principal axes (neighbor_axes.py), or in
float32 of whole rows, where few axes do not tell rows apart. A row whose bound is below the query's k-th similarity is
not among its k nearest; the others are compared exactly.

The k-th similarity is not known beforehand, so it is bet on. A bet is won if the k-th similarity that was found reaches
it, as no row that does was left out. Else what was found, if at least k rows were, is a bet that cannot be lost.

Shapes: N rows, D embedding width, k neighbours, d axes, b queries, t rows of a bank tile.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.neighbor_axes import MOST_BOUNDED, TRIED, Axes, Projected, margin_of, most_compared
from spice_ray.core.neighbor_keys import keys_of, merge_pairs, no_keys, similarities_of
from spice_ray.core.neighbor_rows import MOST_KEPT, Compare, Floats, Ints, TakeRows, fetch, space_for_rows

Flags = NDArray[np.bool_]
Reached = tuple[Ints, Floats]
"""Row numbers and the bounds on their similarities."""

QUERIES = 512
"""b, at most."""
_TILE = 1 << 16
"""t, at most."""
_TILE_NUMBERS = 1 << 24
"""Of a tile that is taken anew for each block."""
_CHUNK = 1 << 11
"""Rows that are looked at once when a bank is made: few, so that the memory of one chunk serves the next."""
_FOLD = 64
"""Columns, at most, whose greatest stands for them where the k-th bound is looked for."""
_SPARE = 8
"""Times k: so many of these there should be, else the k-th of them lies far below the k-th bound."""


class BoundBank:
    """All rows, in numbers whose products bound similarities."""

    def __init__(
        self, take: TakeRows, shape: tuple[int, int], k: int, axes: Axes | None, most_kept: int = MOST_KEPT
    ) -> None:
        """Look at all rows once, on the CPU.

        Args:
            take: Gives the exact rows.
            shape: N and D.
            k: Neighbours per row, at most ``MOST_NEIGHBORS``.
            axes: Any; the better they fit, the fewer rows are left. None: whole rows.
            most_kept: Bytes of whole rows that may be kept; of more, each block of queries takes them anew.
        """
        self._take, self._num_rows, self._k, self._axes = take, shape[0], k, axes
        is_kept = axes is not None or self._num_rows * shape[1] * 4 <= most_kept
        self._tile = min(self._num_rows, _TILE if is_kept else max(1, _TILE_NUMBERS // shape[1]))
        self._space = np.empty((QUERIES, self._tile), np.float32)
        self._first: list[Floats] = []
        if axes is not None:
            self._first, self._further = self._projected_rows(axes)
            self._rests = np.concatenate([numbers[:, -1] for numbers in self._first])
            self._fetch_space = space_for_rows(np.float32)
        elif is_kept:
            self._first = [take(slice(start, start + self._tile)).numpy() for start in self._starts]
        # With its rest a row on the first axes is as long as it is.
        numbers = (torch.from_numpy(some) for some in self._first) if self._first else self._chunks()
        longest = max(float(torch.linalg.vector_norm(some, dim=1).max()) for some in numbers)
        # A sum of n products of float32 errs by n 2^-24 of the rows' lengths at most, and coordinates that were rounded
        # to float32 by a few more. This is twice as much: a similarity that is rounded to float32 is in reach too.
        self._error = np.float32(longest**2 * ((shape[1] if axes is None else axes.width) + 16) * 2.0**-23)
        self._margin = 0.0 if axes is None else self._choose_margin()

    def best(self, queries: Tensor, own: Tensor, compare: Compare) -> tuple[Tensor, Tensor]:
        """The k greatest keys of each query, falling, int64, (b, k), and which are known to be these, bool, (b,).

        The others are of queries that leave too many rows, or whose bets were much too high.

        Args:
            queries: Exact rows, float32, (b, D).
            own: Their row numbers, int64, (b,).
            compare: Compares rows exactly.
        """
        projected, numbers = self._project(queries), own.numpy()
        best, bets, is_few = self._found(queries, projected, numbers, None, compare)
        kth = similarities_of(best[:, -1]).numpy()
        is_known = is_few & (kth >= bets)
        # What was found of these bounds the k-th similarity from below: no bet is needed any more.
        lost = np.flatnonzero(is_few & ~is_known & np.isfinite(kth))
        if len(lost):
            part = Projected(*(coordinates[lost] for coordinates in projected))
            best[lost], _, is_known[lost] = self._found(queries[lost], part, numbers[lost], kth[lost], compare)
        return best, torch.from_numpy(is_known)

    @property
    def _starts(self) -> range:
        """The first row of each tile."""
        return range(0, self._num_rows, self._tile)

    def _chunks(self) -> Iterator[Tensor]:
        """All rows, some at a time."""
        return (self._take(slice(start, start + _CHUNK)) for start in range(0, self._num_rows, _CHUNK))

    def _projected_rows(self, axes: Axes) -> tuple[list[Floats], Floats]:
        """All rows on the first axes, by tiles, and on the further ones."""
        first = np.empty((self._num_rows, axes.first + 1), np.float32)
        further = np.empty((self._num_rows, axes.width - axes.first + 1), np.float32)
        for number, rows in enumerate(self._chunks()):
            chunk = slice(number * _CHUNK, number * _CHUNK + len(rows))
            first[chunk], further[chunk] = axes.project(rows)
        return [first[start : start + self._tile] for start in self._starts], further

    def _found(
        self, queries: Tensor, projected: Projected, own: Ints, bets: Floats | None, compare: Compare
    ) -> tuple[Tensor, Floats, Flags]:
        """The greatest keys of the rows that reach the bets, these, and which queries have few enough such rows."""
        bets, rows = self._in_reach(projected, own, bets)
        is_few = np.array([some is not None for some in rows])
        few = [np.empty(0, np.int64) if some is None else some for some in rows]
        of_query = torch.arange(len(few)).repeat_interleave(torch.tensor([len(some) for some in few]))
        reached = torch.from_numpy(np.concatenate(few))
        keys = keys_of(compare(queries, of_query, reached), reached)
        return merge_pairs(no_keys(len(own), self._k), of_query, keys), bets, is_few

    def _in_reach(self, projected: Projected, own: Ints, bets: Floats | None) -> tuple[Floats, list[Ints | None]]:
        """The bets, made where there are none, and the rows that reach them; none where a query has too many."""
        makes_bets = bets is None
        bets = np.full(len(own), -np.inf, np.float32) if bets is None else bets
        highest = np.full((len(own), self._k), -np.inf, np.float32)
        found: list[list[Reached] | None] = [[] for _ in own]
        for start in self._starts:
            bounds = self._bounds(projected.first, own, start)
            # One query at a time, as its bounds fit into a processor's cache.
            for query, (bound, parts) in enumerate(zip(bounds, found, strict=True)):
                if parts is None:
                    continue
                before = highest[query].copy()
                for fold in (self._fold(len(bound)), 1):
                    if makes_bets:
                        highest[query] = self._highest(before, bound, fold)
                        bets[query] = highest[query, 0] - self._margin * projected.first[query, -1] - self._error
                    columns = np.flatnonzero(bound >= bets[query] - self._error)
                    # Else the greatest of folded columns may have told little.
                    if len(columns) <= MOST_BOUNDED or not makes_bets:
                        break
                parts.append((columns + start, bound.take(columns)))
                if sum(len(rows) for rows, _ in parts) > MOST_BOUNDED:
                    found[query] = None
        return bets, [
            None if parts is None else self._few(projected, query, parts, bets[query])
            for query, parts in enumerate(found)
        ]

    def _bounds(self, queries: Floats, own: Ints, start: int) -> Floats:
        """On the similarities to a tile's rows, -inf for the query itself, (b, t)."""
        rows = self._first[start // self._tile] if self._first else self._take(slice(start, start + self._tile)).numpy()
        # numpy's OpenBLAS, as torch's MKL has slower code for processors of other makers than its own.
        bounds = np.matmul(queries, rows.T, out=self._space[: len(queries), : len(rows)])
        inside = np.flatnonzero((own >= start) & (own < start + len(rows)))
        bounds[inside, own[inside] - start] = -np.inf
        return bounds

    def _fold(self, columns: int) -> int:
        return max(1, min(_FOLD, columns // (_SPARE * self._k)))

    def _highest(self, highest: Floats, bounds: Floats, fold: int) -> Floats:
        """The k greatest so far, or a little less, the least of them first, (k,)."""
        folded = bounds[: len(bounds) // fold * fold].reshape(fold, -1).max(0)
        return np.partition(np.concatenate((highest, folded)), -self._k)[-self._k :]

    def _few(self, projected: Projected, query: int, parts: list[Reached], bet: np.float32) -> Ints | None:
        """Of a query's rows those that reach its bet on all axes; none where they are too many."""
        rows, bounds = (np.concatenate(one) for one in zip(*parts, strict=True))
        least = bet - self._error
        if self._axes is None:
            if len(bounds) > self._k:  # folding may have made the bet too low
                least = max(least, np.partition(bounds, -self._k)[-self._k] - 2 * self._error)
        else:
            if len(parts) > 1:  # the bet was lower when the first were chosen
                stays = np.flatnonzero(bounds >= least)
                rows, bounds = rows.take(stays), bounds.take(stays)
            similarities = bounds - projected.first[query, -1] * self._rests.take(rows)
            bounds = similarities + products(self._further, rows, projected.further[query], self._fetch_space)
        rows = rows.take(np.flatnonzero(bounds >= least))
        return rows if len(rows) <= most_compared(self._k) else None

    def _project(self, queries: Tensor) -> Projected:
        if self._axes is None:
            return Projected(queries.numpy(), np.empty((len(queries), 0), np.float32))
        return self._axes.project(queries)

    def _choose_margin(self) -> float:
        """By how much of its rest a query's k-th bound is above its k-th similarity, but for few of a sample."""
        own = np.arange(TRIED) * (self._num_rows // TRIED)
        queries = self._take(torch.from_numpy(own))
        projected = self._project(queries).first
        highest = np.full((TRIED, self._k), -np.inf, np.float32)
        for start in self._starts:
            bounds = self._bounds(projected, own, start)
            fold = self._fold(bounds.shape[1])
            highest = np.stack([self._highest(*one, fold) for one in zip(highest, bounds, strict=True)])
        nearest = torch.full((TRIED, self._k + 1), -torch.inf)  # the query itself too
        for rows in self._chunks():
            nearest = torch.cat((nearest, queries @ rows.T), dim=1).topk(self._k + 1, dim=1).values
        rests = torch.from_numpy(projected[:, -1])
        return margin_of(torch.from_numpy(highest[:, 0]) - nearest[:, -1], rests)


def products(bank: Floats, rows: Ints, query: Floats, space: Floats) -> Floats:
    """Of a query with the chosen rows, (n,)."""
    most = space.size // bank.shape[1]
    parts = [fetch(bank, rows[start : start + most], space) @ query for start in range(0, len(rows), most)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)
