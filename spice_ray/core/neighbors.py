"""Exact nearest neighbours by cosine (paper III-C), in memory that the block bounds and not the number of images.

The answer is the same for any block, any split of the rows over workers, and on CPU and GPU: rows are rounded to
multiples of 2^-26, so that in float64 every product and every partial sum of unit rows is exact (a multiple of 2^-52,
below 2), and no order of summation can matter. Images with equal embeddings are therefore exactly equally similar.

Shapes: N rows, D embedding width, k neighbours, b rows of a query block, t rows of a bank tile.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = Tensor | NDArray[Any]

_SCALE = float(1 << 26)
_LOW_32_BITS = (1 << 32) - 1
_LOWEST_KEY = -0x7F800001 << 32
"""The key of similarity -inf, below that of any pair."""


def exact_neighbors(
    embeddings: Rows, k: int, *, block: int = 1024, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of every row by cosine.

    Args:
        embeddings: Unit rows, float, (N, D); may be a memory-mapped array.
        k: Neighbours per row, in 1..N-1.
        block: Rows of a query block and of the tiles that it meets one by one. Working memory is at most about
            ``block`` * (100 * ``block`` + 40 * D + 40 * k) bytes whatever N is; there is never an N x N array.
        device: Where to compute; none: where the embeddings are. Rows come to it tile by tile, so put a tensor there
            beforehand if it fits.

    Returns:
        Row numbers, int64, (N, k), and similarities, float32, (N, k), both on the CPU. Each row is ordered by falling
        similarity (as float32) and equal ones by rising row number; the row itself is left out.

    Raises:
        ValueError: ``k`` is not in 1..N-1, ``block`` is below 1, or a value is not finite.
    """
    return neighbors_of_rows(embeddings, 0, len(embeddings), k, block=block, device=device)


def neighbors_of_rows(
    embeddings: Rows, start: int, stop: int, k: int, *, block: int = 1024, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Rows ``start`` to ``stop`` of what ``exact_neighbors`` returns, bit for bit: one worker's share.

    Args:
        embeddings: All unit rows, float, (N, D).
        start: First row asked for.
        stop: One past the last row asked for.
        k: Neighbours per row, in 1..N-1.
        block: As in ``exact_neighbors``.
        device: As in ``exact_neighbors``.

    Returns:
        Row numbers, int64, and similarities, float32, both (stop - start, k), on the CPU.

    Raises:
        ValueError: As in ``exact_neighbors``, or ``start`` and ``stop`` are no range within 0..N.
    """
    _check_request(len(embeddings), start, stop, k, block)
    _check_finite(embeddings, block)
    indices = torch.empty((stop - start, k), dtype=torch.int64)
    similarities = torch.empty((stop - start, k), dtype=torch.float32)
    for first in range(start, stop, block):
        last = min(first + block, stop)
        keys = _best_keys(embeddings, first, last, k, block, device)
        found = slice(first - start, last - start)
        indices[found], similarities[found] = _row_numbers(keys), _similarities(keys)
    return indices, similarities


def _check_request(num_rows: int, start: int, stop: int, k: int, block: int) -> None:
    if not 1 <= k < num_rows:
        raise ValueError(f"k={k} neighbours of {num_rows} rows; k must be at least 1 and below the number of rows")
    if not 0 <= start <= stop <= num_rows:
        raise ValueError(f"rows {start} to {stop} of {num_rows}; the range must lie within the rows")
    if block < 1:
        raise ValueError(f"block={block} rows; a block needs at least 1")


def _check_finite(embeddings: Rows, step: int) -> None:
    for first in range(0, len(embeddings), step):
        finite = torch.isfinite(_slice(embeddings, first, first + step)).all(dim=1)
        if not finite.all():
            row = first + int((~finite).nonzero()[0, 0])
            raise ValueError(f"row {row} of the embeddings is not finite; neighbours need finite unit rows")


def _slice(embeddings: Rows, first: int, last: int) -> Tensor:
    rows = embeddings[first:last]
    # The copy is for memory maps that cannot be written, which torch does not take.
    return rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def _exact_rows(embeddings: Rows, first: int, last: int, device: torch.device | None) -> Tensor:
    rows = _slice(embeddings, first, last).to(device=device)
    return (rows.double() * _SCALE).round_().div_(_SCALE)


def _best_keys(embeddings: Rows, first: int, last: int, k: int, block: int, device: torch.device | None) -> Tensor:
    """The k greatest keys of each row from ``first`` to ``last``, falling, (b, k)."""
    queries = _exact_rows(embeddings, first, last, device)
    best = torch.full((last - first, k), _LOWEST_KEY, dtype=torch.int64, device=queries.device)
    own = torch.arange(first, last, device=queries.device)
    for tile_first in range(0, len(embeddings), block):
        bank = _exact_rows(embeddings, tile_first, tile_first + block, device)
        # Adding zero gives -0.0 the bits of 0.0.
        similarities = (queries @ bank.T).float().add_(0.0)
        rows = torch.arange(tile_first, tile_first + len(bank), device=queries.device)
        similarities[rows == own[:, None]] = -torch.inf
        best = _merge(best, similarities, rows)
    return best


def _merge(best: Tensor, similarities: Tensor, rows: Tensor) -> Tensor:
    """The k greatest of the keys found so far, (b, k), and those of a tile with ``rows``, (b, t)."""
    # Tiles come by rising row number, so a newcomer that only equals the k-th loses to it, and few have to be sorted.
    enters = similarities > _similarities(best[:, -1:])
    queries, columns = enters.nonzero(as_tuple=True)
    num_new = enters.sum(dim=1)
    place = torch.arange(len(queries), device=best.device) - (num_new.cumsum(0) - num_new)[queries]
    width = best.shape[1] + int(num_new.max())
    keys = torch.full((len(best), width), _LOWEST_KEY, dtype=torch.int64, device=best.device)
    keys[:, : best.shape[1]] = best
    keys[queries, best.shape[1] + place] = _keys(similarities[queries, columns], rows[columns])
    return keys.topk(best.shape[1], dim=1).values


def _keys(similarities: Tensor, rows: Tensor) -> Tensor:
    """One int64 per pair that no two pairs of a query share, so that topk has no tie to break by chance.

    The upper half orders as the similarity does; the lower half falls as the row number rises.
    """
    return (_flip_negative(similarities.view(torch.int32)).long() << 32) | (_LOW_32_BITS - rows)


def _row_numbers(keys: Tensor) -> Tensor:
    return _LOW_32_BITS - (keys & _LOW_32_BITS)


def _similarities(keys: Tensor) -> Tensor:
    return _flip_negative((keys >> 32).int()).view(torch.float32)


def _flip_negative(bits: Tensor) -> Tensor:
    # The bits of floats order as integers do, once those of the negative ones are flipped; its own inverse.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
