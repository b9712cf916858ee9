"""How well clusters fit the graph of nearest neighbours: a sign without labels that is fair to any method.

Heads are trained to have a low unsupervised loss and k-means is not, so that this loss cannot choose between them.

Shapes: n rows, k neighbours of each.
"""

import math

import numpy as np
from numpy.typing import NDArray

_STANDARD_ERRORS = 2

Ints = NDArray[np.int64]


def modularity(labels: Ints, neighbors: Ints) -> float:
    """Share of neighbours in one cluster, less what chance would give (Newman, 2004, eq. 5), in [-1, 1).

    The second part is what an agreement alone lacks: to put all rows into one cluster gains nothing.

    Args:
        labels: Cluster of each row, int64, at least 0, (n,).
        neighbors: Row numbers of its nearest neighbours, int64, (n, k).
    """
    # An edge has two ends: a row's own, k times, and those at its neighbours.
    ends = np.bincount(np.concatenate([np.repeat(labels, neighbors.shape[1]), labels[neighbors].ravel()]))
    return float(_agreement(labels, neighbors).mean() - ((ends / ends.sum()) ** 2).sum())


def fits_better(labels: Ints, rival: Ints, neighbors: Ints) -> bool:
    """Whether clusters have a larger modularity than others, by more than two standard errors of the difference.

    Args:
        labels: Cluster of each row, int64, at least 0, (n,).
        rival: The same, of the others.
        neighbors: As in :func:`modularity`.
    """
    gain = modularity(labels, neighbors) - modularity(rival, neighbors)
    of_rows = _agreement(labels, neighbors) - _agreement(rival, neighbors)
    return gain > _STANDARD_ERRORS * float(of_rows.std()) / math.sqrt(len(labels))


def _agreement(labels: Ints, neighbors: Ints) -> NDArray[np.float64]:
    """Share of each row's neighbours that have its cluster, (n,)."""
    found: NDArray[np.float64] = (labels[neighbors] == labels[:, None]).mean(axis=1)
    return found
