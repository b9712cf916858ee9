"""Nearest neighbours among the few rows that a bound on their similarity does not rule out.

A bound is cheaper than a similarity: a product in float32 on the first principal axes (neighbor_axes.py), or in
float32 of whole rows, where few axes do not tell rows apart. A row whose bound is below the query's k-th similarity is
not among its k nearest; the others are compared exactly.

The k-th similarity is not known beforehand, so it is bet on. A bet is won if the k-th similarity that was found reaches
it, as no row that does was left out. Else what was found is the next bet, which cannot be lost.

Shapes: N rows, D embedding width, k neighbours, d axes, b queries, t rows of a bank tile.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.neighbor_axes import MOST_BOUNDED, TRIED, Axes, Floats, Projected, margin_of, most_compared
from spice_ray.core.neighbor_keys import no_keys, similarities_of

Ints = NDArray[np.int64]
TakeRows = Callable[[slice | Tensor], Tensor]
"""Rows by number, float32, (n, D)."""
Compare = Callable[[Tensor, Tensor, Sequence[Ints]], Tensor]
"""Merges rows with the greatest keys found so far, by exact similarities: keys, int64, (b, k); queries, float32,
(b, D); and the numbers of each query's rows."""

QUERIES = 512
"""b, at most."""
_TILE = 1 << 16
"""t, at most."""
_TILE_NUMBERS = 1 << 24
"""Of a tile that is taken anew for each block."""
_CHUNK = 1 << 10
"""Rows that are projected at once: few, so that the memory of one chunk serves the next."""
_KEPT_BYTES = 512 << 20
"""Whole rows that are kept; of more, each block of queries takes them anew."""
_FOLD = 64
"""Columns, at most, whose greatest stands for them where the k-th bound is looked for."""
_SPARE = 8
"""Times k: so many of these there should be, else the k-th of them lies far below the k-th bound."""
_STEP = 1e-3
"""By how much a bet is lowered at least."""


class _Left(NamedTuple):
    """What is left of all rows."""

    bets: Floats
    """(b,)"""
    rows: list[Ints]
    """Those of each query that reach its bet."""


