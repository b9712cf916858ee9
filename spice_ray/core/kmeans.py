"""K-means as a clustering head: what heads on embeddings that were given start from, and are measured against.

Shapes: n rows, D embedding width, K clusters. scikit-learn is imported where it is used: it takes seconds.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_ray.core.heads import ClusterHead


class KMeansHead(NamedTuple):
    """Clusters of k-means from one start."""

    head: ClusterHead
    """Its most probable cluster is the one with the nearest centre."""
    inertia: float
    """Sum of the squared distances from the rows to these."""


def kmeans_head(rows: NDArray[np.float32], num_clusters: int, seed: int, *, scale: float) -> KMeansHead:
    """One run of k-means from k-means++ centres (Arthur and Vassilvitskii, 2007).

    The head's probabilities are the posterior of equally frequent round Gaussians about the centres, whose variance is
    that of the rows about them: log p(k | x) = (c_k x - |c_k|^2 / 2) / variance + constant, which is linear in x.

    Args:
        rows: Unit rows, (n, D), n >= K.
        num_clusters: K.
        seed: Of the first centres, in 0..2^32-1.
        scale: The head takes unit rows times this.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # Several threads sum in another order each time, and a run that goes on must find the same centres.
    with threadpool_limits(1):
        found = KMeans(num_clusters, n_init=1, random_state=seed).fit(rows)
    variance = max(found.inertia_ / rows.size, float(np.finfo(np.float32).eps))
    centres = torch.from_numpy(found.cluster_centers_.astype(np.float64))
    bias = -(centres**2).sum(dim=1) / (2 * variance)
    return KMeansHead(linear_head(centres / (scale * variance), bias, bound=scale), float(found.inertia_))


def linear_head(weight: Tensor, bias: Tensor, *, bound: float) -> ClusterHead:
    """The head whose logits are ``weight`` x + ``bias``, for rows x none of whose values lies below ``-bound``.

    Args:
        weight: (K, D).
        bias: (K,).
        bound: At least 0.
    """
    num_clusters, width = weight.shape
    head = ClusterHead(width, num_clusters, 0)
    # Raised by the bound, no value is cut off by the ReLU between the layers.
    values = (torch.eye(width), torch.full((width,), bound), weight, bias - bound * weight.sum(dim=1))
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), values, strict=True):
            parameter.copy_(value)
    return head
