"""The few pairs of rows that can be neighbours, found in bfloat16 and by a bound on what that can err.

Let s be the similarity of a pair, s' the cheap one before it is rounded to the cheap type, and |s - s'| <= E for all
pairs of a query. If at least k rows have s' >= f, the k-th greatest s is at least f - E, and a row with s' < f - 2 E
cannot be among the k. What is left, hardly more than k rows, is compared exactly, those with s' >= f first: once their
k-th greatest s is known to be g, a row with s' < g - E is out too. Rounding to the cheap type keeps the order, so the
tests may be made on rounded values.

A product in bfloat16 costs a fifth of one in float32 on a processor with matrix tiles; then choosing is what costs. It
looks at the greatest similarity of each group of columns first, and at the columns of few groups.

Shapes: N rows, D embedding width, k neighbours, b rows of a query block, t rows of a bank tile, P pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.neighbor_axes import most_compared
from spice_ray.core.neighbor_bounds import QUERIES, Compare, Flags, Ints, TakeRows
from spice_ray.core.neighbor_keys import no_keys, similarities_of

CHEAP_PRODUCT = 0.2
"""What a number of a product in bfloat16 costs of one in float32, where there are matrix tiles."""
_GROUP = 16
"""Columns of a group, each a tile's sixteenth apart from the next."""
_FOLD = 8
"""Groups, at most, whose greatest stands for them where the floor is looked for."""
_SPARE = 4
"""Times k: so many of these there should be, else the k-th of them lies far below the k-th similarity."""
_TILE = 1 << 15
"""t, at most: of wide rows fewer, so that a tile has no more values than this many of 512."""
_KEPT_BYTES = 512 << 20
"""Cheap rows that are kept; of more, each block of queries rounds them anew."""


class Pairs(NamedTuple):
    """Candidates of a query block, by rising query."""

    queries: Tensor
    """Position in the query block, int64, (P,)."""
    rows: Tensor
    """Row numbers, int64, (P,)."""
    cheap: Tensor
    """Rounded cheap similarities, float32, (P,)."""

    def where(self, mask: Tensor) -> "Pairs":
        """Those of a mask, bool, (P,)."""
        return self.at(mask.nonzero()[:, 0])

    def at(self, positions: Tensor) -> "Pairs":
        """Those at positions, int64."""
        return Pairs(*(values.index_select(0, positions) for values in self))

    def by_query(self, queries: int) -> list[Ints]:
        """The row numbers of each of so many queries."""
        counts = self.queries.bincount(minlength=queries).tolist()
        return [rows.numpy() for rows in self.rows.split(counts)]


class Candidates(NamedTuple):
    """All pairs of a query block that can be among the nearest."""

    pairs: Pairs
    floor: Tensor
    """f: what the cheap similarities of at least k rows of a query reach, float32, (b, 1)."""
    error: Tensor
    """E, float32, (b, 1)."""


