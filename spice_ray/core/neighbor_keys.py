"""Keys of pairs of rows: a similarity and a row number in one int64, so that the best pairs have no ties.

Shapes: b rows of a query block, k neighbours, t rows of a bank tile, P pairs.
"""

import torch
from torch import Tensor

_LOW_32_BITS = (1 << 32) - 1
_LOWEST_KEY = -0x7F800001 << 32
"""The key of similarity -inf, below that of any pair."""


def no_keys(queries: int, k: int, device: torch.device | None = None) -> Tensor:
    """Keys that any other is greater than, int64, (b, k)."""
    return torch.full((queries, k), _LOWEST_KEY, dtype=torch.int64, device=device)


def merge_tile(best: Tensor, similarities: Tensor, rows: Tensor) -> Tensor:
    """The greatest of the keys found so far and those of a tile, falling, int64, (b, k).

    Args:
        best: int64, (b, k); keys of rows below those of the tile.
        similarities: float32, (b, t).
        rows: Row numbers of the tile, int64, (t,).
    """
    # Tiles come by rising row number, so a newcomer that only equals the k-th loses to it, and few have to be sorted.
    enters = similarities > similarities_of(best[:, -1:])
    queries, columns = enters.nonzero(as_tuple=True)
    return merge_pairs(best, queries, keys_of(similarities[queries, columns], rows[columns]))


def merge_pairs(best: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The greatest of the keys found so far and those of some pairs, falling, int64, (b, k).

    Args:
        best: int64, (b, k).
        queries: Which row of ``best`` a pair belongs to, rising, int64, (P,).
        keys: Of the pairs, int64, (P,).
    """
    num_new = queries.bincount(minlength=len(best))
    place = torch.arange(len(queries), device=best.device) - (num_new.cumsum(0) - num_new)[queries]
    width = best.shape[1] + int(num_new.max())
    merged = no_keys(len(best), width, best.device)
    merged[:, : best.shape[1]] = best
    merged[queries, best.shape[1] + place] = keys
    return merged.topk(best.shape[1], dim=1).values


def keys_of(similarities: Tensor, rows: Tensor) -> Tensor:
    """One int64 per pair that no two pairs of a query share, so that topk has no tie to break by chance.

    The upper half orders as the similarity does; the lower half falls as the row number rises.

    Args:
        similarities: float32, none of them -0.0, (P,).
        rows: Row numbers, int64, (P,).
    """
    return (_flip_negative(similarities.view(torch.int32)).long() << 32) | (_LOW_32_BITS - rows)


def row_numbers_of(keys: Tensor) -> Tensor:
    """Row numbers, int64."""
    return _LOW_32_BITS - (keys & _LOW_32_BITS)


def similarities_of(keys: Tensor) -> Tensor:
    """Similarities, float32."""
    return _flip_negative((keys >> 32).int()).view(torch.float32)


def _flip_negative(bits: Tensor) -> Tensor:
    # The bits of floats order as integers do, once those of the negative ones are flipped; its own inverse.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
