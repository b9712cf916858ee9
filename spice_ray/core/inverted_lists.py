"""Approximate nearest neighbours by inverted lists (faiss), where there are more rows than can all be compared.

Rows are dealt to the nearest of some centres, and a row is compared with those of the lists whose centres are nearest.
Some neighbours are missed; how many is measured on a sample, by which the number of lists is chosen.

Shapes: N rows, D embedding width, k neighbours, S sampled rows.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.neighbor_keys import keys_of, row_numbers_of, similarities_of
from spice_ray.core.neighbor_rows import Rows, on_grid, take_rows
from spice_ray.core.neighbors import best_of_all
from spice_ray.core.order import permutation

RECALL = 0.99
"""Share of the neighbours that must be found on the sample."""
SAMPLED = 1000
"""S."""
_ROWS_PER_CENTRE = 39
"""faiss asks for so many at least, and learns from 256 at most."""
_ROWS_AT_ONCE = 1 << 16
_SPARE = 8
"""Candidates beyond k, for those that are nearly alike."""
_TILE = 1024
_CANDIDATES = 1 << 13
"""Of a block of queries: they are gathered in float64."""


class Recall(NamedTuple):
    """What a number of probed lists finds."""

    probes: int
    """Lists that each row is compared with."""
    share: float
    """Of the sampled rows' true neighbours."""
    rows: int
    """How many were sampled."""


def build_lists(rows: Rows, key: int) -> Any:
    """An index of about 4 sqrt(N) lists; it holds all rows, 4 N D bytes, and a fifth of a percent more.

    Args:
        rows: Unit rows, float, (N, D).
        key: A ``stream_key`` that the centres depend on.
    """
    import faiss

    num_rows, width = rows.shape
    count = max(1, min(round(4 * math.sqrt(num_rows)), num_rows // _ROWS_PER_CENTRE))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, count, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = key % (1 << 31)
    chosen = torch.from_numpy(np.sort(permutation(key, num_rows)[: 256 * count]))
    index.train(take_rows(rows, chosen).float().numpy())
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        index.add(take_rows(rows, slice(start, start + _ROWS_AT_ONCE)).float().numpy())
    return index


def choose_probes(index: Any, rows: Rows, k: int, key: int) -> Recall:
    """The least power of two of lists whose recall is enough, or all lists.

    Args:
        index: What ``build_lists`` gave.
        rows: The same rows.
        k: Neighbours of each.
        key: A ``stream_key`` that the sample depends on.
    """
    sampled = torch.from_numpy(np.sort(permutation(key, len(rows))[:SAMPLED]))
    queries = on_grid(take_rows(rows, sampled))
    keys = best_of_all(queries, sampled, lambda tile: on_grid(take_rows(rows, tile)), len(rows), k, _TILE)
    last = similarities_of(keys[:, -1:])
    probes = 1
    while True:
        probes = min(probes, index.nlist)
        _, similarities = ListSearch(index, rows, k, probes).find_rows(sampled)
        # One that is as near as the last of the true ones is as good.
        share = float((similarities >= last).double().mean())
        if share >= RECALL or probes == index.nlist:
            return Recall(probes, share, len(sampled))
        probes *= 2


class ListSearch:
    """Looks for the k nearest other rows among those of some lists."""

    def __init__(self, index: Any, rows: Rows, k: int, probes: int) -> None:
        """Take what ``build_lists`` made of ``rows``, and look into ``probes`` of its lists."""
        self._index, self._rows, self._k, self._probes = index, rows, k, probes

    def find(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What was found for the rows from ``start`` to ``stop``, as ``NeighborSearch.find`` gives it."""
        return self.find_rows(torch.arange(start, stop))

    def find_rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The same for rows by number, int64, (n,)."""
        parts = [self._find(part) for part in numbers.split(max(1, _CANDIDATES // self._k))]
        indices, similarities = (torch.cat(part) for part in zip(*parts, strict=True))
        return indices, similarities

    def _find(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        queries = take_rows(self._rows, numbers).float()
        found = self._search(queries.numpy(), self._probes)
        short = (found < 0).any(axis=1)
        if short.any():  # too few rows in those lists
            found[short] = self._search(queries.numpy()[short], self._index.nlist)
        candidates = torch.from_numpy(found)
        rows = take_rows(self._rows, candidates.flatten()).view(*candidates.shape, -1)
        # Compared exactly and in the exact order, so that what is found does not depend on how faiss sums up.
        similarities = torch.bmm(on_grid(rows), on_grid(queries)[:, :, None])[:, :, 0].float().add_(0.0)
        similarities[candidates == numbers[:, None]] = -torch.inf
        keys = keys_of(similarities, candidates).topk(self._k, dim=1).values
        return row_numbers_of(keys), similarities_of(keys)

    def _search(self, queries: NDArray[np.float32], probes: int) -> NDArray[np.int64]:
        """Some more than k, as a row finds itself and faiss rounds; -1 where there are not so many."""
        import faiss

        params, wanted = faiss.SearchParametersIVF(), min(self._k + 1 + _SPARE, len(self._rows))
        params.nprobe = probes
        found: NDArray[np.int64] = self._index.search(queries, wanted, params=params)[1]
        return found