class BoundBank:
    """All rows, in numbers whose products bound similarities."""

    def __init__(self, take: TakeRows, shape: tuple[int, int], k: int, axes: Axes | None) -> None:
        """Look at all rows once, on the CPU.

        Args:
            take: Gives the exact rows.
            shape: N and D.
            k: Neighbours per row, at most ``MOST_NEIGHBORS``; where it is above N / 64, there may well be no answer.
            axes: Any; the better they fit, the fewer rows are left. None: whole rows.
        """
        self._take, self._num_rows, self._k, self._axes = take, shape[0], k, axes
        is_kept = axes is not None or self._num_rows * shape[1] * 4 <= _KEPT_BYTES
        self._tile = min(self._num_rows, _TILE if is_kept else max(1, _TILE_NUMBERS // shape[1]))
        self._space = np.empty((QUERIES, self._tile), np.float32)
        self._fetch_space = space_for_rows(np.float32)
        self._first: list[Floats] = []
        further, longest = list[Floats](), 0.0
        for start in range(0, self._num_rows, self._tile):
            rows = take(slice(start, start + self._tile))
            longest = max(longest, float(torch.linalg.vector_norm(rows, dim=1).max()))
            if axes is not None:
                projected = [axes.project(chunk) for chunk in rows.split(_CHUNK)]
                self._first.append(np.concatenate([one.first for one in projected]))
                further.append(np.concatenate([one.further for one in projected]))
            elif is_kept:
                self._first.append(rows.numpy())
        if axes is not None:
            self._rests = np.concatenate([numbers[:, -1] for numbers in self._first])
            self._further = np.concatenate(further)
        # What sums of so many products lose in float32, and as much again, so that half of it is to spare: for
        # coordinates that were rounded to float32, and because similarities are compared as float32.
        self._error = np.float32(longest**2 * ((shape[1] if axes is None else axes.width) + 16) * 2.0**-23)
        self._margin = 0.0 if axes is None else self._choose_margin()

    def best(self, queries: Tensor, first: int, compare: Compare) -> Tensor | None:
        """The k greatest keys of each query, falling, int64, (b, k).

        Args:
            queries: Exact rows, float32, (b, D).
            first: The row number of the first of them; the others follow.
            compare: Compares rows exactly.

        Returns:
            None where too many rows are left.
        """
        projected, own = self._project(queries), np.arange(first, first + len(queries))
        best, bets = no_keys(len(queries), self._k), np.full(len(queries), np.nan, np.float32)
        open_, step = np.arange(len(queries)), _STEP
        while len(open_):
            part = Projected(*(numbers[open_] for numbers in projected))
            left = self._left(part, own[open_], bets[open_])
            if left is None:
                return None
            best[open_] = compare(no_keys(len(open_), self._k), queries[open_], left.rows)
            kth = similarities_of(best[open_, -1]).numpy()
            # Fewer than k were found: that says no more than that the bet was much too high.
            bets[open_] = np.where(np.isfinite(kth), kth, left.bets - step)
            open_, step = open_[kth < left.bets], 2 * step
        return best

    def _left(self, projected: Projected, own: Ints, bets: Floats) -> _Left | None:
        """All rows that reach the bets; where there is none (nan), it is made."""
        bets, is_open, room = bets.copy(), np.isnan(bets), MOST_BOUNDED * len(own)
        highest = np.full((len(own), self._k), -np.inf, np.float32)
        found: list[list[tuple[Ints, Floats]]] = [[] for _ in own]
        for start in range(0, self._num_rows, self._tile):
            bounds = self._bounds(projected.first, own, start)
            # One query at a time, as its bounds fit into a processor's cache.
            for query, bound in enumerate(bounds):
                if is_open[query]:
                    highest[query] = self._highest(highest[query], bound)
                    bets[query] = highest[query, 0] - self._margin * projected.first[query, -1] - self._error
                columns = np.flatnonzero(bound >= bets[query] - self._error)
                room -= len(columns)
                if room < 0:
                    return None
                found[query].append((columns + start, bound.take(columns)))
        rows = [self._reach(projected, query, parts, bets[query]) for query, parts in enumerate(found)]
        return None if sum(map(len, rows)) > most_compared(self._k) * len(own) else _Left(bets, rows)

    def _bounds(self, queries: Floats, own: Ints, start: int) -> Floats:
        """On the similarities to a tile's rows, -inf for the query itself, (b, t)."""
        rows = self._first[start // self._tile] if self._first else self._take(slice(start, start + self._tile)).numpy()
        # numpy's OpenBLAS, as torch's MKL has slower code for processors of other makers than its own.
        bounds = np.matmul(queries, rows.T, out=self._space[: len(queries), : len(rows)])
        inside = np.flatnonzero((own >= start) & (own < start + len(rows)))
        bounds[inside, own[inside] - start] = -np.inf
        return bounds

    def _highest(self, highest: Floats, bounds: Floats) -> Floats:
        """The k greatest so far, or a little less, the least of them first, (k,)."""
        fold = max(1, min(_FOLD, len(bounds) // (_SPARE * self._k)))
        folded = bounds[: len(bounds) // fold * fold].reshape(fold, -1).max(0)
        return np.partition(np.concatenate((highest, folded)), -self._k)[-self._k :]

    def _reach(self, projected: Projected, query: int, parts: list[tuple[Ints, Floats]], bet: np.float32) -> Ints:
        """Of a query's rows those that reach its bet on all axes."""
        rows, bounds = (np.concatenate(one) for one in zip(*parts, strict=True))
        if len(parts) > 1:  # the bet was lower when the first were chosen
            stays = np.flatnonzero(bounds >= bet - self._error)
            rows, bounds = rows.take(stays), bounds.take(stays)
        if self._axes is None:
            return rows
        similarities = bounds - projected.first[query, -1] * self._rests.take(rows)
        bounds = similarities + fetch(self._further, rows, self._fetch_space) @ projected.further[query]
        return rows.take(np.flatnonzero(bounds >= bet - self._error))

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
        nearest = torch.full((TRIED, self._k + 1), -torch.inf)  # the query itself too
        for start in range(0, self._num_rows, self._tile):
            bounds = self._bounds(projected, own, start)
            highest = np.stack([self._highest(*one) for one in zip(highest, bounds, strict=True)])
            similarities = queries @ self._take(slice(start, start + self._tile)).T
            nearest = torch.cat((nearest, similarities), dim=1).topk(self._k + 1, dim=1).values
        rests = torch.from_numpy(projected[:, -1])
        return margin_of(torch.from_numpy(highest[:, 0]) - nearest[:, -1], rests)


def space_for_rows(dtype: type[Any]) -> NDArray[Any]:
    """Memory for ``fetch``."""
    return np.empty(1 << 20, dtype)


def fetch(bank: Floats, rows: Ints, space: Floats) -> Floats:
    """The chosen rows, in memory that is there already: new memory the system would have to give page by page."""
    shape = len(rows), bank.shape[1]
    if shape[0] * shape[1] > space.size:
        return bank.take(rows, 0)
    # Clipped, as numpy would else take them into new memory first to see whether all are there.
    return bank.take(rows, 0, out=space[: shape[0] * shape[1]].reshape(shape), mode="clip")
