"""The number of clusters K, proposed without labels from the frozen embedding. SPICE itself is given K.

The score of a candidate is the product of two signs that err in different ways:

- the eigengap of the graph of nearest neighbours (von Luxburg, 2007): as many eigenvalues of its normalised Laplacian
  are near zero as there are parts that hardly touch, so the next one lies apart. It finds the finest parts; where
  clusters merge into one another, the largest gap may be one far up the spectrum, by chance.
- the mean silhouette (Rousseeuw, 1987) of Ward's clusters by cosine: how much nearer a row is to its own cluster than
  to the next. It is high for coarse clusters, and falls where K is far too large.

Shapes: n rows, D embedding width. SciPy is imported where it is used: it takes a while.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spice_ray.core.neighbors import exact_neighbors
from spice_ray.core.order import permutation, stream_key, uniform

MOST_ROWS = 5000
"""Rows that K is judged by. Ward's method holds the distance of every pair twice, 200 MB."""
_NEIGHBORS = 15
_MOST_DENSE = 500
_ROUNDING = 1e-12

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Candidate(NamedTuple):
    """A number of clusters and what speaks for it."""

    num_clusters: int
    score: float
    """``eigengap`` times ``silhouette``, and 0 where the latter is negative."""
    eigengap: float
    """Eigenvalue K + 1 of the normalised Laplacian less eigenvalue K, in [0, 2]."""
    silhouette: float
    """Mean over all rows, in [-1, 1]."""


def sample_ids(ids: Ints, seed: int) -> Ints:
    """At most ``MOST_ROWS`` of the ``ids``, int64, in their order."""
    return ids[np.sort(permutation(stream_key(seed, "cluster_count"), len(ids))[:MOST_ROWS])]


def score_counts(embeddings: NDArray[np.float32], least: int, most: int) -> list[Candidate]:
    """The candidates for K by rising K.

    Args:
        embeddings: Unit rows, (n, D), n >= 2; time and memory grow with n * n, so give at most ``MOST_ROWS``.
        least: The first candidate, 2 or more.
        most: The last one, unless there are too few rows for so many; ``least`` is always among the candidates.
    """
    from scipy.cluster.hierarchy import linkage

    rows = np.asarray(embeddings, np.float64)
    counts = range(least, max(least, min(most, len(rows) - 1)) + 1)
    spectrum = laplacian_spectrum(embeddings, counts[-1] + 1)
    tree = linkage(rows, "ward")
    return [_candidate(count, spectrum, rows, tree) for count in counts]


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates by falling score; of equals, the fewer clusters first."""
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.num_clusters))


def _candidate(count: int, spectrum: Floats, rows: Floats, tree: Floats) -> Candidate:
    from scipy.cluster.hierarchy import fcluster

    gap = float(spectrum[count] - spectrum[count - 1]) if count < len(spectrum) else 0.0
    silhouette = mean_silhouette(rows, fcluster(tree, count, "maxclust").astype(np.int64) - 1)
    return Candidate(count, gap * max(0.0, silhouette), gap, silhouette)


def mean_silhouette(rows: Floats, labels: Ints) -> float:
    """The mean silhouette by cosine distance, of which sums over a cluster are enough: O(n K D) and not O(n n D).

    Args:
        rows: Unit rows, (n, D).
        labels: Their clusters, 0..K-1, none empty, (n,).

    Returns:
        0 where there is but one cluster; a row that is alone in its cluster counts 0.
    """
    sizes = np.bincount(labels)
    if len(sizes) < 2:
        return 0.0
    sums = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(sums, labels, rows)
    own = np.arange(len(rows)), labels
    similarity = rows @ sums.T  # to all rows of a cluster together, (n, K)
    to_own = 1 - (similarity[own] - (rows**2).sum(axis=1)) / np.maximum(sizes[labels] - 1, 1)
    to_others = 1 - similarity / sizes
    to_others[own] = np.inf
    to_next = to_others.min(axis=1)
    larger = np.maximum(to_own, to_next)
    # Between equal rows there is nothing but rounding.
    is_known = (sizes[labels] > 1) & (larger > _ROUNDING)
    return float(np.where(is_known, (to_next - to_own) / np.where(is_known, larger, 1), 0).mean())


def laplacian_spectrum(embeddings: NDArray[np.float32], count: int) -> Floats:
    """The least eigenvalues of the normalised Laplacian of the symmetric graph of nearest neighbours, rising.

    Args:
        embeddings: Unit rows, (n, D), n >= 2.
        count: How many; there are never more than n.
    """
    from scipy.sparse.csgraph import connected_components

    graph = neighbor_graph(embeddings, _NEIGHBORS)
    num_parts, part_of = connected_components(graph, directed=False)
    # One part at a time: all of them have the eigenvalue 0, and Lanczos finds equal eigenvalues only by rounding.
    parts = [np.flatnonzero(part_of == part) for part in range(num_parts)]
    found = [_least_eigenvalues(graph[part][:, part], count) for part in parts]
    return np.sort(np.concatenate(found))[:count]


def neighbor_graph(embeddings: NDArray[np.float32], num_neighbors: int) -> Any:
    """Which rows are neighbours, as a sparse array of weights, (n, n): 2 where each is the other's, 1 where one is.

    Args:
        embeddings: Unit rows, (n, D), n >= 2.
        num_neighbors: Of each row; all others where these are fewer.
    """
    from scipy.sparse import csr_array

    num_rows, k = len(embeddings), min(num_neighbors, len(embeddings) - 1)
    neighbors, _ = exact_neighbors(embeddings, k)
    starts = np.arange(0, num_rows * k + 1, k)
    one_way = csr_array((np.ones(num_rows * k), neighbors.numpy().ravel(), starts), shape=(num_rows, num_rows))
    return (one_way + one_way.T).tocsr()


def _least_eigenvalues(graph: Any, count: int) -> Floats:
    """Of a connected graph; as many as it has, where these are fewer than ``count``."""
    from scipy.sparse import diags_array
    from scipy.sparse.linalg import eigsh

    num_rows = graph.shape[0]
    scale = diags_array(1 / np.sqrt(graph.sum(axis=1)))
    adjacency = scale @ graph @ scale
    if num_rows <= max(_MOST_DENSE, 2 * count):
        return np.sort(1 - np.linalg.eigvalsh(adjacency.toarray()))[:count]
    start = uniform(stream_key("lanczos"), torch.arange(num_rows)).numpy().ravel().astype(np.float64)
    return np.sort(1 - eigsh(adjacency, count, which="LA", v0=start, tol=1e-6, return_eigenvectors=False))
