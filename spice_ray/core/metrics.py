"""How well clusters match classes, and k-means, which they are compared with.

Shapes: n images, D feature width. SciPy and scikit-learn are imported where they are used: they take seconds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST_FULL_KMEANS = 2e7  # values

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """How well clusters match classes; all but ``n`` and ``k`` are 1 for a perfect match."""

    acc: float
    """Share of images whose cluster is matched to their class, one class per cluster (Hungarian)."""
    nmi: float
    """Normalised mutual information, arithmetic mean of the entropies."""
    nmi_geometric: float
    """The same by the geometric mean, as SPICE's code has it."""
    ari: float
    """Adjusted Rand index."""
    n: int
    """Images scored."""
    k: int
    """Clusters that have an image among those scored."""
    many_to_one: float
    """Share of images that belong to the commonest class of their cluster."""


def clustering_accuracy(labels_true: Ints, labels_pred: Ints) -> float:
    """Accuracy under the best matching of clusters to classes, each used at most once (Hungarian).

    Args:
        labels_true: Class of each image, (n,).
        labels_pred: Cluster of each image, (n,); there may be more or fewer clusters than classes.

    Returns:
        Share of images in [0, 1] whose cluster is matched to their class.

    Raises:
        ValueError: The shapes differ, or there is no image.
    """
    from scipy.optimize import linear_sum_assignment

    counts = _counts(labels_true, labels_pred)
    classes, clusters = linear_sum_assignment(counts, maximize=True)
    return float(counts[classes, clusters].sum() / counts.sum())


def many_to_one_accuracy(labels_true: Ints, labels_pred: Ints) -> float:
    """Accuracy when each cluster stands for its commonest class; otherwise as ``clustering_accuracy``."""
    counts = _counts(labels_true, labels_pred)
    return float(counts.max(axis=0).sum() / counts.sum())


def scores(labels_true: Ints, labels_pred: Ints) -> Scores:
    """Every score of one clustering; arguments and errors are those of ``clustering_accuracy``."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return Scores(
        acc=clustering_accuracy(labels_true, labels_pred),
        nmi=float(normalized_mutual_info_score(labels_true, labels_pred, average_method="arithmetic")),
        nmi_geometric=float(normalized_mutual_info_score(labels_true, labels_pred, average_method="geometric")),
        ari=float(adjusted_rand_score(labels_true, labels_pred)),
        n=len(labels_true),
        k=len(np.unique(labels_pred)),
        many_to_one=many_to_one_accuracy(labels_true, labels_pred),
    )


def kmeans_labels(features: NDArray[Any], k: int, seed: int) -> Ints:
    """Clusters of k-means: the best of 10 starts; in mini-batches where there are more than 2e7 values.

    Args:
        features: (n, D), n >= k.
        k: Number of clusters.
        seed: Of the starts, in 0..2^32-1.

    Returns:
        int64 in 0..k-1, (n,).
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    method = KMeans if features.size <= _LARGEST_FULL_KMEANS else MiniBatchKMeans
    return np.asarray(method(n_clusters=k, n_init=10, random_state=seed).fit_predict(features), np.int64)


def _counts(labels_true: Ints, labels_pred: Ints) -> Ints:
    from sklearn.metrics.cluster import contingency_matrix

    if np.ndim(labels_true) != 1 or np.shape(labels_true) != np.shape(labels_pred) or len(labels_true) == 0:
        shapes = f"{np.shape(labels_true)} and {np.shape(labels_pred)}"
        raise ValueError(f"classes and clusters have shapes {shapes}; give both for the same images, at least one")
    return np.asarray(contingency_matrix(labels_true, labels_pred), np.int64)
