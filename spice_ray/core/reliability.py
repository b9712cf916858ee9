"""Reliable pseudo-labels: samples whose neighbours agree with them (paper III-C, eqs. 6-7), and how to balance them.

Shapes: N samples, Ns neighbours of each, K clusters.
"""

import torch
from torch import Tensor

from spice_ray.core.order import permutation

_ROWS_PER_BLOCK = 1 << 16


def consistency_ratio(labels: Tensor, neighbors: Tensor) -> Tensor:
    """Share of each sample's neighbours that have its label (eq. 6).

    Rows are taken in blocks, so that working memory does not grow with N.

    Args:
        labels: Cluster of each sample, int64, (N,).
        neighbors: Row numbers of its nearest neighbours, int64, (N, Ns), Ns >= 1.

    Returns:
        r in [0, 1], float64, (N,).

    Raises:
        ValueError: There is no neighbour to ask, or the two disagree about N.
    """
    return _num_agreeing(labels, neighbors).double() / neighbors.shape[1]


def reliable_samples(
    labels: Tensor, confidences: Tensor, neighbors: Tensor, *, min_consistency: float, min_confidence: float
) -> Tensor:
    """The samples whose label is reliable (eq. 7): more than tau_c of the neighbours agree, and the head is sure.

    Args:
        labels: Cluster of each sample, int64, (N,).
        confidences: The head's probability of that cluster, float, (N,).
        neighbors: Row numbers of its nearest neighbours, int64, (N, Ns).
        min_consistency: tau_c in [0, 1), exclusive.
        min_confidence: In [0, 1), exclusive and compared in the dtype of ``confidences``; 0 gates nothing.

    Returns:
        bool, (N,).

    Raises:
        ValueError: As in ``consistency_ratio``.
    """
    # Counts and not ratios: in float32 the ratio 99/100 is greater than 0.99.
    needed = min_consistency * neighbors.shape[1] + 1e-9
    consistent = _num_agreeing(labels, neighbors).double() > needed
    return consistent if min_confidence == 0 else consistent & (confidences > min_confidence)


def kept_per_cluster(labels: Tensor, reliable: Tensor, num_clusters: int) -> Tensor:
    """Number of reliable samples in each cluster.

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        reliable: bool, (N,).
        num_clusters: K.

    Returns:
        int64, (K,).
    """
    return torch.bincount(labels[reliable], minlength=num_clusters)


def equal_weights(reliable: Tensor) -> Tensor:
    """Weight 1 for each reliable sample and 0 for the others, float32, (N,)."""
    return reliable.float()


def cluster_weights(labels: Tensor, reliable: Tensor, num_clusters: int) -> Tensor:
    """Weights under which every cluster with reliable samples counts as much as any other.

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        reliable: bool, (N,).
        num_clusters: K.

    Returns:
        float32, (N,): num_reliable / (K' n_k) for the n_k reliable samples of cluster k, where K' clusters have any,
        and 0 for samples that are not reliable. The mean over the reliable ones is 1.
    """
    kept = kept_per_cluster(labels, reliable, num_clusters).double()
    num_filled = int((kept > 0).sum())
    # The clamps meet only clusters without reliable samples, whose weight no sample takes.
    per_cluster = kept.sum() / (max(1, num_filled) * kept.clamp(min=1))
    return torch.where(reliable, per_cluster[labels], 0.0).float()


def smallest_cluster_cut(labels: Tensor, reliable: Tensor, num_clusters: int, key: int) -> Tensor:
    """Weights that cut every cluster to as many reliable samples as the smallest one has.

    The smallest cluster that has any: the published code lets an empty cluster empty all the others.

    Args:
        labels: Cluster of each sample, int64 in 0..K-1, (N,).
        reliable: bool, (N,).
        num_clusters: K.
        key: A ``stream_key``; which samples stay depends on it alone.

    Returns:
        float32, (N,): 1 for the samples that stay and 0 for the others.
    """
    weights = torch.zeros(len(labels), device=labels.device)
    kept = kept_per_cluster(labels, reliable, num_clusters)
    if not kept.any():
        return weights
    smallest = int(kept[kept > 0].min())
    shuffled = torch.from_numpy(permutation(key, len(labels))).to(labels.device)
    shuffled = shuffled[reliable[shuffled]]
    for cluster in range(num_clusters):
        weights[shuffled[labels[shuffled] == cluster][:smallest]] = 1.0
    return weights


def _num_agreeing(labels: Tensor, neighbors: Tensor) -> Tensor:
    if neighbors.ndim != 2 or neighbors.shape[1] == 0 or neighbors.shape[0] != len(labels):
        raise ValueError(
            f"neighbours of shape {tuple(neighbors.shape)} for {len(labels)} labels; give each label at least one"
        )
    agreeing = torch.empty(len(labels), dtype=torch.int64, device=labels.device)
    for first in range(0, len(labels), _ROWS_PER_BLOCK):
        rows = slice(first, first + _ROWS_PER_BLOCK)
        agreeing[rows] = (labels[neighbors[rows]] == labels[rows, None]).sum(dim=1)
    return agreeing
