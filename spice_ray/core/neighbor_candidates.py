"""The few pairs of rows that can be neighbours, found in half precision and by a bound on what that can err.

Let s be the similarity of a pair, s' the cheap one before it is rounded to the cheap type, and |s - s'| <= E for all
pairs of a query. If at least k rows have s' >= f, the k-th greatest s is at least f - E, and a row with s' < f - 2 E
cannot be among the k. What is left, hardly more than k rows, is compared exactly, those with s' >= f first: once their
k-th greatest s is known to be g, a row with s' < g - E is out too. Rounding to the cheap type keeps the order, so the
tests may be made on rounded values.

E takes for granted how a device sums up. As a precaution that is checked on every pair that is compared: a query of
which one errs more is said not to be known. So is one that leaves too many rows.

A product in half precision costs a fifth of one in float32 on a processor with matrix tiles, and far less of one in
float64 on a GPU; then choosing is what costs. It looks at the greatest similarity of each group of columns first, and
at the columns of few groups.

Shapes: N rows, D embedding width, k neighbours, b rows of a query block, t rows of a bank tile, P pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spice_ray.core.neighbor_axes import most_compared
from spice_ray.core.neighbor_bounds import QUERIES
from spice_ray.core.neighbor_keys import keys_of, merge_pairs, no_keys, similarities_of
from spice_ray.core.neighbor_rows import Compare, TakeRows

CHEAP_PRODUCT = 0.2
"""What a number of a product in bfloat16 costs of one in float32, where there are matrix tiles."""
_GROUP = 16
"""Columns of a group, each a tile's sixteenth apart from the next."""
_FOLD = 8
"""Groups, at most, whose greatest stands for them where the floor is looked for."""
_SPARE = 4
"""Times k: so many of these there should be, else the k-th of them lies far below the k-th similarity."""
_PAIRS_AT_ONCE = 1 << 23
"""Of a query block, at most, on a GPU."""


class Cheap(NamedTuple):
    """How similarities are computed cheaply."""

    dtype: torch.dtype
    """Of rows, and of similarities once they are summed up in float32."""
    error_of_sum: float
    """What a sum may lose for each of its products, of the lengths of both rows."""
    queries: int
    """b, at most."""
    tile: int
    """t, at most: of wide rows fewer, so that a tile has no more values than this many of 512."""


ON_TILES = Cheap(torch.bfloat16, 2.0**-23, QUERIES, 1 << 15)
# Of half precisions float16 errs less, and numbers of unit rows are in its reach. Tensor cores cut off what does not
# fit into float32, also of numbers that they align before they add them: four times what cutting off each sum would
# lose.
ON_GPU = Cheap(torch.float16, 2.0**-21, 1 << 12, 1 << 16)


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


class Candidates(NamedTuple):
    """All pairs of a query block that can be among the nearest, but of queries that have too many."""

    pairs: Pairs
    is_few: Tensor
    """Which queries have not, bool, (b,)."""
    floor: Tensor
    """f: what the cheap similarities of at least k rows of a query reach, float32, (b, 1)."""
    error: Tensor
    """E, float32, (b, 1)."""