def has_matrix_tiles() -> bool:
    """Whether this processor has tiles for products in bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class CandidateBank:
    """All rows in bfloat16, and what that can err."""

    def __init__(self, take: TakeRows, num_rows: int, k: int) -> None:
        """Look at all rows once, on the CPU.

        Args:
            take: Gives the exact rows.
            num_rows: N.
            k: Neighbours per row.
        """
        self._take, self._num_rows, self._k = take, num_rows, k
        self._tile = _tile_of(num_rows, take(slice(0, 1)).shape[1])
        self._space = torch.empty(QUERIES, self._tile, dtype=torch.bfloat16)
        self._kept: list[Tensor] = []
        self._norm = self._loss = 0.0
        for first in range(0, num_rows, self._tile):
            rows = take(slice(first, first + self._tile))
            self._norm = max(self._norm, float(torch.linalg.vector_norm(rows, dim=1).max()))
            self._loss = max(self._loss, float(torch.linalg.vector_norm(rows - _rounded(rows), dim=1).max()))
            if num_rows * rows.shape[1] * 2 <= _KEPT_BYTES:
                self._kept.append(self._cheap_tile(rows))

    def best(self, queries: Tensor, own: Ints, compare: Compare) -> tuple[Tensor, Flags]:
        """The k greatest keys of each query, falling, int64, (b, k), and which of them are known to be these, (b,).

        None of them where there are too many candidates.

        Args:
            queries: Exact rows, float32, (b, D).
            own: Their row numbers, (b,).
            compare: Compares rows exactly.
        """
        found = self.candidates(queries, torch.from_numpy(own))
        if found is None:
            return no_keys(len(own), self._k), np.zeros(len(own), np.bool_)
        pairs, number = found.pairs, len(queries)
        is_sure = pairs.cheap >= found.floor[pairs.queries, 0]
        best = compare(no_keys(number, self._k), queries, pairs.where(is_sure).by_query(number))
        needed = _rounded(similarities_of(best[:, -1:]) - found.error)
        others = pairs.where(~is_sure & (pairs.cheap >= needed[pairs.queries, 0]))
        return compare(best, queries, others.by_query(number)), np.ones(number, np.bool_)

    def candidates(self, queries: Tensor, own: Tensor) -> Candidates | None:
        """All rows that can be among the k nearest of each query, itself left out; None where there are too many.

        Args:
            queries: Exact rows, float32, (b, D).
            own: Their row numbers, int64, (b,).
        """
        k = self._k
        cheap, error = queries.bfloat16(), self.error_of(queries)
        best = torch.full((len(queries), k), -torch.inf)
        found, room = list[Pairs](), most_compared(k) * len(queries)
        for start in range(0, self._num_rows, self._tile):
            similarities = self._similarities(cheap, own, start)
            groups = similarities.view(len(queries), _GROUP, -1).amax(dim=1).float()
            best = torch.cat((best, _folded(groups, k)), dim=1).topk(k, dim=1).values
            chosen = _above(similarities, groups, self._threshold(best, error), start, room)
            if chosen is None:
                return None
            room -= len(chosen.rows)
            found.append(chosen)
        return Candidates(_left(found, self._threshold(best, error)), best[:, -1:], error)

    def error_of(self, queries: Tensor) -> Tensor:
        """E of each query, float32, (b, 1).

        By Cauchy and Schwarz, from what rounding took from each row; what D sums of products lose in float32 comes to
        it, and that exact similarities are compared as float32.
        """
        norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        losses = torch.linalg.vector_norm(queries - _rounded(queries), dim=1, keepdim=True)
        of_rows = losses * (self._norm + self._loss) + norms * self._loss
        of_sums = (norms + losses) * (self._norm + self._loss) * (queries.shape[1] + 4) * 2.0**-23
        error: Tensor = 1.01 * (of_rows + of_sums)
        return error

    def _threshold(self, best: Tensor, error: Tensor) -> Tensor:
        """Below which no rounded similarity belongs to one of the k nearest, float32, (b, 1)."""
        floor = best[:, -1:]
        # A rounded similarity of f was at least f less half the gap to the next one.
        unrounded = floor - floor.abs() * (torch.finfo(torch.bfloat16).eps / 2)
        return _rounded(unrounded - 2 * error).clamp_min_(torch.finfo(torch.float32).min)

    def _similarities(self, queries: Tensor, own: Tensor, start: int) -> Tensor:
        """Those to a tile, in the cheap type, (b, t); -inf for the query itself, and where the tile has no row."""
        number = start // self._tile
        tile = self._kept[number] if self._kept else self._cheap_tile(self._take(slice(start, start + self._tile)))
        similarities = torch.mm(queries, tile.T, out=self._space[: len(queries)])
        similarities[:, self._num_rows - start :] = -torch.inf
        inside = ((own >= start) & (own < start + self._tile)).nonzero()[:, 0]
        similarities[inside, own[inside] - start] = -torch.inf
        return similarities

    def _cheap_tile(self, rows: Tensor) -> Tensor:
        """In the cheap type, with zeros where the last tile has no row, (t, D)."""
        cheap = rows.bfloat16()
        return cheap if len(cheap) == self._tile else F.pad(cheap, (0, 0, 0, self._tile - len(cheap)))


def _rounded(values: Tensor) -> Tensor:
    """As bfloat16 has them, float32."""
    return values.bfloat16().float()


def _tile_of(num_rows: int, width: int) -> int:
    """t: whole groups, and tiles of about the same size."""
    unit, most = _GROUP * _FOLD, min(_TILE, _TILE * 512 // width)
    return max(1, -(-num_rows // (-(-num_rows // most) * unit))) * unit


def _folded(groups: Tensor, k: int) -> Tensor:
    """The greatest of every few groups, so that fewer have to be sorted."""
    fold = next(fold for fold in (_FOLD, 4, 2, 1) if fold == 1 or groups.shape[1] // fold >= _SPARE * k)
    return groups.view(len(groups), fold, -1).amax(dim=1)


def _above(similarities: Tensor, groups: Tensor, threshold: Tensor, start: int, room: int) -> Pairs | None:
    """The pairs of a tile that reach the threshold; None where they are too many."""
    queries, group = (groups >= threshold).nonzero(as_tuple=True)
    if len(queries) > room:
        return None
    members = similarities.view(*groups.shape[:1], _GROUP, -1)[queries, :, group].float()
    pair, place = (members >= threshold[queries]).nonzero(as_tuple=True)
    if len(pair) > room:
        return None
    rows = start + place * groups.shape[1] + group[pair]
    return Pairs(queries[pair], rows, members[pair, place])


def _left(found: list[Pairs], threshold: Tensor) -> Pairs:
    """Of all tiles' pairs those that reach the last threshold, by rising query."""
    if len(found) == 1:
        return found[0]
    pairs = Pairs(*(torch.cat(values) for values in zip(*found, strict=True)))
    pairs = pairs.where(pairs.cheap >= threshold[pairs.queries, 0])
    return pairs.at(pairs.queries.argsort(stable=True))
