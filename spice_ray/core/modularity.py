"""How well clusters fit the graph of nearest neighbours: a sign without labels that is fair to any method.

Heads are trained to have a low unsupervised loss and k-means is not, so that this loss cannot choose between them.

Shapes: n rows, k neighbours of each.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def modularity(labels: Ints, neighbors: Ints) -> float:
    """Share of neighbours in one cluster, less what chance would give (Newman, 2004, eq. 5), in [-1, 1).

    The second part is what an agreement alone lacks: to put all rows into one cluster gains nothing.

    Args:
        labels: Cluster of each row, int64, at least 0, (n,).
        neighbors: Row numbers of its nearest neighbours, int64, (n, k).
    """
    agreeing = float((labels[neighbors] == labels[:, None]).mean())
    # An edge has two ends: a row's own, k times, and those at its neighbours.
    ends = np.bincount(np.concatenate([np.repeat(labels, neighbors.shape[1]), labels[neighbors].ravel()]))
    return agreeing - float(((ends / ends.sum()) ** 2).sum())