def cheap_of(device: torch.device, k: int) -> Cheap | None:
    """How similarities to k neighbours are cheap there; None where they are not."""
    if device.type == "cpu":
        return ON_TILES if has_matrix_tiles() else None
    # A power of two, of which workers' parts are multiples.
    at_once = 1 << (_PAIRS_AT_ONCE // most_compared(k)).bit_length() - 1
    return ON_GPU._replace(queries=min(ON_GPU.queries, at_once))


def has_matrix_tiles() -> bool:
    """Whether this processor has tiles for products in bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class CandidateBank:
    """All rows in half precision, and what that can err."""

    def __init__(self, take: TakeRows, shape: tuple[int, int], k: int, cheap: Cheap, most_kept: int) -> None:
        """Look at all rows once.

        Args:
            take: Gives the exact rows, on the device where similarities are computed.
            shape: N and D.
            k: Neighbours per row.
            cheap: How.
            most_kept: Bytes of rows in half precision that may be kept; of more, each block of queries rounds them
                anew.
        """
        self._take, self._num_rows, self._k, self._cheap = take, shape[0], k, cheap
        self._most = most_compared(k)
        self._tile = _tile_of(*shape, cheap.tile)
        self._kept: list[Tensor] = []
        self._norm = self._loss = 0.0
        for first in range(0, self._num_rows, self._tile):
            rows = take(slice(first, first + self._tile))
            self._norm = max(self._norm, float(torch.linalg.vector_norm(rows, dim=1).max()))
            self._loss = max(self._loss, float(torch.linalg.vector_norm(rows - self._rounded(rows), dim=1).max()))
            if shape[0] * shape[1] * 2 <= most_kept:
                self._kept.append(self._cheap_tile(rows))
        self._space = torch.empty(cheap.queries, self._tile, dtype=cheap.dtype, device=rows.device)

    def best(self, queries: Tensor, own: Tensor, compare: Compare) -> tuple[Tensor, Tensor]:
        """The k greatest keys of each query, falling, int64, (b, k), and which are known to be these, bool, (b,).

        Args:
            queries: Exact rows, float32, (b, D).
            own: Their row numbers, int64, (b,).
            compare: Compares rows exactly.
        """
        found = self.candidates(queries, own)
        pairs, best = found.pairs, no_keys(len(own), self._k, own.device)
        is_sure = pairs.cheap >= found.floor[pairs.queries, 0]
        sure = pairs.where(is_sure)
        exact = compare(queries, sure.queries, sure.rows)
        best = merge_pairs(best, sure.queries, keys_of(exact, sure.rows))
        needed = self._rounded(similarities_of(best[:, -1:]) - found.error)
        others = pairs.where(~is_sure & (pairs.cheap >= needed[pairs.queries, 0]))
        exact_others = compare(queries, others.queries, others.rows)
        best = merge_pairs(best, others.queries, keys_of(exact_others, others.rows))
        is_known = found.is_few & (similarities_of(best[:, -1]) > -torch.inf)
        for some, similarities in ((sure, exact), (others, exact_others)):
            is_known[some.queries[self._is_off(some, similarities, found.error)]] = False
        return best, is_known

    def candidates(self, queries: Tensor, own: Tensor) -> Candidates:
        """All rows that can be among the k nearest of each query, itself left out.

        Args:
            queries: Exact rows, float32, (b, D).
            own: Their row numbers, int64, (b,).
        """
        cheap, error = queries.to(self._cheap.dtype), self.error_of(queries)
        best = torch.full((len(queries), self._k), -torch.inf, device=queries.device)
        is_few = torch.ones_like(own, dtype=torch.bool)
        found = list[Pairs]()
        for start in range(0, self._num_rows, self._tile):
            similarities = self._similarities(cheap, own, start)
            groups = similarities.view(len(queries), _GROUP, -1).amax(dim=1)
            best = torch.cat((best, _folded(groups, self._k).float()), dim=1).topk(self._k, dim=1).values
            threshold = self._threshold(best, error)
            found.append(_above(similarities, groups, threshold, start, is_few, self._most))
            if sum(len(pairs.rows) for pairs in found) > self._most * len(queries):
                found = [_left(found, threshold, is_few, self._most)]
        return Candidates(_left(found, threshold, is_few, self._most), is_few, best[:, -1:], error)

    def error_of(self, queries: Tensor) -> Tensor:
        """E of each query, float32, (b, 1).

        By Cauchy and Schwarz, from what rounding took from each row; what D sums of products lose in float32 comes to
        it, and that exact similarities are compared as float32.
        """
        norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        losses = torch.linalg.vector_norm(queries - self._rounded(queries), dim=1, keepdim=True)
        of_rows = losses * (self._norm + self._loss) + norms * self._loss
        of_sums = (norms + losses) * (self._norm + self._loss) * (queries.shape[1] + 4) * self._cheap.error_of_sum
        error: Tensor = 1.01 * (of_rows + of_sums)
        return error

    def _threshold(self, best: Tensor, error: Tensor) -> Tensor:
        """Below which no rounded similarity belongs to one of the k nearest, in the cheap type, (b, 1)."""
        floor, kind = best[:, -1:], self._cheap.dtype
        # A rounded similarity of f was at least f less half the gap to the next one.
        return (floor - self._half_gap(floor) - 2 * error).to(kind).clamp_min_(torch.finfo(kind).min)

    def _is_off(self, pairs: Pairs, exact: Tensor, error: Tensor) -> Tensor:
        """Which cheap similarities err more than they can, bool, (P,)."""
        off, allowed = (exact - pairs.cheap).abs(), error[pairs.queries, 0] + self._half_gap(pairs.cheap)
        return ~(off <= allowed)  # so is what is no number

    def _half_gap(self, rounded: Tensor) -> Tensor:
        """How far at most what was rounded lies from it, float32."""
        kind = torch.finfo(self._cheap.dtype)
        return rounded.abs().clamp_min(kind.tiny) * (kind.eps / 2)

    def _rounded(self, values: Tensor) -> Tensor:
        """As the cheap type has them, float32."""
        return values.to(self._cheap.dtype).float()

    def _similarities(self, queries: Tensor, own: Tensor, start: int) -> Tensor:
        """Those to a tile, in the cheap type, (b, t); -inf for the query itself, and where the tile has no row."""
        number = start // self._tile
        tile = self._kept[number] if self._kept else self._cheap_tile(self._take(slice(start, start + self._tile)))
        with _summed_in_float32():
            similarities = torch.mm(queries, tile.T, out=self._space[: len(queries)])
        similarities[:, self._num_rows - start :] = -torch.inf
        place = (own - start).clamp(0, self._tile - 1)[:, None]
        is_own = place == (own - start)[:, None]
        return similarities.scatter_(1, place, similarities.gather(1, place).masked_fill_(is_own, -torch.inf))

    def _cheap_tile(self, rows: Tensor) -> Tensor:
        """In the cheap type, with zeros where the last tile has no row, (t, D)."""
        cheap = rows.to(self._cheap.dtype)
        return cheap if len(cheap) == self._tile else F.pad(cheap, (0, 0, 0, self._tile - len(cheap)))


@contextmanager
def _summed_in_float32() -> Iterator[None]:
    """A GPU may else sum up parts of a product in half precision."""
    matmul = torch.backends.cuda.matmul
    reduction = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction_split_k
    accumulation = matmul.allow_fp16_accumulation
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation = (False, reduction[1]), False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation = reduction, accumulation


def _tile_of(num_rows: int, width: int, most: int) -> int:
    """t: whole groups, and tiles of about the same size."""
    unit, most = _GROUP * _FOLD, min(most, most * 512 // width)
    return max(1, -(-num_rows // (-(-num_rows // most) * unit))) * unit


def _folded(groups: Tensor, k: int) -> Tensor:
    """The greatest of every few groups, so that fewer have to be sorted."""
    fold = next(fold for fold in (_FOLD, 4, 2, 1) if fold == 1 or groups.shape[1] // fold >= _SPARE * k)
    return groups.view(len(groups), fold, -1).amax(dim=1)


def _above(similarities: Tensor, groups: Tensor, threshold: Tensor, start: int, is_few: Tensor, most: int) -> Pairs:
    """The pairs of a tile that reach the threshold; a query that has more than ``most`` is marked and left out."""
    reach = groups >= threshold
    is_few &= reach.sum(dim=1) <= most  # each of them has one at least
    queries, group = (reach & is_few[:, None]).nonzero(as_tuple=True)
    members = similarities.view(*groups.shape[:1], _GROUP, -1)[queries, :, group]
    reach = members >= threshold[queries]
    is_few &= torch.zeros_like(is_few, dtype=torch.int64).index_add_(0, queries, reach.sum(dim=1)) <= most
    pair, place = (reach & is_few[queries, None]).nonzero(as_tuple=True)
    rows = start + place * groups.shape[1] + group[pair]
    return Pairs(queries[pair], rows, members[pair, place].float())


def _left(found: list[Pairs], threshold: Tensor, is_few: Tensor, most: int) -> Pairs:
    """Of all tiles' pairs those that reach the last threshold, by rising query; of none that has more than ``most``."""
    pairs = Pairs(*(torch.cat(values) for values in zip(*found, strict=True)))
    pairs = pairs.where(pairs.cheap >= threshold[pairs.queries, 0])
    is_few &= pairs.queries.bincount(minlength=len(is_few)) <= most
    pairs = pairs.where(is_few[pairs.queries])
    return pairs if len(found) == 1 else pairs.at(pairs.queries.argsort(stable=True))
