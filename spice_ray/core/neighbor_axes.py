"""Principal axes of embeddings, by the first few of which most pairs of rows are known not to be neighbours.

Embeddings have most of their length on few axes. Let y be a row's coordinates on d of them and r what is left of it:
by Cauchy and Schwarz the similarity of two rows is at most

    y_q . y_i + |r_q| |r_i|,

which is a product of d + 1 numbers and not of D.

Shapes: N rows, D embedding width, k neighbours, d axes, n rows of a chunk.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spice_ray.core.neighbor_rows import Floats

MOST_BOUNDED = 1 << 14
"""Rows of a query that the first bound may leave."""
MOST_NEIGHBORS = 1 << 9
"""k, at most."""
_SAMPLE = 1 << 13
"""Rows, at most, by which axes are chosen."""
TRIED = 64
"""Queries among them."""
_LOST = 2
"""Of ``TRIED`` bets: that with the second greatest margin is just won."""
_FEWEST_ROWS = 1 << 14
_ROWS_PER_WIDTH = 32
"""N / D, at least: else finding the axes costs more than they save."""
_WIDEST = 4096
"""D, at most, as finding axes takes memory for D x D numbers."""
_WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
_KEPT_BYTES = 256 << 20
"""Of all rows' coordinates."""

# What the steps cost, in multiply-adds of a float32 product, as it was measured on an AMD EPYC with AVX2.
_CHOOSING = 33.0
"""Per row: the pass over a query's bounds."""
_FETCHED = 35.0
"""Per coordinate of a row that is left, which is fetched by itself."""
_PER_ROW = 10.0
"""Coordinates that cost as much as handling a row that is left."""
_COMPARED = 60.0
"""Per coordinate of a row that is compared in float64."""
_PROJECTED = 4.0
"""Per coordinate and axis of a row, in float64: all rows are projected by each of the workers, of which two are taken
to share the queries."""
_ON_AXES = 2.4e6
"""Per query, whatever is left."""
_GAIN = 0.9
"""Of what comparing all rows costs, at most."""


class Projected(NamedTuple):
    """Rows on the axes."""

    first: Floats
    """Coordinates on the first axes and the length that is left beyond them, (n, d + 1)."""
    further: Floats
    """The same of the next axes."""


class Axes:
    """The first principal axes, and how many more tell those pairs apart that the first do not."""

    def __init__(self, vectors: Tensor, first: int, last: int) -> None:
        """Take the columns up to ``first``, and from there to ``last``.

        Args:
            vectors: Orthonormal columns, float64, (D, at least ``last``).
            first: d of the bound that is looked at first.
            last: d of the one that is looked at then; above ``first``.
        """
        self._vectors, self.first, self.width = vectors[:, :last].contiguous(), first, last

    def project(self, rows: Tensor) -> Projected:
        """The rows, float32, (n, D), on the axes."""
        exact = rows.double()
        coordinates = exact @ self._vectors
        length, squares = torch.linalg.vector_norm(exact, dim=1, keepdim=True).square(), coordinates.square()

        def with_rest(start: int, stop: int) -> Floats:
            # What float64 lost must not make a rest shorter, nor may rounding to float32.
            left = (length - squares[:, :stop].sum(1, keepdim=True)).clamp_min(0) + 1e-12 * length
            joined = torch.cat((coordinates[:, start:stop], left.sqrt() * (1 + 2.0**-20)), dim=1)
            return np.asarray(joined.float())

        return Projected(with_rest(0, self.first), with_rest(self.first, self.width))


def most_compared(k: int) -> int:
    """Rows of a query that may be compared exactly: where more are left, rows are too much alike for that to pay."""
    return 16 * (k + 16)


def may_have_axes(num_rows: int, width: int) -> bool:
    """Whether there are rows enough for finding axes to pay, and few enough axes to be found in little memory."""
    return width <= _WIDEST and num_rows >= max(_FEWEST_ROWS, _ROWS_PER_WIDTH * width)


def sample_of(num_rows: int) -> Tensor:
    """The numbers of rows by which axes are chosen, int64."""
    return torch.arange(0, num_rows, -(-num_rows // _SAMPLE))


def choose_axes(sample: Tensor, num_rows: int, k: int, cost_of_product: float) -> Axes | None:
    """The principal axes of a sample, as many as are expected to make the search the fastest.

    Args:
        sample: Rows that stand for all, float32, at least ``TRIED``, (n, D).
        num_rows: N.
        k: Neighbours per row.
        cost_of_product: Of comparing all rows, per number, in multiply-adds of a float32 product.

    Returns:
        None where comparing all rows is about as fast.
    """
    width = sample.shape[1]
    vectors = torch.linalg.eigh((sample.T @ sample).double()).eigenvectors.flip(1)
    widths = [one for one in _WIDTHS if one < width and num_rows * (one + 2) * 4 <= _KEPT_BYTES]
    most = _GAIN * (num_rows * (cost_of_product * width + _CHOOSING) + k * _COMPARED * width)
    chosen = None
    for (first, last), left in _rows_left(sample, vectors, widths, max(1, round(k * len(sample) / num_rows))).items():
        bounded, compared = (max(k, share * num_rows) for share in left)
        # By a quarter, as this is their mean.
        if bounded > MOST_BOUNDED / 4 or compared > most_compared(k) / 4:
            continue
        cost = _ON_AXES + num_rows * (first + 1 + _CHOOSING) + _PROJECTED * width * last
        cost += bounded * _FETCHED * (last - first + _PER_ROW) + compared * _COMPARED * width
        if cost < most:
            most, chosen = cost, (first, last)
    return None if chosen is None else Axes(vectors, *chosen)


def _rows_left(
    sample: Tensor, vectors: Tensor, widths: list[int], rank: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """The shares of rows that reach the bets on the similarity of a rank, on so many axes first, and then."""
    queries = slice(None, None, len(sample) // TRIED)
    nearest = (sample[queries] @ sample.T).topk(rank + 1, dim=1).values[:, -1:]  # itself too
    coordinates = sample @ vectors.float()
    rests = (sample.square().sum(1, keepdim=True) - coordinates.square().cumsum(1)).clamp_min_(0).sqrt_()
    bounds, bets = dict[int, Tensor](), dict[int, Tensor]()
    for width in widths:
        rest = rests[:, width - 1]
        bounds[width] = coordinates[queries, :width] @ coordinates[:, :width].T + rest[queries][:, None] * rest
        highest = bounds[width].topk(rank + 1, dim=1).values[:, -1:]
        bets[width] = highest - margin_of(highest - nearest, rest[queries][:, None]) * rest[queries][:, None]
    return {
        (first, last): (_share(bounds[first] >= bets[first]), _share(bounds[last] >= bets[first]))
        for first in widths
        for last in widths
        if first < last
    }


def margin_of(over: Tensor, rests: Tensor) -> float:
    """By how much of its rest a query's k-th bound is above its k-th similarity, but for few.

    Args:
        over: By how much it is above, of each of a few queries.
        rests: Of these, of the same shape.
    """
    # Rows of length 0 have no rest, and tell nothing. Folding may have made a k-th bound too low.
    margins = (over / rests)[rests > 0].clamp_min(0).sort().values
    return float(margins[-_LOST]) if len(margins) >= _LOST else 0.0


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())
