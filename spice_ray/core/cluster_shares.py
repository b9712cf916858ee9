"""How large K clusters are, estimated without labels from the frozen embedding. SPICE takes them to be equal.

Spectral clustering of the graph of nearest neighbours: clusters of any size and form are found as long as few links
leave them, where k-means would cut a large one and join small ones. Weak links between all rows (Amini, Chen, Bickel
and Levina, 2013) keep the graph in one part, so that a handful of rows without a link to the others is no cluster by
that alone. The eigenvectors are read by pivoted QR (Damle, Minden and Ying, 2019), which has no start to draw.

Shapes: n rows, m of them different, D embedding width. SciPy is imported where it is used: it takes a while.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spice_ray.core.cluster_count import neighbor_graph
from spice_ray.core.order import stream_key, uniform

_NEIGHBORS = 10
_WEAK_LINKS = 0.1
"""Weight of a row's weak links, all together, as a part of the mean weight of its others."""
_MOST_DENSE = 500
_ROWS_PER_VECTOR = 8
"""Below so many rows for each eigenvector that is wanted a dense solver is faster."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def estimate_sizes(embeddings: NDArray[np.float32], num_clusters: int) -> Ints:
    """How many of the rows each cluster has, the largest first.

    The order of the rows does not matter. Equal rows are in one cluster. Where no more than K rows differ, each of them
    is a cluster.

    Args:
        embeddings: Unit rows, (n, D); time and memory grow with n * n, so give at most some thousands.
        num_clusters: K.

    Returns:
        int64, (K,), each at least 1: also of a cluster that has no row, so that the sum may be above n.

    Raises:
        ValueError: A value is not finite.
    """
    rows, counts = np.unique(embeddings, axis=0, return_counts=True)
    if len(rows) <= num_clusters:
        sizes = np.pad(counts, (0, num_clusters - len(rows)))
    else:
        labels = spectral_labels(neighbor_graph(rows, _NEIGHBORS), num_clusters)
        sizes = np.bincount(labels, weights=counts, minlength=num_clusters)
    return np.maximum(np.sort(sizes.astype(np.int64))[::-1], 1)


def spectral_labels(graph: Any, num_clusters: int) -> Ints:
    """The cluster of each node of a graph, int64 in 0..K-1, (m,); one may stay empty.

    Args:
        graph: Symmetric sparse weights, (m, m), with a link at every node.
        num_clusters: K, below m.
    """
    from scipy.linalg import qr, svd

    degrees = graph.sum(axis=1)
    weak = _WEAK_LINKS * degrees.mean()
    scale = 1 / np.sqrt(degrees + weak)
    vectors = scale[:, None] * _leading_vectors(graph, weak / len(degrees), scale, num_clusters)
    # The K rows that are farthest from each other's span stand for the clusters; the rotation takes them to the axes.
    _, pivots = qr(vectors.T, mode="r", pivoting=True)
    left, _, right = svd(vectors[pivots[:num_clusters]].T, full_matrices=False)
    return np.asarray(np.abs(vectors @ (left @ right)).argmax(axis=1), np.int64)


def _leading_vectors(graph: Any, weak: float, scale: Floats, count: int) -> Floats:
    """Eigenvectors of the largest eigenvalues of the normalised graph with ``weak`` added to every weight, (m, K)."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import LinearOperator, eigsh

    num_rows = len(scale)
    if num_rows <= max(_MOST_DENSE, _ROWS_PER_VECTOR * count):
        dense = scale[:, None] * (graph.toarray() + weak) * scale
        return np.asarray(eigh(dense, subset_by_index=(num_rows - count, num_rows - 1))[1])

    def product(vector: Floats) -> Floats:
        scaled = scale * vector.ravel()
        return np.asarray(scale * (graph @ scaled + weak * scaled.sum()))

    start = uniform(stream_key("lanczos"), torch.arange(num_rows)).numpy().ravel().astype(np.float64)
    operator = LinearOperator((num_rows, num_rows), matvec=product, dtype=np.float64)
    return np.asarray(eigsh(operator, count, which="LA", v0=start, tol=1e-8)[1])
